"""The rooms as ops of the namespace ``ldmi_fast_triton``, with the schemas of ``ldmi_fast``.

Each is a ``torch.library.triton_op``: torch.compile sees the launches inside and can plan memory round them. Its fake kernel is the
function itself, run on tensors without data. They are a namespace of their own because ``ldmi_fast`` has one kernel a device, and
which engine runs is for ``engines.choose`` to say. No autograd formulas, as there.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import triton_op

from ...precision import compute_dtype
from ...sums import total_weight
from . import plan
from .fused import loss_and_gradient
from .joint import joint_sums
from .logdet_inverse import log_det, log_det_and_loss
from .logits_grad import gradient


def forward(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    ignore_index: int,
    absent: str,
    eps: float,
    normalize: bool,
    cross_entropy_weight: float,
    input: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """joint and logdet_inverse with the scalars behind them; three launches for few classes."""
    S, n, lse, ce = joint_sums(logits, target, sample_weight, logits.shape[1], ignore_index, input, cross_entropy_weight != 0)
    if target.is_floating_point() and sample_weight is None:
        total = n.new_full((), logits.shape[0])  # not float(N), for which torch.compile would compile anew at every batch size
    else:
        total = total_weight(target, sample_weight, n)
    dtype = compute_dtype(logits.dtype)
    loss, V, scale, ce_scale = log_det_and_loss(S, n, total, ce, absent, eps, normalize, cross_entropy_weight, dtype)
    return loss, lse, V, scale, ce_scale


@triton_op("ldmi_fast_triton::joint", mutates_args=())
def joint(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int, input: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``composite.joint``."""
    return joint_sums(logits, target, sample_weight, num_labels, ignore_index, input)


@triton_op("ldmi_fast_triton::logdet_inverse", mutates_args=())
def logdet_inverse(S: Tensor, n: Tensor, absent: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``composite.logdet_inverse``."""
    return log_det(S, n, absent)


@triton_op("ldmi_fast_triton::logits_grad", mutates_args=())
def logits_grad(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    lse: Tensor,
    V: Tensor,
    scale: Tensor,
    ce_scale: Tensor,
    ignore_index: int,
    input: str,
) -> Tensor:
    """``composite.logits_grad``."""
    return gradient(logits, target, sample_weight, lse, V, scale, ce_scale, ignore_index, input)


@triton_op("ldmi_fast_triton::loss_forward", mutates_args=())
def loss_forward(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    ignore_index: int,
    absent: str,
    eps: float,
    normalize: bool,
    cross_entropy_weight: float,
    input: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``composite.loss_forward``."""
    loss, lse, V, scale, ce_scale = forward(
        logits, target, sample_weight, ignore_index, absent, eps, normalize, cross_entropy_weight, input
    )
    return loss, lse, V if gradient else V.new_empty((0, 0)), scale, ce_scale


@triton_op("ldmi_fast_triton::fused", mutates_args=())
def fused(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    ignore_index: int,
    absent: str,
    eps: float,
    normalize: bool,
    cross_entropy_weight: float,
    input: str,
) -> tuple[Tensor, Tensor]:
    """``composite.fused``."""
    rows, classes = logits.shape[0], int(logits.shape[1])
    options = (ignore_index, absent, eps, normalize, cross_entropy_weight, input)
    if plan.is_fused(rows, classes, target.is_floating_point(), logits.dtype.itemsize):
        return loss_and_gradient(logits, target, sample_weight, *options)
    loss, lse, V, scale, ce_scale = forward(logits, target, sample_weight, *options)
    return loss, gradient(logits, target, sample_weight, lse, V, scale, ce_scale, ignore_index, input)
