"""From checked options to the loss of a batch: what all entry points share.

check, flatten -> choose the engine -> choose the path -> the loss -> a look at the values, if it is NaN
"""

from __future__ import annotations

import math
import os
from typing import Literal

import torch
from torch import Tensor

from . import autograd, few_rows, stages
from .average import MovingAverage
from .checks import check_tensors, flatten, raise_for_values
from .engines import composite, native
from .engines.choose import choose
from .engines.contract import Engine
from .options import CHECK_VARIABLE, ENGINE_VARIABLE, Options
from .precision import accumulator, compute_dtype
from .sums import Sums
from .tracing import may_look, may_need_gradient, transformed


def prepare(logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the tensors and flatten them to one row per sample."""
    check_tensors(logits, target, sample_weight, options)
    return flatten(logits, target, widen(sample_weight))


def engine_for(logits: Tensor, options: Options) -> Engine:
    """The engine for these logits. An exported program has no autograd Functions, so a program that may be trained uses the composite
    engine, which PyTorch differentiates itself."""
    if torch.compiler.is_exporting() and torch.is_grad_enabled():
        return composite
    return choose(logits, options)


def widen(sample_weight: Tensor | None) -> Tensor | None:
    """Sample weights in fp64 if they need a gradient: the parts of the gradient cancel, so they are rounded only after they are
    added."""
    if sample_weight is None or not may_need_gradient(sample_weight):
        return sample_weight
    return sample_weight.to(accumulator(sample_weight.device))


def may_check_values(value: Tensor) -> bool:
    """Whether values may be read: in eager mode on the CPU. On other devices this would wait for the device at every step, so there it
    is for debugging, with LDMI_FAST_CHECK=1."""
    if not may_look(value):
        return False
    if value.is_cpu:
        return True
    return os.environ.get(CHECK_VARIABLE) == "1" and not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def check_values(value: Tensor, target: Tensor, sample_weight: Tensor | None, classes: int, ignore_index: int) -> None:
    """If the result is NaN, raise the error for labels or weights that are out of range, if there are any."""
    if may_check_values(value) and math.isnan(value.item()):
        raise_for_values(target, sample_weight, classes, ignore_index)


Path = Literal["one call", "staged", "few rows", "composite"]


def path_of(
    rows: int,
    classes: int,
    soft: bool,
    sample_weight: Tensor | None,
    options: Options,
    engine: Engine,
    averaged: bool = False,
) -> Path:
    """How the loss of [N, C] logits is computed by ``engine``. The decision is made here only; :func:`ldmi_fast.explain` calls this
    function too.

    Args:
        rows: N.
        classes: C.
        soft: whether the targets are distributions.
        sample_weight: [N], or any shape: only whether its gradient may be asked for matters.
        options: of the loss.
        engine: the module with the ops.
        averaged: whether the sums go through a moving average.

    Returns:
        ``"one call"``: the engine's ``fused`` if the engine says so, else ``loss_forward``, and in the backward ``logits_grad``.
        ``"staged"``: ``joint``, something that changes the sums or needs the gradient of each, ``logdet_inverse``.
        ``"few rows"``: of the classes that occur, see :mod:`.few_rows`.
        ``"composite"``: by operations that PyTorch differentiates itself.
    """
    if options.group is not None or averaged:
        return "staged"
    if few_rows.applies(rows, classes, soft):
        return "few rows"
    if engine is composite:
        return "composite"
    if sample_weight is not None and may_need_gradient(sample_weight):
        return "staged"
    return "composite" if transformed() else "one call"


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
        and options.group is None
        and ENGINE_VARIABLE not in os.environ
        and not transformed()
        and not few_rows.applies(logits.shape[0], logits.shape[1], False)
    )


def evaluate(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options, average: MovingAverage | None = None
) -> Tensor:
    """The loss for checked options: what ``dmi_loss`` and ``DMILoss`` share. ``average``: the batch enters it."""
    if average is None and sample_weight is None and _is_small_step(logits, target, options):
        # The checks below would cost as much as the loss. The op checks what memory safety needs; if it refuses, the checks say why.
        try:
            loss = autograd.loss(logits, target, None, options, choose(logits, options), fused=True)
        except RuntimeError:
            check_tensors(logits, target, None, options)
            raise
        check_values(loss, target, None, logits.shape[1], options.ignore_index)
        return loss
    logits, target, sample_weight = prepare(logits, target, sample_weight, options)
    engine = engine_for(logits, options)
    soft = target.is_floating_point()
    path = path_of(logits.shape[0], logits.shape[1], soft, sample_weight, options, engine, average is not None)
    if path == "staged":
        sums = stages.joint_sums(logits, target, sample_weight, options, engine)
        loss = loss_from_sums(sums, options, engine, logits.dtype, average)
    elif path == "few rows":
        loss = few_rows.loss(logits, target, sample_weight, options, engine)
    elif path == "composite":
        loss = composite.loss(logits, target, sample_weight, options)
    else:
        loss = autograd.loss(logits, target, sample_weight, options, engine, fused=engine.is_fused(logits, target))
    check_values(loss, target, sample_weight, logits.shape[1], options.ignore_index)
    return loss


def loss_from_sums(sums: Sums, options: Options, engine: Engine, dtype: torch.dtype, average: MovingAverage | None = None) -> Tensor:
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
