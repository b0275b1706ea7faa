"""The oracle against mpmath and against finite differences: it must be right before anything is compared with it."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from tests.support import oracle
from tests.support.compare import DERIVATIVE, EXACT, REORDERED
from tests.support.problems import as_array, conditioned, problem

OPTIONS: list[Any] = [
    pytest.param({}, {}, id="hard"),
    pytest.param({"soft": True}, {}, id="soft"),
    pytest.param({"weighted": True}, {"normalize": False}, id="weighted-unnormalised"),
    pytest.param({"soft": True, "weighted": True}, {"eps": 1e-3}, id="soft-weighted-eps"),
    pytest.param({"absent": (1,)}, {"cross_entropy_weight": 0.7}, id="absent-ce"),
    pytest.param({"absent": (0, 3), "soft": True}, {"cross_entropy_weight": 2.0, "eps": 0.1}, id="soft-absent-ce-eps"),
    pytest.param({"weighted": True}, {"ignore_index": 2, "cross_entropy_weight": 1.5}, id="ignored-class"),
    pytest.param({}, {"input": "probs", "cross_entropy_weight": 0.3}, id="probs-ce"),
    pytest.param({"soft": True, "weighted": True}, {"input": "probs", "eps": 1e-2}, id="probs-soft-eps"),
]


def arrays(build: dict[str, Any], options: dict[str, Any], n: int = 23, classes: int = 5) -> tuple[Any, Any, Any]:
    batch = problem(n, classes, dtype=torch.float64, **build)
    logits, target = as_array(batch.logits), as_array(batch.target)
    if options.get("input") == "probs":
        # Rows that do not add up to one: the loss must not renormalise them.
        logits = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) * 0.9
    return logits, target, None if batch.sample_weight is None else as_array(batch.sample_weight)


def mp_loss(logits: Any, target: Any, weight: Any, options: dict[str, Any]) -> Any:
    """The loss at 50 digits, term by term, from the determinant itself."""
    mp = mpmath.mp
    n, classes = logits.shape
    weights = [mp.mpf(1)] * n if weight is None else [mp.mpf(float(w)) for w in weight]
    soft = target.dtype.kind == "f"
    joint = mp.matrix(classes, classes)
    counts = [mp.mpf(0)] * classes
    total = ce = mp.mpf(0)
    for i in range(n):
        if not soft and target[i] == options.get("ignore_index", -100):
            continue
        row = [mp.mpf(x) if isinstance(x, mpmath.mpf) else mp.mpf(float(x)) for x in logits[i]]
        if options.get("input", "logits") == "logits":
            row = [mp.exp(x) for x in row]
            row = [x / mp.fsum(row) for x in row]
        share = (
            [mp.mpf(x) if isinstance(x, mpmath.mpf) else mp.mpf(float(x)) for x in target[i]]
            if soft
            else [mp.mpf(int(target[i] == c)) for c in range(classes)]
        )
        total += weights[i]
        for y in range(classes):
            counts[y] += weights[i] * share[y]
            ce -= weights[i] * share[y] * mp.log(row[y])
            for c in range(classes):
                joint[y, c] += weights[i] * share[y] * row[c]
    kept = [y for y in range(classes) if counts[y] > 0]
    sub = mp.matrix(len(kept), len(kept))
    for a, y in enumerate(kept):
        for b, c in enumerate(kept):
            sub[a, b] = joint[y, c] / (total if options.get("normalize", True) else 1)
    loss = -mp.log(abs(mp.det(sub)) + mp.mpf(options.get("eps", 0)))
    return loss + mp.mpf(options.get("cross_entropy_weight", 0)) * ce / total


@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_value_is_the_formula_at_fifty_digits(build: dict[str, Any], options: dict[str, Any]) -> None:
    logits, target, weight = arrays(build, options)
    with mpmath.workdps(50):
        expected = float(mp_loss(logits, target, weight, options))
    assert oracle.dmi(logits, target, sample_weight=weight, **options).loss == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_gradients_are_finite_differences_of_the_value(build: dict[str, Any], options: dict[str, Any]) -> None:
    logits, target, weight = arrays(build, options)
    answer = oracle.dmi(logits, target, sample_weight=weight, **options)
    rng = np.random.default_rng(0)
    directions = [("grad", rng.standard_normal(logits.shape)) for _ in range(3)]
    if target.dtype.kind == "f":
        # Absent classes stay absent: a target that moves there changes which classes are kept.
        for _ in range(3):
            move = rng.standard_normal(target.shape)
            move[:, answer.absent] = 0
            directions.append(("target_grad", move))
    h = 1e-4
    for name, move in directions:
        steps = [-2, -1, 1, 2]
        values = []
        for step in steps:
            at = (logits + h * step * move, target) if name == "grad" else (logits, target + h * step * move)
            values.append(oracle.dmi(*at, sample_weight=weight, **options).loss)
        slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
        # the difference's own error, h^4 and the rounding of the losses over h
        assert (getattr(answer, name) * move).sum() == pytest.approx(slope, rel=1e-9, abs=1e-10), name


@pytest.mark.parametrize("kind", ["flat", "twins"])
def test_gradient_at_condition_number_1e6_is_the_one_at_fifty_digits(kind: str) -> None:
    batch = conditioned(24, 6, 1e6, kind=kind, dtype=torch.float64)
    logits, target = as_array(batch.logits), as_array(batch.target)
    answer = oracle.dmi(logits, target)
    assert answer.cond == pytest.approx(1e6, rel=0.5)
    with mpmath.workdps(50):
        for i, c in [(0, 0), (5, 3), (17, 1), (23, 5)]:

            def along(x: Any, i: int = i, c: int = c) -> Any:
                moved = logits.astype(object)
                moved[i, c] = x
                return mp_loss(moved, target, None, {})

            slope = float(mpmath.diff(along, mpmath.mpf(float(logits[i, c]))))
            # at cond 1e6 in extended precision, whose unit roundoff is 2^-64: 8 * 1e6 * 2^-64 is 4e-13
            largest = np.abs(answer.grad).max()
            assert answer.grad[i, c] == pytest.approx(slope, rel=DERIVATIVE, abs=DERIVATIVE * largest)


def test_extended_precision_and_lapack_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, weight = arrays({"weighted": True}, {}, n=400, classes=40)
    extended = oracle.dmi(logits, target, sample_weight=weight)
    monkeypatch.setattr(oracle, "EXTENDED_CLASSES", 0)
    lapack = oracle.dmi(logits, target, sample_weight=weight)
    assert lapack.loss == pytest.approx(extended.loss, rel=REORDERED)
    assert lapack.sign == extended.sign
    np.testing.assert_allclose(lapack.grad, extended.grad, rtol=0, atol=DERIVATIVE * np.abs(extended.grad).max())


def test_extra_dimensions_are_rows() -> None:
    logits, target, _ = arrays({}, {}, n=24, classes=5)
    flat = oracle.dmi(logits, target)
    # (24, 5) -> (2, 5, 3, 4): the row of (n, d1, d2) is n * 12 + d1 * 4 + d2.
    deep = oracle.dmi(logits.reshape(2, 3, 4, 5).transpose(0, 3, 1, 2), target.reshape(2, 3, 4))
    assert deep.loss == flat.loss
    np.testing.assert_array_equal(deep.grad.transpose(0, 2, 3, 1).reshape(24, 5), flat.grad)


def test_edge_table() -> None:
    logits, target, _ = arrays({}, {})
    nothing = oracle.dmi(logits[:0], target[:0], eps=1e-3, absent="strict", cross_entropy_weight=1.0)
    assert nothing.loss == 0
    assert nothing.grad.shape == (0, 5)
    ignored = oracle.dmi(logits, np.full_like(target, -100), eps=1e-3)
    assert ignored.loss == 0
    assert not ignored.grad.any()
    flat = oracle.dmi(np.zeros_like(logits), target)
    assert flat.singular
    assert flat.loss == np.inf
    assert not flat.grad.any()
    assert oracle.dmi(np.zeros_like(logits), target, eps=1e-3).loss == pytest.approx(-np.log(1e-3))
    strict = oracle.dmi(logits, np.minimum(target, 3), absent="strict", eps=1e-3)
    assert strict.singular
    assert strict.loss == pytest.approx(-np.log(1e-3))
    assert not strict.grad.any()
    present = oracle.dmi(logits, np.minimum(target, 3))
    assert present.kept == 4
    assert present.absent == [4]
    assert np.isfinite(present.loss)
    poisoned = logits.copy()
    poisoned[2, 0] = np.nan
    answer = oracle.dmi(poisoned, np.where(np.arange(len(target)) == 4, -100, target))
    assert np.isnan(answer.loss)
    assert not answer.grad[4].any()
    assert np.isnan(np.delete(answer.grad, 4, 0)).all()
    assert oracle.dmi(poisoned, np.where(np.arange(len(target)) == 2, -100, target)).loss == pytest.approx(
        oracle.dmi(np.delete(logits, 2, 0), np.delete(target, 2)).loss
    )
    for row in (np.full(5, -np.inf), np.array([0, np.inf, 0, 0, 0])):
        broken = logits.copy()
        broken[2] = row
        assert np.isnan(oracle.dmi(broken, target).loss)
    partial = logits.copy()
    partial[2, (target[2] + 1) % 5] = -np.inf
    answer = oracle.dmi(partial, target)
    assert np.isfinite(answer.loss)
    assert np.isfinite(answer.grad).all()
    assert answer.grad[2, (target[2] + 1) % 5] == 0
