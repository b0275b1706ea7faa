"""The functions of the public API."""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import autograd, few_rows, stages
from .average import MovingAverage
from .checks import check_tensors, flatten, raise_for_values
from .engines import composite, native
from .engines.choose import choose
from .options import CHECK_VARIABLE, ENGINE_VARIABLE, OPTION_NAMES, Options, explain_keywords, make_options
from .precision import accumulator, compute_dtype
from .sums import Sums
from .tracing import may_look, may_need_gradient, transformed


def prepare(logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the tensors and flatten them to one row a sample."""
    check_tensors(logits, target, sample_weight, options)
    return flatten(logits, target, widen(sample_weight))


def engine_for(logits: Tensor, options: Options) -> ModuleType:
    """The engine for these logits. A program that torch.export makes has no autograd Functions, so one that may be trained takes the
    engine that PyTorch differentiates itself."""
    if torch.compiler.is_exporting() and torch.is_grad_enabled():
        return composite
    return choose(logits, options)


def widen(sample_weight: Tensor | None) -> Tensor | None:
    """Sample weights in fp64 if they need a gradient: its parts cancel, and are rounded to the weights' dtype after their sum."""
    if sample_weight is None or not may_need_gradient(sample_weight):
        return sample_weight
    return sample_weight.to(accumulator(sample_weight.device))


def may_check_values(value: Tensor) -> bool:
    """Whether the data may be looked at: in eager, on the CPU. Elsewhere that would wait for the device at every step, so there it is
    for debugging, with LDMI_FAST_CHECK=1."""
    if not may_look(value):
        return False
    if value.is_cpu:
        return True
    return os.environ.get(CHECK_VARIABLE) == "1" and not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def check_values(value: Tensor, target: Tensor, sample_weight: Tensor | None, classes: int, ignore_index: int) -> None:
    """A NaN result is worth a look at the labels and weights: they may be out of range."""
    if may_check_values(value) and math.isnan(value.item()):
        raise_for_values(target, sample_weight, classes, ignore_index)


def _is_small_step(logits: Tensor, target: Tensor, options: Options) -> bool:
    """Whether this is the usual step of a small problem: plain tensors (N, C) and (N,) on one device that has compiled kernels, in
    eager mode, nothing forced."""
    return (
        not torch.compiler.is_compiling()
        and type(logits) is Tensor
        and type(target) is Tensor
        and logits.device == target.device
        and native.runs_on(logits.device)
        and not logits.is_nested
        and logits.dim() == 2
        and native.is_fused(logits, target)
        and options.engine is None
        and ENGINE_VARIABLE not in os.environ
        and not transformed()
        and not few_rows.applies(logits, target)
    )


def evaluate(logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options) -> Tensor:
    """The loss for checked options: what ``dmi_loss`` and ``DMILoss`` share."""
    if options.group is not None:
        return evaluate_in_stages(logits, target, sample_weight, options)
    if sample_weight is None and _is_small_step(logits, target, options):
        # The checks below would cost as much as the loss. The op makes those that memory needs, and if it refuses, they say why.
        try:
            loss = autograd.fused(logits, target, options, choose(logits, options))
        except RuntimeError:
            check_tensors(logits, target, None, options)
            raise
        check_values(loss, target, None, logits.shape[1], options.ignore_index)
        return loss
    logits, target, sample_weight = prepare(logits, target, sample_weight, options)
    engine = engine_for(logits, options)
    if few_rows.applies(logits, target):
        loss = few_rows.loss(logits, target, sample_weight, options, engine)
    elif engine is not composite and sample_weight is not None and may_need_gradient(sample_weight):
        sums = stages.joint_sums(logits, target, sample_weight, options, engine)
        loss = conclude(sums, options, engine, logits.dtype)
    else:
        loss = autograd.loss(logits, target, sample_weight, options, engine)
    check_values(loss, target, sample_weight, logits.shape[1], options.ignore_index)
    return loss


def conclude(sums: Sums, options: Options, engine: ModuleType, dtype: torch.dtype, average: MovingAverage | None = None) -> Tensor:
    """From the sums of a batch to its loss: over the ranks, through the average, then the determinant. ``dtype``: of the logits."""
    if options.group is not None:
        from . import distributed  # imports torch.distributed, which most programs do without

        if transformed():
            raise RuntimeError(
                "torch.func transforms (grad, vmap, jvp, hessian, ...) do not go through the all-reduce of group=...: use "
                "torch.autograd.grad, with create_graph=True for derivatives of the gradient, or leave out group"
            )
        sums = distributed.all_reduce(sums, options, None if average is None else average.momentum)
    if average is not None:
        sums = average(sums)
    value = stages.finish(sums, options, engine)
    return value.to(compute_dtype(dtype))


def evaluate_in_stages(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options, average: MovingAverage | None = None
) -> Tensor:
    """The loss where something stands between the joint and its determinant: other ranks, or an average."""
    logits, target, sample_weight = prepare(logits, target, sample_weight, options)
    engine = engine_for(logits, options)
    sums = stages.joint_sums(logits, target, sample_weight, options, engine)
    loss = conclude(sums, options, engine, logits.dtype, average)
    check_values(loss, target, sample_weight, logits.shape[1], options.ignore_index)
    return loss


def dmi_loss(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    absent: str = "present",
    eps: float = 0.0,
    normalize: bool = True,
    cross_entropy_weight: float = 0.0,
    input: str = "logits",
    group: Any = None,
    engine: str | None = None,
    **unknown: Any,
) -> Tensor:
    r"""The L_DMI loss of a batch: minus the log of the absolute determinant of the joint matrix of labels and predictions.

    .. math:: U = \frac{1}{W} \sum_i w_i \, e_{y_i} \, \mathrm{softmax}(z_i)^T \qquad \text{loss} = -\log |\det U|

    It is robust to label noise that depends on the class alone: noise with transition matrix T multiplies det U by det T, which moves
    the loss by a constant and leaves its gradient as it is (Xu, Cao, Kong, Wang: "L_DMI: A Novel Information-theoretic
    Loss Function for Training Deep Nets Robust to Label Noise", NeurIPS 2019, arXiv:1909.03388).

    The loss cannot tell a labelling from a permuted one, so start from a model that cross entropy has warmed up. Its gradient is
    about C times that of cross entropy (sum_i w_i <p_i, V[y_i]> = C): lower the learning rate accordingly under SGD.

    Args:
        logits: (N, C) or (N, C, d1, ...), fp16, bf16, fp32 or fp64, any strides. Sums run in fp64.
        target: class indices of any integer dtype, (N,) or (N, d1, ...); or distributions over the classes, floating,
            in the shape of the logits (they get a gradient if they require one).
        sample_weight: (N,) or (N, d1, ...), floating, >= 0. Rows of weight 0 contribute nothing, whatever they hold. They get a
            gradient if they require one (learning to reweight); that of a row of weight 0 is 0 unless its values are finite. Where
            all weights are 0 there is no joint, and no gradient: begin with ones.
        ignore_index: class index whose rows contribute nothing.
        absent: what a class without weight in this batch means. ``"present"``: the determinant of the other classes'
            submatrix; ``"strict"``: the batch is singular.
        eps: added to \|det U\| before the logarithm. 0: the exact loss; 1e-3: the published form.
        normalize: False: the determinant of the weighted counts instead of their mean (a constant apart).
        cross_entropy_weight: this much of the weighted mean cross entropy is added, from the same pass.
        input: ``"probs"`` if the first argument holds probabilities, rows that sum to 1.
        group: a torch.distributed ProcessGroup, a 1-D DeviceMesh or ``"world"`` (the default group): the loss is that of all ranks'
            samples together, the same on every rank, from one all-reduce; the gradient is world_size times that of the local
            samples, so that the averaging of DDP and FSDP gives what one process would. Every rank has to call, with the same options
            and classes; local batches may be of any size, or empty.
        engine: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"composite"``; None chooses (see :func:`explain`). The environment variable
            LDMI_FAST_ENGINE forces one for the whole process. Under torch.func transforms, and for derivatives of the gradient, the
            composite engine computes, whichever is named: only there PyTorch can differentiate any number of times.

    Returns:
        A scalar tensor, fp32 (fp64 for fp64 logits). 0 if no row counts; +inf (-log eps with eps) if the joint matrix is
        singular, with a gradient of zero (that of the cross entropy term); NaN if a row that counts holds NaN or +inf, or has
        no finite logit.

    Raises:
        TypeError, ValueError: arguments that cannot work, with what was given and what is expected. On the CPU in eager mode
            also for sample weights that are negative or not finite (elsewhere the loss is NaN).
        IndexError: a label out of range, on the CPU in eager mode. Elsewhere the loss is NaN; on other devices the environment
            variable LDMI_FAST_CHECK=1 raises these, too, and waits for the device at every step to do so.
        RuntimeError: the forced engine cannot run here, and why; or another rank did not come to the all-reduce within the time limit
            of the group.

    Example:
        >>> loss = dmi_loss(model(images), noisy_labels)
        >>> loss.backward()
    """
    if unknown:
        explain_keywords("dmi_loss", unknown, ("sample_weight", *OPTION_NAMES))
    options = make_options(ignore_index, absent, eps, normalize, cross_entropy_weight, input, engine, group)
    return evaluate(logits, target, sample_weight, options)


def joint_matrix(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    normalize: bool = True,
    input: str = "logits",
    engine: str | None = None,
    **unknown: Any,
) -> Tensor:
    r"""The joint matrix of labels (rows) and predictions (columns), :math:`U = \frac1W \sum_i w_i e_{y_i} p_i^T`.

    Args:
        logits, target, sample_weight, ignore_index, input, engine: as for :func:`dmi_loss`.
        normalize: False gives the weighted sums S = W U.

    Returns:
        (C, C), fp32 (fp64 for fp64 logits), differentiable. Zeros if no row counts.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`dmi_loss`.
    """
    if unknown:
        explain_keywords("joint_matrix", unknown, ("sample_weight", "ignore_index", "normalize", "input", "engine"))
    options = make_options(ignore_index, "present", 0.0, normalize, 0.0, input, engine)
    logits, target, sample_weight = prepare(logits, target, sample_weight, options)
    engine = engine_for(logits, options)
    if engine is not composite and sample_weight is not None and may_need_gradient(sample_weight):
        S, _, total, _ = stages.joint_sums(logits, target, sample_weight, options, engine)
        joint = S / torch.where(total == 0, 1, total) if normalize else S
        joint = joint.to(compute_dtype(logits.dtype))
    else:
        joint = autograd.joint_matrix(logits, target, sample_weight, options, engine)
    if may_check_values(joint):  # else the sum would cost a launch
        check_values(joint.detach().sum(), target, sample_weight, logits.shape[1], options.ignore_index)
    return joint
