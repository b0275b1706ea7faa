"""logdet_inverse: log|det S|, its sign, the number of classes kept and V = S^{-T}, of the classes that have weight.

Equilibrated, R = diag(1/n) S. Few classes: one program holds R in registers (fp64) and turns it into its inverse in place, by
Gauss-Jordan elimination with partial pivoting; the pivots are those of LU, and so is the rule for singular. Many classes: the LU of
torch, whose calls here neither synchronise nor raise (torch.linalg.inv and torch.linalg.solve would), in the memory of S and of V.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...precision import EPSILON, singular_threshold
from ...presence import ABSENT_SHARE, present_classes
from ..combine import combine
from . import plan
from .launch import bits, on_device_of, wrap_triton
from .rows import to_double


@triton.jit
def gauss_jordan(A, classes, threshold, B: tl.constexpr):
    """Eliminates A [B, B] fp64, whose first ``classes`` rows and columns hold R and the rest the identity.

    Rows stay where they are; column k is eliminated with row perm[k], the one of the largest entry among those not yet used. The
    result M holds the inverse with its rows and columns permuted: R^{-1}[k, perm[c]] = M[perm[k], c].

    Returns M, perm [B] (by column), its inverse (by row), the pivots [B], and whether one is <= threshold.
    """
    r, c = tl.arange(0, B), tl.arange(0, B)
    unused = r < classes
    perm, column_of = c, r
    pivots = tl.full([B], 1.0, tl.float64)
    singular = tl.zeros([], tl.int32)
    for k in range(classes):
        column = tl.sum(tl.where(c[None, :] == k, A, 0.0), axis=1)
        p = tl.argmax(tl.where(unused, tl.abs(column), -1.0), axis=0)
        row = tl.sum(tl.where(r[:, None] == p, A, 0.0), axis=0)
        pivot = tl.sum(tl.where(c == k, row, 0.0), axis=0)
        small = tl.abs(pivot) <= threshold
        singular = tl.where(small, 1, singular)
        pivot = tl.where(small, 1.0, pivot)  # the result is then not used; this avoids infinities
        pivots = tl.where(c == k, pivot, pivots)
        perm = tl.where(c == k, p, perm)
        column_of = tl.where(r == p, k, column_of)
        unused = unused & (r != p)
        reciprocal = 1.0 / pivot
        row = tl.where(c == k, reciprocal, row * reciprocal)
        factor = tl.where(r == p, 0.0, column)
        rest = tl.where(c[None, :] == k, 0.0, A) - factor[:, None] * row[None, :]
        A = tl.where(r[:, None] == p, row[None, :], rest)
    return A, perm, column_of, pivots, singular


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


_ABSENT_SHARE = tl.constexpr(ABSENT_SHARE)
_EPSILON = tl.constexpr(EPSILON[torch.float64])
_EPSILON_SINGLE = tl.constexpr(EPSILON[torch.float32])


@triton.jit
def least_weight(n):
    """The least weight of a class that is present, of the weights n [B] (0 in the padding): present_classes."""
    return tl.sum(tl.where(n < 0.0, 0.0, _ABSENT_SHARE * n), axis=0)


@triton.jit
def is_present(n, least):
    return (n > 0.0) & ((n < least) == 0)


@triton.jit
def equilibrated(S, n, classes, SINGLE: tl.constexpr, B: tl.constexpr):
    """R [B, B] with the identity in the rows and columns of absent classes and of the padding, from S [B, B] and n [B] by row.

    SINGLE: whether S came in single precision. Returns R, n where it divides and 1 elsewhere [B], present [B], all finite (0 or 1),
    and the threshold for pivots, precision.singular_threshold.
    """
    r, c = tl.arange(0, B), tl.arange(0, B)
    inside = r < classes
    non_finite = tl.sum(tl.where(inside & (is_finite(n) == 0), 1, 0), axis=0)
    non_finite += tl.sum(tl.sum(tl.where(inside[:, None] & (c < classes)[None, :] & (is_finite(S) == 0), 1, 0), axis=1), axis=0)
    finite = non_finite == 0
    present = inside & is_present(n, least_weight(tl.where(inside, n, 0.0)))
    present_c = along_columns(present.to(tl.int32), B) > 0
    divides = present & finite
    keep = divides[:, None] & present_c[None, :]
    n_safe = tl.where(divides, n, 1.0)
    R = tl.where(keep, S, (r[:, None] == c[None, :]).to(tl.float64)) / n_safe[:, None]
    norm = tl.max(tl.where(inside, tl.sum(tl.abs(R), axis=1), 0.0), axis=0)
    epsilon: tl.constexpr = _EPSILON_SINGLE if SINGLE else _EPSILON
    return R, n_safe, present, finite, classes * epsilon * norm


@triton.jit
def along_columns(v, B: tl.constexpr):
    """A vector [B] by row as the same vector by column."""
    r, c = tl.arange(0, B), tl.arange(0, B)
    return tl.sum(tl.where(r[:, None] == c[None, :], v[:, None], 0), axis=0)


@triton.jit
def log_abs_det_and_sign(n_safe, present, pivots, column_of, singular, finite, classes, B: tl.constexpr):
    """log|det S| and its sign, with -inf and 0 where singular, NaN where not finite."""
    r, c = tl.arange(0, B), tl.arange(0, B)
    log_abs_det = tl.sum(tl.where(c < classes, tl.log(tl.abs(pivots)), 0.0), axis=0)
    log_abs_det += tl.sum(tl.where(present, tl.log(n_safe), 0.0), axis=0)
    # the parity of the permutation: how many pairs are out of order
    by_column = along_columns(column_of, B)
    pairs = (r[:, None] < c[None, :]) & (c < classes)[None, :] & (column_of[:, None] > by_column[None, :])
    odd = tl.sum(tl.sum(pairs.to(tl.int32), axis=1), axis=0) + tl.sum(((c < classes) & (pivots < 0.0)).to(tl.int32), axis=0)
    sign = (1 - 2 * (odd % 2)).to(tl.float64)
    nan = tl.where(finite, 0.0, float("nan")).to(tl.float64)
    return tl.where(singular, -float("inf"), log_abs_det) + nan, tl.where(singular, 0.0, sign) + nan


@triton.jit
def combined(
    log_abs_det, kept, total, ce, log_eps, cross_entropy_weight, EPS: tl.constexpr, NORMALIZE: tl.constexpr, CE: tl.constexpr
):
    """engines.combine in a kernel: loss, scale, ce_scale."""
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    level = log_abs_det
    if NORMALIZE:
        level = log_abs_det - kept.to(tl.float64) * tl.log(safe)
    if EPS:
        above = level - log_eps
        loss = -tl.where(above > 0.0, level, log_eps) - tl.log(1.0 + tl.exp(-tl.abs(above)))
        scale = 1.0 / (1.0 + tl.exp(-above))
    else:
        loss = -level
        scale = tl.full([], 1.0, tl.float64)
    loss = tl.where(empty, 0.0, loss)
    ce_scale = cross_entropy_weight / safe
    if CE:
        loss += ce_scale * ce
    return loss, scale, ce_scale


@triton.jit(do_not_specialize=["log_eps", "cross_entropy_weight"])
def _small_kernel(
    S,
    n,
    log_abs_det,
    sign,
    kept,
    V,
    total,
    ce,
    loss,
    scale,
    ce_scale,
    classes,
    log_eps,
    cross_entropy_weight,
    STRICT: tl.constexpr,
    SINGLE: tl.constexpr,
    COMBINE: tl.constexpr,
    EPS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CE: tl.constexpr,
    B: tl.constexpr,
):
    """One matrix a program. With COMBINE (one matrix): from log|det S| to the loss in the same launch."""
    problem = tl.program_id(0).to(tl.int64)
    S += problem * classes * classes
    n += problem * classes
    V += problem * classes * classes
    r, c = tl.arange(0, B), tl.arange(0, B)
    inside = (r < classes)[:, None] & (c < classes)[None, :]
    matrix = tl.load(S + r[:, None] * classes + c[None, :], mask=inside, other=0.0).to(tl.float64)
    weights = tl.load(n + r, mask=r < classes, other=0.0).to(tl.float64)
    R, n_safe, present, finite, threshold = equilibrated(matrix, weights, classes, SINGLE, B)
    count = tl.sum(present.to(tl.int32), axis=0)
    M, perm, column_of, pivots, small = gauss_jordan(R, classes, threshold, B)
    singular = small > 0
    keeps = count
    if STRICT:
        singular = singular | ((count < classes) & (count > 0))
        keeps = tl.where(count == 0, 0, classes)
    singular = singular & finite
    value, its_sign = log_abs_det_and_sign(n_safe, present, pivots, column_of, singular, finite, classes, B)
    # V = R^{-T} / n has M[i, c] in row perm[c] and column column_of[i]
    n_to = tl.load(n + perm, mask=c < classes, other=0.0).to(tl.float64)
    n_from = tl.load(n + column_of, mask=r < classes, other=0.0).to(tl.float64)
    least = least_weight(weights)
    to_present = is_present(n_to, least)
    keep = is_present(n_from, least)[:, None] & to_present[None, :] & (singular == 0)
    out = tl.where(keep, M / tl.where(to_present, n_to, 1.0)[None, :], 0.0)
    out += tl.where(finite, 0.0, float("nan")).to(tl.float64)
    tl.store(V + perm[None, :] * classes + column_of[:, None], out, mask=inside)
    if COMBINE:
        result, its_scale, its_ce_scale = combined(
            value, keeps, tl.load(total), tl.load(ce), to_double(log_eps), to_double(cross_entropy_weight), EPS, NORMALIZE, CE
        )
        tl.store(loss, result)
        tl.store(scale, its_scale)
        tl.store(ce_scale, its_ce_scale)
    else:
        tl.store(log_abs_det + problem, value)
        tl.store(sign + problem, its_sign)
        tl.store(kept + problem, keeps.to(tl.int64))


def _warps(block: int) -> int:
    """Enough warps that no compiler puts a value on the stack: 32 x 32 doubles are 16 registers per thread in 4 warps, 64 x 64 in
    16."""
    return 16 if block > 32 else 4 if block > 16 else 2


def log_det(S: Tensor, n: Tensor, absent: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``composite.logdet_inverse`` defines."""
    classes = int(S.shape[-1])
    batch = S.shape[:-2]
    if classes > plan.GAUSS_JORDAN_CLASSES or math.prod(batch) == 0:
        return _by_lu(S.clone(memory_format=torch.contiguous_format), n.contiguous(), absent)
    S, n = S.contiguous(), n.contiguous()
    V = torch.empty_like(S)
    log_abs_det, sign = S.new_empty(batch), S.new_empty(batch)
    kept = S.new_empty(batch, dtype=torch.int64)
    block = plan.tile_width(classes)
    with on_device_of(S):
        wrap_triton(_small_kernel)[(math.prod(batch),)](
            S,
            n,
            log_abs_det,
            sign,
            kept,
            V,
            S,
            S,
            S,
            S,
            S,
            classes,
            0,
            0,
            STRICT=absent == "strict",
            SINGLE=S.dtype == torch.float32,
            COMBINE=False,
            EPS=False,
            NORMALIZE=False,
            CE=False,
            B=block,
            num_warps=_warps(block),
        )
    return log_abs_det, sign, kept, V


def log_det_and_loss(
    S: Tensor,
    n: Tensor,
    total: Tensor,
    ce: Tensor,
    absent: str,
    eps: float,
    normalize: bool,
    cross_entropy_weight: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``log_det`` and ``combine`` of one problem: loss [] in ``dtype``, V [C, C], scale [] and ce_scale []. S may be overwritten."""
    classes = int(S.shape[-1])
    if classes > plan.GAUSS_JORDAN_CLASSES:
        log_abs_det, _, kept, V = _by_lu(S, n, absent)
        value, scale, ce_scale = combine(log_abs_det, kept, total, ce, eps, normalize, cross_entropy_weight)
        return value.to(dtype), V, scale, ce_scale
    V = torch.empty_like(S)
    loss, scale, ce_scale = S.new_empty((), dtype=dtype), S.new_empty(()), S.new_empty(())
    block = plan.tile_width(classes)
    with on_device_of(S):
        wrap_triton(_small_kernel)[(1,)](
            S,
            n,
            S,
            S,
            S,
            V,
            total,
            ce,
            loss,
            scale,
            ce_scale,
            classes,
            bits(math.log(eps)) if eps > 0 else 0,
            bits(cross_entropy_weight),
            STRICT=absent == "strict",
            SINGLE=False,
            COMBINE=True,
            EPS=eps > 0,
            NORMALIZE=normalize,
            CE=cross_entropy_weight != 0,
            B=block,
            num_warps=_warps(block),
        )
    return loss, V, scale, ce_scale


def _by_lu(A: Tensor, n: Tensor, absent: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by torch's LU and its triangular solves, of A = S, which it overwrites with V: no synchronisation, no exception.

    Two matrices are all the memory that it takes, A and X. A becomes R = diag(1/n) S, and then holds the factors P L U = R^T (LAPACK
    is column-major). R^{-1} = P (L^T)^{-1} (U^T)^{-1} is solved for in X, which holds it column-major, and that is R^{-T}.
    """
    classes = A.shape[-1]
    present = present_classes(n)
    empty = ~present.any(-1)
    finite = torch.isfinite(A.amax((-2, -1))) & torch.isfinite(A.amin((-2, -1))) & torch.isfinite(n).all(-1)
    divides = present & finite.unsqueeze(-1)
    n_safe = torch.where(divides, n, 1)

    def clear(of: Tensor) -> None:
        """Zeros in the rows and columns of absent classes."""
        A.masked_fill_(~(of.unsqueeze(-1) & of.unsqueeze(-2)), 0)

    clear(divides)
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(divides, diagonal, 1))
    A.div_(n_safe.unsqueeze(-1))
    norm = torch.linalg.vector_norm(A, 1, dim=-1).amax(-1)
    lu = A.mT
    pivots, info = torch.empty_like(n, dtype=torch.int32), torch.empty_like(finite, dtype=torch.int32)
    torch.linalg.lu_factor_ex(lu, out=(lu, pivots, info))
    threshold = singular_threshold(classes, norm)
    singular = (diagonal.abs() <= threshold.unsqueeze(-1)).any(-1)
    kept = present.sum(-1)
    if absent == "strict":
        singular = singular | (~present.all(-1) & ~empty)
        kept = torch.where(empty, 0, classes)
    singular = singular & finite
    nan = torch.where(finite, 0.0, torch.nan).to(A.dtype)
    log_abs_det = diagonal.abs().log().sum(-1) + torch.where(divides, n_safe.log(), 0).sum(-1)
    swaps = (pivots != torch.arange(1, classes + 1, device=A.device)).sum(-1)
    sign = diagonal.sign().prod(-1) * (1 - 2 * (swaps % 2))
    X = torch.empty_like(A, memory_format=torch.contiguous_format).zero_()
    X.diagonal(dim1=-2, dim2=-1).fill_(1)
    column_major = X.mT
    # where P has row j of X, by what it does to 0, 1, 2, ...; torch.linalg.lu_solve of X itself would make a copy of it for that
    numbers = torch.arange(classes, dtype=A.dtype, device=A.device).unsqueeze(-1).expand(*n.shape, 1).contiguous()
    place = torch.linalg.lu_solve(column_major, pivots, numbers).squeeze(-1).long()
    torch.linalg.solve_triangular(A, column_major, upper=False, out=column_major)
    torch.linalg.solve_triangular(A, column_major, upper=True, unitriangular=True, out=column_major)
    A.scatter_(-1, place.unsqueeze(-2).expand(X.shape), X)
    del X, column_major
    A.div_(n_safe.unsqueeze(-1))
    clear(divides & ~singular.unsqueeze(-1))
    A.add_(nan[..., None, None])
    return torch.where(singular, -torch.inf, log_abs_det) + nan, torch.where(singular, 0, sign) + nan, kept, A
