"""Run logdet_inverse of an engine on hard matrices, and check its backward error."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ldmi_fast.engines.choose import engine_module
from tests.support.compare import EPSILON
from tests.support.matrices import Hard

EPS = EPSILON[torch.float64]


def factor(
    engine: str, device: torch.device, S: npt.ArrayLike | Tensor, n: npt.ArrayLike | Tensor, absent: str = "present"
) -> tuple[Tensor, ...]:
    """The results of an engine's logdet_inverse, on the CPU."""
    results = engine_module(engine).logdet_inverse(torch.as_tensor(S, device=device), torch.as_tensor(n, device=device), absent)
    return tuple(result.cpu() for result in results)


def factor_all(engine: str, device: torch.device, hard: list[Hard]) -> list[tuple[Tensor, ...]]:
    """Factor all of them in one call."""
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


def assert_regular(engine: str, device: torch.device, hard: Hard) -> None:
    """For matrices so large that the reference is numpy's log|det| and the residual is computed in fp64."""
    log_abs_det, sign, kept, V = factor(engine, device, hard.S, hard.n)
    want_sign, want = np.linalg.slogdet(hard.S)
    assert (int(kept), float(sign)) == (len(hard.n), want_sign), hard.name
    # 1e-6: the relative error of a determinant in fp64 at a condition number of 1e10, the largest here; numpy's has it too
    assert abs(float(log_abs_det) - want) <= 1e-10 * abs(want) + 1e-6, hard.name
    assert backward_error(hard, V, precise=False) <= 10, hard.name
