"""The loss and its gradients in extended precision, straight from the formulas, sharing no code with the package.

With P = softmax(Z) (or the probabilities given), labels y (or soft targets T), weights w and W = sum w::

    S = sum_i w_i e_{y_i} p_i^T           [C, C]   rows: labels, columns: predictions; soft: sum_i w_i T_i p_i^T
    R = diag(1 / n) S                               n_y = weight of class y; rows of R are mean predictions
    l = log|det S| - k log W                        k = number of classes kept; without k log W when not normalised
    loss = -log(exp(l) + eps) + a * (weighted mean cross entropy)
    V = S^{-T},  dloss/dp_i = -w_i V[y_i],  dloss/dT_iy = -w_i <p_i, V[y]>      (times sigmoid(l - log eps))
    dloss/dw_i = k / W - <p_i, V[y_i]>   (without k / W when not normalised; the same factor)   + a (ce_i - mean ce) / W

A class is kept if its share of the weight is at least ``ABSENT_SHARE`` and, for soft targets, if its share of a row is not the same in
all of them.

Everything runs in numpy's longdouble (64-bit significand on x86) up to ``EXTENDED_CLASSES`` classes, in float64 above,
where the factorisation is LAPACK's. ``test_oracle.py`` compares it with mpmath and with finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[np.floating]

ABSENT_SHARE = 1e-12
#: A column of soft targets whose entries differ by at most this, relatively, is constant up to rounding.
SAME = {np.dtype(np.float16): 2.0**-8, np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-6}

#: Above these the plain numpy elimination (no BLAS for longdouble) would take seconds.
EXTENDED_CLASSES = 130
EXTENDED_ELEMENTS = 1_000_000


@dataclass(frozen=True)
class Answer:
    """What the contract says about one batch."""

    loss: float
    grad: npt.NDArray[np.float64]  # d loss / d logits (or probabilities), shaped like them
    target_grad: npt.NDArray[np.float64] | None  # d loss / d soft targets, shaped like them; None for labels
    weight_grad: npt.NDArray[np.float64]  # d loss / d sample weights [N * d1 * ...]; 0 in rows that are not used
    share: float  # sigmoid(l - log eps): what eps leaves of the gradient; 1 without eps
    log_abs_det: float  # l above: -inf when singular, 0 for an empty batch
    sign: float  # of det S over the kept classes; 0 when singular
    counts: npt.NDArray[np.float64]  # n [C]
    absent: list[int]  # classes without weight
    kept: int  # k
    singular: bool
    cond: float  # condition number of R over the kept classes in the 2-norm, to within 1%; inf when singular
    cancellation: float  # largest term of the gradient with respect to the logits over its largest entry, >= 1
    V: npt.NDArray[np.float64]  # [C, C], rows and columns of absent classes zero
    joint: npt.NDArray[np.float64]  # S [C, C]


def dmi(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    absent: str = "present",
    eps: float = 0.0,
    normalize: bool = True,
    cross_entropy_weight: float = 0.0,
    input: str = "logits",
) -> Answer:
    """The loss and its gradients. ``logits``: (N, C, d1, ...); ``target``: integers (N, d1, ...) or floats (N, C, d1, ...)."""
    logits = np.asarray(logits)
    target = np.asarray(target)
    soft = target.dtype.kind == "f"
    classes = logits.shape[1]
    z = _rows(logits)
    extended = classes <= EXTENDED_CLASSES and z.size <= EXTENDED_ELEMENTS
    real: Any = np.longdouble if extended else np.float64
    z = z.astype(real)
    rows = len(z)
    weight = np.ones(rows, real) if sample_weight is None else np.asarray(sample_weight).reshape(rows).astype(real)
    if soft:
        membership = _rows(target).astype(real)
        used = weight > 0
    else:
        labels = target.reshape(rows).astype(np.int64)
        used = (weight > 0) & (labels != ignore_index)
        membership = np.zeros((rows, classes), real)
        membership[used, labels[used]] = 1
    z, membership, weight = z[used], membership[used], weight[used]

    def answer(loss: float, grad: Array, target_grad: Array, weight_grad: Array | None = None, **rest: Any) -> Answer:
        by_weight = np.zeros(rows)
        if weight_grad is not None:
            by_weight[used] = weight_grad
        return Answer(
            loss=float(loss),
            weight_grad=by_weight,
            grad=_like(logits, grad, used),
            target_grad=_like(logits, target_grad, used) if soft else None,
            counts=(weight[:, None] * membership).sum(0).astype(np.float64),
            **rest,
        )

    nothing = np.zeros_like(z)
    if not used.any():
        blank = np.zeros((classes, classes))
        return answer(
            0.0,
            nothing,
            nothing,
            share=1.0,
            log_abs_det=0.0,
            sign=1.0,
            absent=list(range(classes)),
            kept=classes if absent == "strict" else 0,
            singular=False,
            cond=1.0,
            cancellation=1.0,
            V=blank,
            joint=blank,
        )

    with np.errstate(all="ignore"):
        p, log_p = _probabilities(z) if input == "logits" else (z, np.log(z))
    if np.isnan(p).any() or np.isnan(membership).any():
        nans = np.full_like(z, np.nan)
        blank = np.full((classes, classes), np.nan)
        return answer(
            np.nan,
            nans,
            nans,
            share=np.nan,
            log_abs_det=np.nan,
            sign=np.nan,
            absent=[],
            kept=classes,
            singular=False,
            cond=np.nan,
            cancellation=np.nan,
            V=blank,
            joint=blank,
        )

    counts = weight @ membership
    present = (counts > 0) & (counts / counts.max() >= ABSENT_SHARE * (counts / counts.max()).sum())
    if soft:
        present &= _informative(membership, SAME[target.dtype])
    kept = int(present.sum()) if absent == "present" else classes
    joint = (weight[:, None] * membership).T @ p
    total = weight.sum()

    rates = (joint / np.where(present, counts, 1)[:, None])[np.ix_(present, present)]
    # The padded matrix has a row of the identity for every absent class, hence the 1.
    norm = max(np.abs(rates).sum(1).max(), 0 if present.all() else 1)
    factor = _invert(rates)
    smallest = np.abs(factor.pivots).min()
    singular = bool(smallest <= classes * 2.0**-52 * norm) or (absent == "strict" and not present.all())

    V = np.zeros((classes, classes), real)
    if singular:
        log_abs_det, sign, cond = real(-np.inf), 0.0, np.inf
    else:
        V[np.ix_(present, present)] = factor.inverse.T / counts[present][:, None]
        log_abs_det = factor.log_abs_det + np.log(counts[present]).sum() - (kept * np.log(total) if normalize else 0)
        sign, cond = factor.sign, _norm2(rates) * _norm2(factor.inverse)

    if eps > 0:
        loss = -np.logaddexp(log_abs_det, np.log(real(eps)))
        share = 1 / (1 + np.exp(np.log(real(eps)) - log_abs_det))
    else:
        loss, share = -log_abs_det, 1
    grad_p = -share * weight[:, None] * (membership @ V)
    target_grad = -share * weight[:, None] * (p @ V.T)
    weight_grad = share * ((kept / total if normalize and not singular else 0) - ((membership @ V) * p).sum(1))
    if input == "probs":
        grad, terms = grad_p, np.abs(grad_p)
    else:
        grad = p * (grad_p - (p * grad_p).sum(1, keepdims=True))
        terms = p * (np.abs(grad_p) + (p * np.abs(grad_p)).sum(1, keepdims=True))

    if cross_entropy_weight:
        scale = cross_entropy_weight * weight[:, None] / total
        with np.errstate(all="ignore"):
            ce = -np.where(membership == 0, 0, membership * log_p).sum(1)
            mean = (weight * ce).sum() / total
            loss = loss + cross_entropy_weight * mean
            weight_grad = weight_grad + cross_entropy_weight * (ce - mean) / total
            if input == "probs":
                grad = grad - scale * np.where(membership == 0, 0, membership / p)
            else:
                grad = grad + scale * (membership.sum(1, keepdims=True) * p - membership)
                terms = terms + scale * (membership.sum(1, keepdims=True) * p + membership)
            # As for torch.xlogy: T log p has slope 0 in T where both are 0.
            target_grad = target_grad - scale * np.where((membership == 0) & (log_p == -np.inf), 0, log_p)

    return answer(
        loss,
        grad,
        target_grad,
        weight_grad,
        share=float(share),
        log_abs_det=float(log_abs_det),
        sign=float(sign),
        absent=np.flatnonzero(~present).tolist(),
        kept=kept,
        singular=singular,
        cond=cond,
        cancellation=float(max(1, terms.max() / np.abs(grad).max())) if grad.any() else 1.0,
        V=V.astype(np.float64),
        joint=joint.astype(np.float64),
    )


def _informative(T: Array, same: float) -> npt.NDArray[np.bool_]:
    """The columns of the soft targets T that distinguish samples: those whose share of a row is not the same in all rows."""
    columns = T.shape[1]
    rows = T[T.sum(1) != 0]
    if len(rows) == 0:
        return np.ones(columns, bool)
    shares = rows / rows.sum(1, keepdims=True)
    constant = np.array([np.ptp(shares[:, c]) <= same * abs(shares[:, c].max()) for c in range(columns)])
    if not constant.all():
        return ~constant
    # one sample, or samples of one class: only the classes with the largest target count
    return shares.max(0) >= shares.max() * (1 - same)


@dataclass(frozen=True)
class _Inverse:
    inverse: Array
    pivots: Array
    log_abs_det: np.floating
    sign: float


def _invert(matrix: Array) -> _Inverse:
    """Inverse, pivots and log|det| by elimination with partial pivoting."""
    if matrix.dtype == np.float64:
        with np.errstate(all="ignore"):
            factor, swaps = scipy.linalg.lu_factor(matrix, check_finite=False)
        pivots = np.diagonal(factor)
        sign = float(np.prod(np.sign(pivots))) * (-1) ** int((swaps != np.arange(len(swaps))).sum())
        solvable = np.abs(pivots).min() > 0
        inverse = scipy.linalg.lu_solve((factor, swaps), np.eye(len(matrix))) if solvable else np.zeros_like(matrix)
    else:
        inverse, pivots, sign = _gauss_jordan(matrix)
    with np.errstate(divide="ignore"):
        return _Inverse(inverse, pivots, np.log(np.abs(pivots)).sum(), sign)


def _gauss_jordan(matrix: Array) -> tuple[Array, Array, float]:
    n = len(matrix)
    table = np.concatenate([matrix, np.eye(n, dtype=matrix.dtype)], axis=1)
    pivots = np.zeros(n, matrix.dtype)
    sign = 1.0
    for j in range(n):
        best = j + int(np.argmax(np.abs(table[j:, j])))
        if best != j:
            table[[j, best]] = table[[best, j]]
            sign = -sign
        pivot = table[j, j]
        pivots[j] = pivot
        if pivot == 0:
            return np.zeros_like(matrix), pivots, 0.0
        sign *= float(np.sign(pivot))
        table[j] /= pivot
        column = table[:, j].copy()
        column[j] = 0
        table -= column[:, None] * table[j]
    return table[:, n:], pivots, sign


def _norm2(matrix: Array) -> float:
    """The largest singular value; where an SVD would take seconds, from below by power iteration."""
    matrix = matrix.astype(np.float64)
    if len(matrix) <= 200:
        return float(np.linalg.norm(matrix, 2))
    vector = np.random.default_rng(0).standard_normal(len(matrix))
    for _ in range(50):
        vector = matrix.T @ (matrix @ vector)
        vector /= np.linalg.norm(vector)
    return float(np.linalg.norm(matrix @ vector))


def _probabilities(z: Array) -> tuple[Array, Array]:
    """softmax and log softmax of the rows; NaN where a row has no finite logit, or +inf or NaN ones."""
    shifted = z - z.max(1, keepdims=True)
    exp = np.exp(shifted)
    total = exp.sum(1, keepdims=True)
    return exp / total, shifted - np.log(total)


def _rows(array: Array) -> Array:
    """(N, C, d1, ...) -> (N * d1 * ..., C), the rows in the order of a flattened (N, d1, ...) target."""
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


def _like(logits: Array, rows: Array, used: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The inverse of ``_rows``, with zeros in the rows that were not used."""
    full = np.zeros((used.size, logits.shape[1]))
    full[used] = rows
    batch, classes, *rest = logits.shape
    return np.moveaxis(full.reshape(batch, *rest, classes), -1, 1)
