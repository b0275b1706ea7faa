"""The ops in the namespace ``ldmi_fast_triton``, with the schemas of ``ldmi_fast``.

Each is a ``torch.library.triton_op``: torch.compile sees the launches inside and can plan memory around them. Its fake kernel is the
function itself, run on tensors without data. They have their own namespace because ``ldmi_fast`` has one kernel per device, and
which engine runs is for ``engines.choose`` to say. No autograd formulas, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import triton_op

from ...ops import SCHEMAS
from ...precision import compute_dtype
from ...sums import total_weight
from . import plan
from .fused import loss_and_gradient
from .joint import joint_sums
from .logdet_inverse import log_det, log_det_and_loss
from .logits_grad import gradient


def forward(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """joint and logdet_inverse with the scalars behind them; three launches for few classes."""
    ignore_index, absent, eps, normalize, cross_entropy_weight, input = options
    S, n, lse, ce = joint_sums(logits, target, sample_weight, logits.shape[1], ignore_index, input, cross_entropy_weight != 0)
    if target.is_floating_point() and sample_weight is None:
        total = n.new_full((), logits.shape[0])  # not float(N), for which torch.compile would compile again at every batch size
    else:
        total = total_weight(target, sample_weight, n)
    dtype = compute_dtype(logits.dtype)
    loss, V, scale, ce_scale = log_det_and_loss(S, n, total, ce, absent, eps, normalize, cross_entropy_weight, dtype)
    return loss, lse, V, scale, ce_scale


def _op(name: str) -> Callable[..., Any]:
    """Register the function that it decorates, with the schema of the op of that name in ``ldmi_fast``."""
    return triton_op(f"ldmi_fast_triton::{name}", mutates_args=(), schema=SCHEMAS[name])


@_op("joint")
def joint(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``composite.joint``."""
    return joint_sums(*args)


@_op("logdet_inverse")
def logdet_inverse(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``composite.logdet_inverse``."""
    return log_det(*args)


@_op("logits_grad")
def logits_grad(*args: Any) -> Tensor:
    """``composite.logits_grad``."""
    return gradient(*args)


@_op("loss_forward")
def loss_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``composite.loss_forward``."""
    *given, wanted = args
    loss, lse, V, scale, ce_scale = forward(*given)
    return loss, lse, V if wanted else V.new_empty((0, 0)), scale, ce_scale


@_op("fused")
def fused(logits: Tensor, target: Tensor, sample_weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """``composite.fused``."""
    ignore_index, *_, input = options
    rows, classes = logits.shape[0], int(logits.shape[1])
    if plan.is_fused(rows, classes, target.is_floating_point(), logits.dtype.itemsize):
        return loss_and_gradient(logits, target, sample_weight, *options)
    loss, lse, V, scale, ce_scale = forward(logits, target, sample_weight, *options)
    return loss, gradient(logits, target, sample_weight, lse, V, scale, ce_scale, ignore_index, input)
