"""The analytic backward, as torch autograd Functions.

A first derivative runs the engine's own kernels. A derivative of the gradient (``create_graph=True``) goes through the
composite engine, which PyTorch differentiates itself: the Functions here never offer a saved gradient for differentiation.
Under functorch transforms (grad, vmap, ...) the composite engine does everything, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .engines import composite
from .engines.combine import combine
from .engines.contract import Engine
from .options import Options
from .precision import compute_dtype
from .presence import classes_with_samples
from .rows import counted_labels
from .sums import total_weight


def gradients_with_graph(
    outputs: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor | None], needed: Sequence[bool], upstream: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The backward of a Function when derivatives of its gradient may be asked for: through operations that PyTorch differentiates.

    Args:
        outputs: computes the outputs of the Function again, from its inputs, by such operations.
        inputs: tensors of the Function.
        needed: for each of them, whether a gradient is needed.
        upstream: the gradients of the outputs.

    Returns:
        The gradient of each input, itself differentiable; None where none is needed.
    """
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need and tensor is not None]
    with torch.enable_grad():
        made = outputs()
    found = iter(torch.autograd.grad(made, wanted, upstream, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def target_grad(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    V: Tensor,
    scale: Tensor,
    ce_scale: Tensor,
    options: Options,
) -> Tensor:
    """The gradient for soft targets, dloss/dT_i = -w_i (scale V p_i + ce_scale log p_i) [N, K].

    Rows of V of absent classes are zero. This is rare, so PyTorch computes it, for a block of rows at a time.
    """
    dtype = compute_dtype(logits.dtype)
    blocks = []
    for start in range(0, max(logits.shape[0], 1), 4096):
        x = logits[start : start + 4096].to(dtype)
        p = torch.softmax(x, -1) if options.input == "logits" else x
        grad = -scale * (p.to(V.dtype) @ V.mT)
        if options.cross_entropy_weight != 0:
            logp = torch.log_softmax(x, -1) if options.input == "logits" else x.log()
            zero = target[start : start + 4096] == 0
            grad = grad - ce_scale * torch.where(zero & (p == 0), 0, logp.to(V.dtype))
        if sample_weight is not None:
            w = sample_weight[start : start + 4096].unsqueeze(-1)
            grad = torch.where(w != 0, grad * w, 0)
        blocks.append(grad.to(target.dtype))
    return torch.cat(blocks)


def sample_weight_grad(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor,
    S_grad: Tensor,
    total_grad: Tensor,
    ce_grad: Tensor,
    options: Options,
) -> Tensor:
    """The gradient for sample weights, of S [K, C], of their sum and of the summed cross entropy:

        d/dw_i = <S_grad[y_i], p_i> + total_grad + ce_grad ce_i    (soft targets: <T_i S_grad, p_i>)

    A weight of 0 has a gradient too, because learning to reweight begins there. The gradient is 0 where such a row holds values that
    are not finite, and in ignored rows. Computed for a block of rows at a time, as for soft targets.
    """
    dtype = compute_dtype(logits.dtype)
    labels = S_grad.shape[0]
    soft = target.is_floating_point()
    blocks = []
    for start in range(0, max(logits.shape[0], 1), 4096):
        rows = slice(start, start + 4096)
        x, y, w = logits[rows].to(dtype), target[rows], sample_weight[rows]
        p = (torch.softmax(x, -1) if options.input == "logits" else x).to(S_grad.dtype)
        if soft:
            counted = torch.ones_like(w, dtype=torch.bool)
            G = y.to(S_grad.dtype) @ S_grad
        else:
            y, counted = counted_labels(y, labels, options.ignore_index)
            counted = counted & (y >= 0) & (y < labels)
            y = torch.where(counted, y, 0)
            G = S_grad[y]
        grad = (G * p).sum(-1) + total_grad
        if options.cross_entropy_weight != 0:
            logp = (torch.log_softmax(x, -1) if options.input == "logits" else x.log()).to(S_grad.dtype)
            if soft:
                t = y.to(S_grad.dtype)
                grad = grad - ce_grad * (t * torch.where((t == 0) & (p == 0), 0, logp)).sum(-1)
            else:
                grad = grad - ce_grad * logp.gather(1, (y % x.shape[1]).unsqueeze(-1)).squeeze(-1)
        grad = torch.where(counted & ((w != 0) | torch.isfinite(grad)), grad, 0)
        blocks.append(grad.to(sample_weight.dtype))
    return torch.cat(blocks)


def as_result(value: Tensor, logits: Tensor) -> Tensor:
    """Convert to the dtype of results for these logits. Not by a .to() that may return its argument: Dynamo of torch 2.11 takes that
    for a second output of the Function, and gives it the gradient that belongs to the first."""
    dtype = compute_dtype(logits.dtype)
    return value if value.dtype == dtype else value.to(dtype)


def _loss_gradients_with_graph(
    ctx: Any, logits: Tensor, target: Tensor, sample_weight: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, ...]:
    found = gradients_with_graph(
        lambda: [composite.loss(logits, target, sample_weight, ctx.options)], (logits, target), ctx.needs_input_grad[:2], [grad]
    )
    return *found, None, None, None


class _Fused(torch.autograd.Function):
    """The loss and its gradient from one op; the backward scales the gradient into a new tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        options: Options,
        engine: Engine,
    ) -> Tensor:
        loss, grad = engine.fused(logits, target, sample_weight, *options.for_ops)
        ctx.options = options
        ctx.save_for_backward(logits, target, sample_weight, grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, sample_weight, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _loss_gradients_with_graph(ctx, logits, target, sample_weight, grad)
        return saved * grad, None, None, None, None


def _loss_forward(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options, engine: Engine, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``loss_forward`` of an engine. If soft targets say nothing about some class, the class weights change between joint and
    determinant."""
    if not target.is_floating_point():
        return engine.loss_forward(logits, target, sample_weight, *options.for_ops, gradient)
    told = classes_with_samples(target, sample_weight)
    if told is None:
        return engine.loss_forward(logits, target, sample_weight, *options.for_ops, gradient)
    S, n, lse, ce = engine.joint(logits, target, sample_weight, logits.shape[1], options.ignore_index, options.input)
    log_abs_det, _, kept, V = engine.logdet_inverse(S, torch.where(told, n, 0), options.absent)
    total = total_weight(target, sample_weight, n)
    value, scale, ce_scale = combine(log_abs_det, kept, total, ce, options.eps, options.normalize, options.cross_entropy_weight)
    return as_result(value, logits), lse, V if gradient else V.new_empty((0, 0)), scale, ce_scale


class _Loss(torch.autograd.Function):
    """loss_forward (joint, logdet_inverse and the scalars after them), and in the backward logits_grad."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        options: Options,
        engine: Engine,
    ) -> Tensor:
        loss, lse, V, scale, ce_scale = _loss_forward(logits, target, sample_weight, options, engine, True)
        ctx.options = options
        ctx.engine = engine
        ctx.save_for_backward(logits, target, sample_weight, lse, V, scale, ce_scale)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        options = ctx.options
        logits, target, sample_weight, lse, V, scale, ce_scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _loss_gradients_with_graph(ctx, logits, target, sample_weight, grad)
        scale, ce_scale = scale * grad, ce_scale * grad
        d_logits = d_target = None
        if ctx.needs_input_grad[0]:
            d_logits = ctx.engine.logits_grad(
                logits, target, sample_weight, lse, V, scale, ce_scale, options.ignore_index, options.input
            )
        if ctx.needs_input_grad[1]:
            d_target = target_grad(logits, target, sample_weight, V, scale, ce_scale, options)
        return d_logits, d_target, None, None, None


def _needs_gradient(logits: Tensor, target: Tensor) -> bool:
    """Whether anything can ask for a gradient; if not, neither the inverse nor the gradient is computed.

    Tensors of forward mode AD do not require a gradient but carry a tangent; the Function refuses them.
    """
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad))


def loss(logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options, engine: Engine, *, fused: bool) -> Tensor:
    """The loss [] of flattened arguments, by ``engine``, differentiable by logits and targets.

    Args:
        logits: [N, C].
        target: [N] integer or [N, C] floating.
        sample_weight: [N] or None.
        options: of the loss.
        engine: the module with its ops.
        fused: whether the gradient comes from the same call as the loss.
    """
    if not _needs_gradient(logits, target):
        return _loss_forward(logits, target, sample_weight, options, engine, False)[0]
    function = _Fused if fused else _Loss
    found: Tensor = function.apply(logits, target, sample_weight, options, engine)
    return found
