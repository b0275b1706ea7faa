"""The accuracy of logdet_inverse in every engine, on matrices of condition 1 to 1e12, graded, near a permutation, near rank one, that
need a pivot at every step or let entries grow, of real label noise; and which matrices it reports as singular.

- backward error: ||S V^T - I|| <= 10 C eps ||S|| ||V||, whatever the condition (infinity norms; S and V in the units of R)
- V, of its largest entry: 1e-11 at a condition of 1e6 and below
- log|det S|: the effect of a relative error of C eps cond(R) in a factor
- singular: a pivot of R of C 2^-52 ||R||_inf or less, to the last bit where pivots are not rounded
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import matrices
from tests.support.compare import EXACT
from tests.support.factoring import EPS, assert_regular, backward_error, factor, factor_all, norm
from tests.support.matrices import Hard

#: On both sides of every edge between kernels: registers of a warp, panels, vectors, a block's shared memory
CLASSES = [1, 2, 3, 5, 8, 9, 10, 14, 16, 17, 26, 31, 32, 33, 48, 64, 65, 97, 100, 128]
LARGE = [171, 600, 1025, 2100]


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
