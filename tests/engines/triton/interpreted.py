"""The kernels of the Triton engine, interpreted, against the composite definition: the edges of every regime.

Collected by ``test_contract.py``, which runs this file in a separate process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldmi_fast import dmi_loss, explain
from ldmi_fast.engines import composite
from ldmi_fast.engines.triton import engine, plan, tuning
from tests.support.compare import DERIVATIVE
from tests.support.problems import gradient_of, problem

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def assert_close(ours: tuple[Tensor, ...], want: tuple[Tensor, ...], rtol: float) -> None:
    for got, expected in zip(ours, want, strict=True):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        scale = expected.double().abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * scale, equal_nan=True)


def scalars(n: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(0.75, dtype=F64), torch.tensor(0.5 / max(n, 1), dtype=F64)


def assert_ops_agree(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    labels: int,
    input: str = "logits",
    ignore_index: int = -100,
    V: Tensor | None = None,
) -> None:
    """joint and logits_grad against their definition, and bitwise against themselves."""
    rtol = DERIVATIVE if logits.dtype == F64 else 2e-6
    args = (logits, target, weight, labels, ignore_index, input)
    want = composite.joint(*args)
    ours = engine.joint(*args)
    assert_close(ours, want, rtol)
    if V is None:
        V = torch.randn(labels, logits.shape[1], generator=torch.Generator().manual_seed(1), dtype=F64)
    given = (logits, target, weight, want[2], V, *scalars(len(logits)), ignore_index, input)
    grad = engine.logits_grad(*given)
    assert_close((grad,), (composite.logits_grad(*given),), 2**-7 if logits.dtype == BF16 else 4 * rtol)
    for again, before in zip((*engine.joint(*args), engine.logits_grad(*given)), (*ours, grad), strict=True):
        assert torch.equal(again, before)


TILE = tuning.tile_rows(16)


@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        pytest.param(0, 5, id="no-rows"),
        pytest.param(TILE - 1, 15, id="one-row-short-of-a-tile"),
        pytest.param(TILE, 16, id="a-tile"),
        pytest.param(TILE + 1, 17, id="one-row-more"),
        pytest.param(2 * TILE, 2, id="a-program"),
        pytest.param(2 * TILE + 1, 3, id="two-programs"),
        pytest.param(130, 64, id="last-of-tiles"),
    ],
)
@pytest.mark.parametrize("kind", ["hard", "weighted", "soft", "probs"])
def test_tiles(rows: int, classes: int, kind: str) -> None:
    dtype = F64 if kind == "weighted" else F32
    batch = problem(rows, classes, soft=kind == "soft", weighted=kind in ("weighted", "soft"), dtype=dtype)
    logits = batch.logits.softmax(-1) if kind == "probs" else batch.logits
    assert plan.joint(rows, classes, classes, kind == "soft", 4, TILE).regime == "tile"
    assert_ops_agree(logits, batch.target, batch.sample_weight, classes, "probs" if kind == "probs" else "logits")


@pytest.mark.parametrize("kind", ["balanced", "one-class", "absent", "weighted", "probs", "ignored"])
def test_label_order(kind: str) -> None:
    """Runs of a label that end within a program, at its border, or span many of them."""
    rows, classes = 83, 65
    batch = problem(rows, classes, weighted=kind == "weighted", absent=tuple(range(60)) if kind == "absent" else ())
    target = batch.target
    if kind == "one-class":
        target = torch.where(torch.arange(rows) == 40, 64, 7)
    if kind == "ignored":
        target = target.clone()
        target[::3] = -100
    how = plan.joint(rows, classes, classes, False, 4, 16)
    assert how.regime == "label"
    assert how.programs > 5
    logits = batch.logits.softmax(-1) if kind == "probs" else batch.logits
    assert_ops_agree(logits, target, batch.sample_weight, classes, "probs" if kind == "probs" else "logits")


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 64])
def test_label_order_at_the_borders_of_programs(rows: int) -> None:
    classes = 66
    target = (torch.arange(rows) // 8) * 3  # runs of 8 rows, the smallest program
    assert_ops_agree(problem(rows, classes).logits, target, None, classes)


def test_several_problems_in_one_joint() -> None:
    """K = B C: the column of a label is its remainder."""
    for labels, classes in ((15, 5), (70, 35)):
        target = torch.arange(60) % labels
        assert_ops_agree(problem(60, classes).logits, target, None, labels)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("kind", ["hard", "weighted", "probs", "ordered"])
def test_long_rows(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, here at a length that is feasible in the interpreter; -inf, blocks of nothing but -inf, NaN and +inf."""
    if dtype == BF16 and kind != "hard":
        pytest.skip("the same code except for the loads")
    monkeypatch.setattr(plan, "ROW_BYTES", 16 * (8 if dtype == F64 else 4))
    monkeypatch.setattr(plan, "TILE_CLASSES", 16)
    if kind == "ordered":
        monkeypatch.setattr(plan, "ORDERED_TABLE_BYTES", 0)
    rows, classes, labels = 11, 35, 4
    batch = problem(rows, classes, weighted=kind == "weighted", dtype=dtype)
    logits = batch.logits.float().softmax(-1).to(dtype) if kind == "probs" else batch.logits.clone()
    target = batch.target % labels
    assert plan.joint(rows, classes, labels, False, dtype.itemsize, 16).long
    how = plan.logits_grad(rows, classes, labels, False, dtype.itemsize)
    assert (how.regime, how.ordered) == ("long", kind == "ordered")
    if kind == "hard":
        logits[3, :16] = -torch.inf
        logits[4, 16:] = -torch.inf
        logits[5, ::2] = -torch.inf
    assert_ops_agree(logits, target, batch.sample_weight, labels, "probs" if kind == "probs" else "logits")
    if kind == "hard":
        for non_finite in (torch.nan, torch.inf):
            spoilt = logits.clone()
            spoilt[7, 20] = non_finite
            S, _, _, _ = engine.joint(spoilt, target, None, labels, -100, "logits")
            assert S[target[7]].isnan().all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("input", ["logits", "probs"])
def test_table_and_order_of_the_gradient(input: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = problem(41, 9, weighted=True, dtype=dtype)
    logits = batch.logits.softmax(-1) if input == "probs" else batch.logits
    for ordered in (False, True):
        monkeypatch.setattr(plan, "DIRECT_ENTRIES", 0)
        monkeypatch.setattr(plan, "ORDERED_TABLE_BYTES", 0 if ordered else 2**30)
        assert plan.logits_grad(41, 9, 9, False, dtype.itemsize).ordered == ordered
        assert_ops_agree(logits, batch.target, batch.sample_weight, 9, input)


def test_soft_targets_of_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SOFT_BLOCK_BYTES", 1)
    for rows in (0, 1, 64, 65, 200):
        batch = problem(rows, 70, soft=True, weighted=True)
        assert plan.joint(rows, 70, 70, True, 4, 16).regime == "soft"
        assert_ops_agree(batch.logits, batch.target, batch.sample_weight, 70)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64])
@pytest.mark.parametrize("classes", [5, 66])
def test_labels_out_of_range(classes: int, dtype: torch.dtype) -> None:
    """S, n, ce and the gradient of that row are NaN; the label is not used as an address; ignored rows do not count."""
    logits = torch.randn(20, classes)
    for label in {classes, torch.iinfo(dtype).max, torch.iinfo(dtype).min} - {0}:
        values = [i % 5 for i in range(20)]
        values[11] = label
        target = torch.tensor(values, dtype=dtype)
        S, n, _, ce = engine.joint(logits, target, None, classes, -100, "logits")
        assert S.isnan().all()
        assert n.isnan().all()
        assert ce.isnan()
        V = torch.ones(classes, classes, dtype=F64)
        grad = engine.logits_grad(logits, target, None, logits[:, 0], V, *scalars(20), -100, "logits")
        assert grad[11].isnan().all()
        assert grad[:11].isfinite().all()
        weight = torch.ones(20)
        weight[11] = 0
        S, n, _, _ = engine.joint(logits, target, weight, classes, -100, "logits")
        assert S.isfinite().all()
        assert n.sum() == 19


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("classes", [5, 66])
@pytest.mark.parametrize("soft", [False, True])
def test_weights_out_of_range(soft: bool, classes: int, weight: float) -> None:
    batch = problem(20, classes, soft=soft)
    weights = torch.ones(20)
    weights[7] = weight
    S, n, _, ce = engine.joint(batch.logits, batch.target, weights, classes, -100, "logits")
    assert not (S.isfinite().all() and n.isfinite().all())
    assert not ce.isfinite()
    if not soft:
        target = batch.target.clone()
        target[7] = -100
        assert engine.joint(batch.logits, target, weights, classes, -100, "logits")[0].isfinite().all()


def test_weights_of_any_size() -> None:
    """S is linear in the weights from 1e-40 to 1e30, and no intermediate result of the gradient overflows."""
    batch = problem(40, 5)
    for size in (1e-40, 1e-20, 1e30):
        weight = torch.full((40,), size)
        assert_close(
            engine.joint(batch.logits, batch.target, weight, 5, -100, "logits")[:2],
            composite.joint(batch.logits, batch.target, weight, 5, -100, "logits")[:2],
            1e-6,
        )
        logits = batch.leaf()
        dmi_loss(logits, batch.target, sample_weight=weight, engine="triton").backward()
        plain = batch.leaf()
        dmi_loss(plain, batch.target, engine="composite").backward()
        assert_close((gradient_of(logits),), (gradient_of(plain),), 1e-5)


def test_logdet_inverse_of_batches_and_of_fp32() -> None:
    generator = torch.Generator().manual_seed(3)
    for classes in (1, 2, 17, 65):
        S = torch.rand(3, classes, classes, generator=generator, dtype=F64) + classes * torch.eye(classes)
        S = S[:, torch.randperm(classes, generator=generator)]  # pivots off the diagonal: a permutation to undo
        n = S.sum(-1)
        n[1, 0] = 0
        S[2, 0], n[2, 0] = S[2, -1], n[2, -1]
        for absent in ("present", "strict"):
            assert_close(engine.logdet_inverse(S, n, absent), composite.logdet_inverse(S, n, absent), DERIVATIVE)
            single = (S.float(), n.float(), absent)
            assert_close(engine.logdet_inverse(*single), composite.logdet_inverse(*single), 1e-5)
        S[0, 0, 0] = torch.nan
        assert_close(engine.logdet_inverse(S, n, "present"), composite.logdet_inverse(S, n, "present"), DERIVATIVE)


@pytest.mark.parametrize("rows", [1, 31, 65])
@pytest.mark.parametrize("classes", [1, 2, 16, 17])
@pytest.mark.parametrize("input", ["logits", "probs"])
def test_fused_is_the_separate_ops(rows: int, classes: int, input: str) -> None:
    batch = problem(rows, classes, weighted=rows > 1, absent=(0,) if classes == 17 else ())
    logits = batch.logits.softmax(-1) if input == "probs" else batch.logits
    assert plan.is_fused(rows, classes, False, 4)
    for eps, normalize, ce, absent in ((0.0, True, 0.0, "present"), (1e-3, False, 0.5, "strict"), (1e-3, True, 0.5, "present")):
        args = (logits, batch.target, batch.sample_weight, -100, absent, eps, normalize, ce, input)
        ours = engine.fused(*args)
        want = composite.fused(*args)
        assert_close(ours[:1], want[:1], 1e-5)
        S, n, _, _ = composite.joint(logits, batch.target, batch.sample_weight, classes, -100, input)
        present = n > 0
        cond = torch.linalg.cond((S / n.unsqueeze(-1))[present][:, present]).item() if want[0].isfinite() else 1.0
        assert_close(ours[1:], want[1:], min(1e-2, 1e-6 * (10 + cond)))


def test_explained_is_what_runs() -> None:
    batch = problem(50, 6)
    assert explain(batch.logits, batch.target, engine="triton").kernels[0].startswith("fused")
    large = problem(50, 70)
    found = explain(large.logits, large.target, engine="triton")
    assert found.engine == "triton"
    assert found.kernels == ("joint (label order)", "logdet_inverse (library LU)", "logits_grad (whole rows)")
