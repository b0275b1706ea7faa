"""Whether what an engine returned can be right: each op's result against invariants and the formula, on the device.

Each function takes the arguments of an op and what it returned, and gives a :class:`Finding`, or None where these arguments show
nothing (values that are not finite, a singular matrix, rounding that may explain anything). A right result never fails: the bounds
are several times what the roundings of a right kernel add up to, in the precision of its softmax.

    joint            S r = sum_i w_i t_i <p_i, r> for r = 1, where it says that rows of S sum to the class weights n, and for an r in
                     which no two entries are the same; n, lse and ce
    logdet_inverse   the residual S V^T r - r of the classes kept, V = 0 elsewhere, and log|det S|, sign and kept by torch's LU
    logits_grad      every row against w_i p_i (V[y_i] - <p_i, V[y_i]>), so that rows sum to zero
    loss_forward     the loss, V and the scales against joint and logdet_inverse
    fused            the loss and every row of the gradient against the same

All but the passes over the logits is O(C^2), except for torch's LU. They cost some milliseconds, wait for the device, and take the
logits block by block, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..precision import EPSILON, compute_dtype
from ..presence import present_classes
from ..rows import used_rows
from ..sums import total_weight
from . import composite
from .combine import combine

_BLOCK_ELEMENTS = 2**21  # logits that are checked at a time: 16 MB in fp64
_EPS = EPSILON[torch.float64]
_TINY = 1e-300  # so that no bound is 0
_ROUNDINGS = 8  # how many roundings a kernel may make where the formula has one
_VAGUE = 0.02  # a bound that is wider than this share of the values themselves shows nothing


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        error: the largest deviation, as a multiple of what rounding may explain: above 1 the result is wrong.
        what: what deviates most.
    """

    error: float
    what: str

    @property
    def right(self) -> bool:
        """Whether rounding explains the result."""
        return self.error <= 1


Joint = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
LogdetInverse = Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor, Tensor, Tensor]]


def _finding(conclusive: Tensor, errors: dict[str, Tensor]) -> Finding | None:
    """The worst of the errors, read from the device at once. None if nothing is conclusive and nothing wrong."""
    known, *values = torch.stack([conclusive.double(), *(error.double() for error in errors.values())]).tolist()
    worst, what = max((math.inf if math.isnan(value) else value, name) for name, value in zip(errors, values, strict=True))
    return Finding(worst, what) if known or worst > 1 else None


def _error(got: Tensor, want: Tensor, bound: Tensor | float) -> Tensor:
    """The largest deviation over its bound []; NaN if there is one in ``got``."""
    return ((got.double() - want).abs() / (bound + _TINY)).max() if got.numel() else want.new_zeros(())


def _probe(classes: int, device: torch.device) -> Tensor:
    """[C, 2]: ones, and a vector whose entries all differ. No random number is drawn, that would move the caller's generator."""
    k = torch.arange(1, classes + 1, dtype=torch.float64, device=device)
    return torch.stack((torch.ones_like(k), torch.sin(12.9898 * k)), -1)


class _Rows(NamedTuple):
    """A block of rows, in fp64: p [n, C], log sum exp [n], labels [n] or targets [n, K], weights [n], 0 or NaN if out of range."""

    where: slice
    x: Tensor
    p: Tensor
    lse: Tensor
    label: Tensor
    weight: Tensor
    nan: Tensor | None


def _blocks(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int, input: str
) -> Iterator[_Rows]:
    rows, classes = logits.shape
    step = max(1, _BLOCK_ELEMENTS // max(classes, num_labels if target.is_floating_point() else 1))
    for start in range(0, rows, step):
        where = slice(start, start + step)
        weights = None if sample_weight is None else sample_weight[where]
        used, label, weight, nan = used_rows(target[where], weights, num_labels, ignore_index, torch.float64)
        x = logits[where].double()
        if used is not None:
            x = torch.where(used.unsqueeze(-1), x, 1.0 / classes if input == "probs" else 0.0)
        if input == "logits":
            lse = torch.logsumexp(x, -1)
            p = (x - lse.unsqueeze(-1)).exp()
        else:
            lse, p = x.new_zeros(len(x)), x
        weight = x.new_ones(len(x)) if weight is None else weight
        yield _Rows(where, x, p, lse, label.double() if label.is_floating_point() else label, weight, nan)


def _unit(logits: Tensor) -> float:
    """The relative rounding of the softmax."""
    return torch.finfo(compute_dtype(logits.dtype)).eps


def joint(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> Finding | None:
    """Check the op ``joint``."""
    logits, target, _, num_labels, _, input = args
    S, n, lse, ce = out
    rows, classes = logits.shape
    if rows == 0:
        return None
    unit, soft = _ROUNDINGS * _unit(logits), target.is_floating_point()
    probe = _probe(classes, logits.device)
    want, mass, bound = S.new_zeros(num_labels, 2), n.new_zeros(num_labels), n.new_zeros(num_labels)
    want_n, want_ce, ce_bound, bad = n.new_zeros(num_labels), n.new_zeros(()), n.new_zeros(()), n.new_zeros(())
    lse_error = n.new_zeros(())
    for block in _blocks(*args):
        products = block.p @ probe
        height = block.p.abs().sum(-1)
        # exp(x - lse) is off by the rounding of the exponent: that of lse, and of lse - x, whose mean is the entropy; and sums on
        # tensor cores may truncate at each of 16 steps
        roundings = unit * (8 + block.lse.abs() + math.log(classes))
        if soft:
            t = block.label * block.weight.unsqueeze(-1)
            want += t.mT @ products
            want_n += t.sum(0)
            mass += t.abs().mT @ height
            bound += t.abs().mT @ (height * roundings)
            none = (t == 0) & (block.p == 0)
            logp = torch.where(none, 1, block.p).log() if input == "probs" else block.x - block.lse.unsqueeze(-1)
            terms = t * torch.where(t == 0, 0, logp)
            want_ce -= terms.sum()
            ce_bound += (t.abs().sum(-1) * roundings).sum() + unit * terms.abs().sum()
        else:
            w = block.weight
            want.index_add_(0, block.label, products * w.unsqueeze(-1))
            want_n.index_add_(0, block.label, w)
            mass.index_add_(0, block.label, w * height)
            bound.index_add_(0, block.label, w * height * roundings)
            own = (block.label % classes).unsqueeze(-1)
            logp = block.p.gather(1, own).log() if input == "probs" else block.x.gather(1, own) - block.lse.unsqueeze(-1)
            want_ce -= (w * logp.squeeze(-1)).sum()
            ce_bound += (w * (roundings + unit * logp.squeeze(-1).abs())).sum()
        if input == "logits":
            counts = block.weight != 0
            lse_bound = torch.where(counts, unit * (4 + block.lse.abs()), torch.inf)
            lse_error = torch.maximum(lse_error, _error(lse[block.where], torch.where(counts, block.lse, 0), lse_bound))
        if block.nan is not None:
            bad = bad + block.nan
    sums = 4 * (rows + 64) * _EPS  # of fp64 sums
    conclusive = torch.isfinite(want.sum() + want_n.sum() + bad) & (bound.sum() <= _VAGUE * mass.sum()) & (mass.sum() > 1e-250)
    conclusive = conclusive & (mass.sum() < 1e250)
    errors = {
        "S 1 against the class weights": _error(S.sum(-1), want[:, 0], bound + sums * mass),
        "the columns of S": _error(S @ probe[:, 1], want[:, 1], bound + sums * mass),
        "the class weights n": _error(n, want_n, (unit + sums if soft else sums) * want_n.abs().clamp(min=mass.max() * _EPS)),
        "the sums of exponentials": lse_error,
        "the cross entropy": torch.where(torch.isfinite(want_ce), _error(ce, want_ce, ce_bound + sums * want_ce.abs()), 0),
    }
    return _finding(conclusive, {name: torch.where(conclusive, error, 0) for name, error in errors.items()})


class _Scaled(NamedTuple):
    """R = diag(1/n) S and the transposed of its inverse, in the classes that are kept [..., C, C], and their norms [...]."""

    R: Tensor
    X_T: Tensor
    n: Tensor
    norm: Tensor
    inverse_norm: Tensor


def _scaled(S: Tensor, n: Tensor, V: Tensor) -> _Scaled:
    present = present_classes(n)
    keep = present.unsqueeze(-1) & present.unsqueeze(-2)
    n = torch.where(present, n, 1)
    R, X_T = torch.where(keep, S / n.unsqueeze(-1), 0), torch.where(keep, V * n.unsqueeze(-1), 0)
    return _Scaled(R, X_T, n, R.abs().sum(-1).amax(-1), X_T.abs().sum(-2).amax(-1))


def logdet_inverse(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> Finding | None:
    """Check the op ``logdet_inverse``; of many matrices a part."""
    S, n, absent = args
    classes = S.shape[-1]
    if S.numel() == 0:
        return None
    S, n = S.reshape(-1, classes, classes), n.reshape(-1, classes)
    step = -(-S.numel() // (8 * _BLOCK_ELEMENTS)) if S.shape[0] > 1 else 1
    S, n = S[::step], n[::step]
    log_abs_det, sign, kept = (value.reshape(-1)[::step] for value in out[:3])
    V = out[3].reshape(-1, classes, classes)[::step]
    want_log, want_sign, want_kept, want_V = composite.logdet_inverse(S, n, absent)
    present = present_classes(n)
    finite = torch.isfinite(S).all(-1).all(-1) & torch.isfinite(n).all(-1)
    known = _scaled(S, n, want_V)
    condition = known.norm * known.inverse_norm
    rounding = _ROUNDINGS * classes * _EPS * condition
    # an elimination without refinement leaves a residual of the condition number times its error
    known_right = finite & (want_sign != 0) & present.any(-1) & (rounding * condition <= _VAGUE)
    ours = _scaled(S, n, V)
    probe = _probe(classes, S.device)
    inside = torch.where(present.unsqueeze(-1), probe, 0)
    residual = (ours.R @ (ours.X_T.mT @ inside) - inside).abs().amax((-2, -1))
    log_bound = rounding + 8 * classes * _EPS * (want_log.abs() + torch.where(present, known.n, 1).log().abs().sum(-1))
    is_singular = finite & (sign == 0)
    missing = finite & present.any(-1) & ~present.all(-1) & (absent == "strict")

    def worst(error: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, error, 0).max()

    def false(statement: Tensor, where: Tensor) -> Tensor:
        return torch.where((where & ~statement).any(), torch.inf, 0.0)

    outside = torch.where(present.unsqueeze(-1) & present.unsqueeze(-2), 0, V)
    errors = {
        "the residual of S V^T = I": worst(residual / (rounding * condition + _TINY), known_right),
        "log|det S|": worst((log_abs_det - want_log).abs() / (log_bound + _TINY), known_right),
        "the sign of det S": false(sign == want_sign, known_right | missing),
        "the number of classes kept": false(kept == want_kept, finite),
        "V of absent classes": false((outside == 0).all(-1).all(-1), finite),
        "V of a singular matrix": false((V == 0).all(-1).all(-1), is_singular),
    }
    return _finding(known_right.any(), errors)


def logits_grad(
    args: tuple[Any, ...], out: Tensor, V_bound: Tensor | None = None, scale_bound: Tensor | float = 0.0
) -> Finding | None:
    """Check the op ``logits_grad``.

    Args:
        args: the op's arguments.
        out: its result.
        V_bound: [K], by how much the entries in a row of V themselves may be off.
        scale_bound: by how much ``scale`` itself may be off.
    """
    logits, target, sample_weight, _, V, scale, ce_scale, ignore_index, input = args
    rows, classes = logits.shape
    if rows == 0:
        return None
    soft, rounding = target.is_floating_point(), torch.finfo(out.dtype)
    unit = _ROUNDINGS * _unit(logits)
    V, scale, ce_scale = V.double(), scale.double(), ce_scale.double()
    slack = rounding.eps * rounding.tiny if out.dtype == torch.float16 else rounding.tiny
    error, size, bad = V.new_zeros(()), V.new_zeros(()), V.new_zeros(())
    for block in _blocks(logits, target, sample_weight, V.shape[0], ignore_index, input):
        p, w = block.p, block.weight.unsqueeze(-1)
        v = block.label @ V if soft else V[block.label]
        high = block.label.abs() @ V.abs() if soft else v.abs()
        if V_bound is not None:
            more = block.label.abs() @ V_bound if soft else V_bound[block.label]
        own = block.label if soft else (block.label % classes).unsqueeze(-1)
        t = own if soft else torch.zeros_like(p).scatter_(1, own, 1.0)
        if input == "logits":
            g = -scale * p * (v - (p * v).sum(-1, keepdim=True)) + ce_scale * (p * t.sum(-1, keepdim=True) - t)
            # the exponent's rounding, where p is not 0
            below = (block.lse.unsqueeze(-1) - block.x).clamp(max=1e6)
            roundings = unit * (4 + 2 * block.lse.abs().unsqueeze(-1) + below)
            mean = (p * high).sum(-1, keepdim=True)
            spread = p * (high + mean) + (p * high * below).sum(-1, keepdim=True) * p
            bound = roundings * (scale.abs() * spread + ce_scale.abs() * (p * t.abs().sum(-1, keepdim=True) + t.abs()))
            # Products below the smallest normal number may be flushed to 0; kernels take V relative to its largest entry.
            lost = 4 * torch.finfo(compute_dtype(logits.dtype)).tiny
            bound = bound + lost * (scale.abs() * V.abs().max() + ce_scale.abs() * t.abs().sum(-1, keepdim=True))
            moved = 2 * p
        else:
            ratio = torch.where(t == 0, 0, t / p)
            g = -scale * v - torch.where(ce_scale == 0, 0, ce_scale * ratio)
            bound = 4 * unit * (scale.abs() * high + torch.where(ce_scale == 0, 0, ce_scale.abs() * ratio.abs()))
            spread, moved = high, torch.ones_like(p)
        bound = bound + scale_bound * spread
        if V_bound is not None:
            bound = bound + scale.abs() * moved * more.unsqueeze(-1)
        g, bound = w * g, w * bound
        bound = bound + 2 * rounding.eps * g.abs() + 4 * slack
        error = torch.maximum(error, _error(out[block.where], g, bound))
        size = torch.maximum(size, g.abs().max())
        if block.nan is not None:
            bad = bad + block.nan
    range_of_softmax = torch.finfo(compute_dtype(logits.dtype)).max
    largest = torch.maximum(V.abs().max(), (V * scale).abs().max()) if V.numel() else V.new_zeros(())
    conclusive = torch.isfinite(size + bad + scale + ce_scale) & (size < rounding.max / 16) & (size > 16 * slack)
    conclusive = conclusive & (largest < range_of_softmax**0.75)
    return _finding(conclusive, {"rows of the gradient": torch.where(conclusive, error, 0)})


class _Expected(NamedTuple):
    """What joint and logdet_inverse say of a loss, and how far another order of the same sums may be from it."""

    conclusive: Tensor
    loss: Tensor
    loss_bound: Tensor
    level_bound: Tensor
    lse: Tensor
    V: Tensor
    V_bound: Tensor
    scale: Tensor
    ce_scale: Tensor


def _expected(args: tuple[Any, ...], joint: Joint, logdet_inverse: LogdetInverse) -> _Expected:
    logits, target, sample_weight, ignore_index, absent, eps, normalize, cross_entropy_weight, input = args[:9]
    classes, unit = logits.shape[1], _ROUNDINGS * _unit(logits)
    S, n, lse, ce = joint(logits, target, sample_weight, classes, ignore_index, input)
    log_abs_det, sign, kept, V = logdet_inverse(S, n, absent)
    total = total_weight(target, sample_weight, n)
    loss, scale, ce_scale = combine(log_abs_det, kept, total, ce, eps, normalize, cross_entropy_weight)
    known = _scaled(S, n, V)
    # how much an entry of R, a mean of probabilities, may be off: see joint, and p log(1/p) has its largest mean where all are equal
    height = lse.double().abs().max()
    D = unit * known.R.abs() * (8 + height - known.R.abs().clamp(1e-30, 1).log())
    growth = known.inverse_norm * D.sum(-1).amax()
    condition = known.norm * known.inverse_norm
    rounding = _ROUNDINGS * classes * _EPS * condition
    growth = 2 * growth + rounding
    level_bound = 2 * (known.X_T.abs() * D).sum() + rounding + 8 * classes * _EPS * log_abs_det.abs()
    loss_bound = level_bound + unit * loss.abs()
    if cross_entropy_weight != 0:
        loss_bound = loss_bound + unit * (4 + height + math.log(classes)) * ce_scale * (total + ce.abs())
    conclusive = torch.isfinite(loss) & (sign != 0) & (kept > 0) & (growth <= _VAGUE) & (level_bound <= _VAGUE * (1 + loss.abs()))
    V_bound = growth * known.X_T.abs().max() / known.n
    return _Expected(conclusive, loss, loss_bound, level_bound, lse, V, V_bound, scale, ce_scale)


def loss_forward(args: tuple[Any, ...], out: tuple[Tensor, ...], joint: Joint, logdet_inverse: LogdetInverse) -> Finding | None:
    """Check the op ``loss_forward`` against the ops ``joint`` and ``logdet_inverse``, which have been checked."""
    logits, target, gradient, eps = args[0], args[1], args[9], args[5]
    loss, lse, V, scale, ce_scale = out
    if len(logits) == 0:
        return None
    want = _expected(args, joint, logdet_inverse)
    errors = {
        "the loss": _error(loss, want.loss, want.loss_bound),
        "scale": _error(scale, want.scale, (want.level_bound if eps > 0 else 0) + 64 * _EPS * want.scale.abs()),
        "ce_scale": _error(ce_scale, want.ce_scale, (_unit(logits) if target.is_floating_point() else 1e-12) * want.ce_scale.abs()),
        "the sums of exponentials": _error(lse, want.lse.double(), 2 * _ROUNDINGS * _unit(logits) * (4 + want.lse.double().abs())),
    }
    if gradient:
        errors["V"] = _error(V, want.V, want.V_bound.unsqueeze(-1))
    return _finding(want.conclusive, {name: torch.where(want.conclusive, error, 0) for name, error in errors.items()})


def fused(args: tuple[Any, ...], out: tuple[Tensor, ...], joint: Joint, logdet_inverse: LogdetInverse) -> Finding | None:
    """Check the op ``fused`` against the ops ``joint`` and ``logdet_inverse``, which have been checked."""
    logits, target, sample_weight, ignore_index, _, eps, _, _, input = args
    loss, grad = out
    if len(logits) == 0:
        return None
    want = _expected(args, joint, logdet_inverse)
    found = _finding(want.conclusive, {"the loss": torch.where(want.conclusive, _error(loss, want.loss, want.loss_bound), 0)})
    if found is None or not found.right:
        return found
    given = (logits, target, sample_weight, want.lse, want.V, want.scale, want.ce_scale, ignore_index, input)
    rows = logits_grad(given, grad, want.V_bound, want.level_bound if eps > 0 else 0.0)
    return found if rows is None else max(found, rows)
