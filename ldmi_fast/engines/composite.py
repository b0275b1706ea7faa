"""The composite engine: the operation in plain PyTorch, on any device, differentiable to any order.

It is also the readable definition of the ops. With logits Z [N, C], labels y [N], weights w [N] and P = softmax(Z):

    joint             S = sum_i w_i e_{y_i} p_i^T  [K, C],   n_y = sum_{i: y_i = y} w_i  [K]
    logdet_inverse    R = diag(1/n) S;  log|det S| = log|det R| + sum_y log n_y;  V = S^{-T} = diag(1/n) R^{-T}
    logits_grad       dloss/dz_i = -w_i p_i * (V[y_i] - <p_i, V[y_i]>)

Sums run in fp64 (fp32 on a device that has no fp64). Index sums are deterministic on the CPU; on other devices they follow
``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import raise_for_negative_targets
from ..options import Options
from .combine import combine

# A matrix is singular when some |pivot of R| <= C * UNIT_ROUNDOFF[dtype of R] * ||R||_inf.
UNIT_ROUNDOFF = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}

# A class whose share of the whole weight is smaller is absent. In a moving average the share of a class that left the data decays
# for ever; long before it underflows, the row of S says nothing about the model any more. csrc/plan/presence.h has the same number.
ABSENT_SHARE = 1e-12


def accumulator(device: torch.device) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def can_run(device: torch.device) -> str:
    """Why this engine cannot run on ``device``: it can on all."""
    return ""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the softmax and of the loss: fp64 for fp64 logits, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def counted_labels(target: Tensor, num_labels: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Integer labels as int64 [N] (num_labels for a uint64 that int64 cannot hold), and which are not ignored [N] bool."""
    if target.dtype == torch.uint64:
        target = torch.where(target.view(torch.int64) < 0, num_labels, target.view(torch.int64))
    target = target.to(torch.int64)
    return target, target != ignore_index


def used_rows(
    target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int, acc: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Which rows count [N] bool (None: all), their labels (0 elsewhere), weights (0 elsewhere; None: 1), and a NaN when a
    label or a weight is out of range, else 0."""
    soft = target.is_floating_point()
    used: Tensor | None = None
    poison: Tensor | None = None
    weight: Tensor | None = None
    if sample_weight is not None:
        weight = sample_weight.to(acc)
        used = weight != 0
    if not soft:
        target, kept = counted_labels(target, num_labels, ignore_index)
        used = kept if used is None else used & kept
        bad = used & ((target < 0) | (target >= num_labels))
        poison = bad.any()
        target = torch.where(used & ~bad, target, 0)
    elif used is not None:
        target = torch.where(used.unsqueeze(-1), target, 0)
    if weight is not None and used is not None:
        bad_weight = (used & ~((weight >= 0) & (weight < torch.inf))).any()
        poison = bad_weight if poison is None else poison | bad_weight
    if used is not None:
        weight = used.to(acc) if weight is None else torch.where(used, weight, 0)
    nan = None if poison is None else torch.where(poison, torch.nan, 0.0).to(acc)
    return used, target, weight, nan


# Entries of a column of soft targets that are equal up to the rounding of mixing and smoothing differ by less, relatively.
_SAME = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 4 * 2.0**-10, torch.bfloat16: 4 * 2.0**-7}


def classes_with_samples(target: Tensor, sample_weight: Tensor | None) -> Tensor | None:
    """Which classes the soft targets T [N, C] say something about: [C] bool; None if it is at once clear that they all are.

    A column c of T that has the same share a_c of each row's sum s_i, in all rows that count, says nothing about any sample; label
    smoothing makes such a column for a class that the batch lacks. Its row of S = T^T diag(w) P is a multiple of the sum of all rows,

        S_c = a_c sum_i w_i s_i p_i,    and    sum over k of S_k = sum_i w_i s_i p_i,

    so with it S is singular, whatever the model predicts. Without it, for hard labels H of the classes that remain and T_K = H M,
    S_KK = M^T (H^T diag(w) P)_KK: a constant, invertible M, so the gradient is that of the hard labels.

    Where all columns are such (one sample, or samples of one class) the class with the largest share stays; shares that are all equal
    (no class is distinguished) leave all.
    """
    if target.shape[0] == 0:
        return None
    same = _SAME[target.dtype]
    T = target.detach()
    look = T.is_cpu and may_look(T)
    if look:
        if T.amin() < 0:
            raise_for_negative_targets(target, sample_weight)
        if sample_weight is None and _differ_at_once(T[:64]):
            return None
    sums = T.sum(-1, keepdim=True, dtype=compute_dtype(T.dtype))
    used = sums != 0
    if sample_weight is not None:
        used = used & (sample_weight.detach() != 0).unsqueeze(-1)
    share = T / torch.where(used, sums, 1)
    low, high = torch.where(used, share, torch.inf).amin(0), torch.where(used, share, -torch.inf).amax(0)
    constant = high - low <= same * high.abs()
    if look and not constant.any():
        return None
    all_constant = constant.all()
    top = high >= high.amax() * (1 - same)
    return ~torch.where(all_constant, ~top, constant)


def _differ_at_once(T: Tensor) -> bool:
    """Whether some rows of distributions differ so much in every column that no column's share can be the same: the usual batch, at a
    third of the cost of looking closely."""
    low, high = T.aminmax(dim=0)
    least, most = T.sum(-1).aminmax()
    return bool((high - low > 0.1 * high).all()) and bool(most - least < 0.01 * most)


def with_samples(n: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
    """n [C], and 0 for a class that soft targets say nothing about: it is absent from this batch."""
    if not target.is_floating_point():
        return n
    told = classes_with_samples(target, sample_weight)
    return n if told is None else torch.where(told, n, 0)


def may_look(value: Tensor) -> bool:
    """Whether there are data to look at, now: not while a graph is traced, a functorch transform runs, or tensors are fake."""
    return (
        not torch.compiler.is_compiling()
        and type(value).__torch_dispatch__ == Tensor.__torch_dispatch__
        and not value.is_meta
        and not transformed()
        and _mode(_FAKE) is None
        and _mode(_PROXY) is None
        and _mode(_FUNCTIONAL) is None
    )


_mode = torch._C._get_dispatch_mode
_FAKE, _PROXY, _FUNCTIONAL = (getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))


def may_need_gradient(tensor: Tensor) -> bool:
    """Whether a derivative by this tensor can be asked for: by autograd, in forward mode or by a torch.func transform."""
    return (tensor.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0 or transformed()


def transformed() -> bool:
    """Whether a functorch transform (torch.func.grad, vmap, ...) is tracing this call."""
    return torch._C._are_functorch_transforms_active()


def rows_with_derivatives(
    x: Tensor, target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int, input: str
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """As ``used_rows``; but where the weights may need a gradient, a row of weight 0 counts too if its label does and its values are
    finite: it adds nothing, and the loss has a derivative by its weight."""
    acc = accumulator(x.device)
    used, label, weight, nan = used_rows(target, sample_weight, num_labels, ignore_index, acc)
    if sample_weight is None or not may_need_gradient(sample_weight):
        return used, label, weight, nan
    logp = torch.log_softmax(x.detach(), -1) if input == "logits" else x.detach().log()
    finite = ~logp.isnan().any(-1)
    if target.is_floating_point():
        finite = finite & torch.where(target == 0, 0, logp * target.detach()).isfinite().all(-1)
        used = (sample_weight != 0) | finite
        label = torch.where(used.unsqueeze(-1), target, 0)
    else:
        label, counted = counted_labels(target, num_labels, ignore_index)
        counted = counted & (label >= 0) & (label < num_labels)
        label = torch.where(counted, label, 0)
        own = logp.gather(-1, (label % x.shape[-1]).unsqueeze(-1)).squeeze(-1)
        used = counted & ((sample_weight != 0) | (finite & own.isfinite()))
    return used, label, torch.where(used, sample_weight.to(acc), 0), nan


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


def present_classes(n: Tensor) -> Tensor:
    """Which classes the determinant is of [..., C] bool: those with a share of at least ABSENT_SHARE of the weight n [..., C].

    The shares are scaled before they are added, so that the sum of the largest weights stays finite.
    """
    least = (ABSENT_SHARE * n.clamp(min=0)).sum(-1, keepdim=True)
    return (n > 0) & ~(n < least)


def logdet_inverse(S: Tensor, n: Tensor, absent: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log|det S|, its sign, the number of classes kept, and V = S^{-T}, of the classes that have weight.

    Args:
        S: [..., C, C] fp64 (or fp32), n: [..., C].
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
    threshold = size * UNIT_ROUNDOFF[S.dtype] * norm
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

    ``lse`` is there for engines that save an exponential sum; the softmax is taken anew here.
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


def total_weight(target: Tensor, sample_weight: Tensor | None, n: Tensor) -> Tensor:
    """W, the sum of the weights of the rows that count: [] in the dtype of n."""
    if not target.is_floating_point():
        return n.sum(-1)
    if sample_weight is None:
        return n.new_ones(()) * target.shape[0]  # float() would fix the size in an exported program
    return sample_weight.sum(dtype=n.dtype)


def differentiable_total(logits: Tensor, target: Tensor, sample_weight: Tensor | None, n: Tensor, options: Options) -> Tensor:
    """W [], with a derivative by the weights of the rows that have one."""
    if sample_weight is None or not may_need_gradient(sample_weight):
        return total_weight(target, sample_weight, n.detach())
    rows = rows_with_derivatives(
        logits.detach().to(compute_dtype(logits.dtype)), target, sample_weight, len(n), options.ignore_index, options.input
    )
    return rows[2].sum(dtype=n.dtype)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Keeps autocast from turning the matrix products into half precision."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


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
