"""Batches with far fewer samples than classes: the determinant is of the classes that occur, at most N of C.

The labels that occur get the slots 0, 1, ... in the order of the classes. There are always N slots, so no shape depends on data and
nothing waits for the device. The joint is then [N, C] instead of [C, C]; the columns of the classes in the slots make it
[N, N], and the determinant costs N^3 instead of C^3. Slots that stay empty are absent classes to ``logdet_inverse``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import stages
from .engines.combine import combine
from .engines.contract import Engine
from .options import Options
from .precision import compute_dtype
from .rows import counted_labels, rows_with_derivatives
from .sums import Sums
from .tracing import may_need_gradient

# With fewer classes, or with more samples for them, the [C, C] matrix costs less than the dozen small operations that avoid it.
_LEAST_CLASSES = 512
_CLASSES_PER_ROW = 4


def applies(rows: int, classes: int, soft: bool) -> bool:
    """Whether a batch is computed by slots: hard labels of few samples for their classes. Not where a graph is exported that has to
    serve batches of any size."""
    # the classes first, for the usual step; the rows last, because a comparison would fix the size in an exported program
    return classes >= _LEAST_CLASSES and not soft and not torch.compiler.is_exporting() and rows * _CLASSES_PER_ROW <= classes


def slots(target: Tensor, sample_weight: Tensor | None, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The slot of each sample [N] int64 and the class in each slot [max(N, 1)] int64 (0 in slots that stay empty).

    The slot is -100 for a row that does not count, and N, which is out of range, for a label that is out of range.
    """
    rows = max(target.shape[0], 1)
    label, counted = counted_labels(target, classes, ignore_index)
    if sample_weight is not None and not may_need_gradient(sample_weight):
        counted = counted & (sample_weight != 0)
    inside = (label >= 0) & (label < classes)
    label = torch.where(counted & inside, label, classes)
    every = torch.arange(classes + 1, device=target.device)
    occurs = torch.zeros_like(every).scatter(0, label, 1) * (every < classes)
    slot_of_class = occurs.cumsum(0) - 1
    slot = torch.where(counted, torch.where(inside, slot_of_class[label], rows), -100)
    class_of_slot = torch.zeros(rows + 1, dtype=torch.int64, device=target.device)
    class_of_slot = class_of_slot.scatter(0, torch.where(occurs > 0, slot_of_class, rows), every)[:rows]
    return slot, class_of_slot


def cross_entropy(logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options) -> Tensor:
    """The weighted sum of cross entropies [], differentiable."""
    classes = logits.shape[1]
    x = logits.to(compute_dtype(logits.dtype))
    used, label, weight, nan = rows_with_derivatives(x, target, sample_weight, classes, options.ignore_index, options.input)
    assert used is not None  # hard labels have all of these
    assert weight is not None
    assert nan is not None
    x = torch.where(used.unsqueeze(-1), x, 1.0 / classes)
    logp = torch.log_softmax(x, -1) if options.input == "logits" else x.log()
    own = logp.gather(1, label.unsqueeze(-1)).squeeze(-1).to(weight.dtype)
    return -(weight * own).sum() + nan


def finish(sums: Sums, class_of_slot: Tensor, classes: int, options: Options, engine: Engine, dtype: torch.dtype) -> Tensor:
    """The loss [] of sums whose S is [N, C] and n [N] by slots. ``dtype``: of the logits."""
    level, _, kept, _ = stages.log_abs_det(sums.S.index_select(1, class_of_slot), sums.n, "present", engine)
    if options.absent == "strict":  # fewer samples than classes: some class is absent
        level = torch.where((kept > 0) & ~level.isnan(), -torch.inf, level)
        kept = torch.full_like(kept, classes)
    value, _, _ = combine(level, kept, sums.total, sums.ce, options.eps, options.normalize, options.cross_entropy_weight)
    return value.to(compute_dtype(dtype))


def loss(logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options, engine: Engine) -> Tensor:
    """The loss [] of flattened, checked arguments, as :func:`ldmi_fast.autograd.loss`."""
    dtype = logits.dtype
    slot, class_of_slot = slots(target, sample_weight, logits.shape[1], options.ignore_index)
    if options.cross_entropy_weight != 0:
        logits = logits.to(compute_dtype(dtype))  # two gradients meet there: they are rounded once, after their sum
    # the cross entropy of the joint would take slots for classes
    by_slot = replace(options, ignore_index=-100, cross_entropy_weight=0.0)
    sums = stages.joint_sums(logits, slot, sample_weight, by_slot, engine, len(class_of_slot))
    if options.cross_entropy_weight != 0:
        sums = sums._replace(ce=cross_entropy(logits, target, sample_weight, options))
    return finish(sums, class_of_slot, logits.shape[1], options, engine, dtype)
