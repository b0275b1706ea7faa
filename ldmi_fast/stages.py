"""The loss in differentiable stages. What comes between two stages changes S, and the gradient follows by the chain rule.

    joint_sums -> [sum over processes] -> [moving average] -> log_abs_det -> finish

``joint_sums`` runs an engine's ``joint``, its backward ``logits_grad`` with the gradient of S in the place of -V. ``log_abs_det``
runs ``logdet_inverse``; V is one of its outputs, so derivatives of any order follow from

    d log|det S| = <V, dS>,    dV = -V dS^T V

without storing S. For a single batch the one-call path of :mod:`ldmi_fast.autograd` is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd
from .engines import composite
from .engines.combine import combine
from .engines.contract import Engine
from .options import Options
from .precision import full_precision
from .presence import with_samples
from .sums import Sums, differentiable_total, total_weight
from .tracing import transformed


def _differentiable(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, num_labels: int, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S, n, W and the cross entropy by operations that PyTorch differentiates itself, any number of times."""
    with full_precision(logits.device):
        need_ce = options.cross_entropy_weight != 0
        S, n, _, ce = composite.joint(logits, target, sample_weight, num_labels, options.ignore_index, options.input, need_ce)
        return S, n, differentiable_total(logits, target, sample_weight, n, options), ce


class _JointSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        num_labels: int,
        options: Options,
        engine: Engine,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        S, n, lse, ce = engine.joint(logits, target, sample_weight, num_labels, options.ignore_index, options.input)
        total = total_weight(target, sample_weight, n)
        ctx.options = options
        ctx.engine = engine
        ctx.save_for_backward(logits, target, sample_weight, lse)
        ctx.mark_non_differentiable(*((n,) if ctx.needs_input_grad[2] else (n, total)))
        return S, n, total, ce

    @staticmethod
    def backward(ctx: Any, S_grad: Tensor, n_grad: Tensor, total_grad: Tensor, ce_grad: Tensor) -> tuple[Tensor | None, ...]:
        options = ctx.options
        logits, target, sample_weight, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            upstream = [S_grad]
            if options.cross_entropy_weight != 0:
                upstream.append(ce_grad)
            if needed[2]:
                upstream.append(total_grad)

            def outputs() -> list[Tensor]:
                S, _, total, ce = _differentiable(logits, target, sample_weight, len(S_grad), options)
                return [S, *([ce] if options.cross_entropy_weight != 0 else []), *([total] if needed[2] else [])]

            found = autograd.gradients_with_graph(outputs, (logits, target, sample_weight), needed, upstream)
            return *found, None, None, None
        S_grad = S_grad.contiguous()
        minus = S_grad.new_full((), -1.0)
        d_logits = d_target = d_weight = None
        if needed[0]:
            d_logits = ctx.engine.logits_grad(
                logits, target, sample_weight, lse, S_grad, minus, ce_grad, options.ignore_index, options.input
            )
        if needed[1]:
            d_target = autograd.target_grad(logits, target, sample_weight, S_grad, minus, ce_grad, options)
        if needed[2]:
            d_weight = autograd.sample_weight_grad(logits, target, sample_weight, S_grad, total_grad, ce_grad, options)
        return d_logits, d_target, d_weight, None, None, None


def joint_sums(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options, engine: Engine, num_labels: int | None = None
) -> Sums:
    """The sums of flattened, checked arguments, by ``engine``. ``num_labels``: K, if it is not C."""
    num_labels = logits.shape[1] if num_labels is None else num_labels
    if engine is composite or transformed():
        S, n, total, ce = _differentiable(logits, target, sample_weight, num_labels, options)
    else:
        S, n, total, ce = _JointSums.apply(logits, target, sample_weight, num_labels, options, engine)
    n = n.detach()
    return Sums(S, with_samples(n, target, sample_weight), total, ce)


def joint_matrix(logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options, engine: Engine) -> Tensor:
    """U = S / W [C, C] (S itself with ``normalize=False``; zeros when nothing has weight) of flattened arguments, differentiable."""
    if engine is composite or transformed():
        return composite.joint_matrix(logits, target, sample_weight, options)
    sums = joint_sums(logits, target, sample_weight, options, engine)
    joint = sums.S
    if options.normalize:
        joint = joint * (1 / torch.where(sums.total == 0, 1, sums.total))
    return autograd.as_result(joint, logits)


class _LogAbsDet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, S: Tensor, n: Tensor, absent: str, engine: Engine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_abs_det, sign, kept, V = engine.logdet_inverse(S, n, absent)
        ctx.save_for_backward(V)
        ctx.mark_non_differentiable(sign, kept)
        ctx.set_materialize_grads(False)  # else a first derivative would multiply matrices of zeros
        return log_abs_det, sign, kept, V

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, sign_grad: None, kept_grad: None, V_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (V,) = ctx.saved_tensors
        d_S = None if grad is None else V * grad
        if V_grad is not None:
            through_V = -(V @ V_grad.mT @ V)
            d_S = through_V if d_S is None else d_S + through_V
        return d_S, None, None, None


def log_abs_det(S: Tensor, n: Tensor, absent: str, engine: Engine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log|det S| [], its sign, the number of classes kept and V = S^-T [C, C], as ``logdet_inverse`` gives them, differentiable."""
    if engine is composite or transformed():
        with full_precision(S.device):
            return composite.logdet_inverse(S, n, absent)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _LogAbsDet.apply(S, n, absent, engine)
    return found


def finish(sums: Sums, options: Options, engine: Engine) -> Tensor:
    """The loss [] of the sums, in their dtype."""
    level, _, kept, _ = log_abs_det(sums.S, sums.n, options.absent, engine)
    value, _, _ = combine(level, kept, sums.total, sums.ce, options.eps, options.normalize, options.cross_entropy_weight)
    return value
