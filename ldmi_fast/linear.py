"""The loss with the last linear layer fused in: logits of a chunk of rows at a time, recomputed in the backward, never [N, C]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from . import autograd, few_rows
from .checks import FLOATS, check_dense, check_tensors
from .engines import composite
from .engines.choose import choose
from .engines.contract import Engine
from .evaluate import check_values, evaluate, loss_from_sums, widen
from .options import OptionKeywords, Options, as_int, make_options, shows_options
from .precision import accumulator, compute_dtype, full_precision
from .presence import with_samples
from .rows import counted_labels, used_rows
from .sums import Sums, differentiable_total, total_weight
from .tracing import may_look, may_need_gradient, transformed

# Logits in a chunk, by default: 16 MB in fp32, enough rows for a product of matrices to run at full speed.
_CHUNK_ELEMENTS = 2**22


def _rows(n: int, classes: int, chunk_size: int | None) -> int:
    """Rows in a chunk."""
    return min(max(n, 1), chunk_size if chunk_size is not None else max(_CHUNK_ELEMENTS // classes, 64))


def _add_joint(
    S: Tensor, n: Tensor, logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Add a chunk to S and n in place, where S is larger than the chunk: an engine's ``joint`` would return another S each time.

    Returns:
        lse [rows] and the summed cross entropy [].
    """
    used, label, weight, nan = used_rows(target, sample_weight, logits.shape[1], options.ignore_index, S.dtype)
    x = logits.to(compute_dtype(logits.dtype))
    if used is not None:
        x = torch.where(used.unsqueeze(-1), x, 0)
    lse = torch.logsumexp(x, -1)
    p = torch.softmax(x, -1).to(S.dtype)
    ones = p.new_ones(len(p)) if weight is None else weight
    ce = p.new_zeros(())
    if label.is_floating_point():
        t = label.to(S.dtype) * ones.unsqueeze(-1)
        S.addmm_(t.mT, p)
        n.add_(t.sum(0))
        if options.cross_entropy_weight != 0:
            ce = -(t * torch.where((t == 0) & (p == 0), 0, torch.log_softmax(x, -1).to(S.dtype))).sum()
    else:
        own = x.gather(1, label.unsqueeze(-1)).squeeze(-1)
        ce = (ones * (lse - own).to(S.dtype)).sum()
        S.index_add_(0, label, p if weight is None else p.mul_(weight.unsqueeze(-1)))
        n.index_add_(0, label, ones)
    if nan is not None:
        S.add_(nan)
        n.add_(nan)
    return lse if used is None else torch.where(used, lse, 0), ce


def _without_unused(hidden: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options) -> Tensor:
    """Hidden rows [N, D], zeros where a row does not count: the gradient of the logits is 0 there, and 0 times NaN is NaN."""
    soft = target.is_floating_point()
    if soft and sample_weight is None:
        return hidden
    used = torch.ones((), dtype=torch.bool, device=hidden.device) if sample_weight is None else sample_weight != 0
    if sample_weight is not None and may_need_gradient(sample_weight):  # a weight of 0 has a derivative
        used = used | hidden.isfinite().all(-1)
    if not soft:
        counted = counted_labels(target, 0, options.ignore_index)[1]
        used = used & counted
    if used.is_cpu and may_look(used) and used.all():
        return hidden
    return torch.where(used.unsqueeze(-1), hidden, 0)


class _LinearSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        sample_weight: Tensor | None,
        options: Options,
        engine: Engine,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        classes = weight.shape[0]
        acc = accumulator(hidden.device)
        S: Tensor | None = None
        n = torch.zeros(classes, dtype=acc, device=hidden.device)
        ce = torch.zeros((), dtype=acc, device=hidden.device)
        lses = []
        with full_precision(hidden.device):
            for start in range(0, max(len(hidden), 1), chunk):
                rows = slice(start, start + chunk)
                logits = F.linear(hidden[rows], weight, bias)
                y, w = target[rows], None if sample_weight is None else sample_weight[rows]
                if chunk >= classes:
                    added = engine.joint(logits, y, w, classes, options.ignore_index, "logits")
                    S = added[0] if S is None else S.add_(added[0])
                    n.add_(added[1])
                    lse, part = added[2], added[3]
                else:
                    if S is None:
                        S = torch.zeros(classes, classes, dtype=acc, device=hidden.device)
                    lse, part = _add_joint(S, n, logits, y, w, options)
                lses.append(lse)
                ce = ce + part
        assert S is not None  # there is a chunk, if an empty one
        if torch.compiler.is_compiling():  # under torch 2.11 no gradient reaches an output that was written in place
            S, n = S.clone(), n.clone()
        ctx.options, ctx.engine, ctx.chunk = options, engine, chunk
        ctx.save_for_backward(hidden, weight, bias, target, sample_weight, torch.cat(lses))
        total = total_weight(target, sample_weight, n)
        ctx.mark_non_differentiable(*((n,) if ctx.needs_input_grad[4] else (n, total)))
        return S, n, total, ce

    @staticmethod
    def backward(ctx: Any, S_grad: Tensor, n_grad: Tensor, total_grad: Tensor, ce_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, sample_weight, lse = ctx.saved_tensors
        options, needed = ctx.options, ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *_gradients_with_graph(ctx, S_grad, total_grad, ce_grad), None, None, None
        S_grad = S_grad.contiguous()
        minus = S_grad.new_full((), -1.0)
        # sums over chunks are made in fp32 at least
        wide = compute_dtype(weight.dtype)
        d_hidden = torch.empty_like(hidden) if needed[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if needed[2] else None
        d_target = torch.empty_like(target) if needed[3] else None
        d_sample_weight = torch.empty_like(sample_weight) if needed[4] else None
        with full_precision(hidden.device):
            for start in range(0, len(hidden), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                x, y, w = hidden[rows], target[rows], None if sample_weight is None else sample_weight[rows]
                logits = F.linear(x, weight, bias)
                if d_target is not None:
                    d_target[rows] = autograd.target_grad(logits, y, w, S_grad, minus, ce_grad, options)
                if d_sample_weight is not None and w is not None:
                    d_sample_weight[rows] = autograd.sample_weight_grad(logits, y, w, S_grad, total_grad, ce_grad, options)
                if d_hidden is None and d_weight is None and d_bias is None:
                    continue
                d_logits = ctx.engine.logits_grad(logits, y, w, lse[rows], S_grad, minus, ce_grad, options.ignore_index, "logits")
                del logits
                if d_hidden is not None:
                    if may_look(d_hidden):
                        torch.mm(d_logits, weight, out=d_hidden[rows])
                    else:  # a traced program may be differentiated, and out= cannot
                        d_hidden[rows] = d_logits @ weight
                if d_weight is not None:
                    x = _without_unused(x, y, w, options)
                    if wide == weight.dtype:
                        d_weight.addmm_(d_logits.mT, x)
                    else:
                        d_weight.add_(d_logits.mT @ x)
                if d_bias is not None:
                    d_bias.add_(d_logits.sum(0, dtype=wide))
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(weight.dtype),
            d_target,
            d_sample_weight,
            None,
            None,
            None,
        )


def _gradients_with_graph(ctx: Any, S_grad: Tensor, total_grad: Tensor, ce_grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, themselves differentiable. Derivatives of a gradient need all logits at once."""
    hidden, weight, bias, target, sample_weight, _ = ctx.saved_tensors
    options, needed = ctx.options, ctx.needs_input_grad[:5]
    need_ce = options.cross_entropy_weight != 0

    def outputs() -> list[Tensor]:
        with full_precision(hidden.device):
            logits = F.linear(_without_unused(hidden, target, sample_weight, options), weight, bias)
            S, n, _, ce = composite.joint(logits, target, sample_weight, weight.shape[0], options.ignore_index, "logits", need_ce)
            total = [differentiable_total(logits, target, sample_weight, n, options)] if needed[4] else []
            return [S, *([ce] if need_ce else []), *total]

    upstream = [S_grad, *([ce_grad] if need_ce else []), *([total_grad] if needed[4] else [])]
    with full_precision(hidden.device):
        return autograd.gradients_with_graph(outputs, (hidden, weight, bias, target, sample_weight), needed, upstream)


def _check(hidden: Any, weight: Any, bias: Any, chunk_size: Any) -> None:
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is None and name == "bias":
            continue
        check_dense(name, value, "a floating point")
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}; expected one device")
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape (N, ..., D) and weight (C, D) as in torch.nn.Linear, got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if weight.shape[1] == 0 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (C, D) with C and D at least 1, got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape (C,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if chunk_size is not None and as_int("chunk_size", chunk_size, "rows, or None") < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}")


@shows_options("input")
def linear_dmi_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    chunk_size: int | None = None,
    **options: Unpack[OptionKeywords],
) -> Tensor:
    """``dmi_loss(F.linear(hidden, weight, bias), target)`` without the logits: for many classes and rows.

    The forward makes the logits of a chunk of rows, adds them to the joint and forgets them; the backward makes them once more. That
    is four products of matrices instead of three, and memory for a chunk, for S and V (8 C^2 bytes each) and for the gradients.

    Args:
        hidden: (N, ..., D), what goes into the last layer.
        weight: (C, D), of that layer, as in ``torch.nn.Linear``.
        target: class indices (N, ...), or distributions (N, ..., C); the classes come last, as in the logits of a linear layer.
        bias: (C,) or None, of that layer.
        sample_weight: (N, ...).
        chunk_size: rows at a time; None: about 4 million logits. Where it is smaller than C, the joint is added up by plain
            PyTorch operations, whichever the engine.
        options: the options of :func:`ldmi_fast.dmi_loss`, without ``input``.

    Returns:
        A scalar, fp32 (fp64 if the layer computes in fp64), differentiable with respect to hidden, weight, bias and soft targets.
        Under autocast the product runs in autocast's dtype, as that of ``F.linear`` would.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`ldmi_fast.dmi_loss`.

    Derivatives of the gradient, and ``torch.func`` transforms, make all logits at once.

    Example:
        >>> loss = linear_dmi_loss(features, model.head.weight, noisy_labels, model.head.bias)
    """
    checked = make_options("linear_dmi_loss", options, without=("input",), others=("bias", "sample_weight", "chunk_size"))
    _check(hidden, weight, bias, chunk_size)
    chunk_size = None if chunk_size is None else int(chunk_size)
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(f"hidden and {name} must have one dtype, got {hidden.dtype} and {value.dtype}")
    classes = weight.shape[0]
    shape = hidden.shape[:-1]
    if isinstance(target, Tensor):
        soft = target.is_floating_point()
        expected = (*shape, classes) if soft else tuple(shape)
        if tuple(target.shape) != expected:
            raise ValueError(f"target must have shape {expected} for hidden of shape {tuple(hidden.shape)}, got {tuple(target.shape)}")
        target = target.reshape(-1, classes) if soft else target.reshape(-1)
    if isinstance(sample_weight, Tensor):
        if sample_weight.shape != shape:
            raise ValueError(f"sample_weight must have one weight per sample, shape {tuple(shape)}, got {tuple(sample_weight.shape)}")
        sample_weight = widen(sample_weight.reshape(-1))
    hidden = hidden.reshape(-1, hidden.shape[-1])
    # nothing is stored for it: one number, seen from everywhere
    logits_like = hidden.new_empty(1).expand(len(hidden), classes)
    check_tensors(logits_like, target, sample_weight, checked)
    # With so few rows the logits are smaller than their joint.
    few = checked.group is None and few_rows.applies(len(hidden), classes, target.is_floating_point())
    if few or transformed() or (torch.compiler.is_exporting() and torch.is_grad_enabled()):
        with full_precision(hidden.device):
            logits = F.linear(_without_unused(hidden, target, sample_weight, checked), weight, bias)
        return evaluate(logits, target, sample_weight, checked)
    chosen = choose(hidden, checked)
    chunk = _rows(len(hidden), classes, chunk_size)
    S, n, total, ce = _LinearSums.apply(hidden, weight, bias, target, sample_weight, checked, chosen, chunk)
    n = n.detach()
    sums = Sums(S, with_samples(n, target, sample_weight), total, ce)
    del S  # the determinant's backward needs V alone
    loss = loss_from_sums(sums, checked, chosen, hidden.dtype)
    if not torch.compiler.is_compiling():
        check_values(loss, target, sample_weight, classes, checked.ignore_index)
    return loss
