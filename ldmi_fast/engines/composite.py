"""The composite engine: the operation in plain PyTorch, on any device, differentiable to any order.

It is also the readable definition of the ops. With logits Z [N, C], labels y [N], weights w [N] and P = softmax(Z):

    joint             S = sum_i w_i e_{y_i} p_i^T  [K, C],   n_y = sum_{i: y_i = y} w_i  [K]
    logdet_inverse    R = diag(1/n) S;  log|det S| = log|det R| + sum_y log n_y;  V = S^{-T} = diag(1/n) R^{-T}
    logits_grad       dloss/dz_i = -w_i p_i * (V[y_i] - <p_i, V[y_i]>)

Sums run in fp64 (fp32 on a device that has no fp64). Index sums are deterministic on the CPU; on other devices they follow
``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..options import Options
from ..precision import accumulator, compute_dtype, full_precision, singular_threshold
from ..presence import present_classes, with_samples
from ..rows import rows_with_derivatives, used_rows
from ..sums import differentiable_total, total_weight
from ..tracing import may_look
from .combine import combine


def can_run(device: torch.device) -> str:
    """Why this engine cannot run on ``device``: it can on all."""
    return ""


def is_fused(logits: Tensor, target: Tensor) -> bool:
    """Whether the loss and its gradient come from one call: no, PyTorch differentiates."""
    return False


def joint(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    num_labels: int,
    ignore_index: int,
    input: str,
    need_ce: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Joint sums of labels and predictions.

    Args:
        logits: [N, C] fp16, bf16, fp32 or fp64 (probabilities when ``input="probs"``).
        target: [N] integer in 0..K-1 or ``ignore_index``; or [N, K] floating.
        sample_weight: [N] floating or None.
        num_labels: K; C, or a multiple of C when several problems are stacked (label y of problem b is y + b C). Any other K, such as
            the slots of ``few_rows``, where ce is not asked for: it takes label % C for the class.
        ignore_index: the label of rows that contribute nothing.
        input: ``"logits"`` or ``"probs"``, what the first argument holds.
        need_ce: whether to compute the cross entropy (else its output is 0).

    Returns:
        S [K, C] fp64, n [K] fp64, lse [N] (fp32; fp64 for fp64 logits; 0 in rows that do not count and for probs), and ce [] fp64,
        the weighted sum of cross entropies. A label or weight out of range makes S, n and ce NaN.
    """
    acc = accumulator(logits.device)
    dtype = compute_dtype(logits.dtype)
    rows, classes = logits.shape
    x = logits.to(dtype)
    used, label, weight, nan = rows_with_derivatives(x, target, sample_weight, num_labels, ignore_index, input)
    if used is not None:
        x = torch.where(used.unsqueeze(-1), x, 1.0 / classes if input == "probs" else 0.0)
    p = torch.softmax(x, -1) if input == "logits" else x + torch.where(torch.isfinite(x), 0, torch.nan).to(dtype)
    p_acc = p.to(acc)
    ones = weight if weight is not None else p_acc.new_ones(rows)
    if target.is_floating_point():
        t = label.to(acc) * ones.unsqueeze(-1)
        S = t.mT @ p_acc
        n = t.sum(0)
    else:
        S = p_acc.new_zeros(num_labels, classes).index_add(0, label, p_acc * ones.unsqueeze(-1))
        n = p_acc.new_zeros(num_labels).index_add(0, label, ones)
    lse = x.new_zeros(rows)
    if input == "logits":
        lse = torch.logsumexp(x.detach(), -1)
        if used is not None:
            lse = torch.where(used, lse, 0)
    ce = p_acc.new_zeros(())
    if need_ce:
        # the logarithm of what is not asked for would give its gradient 0 / 0 where a probability is 0
        if target.is_floating_point():
            # a zero in the target contributes nothing, also where the prediction is 0
            nothing = (t == 0) & (p == 0)
            logp = torch.log_softmax(x, -1) if input == "logits" else torch.where(nothing, 1, p).log()
            ce = -(t * torch.where(nothing, 0, logp.to(acc))).sum()
        else:
            own = (label % classes).unsqueeze(-1)
            logp = torch.log_softmax(x, -1).gather(1, own) if input == "logits" else p.gather(1, own).log()
            ce = -(ones * logp.squeeze(-1).to(acc)).sum()
    if nan is not None:
        S, n, ce = S + nan, n + nan, ce + nan
    return S, n, lse, ce


def logdet_inverse(S: Tensor, n: Tensor, absent: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log|det S|, its sign, the number of classes kept, and V = S^{-T}, of the classes that have weight.

    Args:
        S: [..., C, C] fp64 (or fp32).
        n: [..., C], the weight of each class.
        absent: ``"present"`` or ``"strict"``.

    Returns:
        log_abs_det [...] fp64 (-inf when singular), sign [...] fp64 (0 when singular), kept [...] int64 and V [..., C, C] (zero when
        singular; rows and columns of absent classes zero). Nothing has weight: 0, 1, 0 and zeros. Not finite: all NaN.
    """
    classes = S.shape[-1]
    present = present_classes(n)
    if S.dim() == 2 and classes >= _COMPACT_CLASSES and S.is_cpu and may_look(S) and 0 < int(present.sum()) < classes:
        return _logdet_inverse_compacted(S, n, absent, present)
    return _logdet_inverse(S, n, absent, present, classes, 0.0)


def _logdet_inverse(
    S: Tensor, n: Tensor, absent: str, present: Tensor, size: int, least_norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``size``: the number of classes that the threshold for pivots is for; ``least_norm``: a bound of ||R|| from below."""
    classes = S.shape[-1]
    empty = ~present.any(-1)
    eye = torch.eye(classes, dtype=torch.bool, device=S.device)
    finite = torch.isfinite(S).all(-1).all(-1) & torch.isfinite(n).all(-1)
    inside = present.unsqueeze(-1) & present.unsqueeze(-2)
    n_safe = torch.where(present & finite.unsqueeze(-1), n, 1)
    keep = inside & finite[..., None, None]
    R = torch.where(keep, S, eye.to(S.dtype)) / n_safe.unsqueeze(-1)
    lu, _, _ = torch.linalg.lu_factor_ex(R.detach())
    norm = R.detach().abs().sum(-1).amax(-1).clamp(min=least_norm)
    threshold = singular_threshold(size, norm)
    singular = (lu.diagonal(dim1=-2, dim2=-1).abs() <= threshold.unsqueeze(-1)).any(-1)
    kept = present.sum(-1)
    if absent == "strict":
        singular = singular | (~present.all(-1) & ~empty)
        kept = torch.where(empty, 0, classes)
    singular = singular & finite
    regular = ~singular[..., None, None]
    R = torch.where(regular, R, eye.to(S.dtype))
    # Not slogdet: PyTorch's second derivatives of it are wrong in forward mode and under vmap; those of LU are right.
    lu, pivots, _ = torch.linalg.lu_factor_ex(R)
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    log_abs_det = diagonal.abs().log().sum(-1)
    swaps = (pivots != torch.arange(1, classes + 1, device=S.device)).sum(-1)
    sign = diagonal.detach().sign().prod(-1) * (1 - 2 * (swaps % 2))
    log_abs_det = log_abs_det + torch.where(present & finite.unsqueeze(-1), n_safe.log(), 0).sum(-1)
    V = torch.linalg.inv(R).mT / n_safe.unsqueeze(-1)
    V = torch.where(keep & regular, V, 0)
    nan = torch.where(finite, 1.0, torch.nan).to(S.dtype)
    # A matrix that is not finite has a NaN gradient in every entry, through this sum; 0 for all others.
    poison = (S * (nan - 1)[..., None, None]).sum((-2, -1))
    log_abs_det = torch.where(singular, -torch.inf, log_abs_det + poison)
    sign = torch.where(singular, 0, sign * nan)
    return log_abs_det, sign, kept, V * nan[..., None, None]


# Where fewer classes than this are there, looking for the absent ones costs more than it saves.
_COMPACT_CLASSES = 32


def _logdet_inverse_compacted(S: Tensor, n: Tensor, absent: str, present: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``logdet_inverse`` in the time of the k classes that are present, k^3 instead of C^3."""
    index = present.nonzero().squeeze(-1)
    part = S.index_select(0, index).index_select(1, index)
    # an absent class is a row of the identity to the threshold, here as in the engines that keep such rows
    log_abs_det, sign, kept, V = _logdet_inverse(part, n[index], "present", present[index], S.shape[-1], 1.0)
    if absent == "strict" and len(index) > 0:
        kept = torch.full_like(kept, S.shape[-1])
        log_abs_det = torch.where(log_abs_det.isnan(), log_abs_det, -torch.inf)
        sign, V = torch.where(sign.isnan(), sign, 0), torch.where(V.isnan(), V, 0)
    # what is left out decides nothing, unless it is not finite
    finite = torch.isfinite(S).all() & torch.isfinite(n).all()
    poison = (S * torch.where(finite, 0.0, torch.nan).to(S.dtype)).sum()
    V = S.new_zeros(S.shape).index_put((index.unsqueeze(-1), index), V)
    return log_abs_det + poison, sign + poison.detach(), kept, V + poison


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
    """scale * dloss/dlogits + ce_scale * d(weighted sum of cross entropy)/dlogits, [N, C] in the dtype of the logits.

    ``lse`` is there for engines that save an exponential sum; the softmax is computed again here.
    """
    acc = accumulator(logits.device)
    dtype = compute_dtype(logits.dtype)
    labels, classes = V.shape
    used, label, weight, nan = used_rows(target, sample_weight, labels, ignore_index, acc)
    x = logits.to(dtype)
    if used is not None:
        x = torch.where(used.unsqueeze(-1), x, 1.0 / classes if input == "probs" else 0.0)
    p = (torch.softmax(x, -1) if input == "logits" else x).to(acc)
    soft = target.is_floating_point()
    g = label.to(acc) @ V.to(acc) if soft else V.to(acc)[label]
    g = g * -scale
    if input == "logits":
        g = p * (g - (p * g).sum(-1, keepdim=True))
    if soft:
        t = label.to(acc)
        ce = p * t.sum(-1, keepdim=True) - t if input == "logits" else torch.where(t == 0, 0, -t / p)
        g = g + torch.where(ce_scale == 0, 0, ce_scale * ce)
    else:
        column = (label % classes).unsqueeze(-1)
        if input == "logits":
            ce = p.scatter_add(1, column, p.new_full((1, 1), -1.0).expand(p.shape[0], 1))
            g = g + torch.where(ce_scale == 0, 0, ce_scale * ce)
        else:
            g = g.scatter_add(1, column, torch.where(ce_scale == 0, 0, -ce_scale / p.gather(1, column)))
    if weight is not None:
        g = g * weight.unsqueeze(-1)
    if nan is not None:
        g = g + nan
    if used is not None:
        g = torch.where(used.unsqueeze(-1), g, 0)
    return g.to(logits.dtype)


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
    """The loss [] (fp32; fp64 for fp64 logits), and what its gradient needs: lse [N], V [C, C], scale [], ce_scale [].

    V is [0, 0] where no gradient is asked for.
    """
    S, n, lse, ce = joint(logits, target, sample_weight, logits.shape[1], ignore_index, input)
    log_abs_det, _, kept, V = logdet_inverse(S, n, absent)
    total = total_weight(target, sample_weight, n)
    value, scale, ce_scale = combine(log_abs_det, kept, total, ce, eps, normalize, cross_entropy_weight)
    return value.to(compute_dtype(logits.dtype)), lse, V if gradient else V.new_empty((0, 0)), scale, ce_scale


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
    """The loss [] (fp32; fp64 for fp64 logits) and its gradient [N, C], in one call."""
    value, lse, V, scale, ce_scale = loss_forward(
        logits, target, sample_weight, ignore_index, absent, eps, normalize, cross_entropy_weight, input, True
    )
    return value, logits_grad(logits, target, sample_weight, lse, V, scale, ce_scale, ignore_index, input)


def loss(logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options) -> Tensor:
    """The loss [], by operations that PyTorch differentiates itself, as often as asked."""
    with full_precision(logits.device):
        S, n, _, ce = joint(
            logits,
            target,
            sample_weight,
            logits.shape[1],
            options.ignore_index,
            options.input,
            options.cross_entropy_weight != 0,
        )
        total = differentiable_total(logits, target, sample_weight, n, options)
        n = with_samples(n, target, sample_weight)
        log_abs_det, _, kept, _ = logdet_inverse(S, n.detach(), options.absent)
        value, _, _ = combine(log_abs_det, kept, total, ce, options.eps, options.normalize, options.cross_entropy_weight)
        return value.to(compute_dtype(logits.dtype))


def joint_matrix(logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options) -> Tensor:
    """U = S / W [C, C] (S itself with ``normalize=False``; zeros when nothing has weight), differentiable like the loss."""
    with full_precision(logits.device):
        S, n, _, _ = joint(logits, target, sample_weight, logits.shape[1], options.ignore_index, options.input, need_ce=False)
        if options.normalize:
            total = differentiable_total(logits, target, sample_weight, n, options)
            S = S / torch.where(total == 0, 1, total)
        return S.to(compute_dtype(logits.dtype))


for _op in (joint, logdet_inverse, logits_grad, loss_forward, fused):
    ops.implement(_op.__name__, _op)
