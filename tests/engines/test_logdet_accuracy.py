"""The accuracy of logdet_inverse in every engine, on matrices of condition 1 to 1e12, graded, near a permutation, near rank one, that
need a pivot at every step or let entries grow, of real label noise; and which matrices it reports as singular.

- backward error: ||S V^T - I|| <= 10 C eps ||S|| ||V||, whatever the condition (infinity norms; S and V in the units of R)
- V, of its largest entry: 1e-11 at a condition of 1e6 and below
- log|det S|: the effect of a relative error of C eps cond(R) in a factor
- singular: a pivot of R of C 2^-52 ||R||_inf or less, to the last bit where pivots are not rounded
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from ldmi_fast.engines.choose import engine_module
from tests.support import matrices
from tests.support.compare import EPSILON, EXACT
from tests.support.matrices import Hard

EPS = EPSILON[torch.float64]
#: On both sides of every edge between kernels: registers of a warp, panels, vectors, a block's shared memory
CLASSES = [1, 2, 3, 5, 8, 9, 10, 14, 16, 17, 26, 31, 32, 33, 48, 64, 65, 97, 100, 128]
LARGE = [171, 600, 1025, 2100]


def factor(engine: str, device: torch.device, S: npt.ArrayLike, n: npt.ArrayLike) -> tuple[Tensor, ...]:
    """The result of an engine's op, on the CPU."""
    arguments = torch.as_tensor(np.asarray(S), device=device), torch.as_tensor(np.asarray(n), device=device), "present"
    results = engine_module(engine).logdet_inverse(*arguments)
    return tuple(result.cpu() for result in results)


def factor_all(engine: str, device: torch.device, hard: list[Hard]) -> list[tuple[Tensor, ...]]:
    """All of them in one call."""
    results = factor(engine, device, np.stack([h.S for h in hard]), np.stack([h.n for h in hard]))
    return list(zip(*results, strict=True))


def norm(matrix: npt.NDArray[np.floating]) -> float:
    return float(np.abs(matrix).sum(1).max())


def backward_error(hard: Hard, V: Tensor, precise: bool) -> float:
    """||R X - I|| / (||R|| ||X||), with X the inverse of R = diag(1/n) S according to V, in units of C eps."""
    real: Any = np.longdouble if precise else np.float64
    R = hard.S.astype(real) / hard.n[:, None]
    X = (V.numpy().astype(real) * hard.n[:, None]).T
    C = len(R)
    return norm(R @ X - np.eye(C, dtype=real)) / (norm(R) * norm(X)) / (C * EPS)


@pytest.mark.parametrize("classes", CLASSES)
def test_regular(engine: str, device: torch.device, classes: int) -> None:
    hard = matrices.regular(classes, np.random.default_rng(classes))
    for h, (log_abs_det, sign, kept, V) in zip(hard, factor_all(engine, device, hard), strict=True):
        exact = matrices.inverse(h.S / h.n[:, None])
        cond = norm(h.S / h.n[:, None]) * norm(exact)
        want_sign, want = np.linalg.slogdet(h.S)
        scale = classes * EPS * cond * h.growth
        assert int(kept) == classes, h.name
        assert float(sign) == want_sign, h.name
        assert abs(float(log_abs_det) - want) <= 2 * classes * scale + 4 * EPS * (abs(want) + classes), h.name
        assert backward_error(h, V, precise=True) <= 10 * h.growth, h.name
        error = np.abs(V.numpy() - (exact.T / h.n[:, None]).astype(np.float64)).max() / np.abs(V.numpy()).max()
        assert error <= (1e-11 if cond <= 1e6 and h.growth == 1 else 10 * scale), (h.name, error)


def assert_regular(engine: str, device: torch.device, hard: Hard) -> None:
    """For matrices so large that the reference is numpy's log|det| and the residual is computed in fp64."""
    log_abs_det, sign, kept, V = factor(engine, device, hard.S, hard.n)
    want_sign, want = np.linalg.slogdet(hard.S)
    assert (int(kept), float(sign)) == (len(hard.n), want_sign), hard.name
    # 1e-6: the relative error of a determinant in fp64 at a condition number of 1e10, the largest here; numpy's has it too
    assert abs(float(log_abs_det) - want) <= 1e-10 * abs(want) + 1e-6, hard.name
    assert backward_error(hard, V, precise=False) <= 10, hard.name


@pytest.mark.parametrize("classes", LARGE)
def test_regular_of_many_classes(engine: str, device: torch.device, classes: int) -> None:
    rng = np.random.default_rng(classes)
    hard = [matrices.hardly_learned(classes, 1e-4, rng), matrices.near_permutation(classes, rng), matrices.shifted(classes, rng)]
    if classes < 1000:
        hard += [matrices.of_condition(classes, 1e10, rng), matrices.near_rank_one(classes, 1e-6, rng), matrices.graded(classes, rng)]
    for h in hard:
        assert_regular(engine, device, h)


@pytest.mark.parametrize("classes", CLASSES)
def test_singular(engine: str, device: torch.device, classes: int) -> None:
    hard = list(matrices.singular(classes, np.random.default_rng(classes)))
    for h, (log_abs_det, sign, kept, V) in zip(hard, factor_all(engine, device, hard), strict=True):
        assert (float(log_abs_det), float(sign), int(kept)) == (-np.inf, 0, classes), h.name
        assert not V.any(), h.name


@pytest.mark.parametrize("classes", [c for c in CLASSES if c > 1] + LARGE[:1])
def test_the_threshold(engine: str, device: torch.device, classes: int) -> None:
    for name, none, one in matrices.at_the_threshold(classes, np.random.default_rng(classes)):
        n = np.ones(classes)
        log_abs_det, sign, _, V = factor(engine, device, none, n)
        assert (float(log_abs_det), float(sign)) == (-np.inf, 0), name
        assert not V.any(), name
        log_abs_det, sign, _, V = factor(engine, device, one, n)
        assert float(sign) == np.linalg.slogdet(one)[0], name
        assert float(log_abs_det) == pytest.approx(np.log(np.abs(one[one != 0]).min()), rel=EXACT), name
        assert backward_error(Hard(name, one, n), V, precise=classes <= 128) <= 10, name
