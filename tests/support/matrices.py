"""Joint matrices that are hard to factor: S [C, C] fp64, and class weights n [C], 1 where they do not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.experiments.paper.noise import CIFAR10N_COUNTS
from tests.support.compare import EPSILON

Matrix = npt.NDArray[np.float64]

CIFAR100N = Path(__file__).with_name("cifar100n.txt")


@dataclass(frozen=True)
class Hard:
    """``growth``: the factor by which entries grow under partial pivoting, with the largest multiplier at every step."""

    name: str
    S: Matrix
    n: Matrix
    growth: float = 1.0


def _plain(name: str, S: Matrix, growth: float = 1.0) -> Hard:
    return Hard(name, S, np.ones(len(S)), growth)


def _rotation(classes: int, rng: np.random.Generator) -> Matrix:
    return np.linalg.qr(rng.standard_normal((classes, classes)))[0]


def of_condition(classes: int, cond: float, rng: np.random.Generator) -> Hard:
    """Singular values from 1 down to 1 / cond, evenly on a logarithmic scale, between two random rotations."""
    values = cond ** -np.linspace(0, 1, classes) if classes > 1 else np.ones(1)
    return _plain(f"cond {cond:.0e}", (_rotation(classes, rng) * values) @ _rotation(classes, rng))


def graded(classes: int, rng: np.random.Generator) -> Hard:
    """Rows and columns from 1 down to 1e-5 each, and the diagonal with them."""
    size = 10.0 ** -np.linspace(0, 5, classes)
    return _plain("graded", size[:, None] * (rng.uniform(-1, 1, (classes, classes)) + 2 * np.eye(classes)) * size)


def near_permutation(classes: int, rng: np.random.Generator) -> Hard:
    """A permutation with signs, and 0.001 of noise everywhere."""
    S = rng.uniform(-1e-3, 1e-3, (classes, classes))
    S[np.arange(classes), rng.permutation(classes)] += rng.choice([-1.0, 1.0], classes)
    return _plain("near permutation", S)


def shifted(classes: int, rng: np.random.Generator) -> Hard:
    """The pivot is below the diagonal at every step: 1 in the next column, 1e-9 of noise."""
    return _plain("shifted", np.roll(np.eye(classes), 1, axis=1) + 1e-9 * rng.standard_normal((classes, classes)))


def hollow(classes: int) -> Hard:
    """Ones with a diagonal of zeros: the first pivot is not on the diagonal, and later entries are fractions."""
    return _plain("hollow", np.ones((classes, classes)) - np.eye(classes) * (1 if classes > 1 else 0))


def wilkinson(classes: int, transposed: bool) -> Hard:
    """Wilkinson's matrix, whose last column doubles at every step of partial pivoting."""
    S = np.eye(classes) - np.tril(np.ones((classes, classes)), -1)
    S[:, -1] = 1
    name = "wilkinson, transposed" if transposed else "wilkinson"
    return _plain(name, np.ascontiguousarray(S.T) if transposed else S, 2.0 ** (classes - 1))


def hardly_learned(classes: int, signal: float, rng: np.random.Generator) -> Hard:
    """A classifier's mean predictions before it can tell the classes apart: rows equal up to a relative difference ``signal``."""
    R = rng.dirichlet(np.full(classes, 20.0))[None, :] * (1 + signal * rng.standard_normal((classes, classes)))
    n = rng.uniform(1, 100, classes)
    return Hard(f"hardly learned, {signal:.0e}", R / R.sum(1, keepdims=True) * n[:, None], n)


def near_rank_one(classes: int, noise: float, rng: np.random.Generator) -> Hard:
    """The same with entries of either sign, and rows of any size."""
    S = np.outer(rng.standard_normal(classes), rng.standard_normal(classes))
    return _plain(f"near rank one, {noise:.0e}", S + noise * rng.standard_normal((classes, classes)))


def cifar10n() -> Iterator[Hard]:
    """How people mislabelled CIFAR-10, each of the published sets of labels."""
    for level, counts in CIFAR10N_COUNTS.items():
        S = np.array(counts, dtype=np.float64)
        yield Hard(f"CIFAR-10N {level}", S, S.sum(1))


def cifar100n() -> Hard:
    """How people mislabelled CIFAR-100."""
    S = np.loadtxt(CIFAR100N)
    return Hard("CIFAR-100N", S, S.sum(1))


def regular(classes: int, rng: np.random.Generator) -> list[Hard]:
    """All kinds that have an inverse, with ``classes`` classes."""
    found = [of_condition(classes, 10.0**power, rng) for power in range(0, 13, 2)]
    found += [graded(classes, rng), near_permutation(classes, rng), hollow(classes)]
    if classes > 1:
        found += [shifted(classes, rng)]
    if classes <= 40:  # above, growth leaves no correct digit under partial pivoting
        found += [wilkinson(classes, False), wilkinson(classes, True)]
    for power in (2, 5, 8):
        found += [hardly_learned(classes, 10.0**-power, rng), near_rank_one(classes, 10.0**-power, rng)]
    if classes == 10:
        found += cifar10n()
    if classes == 100:
        found.append(cifar100n())
    return found


def singular(classes: int, rng: np.random.Generator) -> Iterator[Hard]:
    """All kinds that have no inverse, whatever is rounded: because of the first, the middle or the last column, or row."""
    dense: Callable[[], Matrix] = lambda: rng.standard_normal((classes, classes))  # noqa: E731
    for at in sorted({0, classes // 2, classes - 1}):
        for name, turn in (("column", lambda S: S), ("row", lambda S: np.ascontiguousarray(S.T))):
            S = dense()
            S[:, at] = 0
            yield _plain(f"{name} {at} is zero", turn(S))
            if classes > 1:
                S = dense()
                S[:, at] = S[:, at - 1]
                yield _plain(f"{name} {at} twice", turn(S))
                S = dense()
                S[:, at] = -4 * S[:, at - 1]
                yield _plain(f"{name} {at} is a multiple", turn(S))
    if classes > 1:
        yield _plain("rank one", np.outer(2.0 ** rng.integers(-3, 3, classes), 2.0 ** rng.integers(-3, 3, classes)))
        R = rng.dirichlet(np.full(classes, 20.0))
        n = np.ldexp(1.0, rng.integers(0, 8, classes))
        yield Hard("the same prediction for all", n[:, None] * R, n)


def at_the_threshold(classes: int, rng: np.random.Generator) -> Iterator[tuple[str, Matrix, Matrix]]:
    """A matrix whose smallest pivot is the largest that still counts as singular, and the same with the next number, which does not.

    The rule is |pivot of R| <= C 2^-52 ||R||_inf. The pivots of these matrices are not rounded: a diagonal with this pivot first, in
    the middle or last; and a triangle of ones that has it last, its rows in random order.
    """

    def pair(name: str, S: Matrix, at: tuple[int, int], norm: float) -> tuple[str, Matrix, Matrix]:
        threshold = classes * EPSILON[torch.float64] * norm
        none, one = S.copy(), S.copy()
        none[at], one[at] = threshold, np.nextafter(threshold, 1)
        return name, none, one

    if classes == 1:
        return  # ||R||_inf is the pivot itself
    for k in sorted({0, classes // 2, classes - 1}):
        yield pair(f"diagonal, {k}", np.eye(classes), (k, k), 1.0)
    full = classes // 2 if classes > 2 else 0
    S = np.eye(classes)
    S[full, full:] = 1
    order = rng.permutation(classes)
    yield pair("triangle", S[order], (int(np.flatnonzero(order == classes - 1)[0]), classes - 1), float(classes - full))


def inverse(matrix: Matrix) -> npt.NDArray[np.longdouble]:
    """A^{-1} in extended precision, by Newton's iteration from LAPACK's inverse. Raises ArithmeticError if that does not converge."""
    A = matrix.astype(np.longdouble)
    X = np.linalg.inv(matrix).astype(np.longdouble)
    eye = np.eye(len(A), dtype=np.longdouble)
    before = np.inf
    for _ in range(12):
        residual = eye - A @ X
        size = float(np.abs(residual).max())
        if size >= before / 2:
            break
        before, X = size, X + X @ residual
    if not before < 1e-2:
        raise ArithmeticError(f"Newton's iteration left a residual of {before}")
    return X
