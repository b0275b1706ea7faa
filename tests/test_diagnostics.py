"""joint_matrix, diagnose and explain: what they return, and that their advice fits the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import ldmi_fast
from ldmi_fast import JointReport, Plan, diagnose, dmi_loss, explain, joint_matrix
from tests.support.compare import DERIVATIVE, EXACT, REORDERED, loss_dtype
from tests.support.problems import Problem, as_array, conditioned, gradient_of, problem

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    ("n", "classes"),
    [
        pytest.param(50, 1, id="one-class"),
        pytest.param(203, 14, id="small"),
        pytest.param(2000, 70, id="large"),
        pytest.param(20, 70, id="fewer-samples-than-classes"),
    ],
)
def test_joint_matrix_values(engine: str, device: torch.device, n: int, classes: int, soft: bool, dtype: torch.dtype) -> None:
    if soft and classes == 1:
        pytest.skip("soft targets of one class are refused")
    batch = problem(n, classes, soft=soft, weighted=True, dtype=dtype)
    here = batch.to(device=device)
    exact = batch.answer().joint
    total = batch.weight.double().sum().item()
    allowed: dict[str, Any] = {"rtol": 2e-6 if loss_dtype(dtype) == torch.float32 else REORDERED, "atol": 0}
    joint = joint_matrix(here.logits, here.target, sample_weight=here.sample_weight, engine=engine)
    assert joint.shape == (classes, classes)
    assert joint.dtype == loss_dtype(dtype)
    assert joint.device.type == device.type
    np.testing.assert_allclose(as_array(joint), exact / total, **allowed)
    if not soft:  # soft targets of half precision do not quite sum to 1
        assert joint.double().sum().item() == pytest.approx(1, rel=1e-6)
    counts = joint_matrix(here.logits, here.target, sample_weight=here.sample_weight, normalize=False, engine=engine)
    np.testing.assert_allclose(as_array(counts), exact, **allowed)


def test_joint_matrix_rows_are_labels(engine: str, device: torch.device) -> None:
    logits = torch.tensor([[0.0, -math.inf, -math.inf]], device=device)
    joint = joint_matrix(logits, torch.tensor([2], device=device), engine=engine)
    expected = torch.zeros(3, 3)
    expected[2, 0] = 1
    assert torch.equal(joint.cpu(), expected)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param({}, {}, id="hard"),
        pytest.param({"weighted": True, "absent": (1,)}, {"normalize": False}, id="absent-counts"),
        pytest.param({"soft": True, "weighted": True}, {}, id="soft"),
        pytest.param({}, {"input": "probs", "ignore_index": 2}, id="probs-ignore"),
    ],
)
def test_joint_matrix_derivatives(engine: str, device: torch.device, build: dict[str, Any], options: dict[str, Any]) -> None:
    batch = problem(8, 3, dtype=torch.float64, **build).to(device=device)
    inputs = [(batch.logits.softmax(1) if options.get("input") == "probs" else batch.logits).requires_grad_()]
    if batch.target.is_floating_point():
        inputs.append(batch.target.requires_grad_())

    def joint(logits: Tensor, target: Tensor = batch.target) -> Tensor:
        return joint_matrix(logits, target, sample_weight=batch.sample_weight, engine=engine, **options)

    assert gradcheck(joint, tuple(inputs))
    assert gradgradcheck(joint, tuple(inputs), fast_mode=True)


def test_a_loss_of_ones_own_on_the_joint_matrix(engine: str, device: torch.device) -> None:
    """-log|det U| written with torch gives the value and gradient of dmi_loss."""
    batch = problem(100, 6, weighted=True, dtype=torch.float64).to(device=device)
    results = []
    for build in (
        lambda z: -torch.linalg.slogdet(joint_matrix(z, batch.target, sample_weight=batch.sample_weight, engine=engine))[1],
        lambda z: dmi_loss(z, batch.target, sample_weight=batch.sample_weight, engine=engine),
    ):
        logits = batch.leaf()
        loss = build(logits)
        loss.backward()
        results.append((loss.item(), gradient_of(logits)))
    assert results[0][0] == pytest.approx(results[1][0], rel=REORDERED)
    assert torch.allclose(results[0][1], results[1][1], rtol=DERIVATIVE, atol=EXACT)


def test_joint_matrix_edge_cases(engine: str, device: torch.device) -> None:
    batch = problem(40, 5, weighted=True).to(device=device)
    assert not joint_matrix(batch.logits[:0], batch.target[:0], engine=engine).any()
    ignored = torch.full_like(batch.target, -100)
    logits = torch.full_like(batch.logits, float("nan")).requires_grad_()
    nothing = joint_matrix(logits, ignored, engine=engine)
    nothing.sum().backward()
    assert not nothing.any()
    assert logits.grad is not None
    assert not logits.grad.any()
    poisoned = batch.logits.clone()
    poisoned[1] = float("nan")
    assert joint_matrix(poisoned, batch.target, sample_weight=batch.sample_weight, engine=engine).isnan().any()


@pytest.mark.parametrize("kind", ["hard", "soft-weighted", "absent", "counts-eps", "deep", "probs"])
def test_report_numbers(engine: str, device: torch.device, kind: str) -> None:
    options: dict[str, Any] = {}
    batch = problem(203, 14, dtype=torch.float64)
    if kind == "soft-weighted":
        batch = problem(203, 14, soft=True, weighted=True, dtype=torch.float64)
    elif kind == "absent":
        batch = problem(203, 14, absent=(0, 9), dtype=torch.float64)
        options = {"ignore_index": 4}
    elif kind == "counts-eps":
        options = {"normalize": False, "eps": 1e-3, "cross_entropy_weight": 0.5}
    elif kind == "deep":
        batch = Problem(batch.logits.view(7, 29, 14).transpose(1, 2), batch.target.view(7, 29))
    elif kind == "probs":
        batch = Problem(batch.logits.softmax(1), batch.target)
        options = {"input": "probs"}
    here = batch.to(device=device)
    report = diagnose(here.logits, here.target, sample_weight=here.sample_weight, engine=engine, **options)
    answer = batch.answer(**options)
    assert isinstance(report, JointReport)
    assert report.loss == pytest.approx(answer.loss, rel=REORDERED)
    assert report.log_abs_det == pytest.approx(answer.log_abs_det, rel=REORDERED)
    assert report.sign == answer.sign
    assert isinstance(report.sign, int)
    assert report.condition_number == pytest.approx(answer.cond, rel=DERIVATIVE)
    assert report.counts.shape == (14,)
    assert report.counts.dtype == torch.float64
    assert report.counts.device.type == "cpu"
    np.testing.assert_allclose(as_array(report.counts), answer.counts, rtol=EXACT, atol=0)
    assert report.absent_classes == answer.absent
    assert report.num_absent == len(answer.absent)
    assert report.kept == answer.kept
    assert not report.singular
    assert report.engine == engine
    counted = 203 if kind != "absent" else 203 - int((batch.target == 4).sum())
    assert report.num_samples == (counted if batch.sample_weight is None else int((batch.sample_weight > 0).sum()))
    text = str(report)
    for part in ("condition number", f"{report.loss:.6g}", f"{answer.kept} of 14 classes"):
        assert part in text


def advice(logits: Tensor, target: Tensor, **options: Any) -> str:
    report = diagnose(logits, target, **options)
    assert all(isinstance(line, str) and line for line in report.advice)
    assert all(line in str(report) for line in report.advice)
    return "\n".join(report.advice)


def test_a_good_batch_gets_no_advice(engine: str, device: torch.device) -> None:
    batch = problem(400, 5).to(device=device)
    assert diagnose(batch.logits, batch.target, engine=engine).advice == []


def test_advice_on_a_singular_batch(engine: str, device: torch.device) -> None:
    batch = problem(400, 5).to(device=device)
    report = diagnose(torch.zeros_like(batch.logits), batch.target, engine=engine)
    assert report.singular
    assert report.loss == math.inf
    assert report.sign == 0
    assert report.log_abs_det == -math.inf
    assert report.condition_number > 1e15
    words = "\n".join(report.advice)
    assert "singular" in words
    assert "cross" in words


def test_advice_on_an_ill_conditioned_batch(engine: str, device: torch.device) -> None:
    batch = conditioned(512, 8, 1e6, kind="twins").to(device=device)
    report = diagnose(batch.logits, batch.target, engine=engine)
    assert 1e5 < report.condition_number < 1e7
    assert "condition number" in "\n".join(report.advice)


def test_advice_on_absent_classes_and_small_batches(engine: str, device: torch.device) -> None:
    batch = problem(8, 14).to(device=device)
    words = advice(batch.logits, batch.target, engine=engine)
    assert "6 of 14 classes" in words
    strict = diagnose(batch.logits, batch.target, absent="strict", engine=engine)
    assert strict.singular
    assert strict.kept == 14
    assert strict.num_absent == 6
    assert "absent='present'" in "\n".join(strict.advice)
    soft = problem(8, 14, soft=True).to(device=device)
    assert "as many samples as classes" in advice(soft.logits, soft.target, engine=engine)


def test_advice_on_a_wrong_sign(engine: str, device: torch.device) -> None:
    batch = problem(400, 4).to(device=device)
    swapped = batch.logits[:, [1, 0, 2, 3]]
    report = diagnose(swapped, batch.target, engine=engine)
    assert report.sign == -1
    assert "negative" in "\n".join(report.advice)
    assert report.loss == pytest.approx(dmi_loss(batch.logits, batch.target, engine=engine).item(), rel=1e-5)


def test_advice_on_eps_that_drowns_the_determinant(engine: str, device: torch.device) -> None:
    batch = problem(256, 14, signal=1.0).to(device=device)
    assert "eps" in advice(batch.logits, batch.target, eps=1e-3, engine=engine)


def test_advice_on_nan_and_on_nothing(engine: str, device: torch.device) -> None:
    batch = problem(40, 5).to(device=device)
    broken = batch.logits.clone()
    broken[2] = float("nan")
    report = diagnose(broken, batch.target, engine=engine)
    assert math.isnan(report.loss)
    assert "NaN" in "\n".join(report.advice)
    assert not report.singular
    nothing = diagnose(batch.logits, torch.full_like(batch.target, -100), engine=engine)
    assert nothing.loss == 0
    assert nothing.kept == 0
    assert nothing.num_samples == 0
    assert "no row counts" in "\n".join(nothing.advice)
    empty = diagnose(batch.logits[:0], batch.target[:0], engine=engine)
    assert empty.loss == 0
    assert str(empty)


def test_diagnose_leaves_autograd_alone(engine: str, device: torch.device) -> None:
    batch = problem(40, 5, soft=True).to(device=device)
    logits, target = batch.leaf(), batch.target.clone().requires_grad_()
    report = diagnose(logits, target, engine=engine)
    assert logits.grad is None
    assert not report.counts.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("n", "classes"),
    [
        pytest.param(0, 14, id="empty"),
        pytest.param(256, 14, id="small"),
        pytest.param(65536, 100, id="large"),
        pytest.param(4096, 1000, id="many-classes"),
    ],
)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_plans(engine: str, device: torch.device, n: int, classes: int, soft: bool) -> None:
    logits = torch.zeros(n, classes, device=device)
    target = torch.zeros(n, classes, device=device) if soft else torch.zeros(n, dtype=torch.int64, device=device)
    plan = explain(logits, target, engine=engine)
    assert isinstance(plan, Plan)
    assert plan.engine == engine
    assert isinstance(plan.kernels, tuple)
    assert plan.kernels
    assert all(isinstance(name, str) for name in plan.kernels)
    assert isinstance(plan.regime, str)
    assert plan.regime
    assert isinstance(plan.workspace_bytes, int)
    assert plan.workspace_bytes >= 0
    assert "engine=" in plan.reason
    text = str(plan)
    for part in (plan.engine, plan.kernels[0], plan.regime, plan.reason, f"{plan.workspace_bytes:,}"):
        assert part in text


def test_plan_without_a_forced_engine() -> None:
    plan = explain(torch.zeros(256, 14), torch.zeros(256, dtype=torch.int64))
    assert "forced" not in plan.reason
    assert plan.reason
    elsewhere = explain(torch.zeros(256, 14, device="meta"), torch.zeros(256, dtype=torch.int64, device="meta"))
    assert elsewhere.engine == "composite"
    assert "meta" in elsewhere.reason


def test_explain_reads_no_values() -> None:
    """It runs nothing: labels out of range, and tensors that have no storage, are fine."""
    assert explain(torch.zeros(4, 3), torch.full((4,), 99)).engine
    assert explain(torch.zeros(4, 3, device="meta"), torch.zeros(4, 3, device="meta")).engine == "composite"


def test_the_package_exports_what_it_documents() -> None:
    assert {"DMILoss", "JointReport", "Plan", "diagnose", "dmi_loss", "explain", "joint_matrix"} <= set(ldmi_fast.__all__)
    assert all(hasattr(ldmi_fast, name) for name in ldmi_fast.__all__)


def test_spread_is_the_scatter_of_batches(engine: str, device: torch.device) -> None:
    """Against the standard deviation of log|det| over many batches from one population."""
    generator = torch.Generator().manual_seed(0)
    n, classes, batches = 200, 3, 400
    target = torch.randint(classes, (batches, n), generator=generator)
    logits = torch.randn(batches, n, classes, generator=generator) + 2 * torch.eye(classes)[target]
    weight = 0.5 + torch.rand(batches, n, generator=generator)
    for mass in (None, weight):
        reports = [
            diagnose(
                logits[b].to(device), target[b].to(device), sample_weight=None if mass is None else mass[b].to(device), engine=engine
            )
            for b in range(batches if mass is None else batches // 2)
        ]
        scatter = torch.tensor([report.log_abs_det for report in reports]).std().item()
        predicted = torch.tensor([report.spread for report in reports]).mean().item()
        assert predicted == pytest.approx(scatter, rel=0.12)


def test_advice_on_noisy_batches(device: torch.device) -> None:
    batch = problem(24, 8, signal=1.0).to(device=device)
    report = diagnose(batch.logits, batch.target)
    assert report.spread > 0.5
    words = "\n".join(report.advice)
    assert "scatters by about" in words
    assert "momentum=0.9" in words
    assert f"+- {report.spread:.2g}" in str(report)


def test_rank_and_the_classes_that_are_similar(device: torch.device) -> None:
    batch = problem(300, 6, dtype=torch.float64)
    logits = batch.logits.clone()
    pair = (batch.target == 1) | (batch.target == 4)
    logits[pair] = logits[pair][0]
    report = diagnose(logits.to(device), batch.target.to(device))
    assert report.rank == 5
    assert report.singular
    assert math.isnan(report.spread)
    words = "\n".join(report.advice)
    assert "rank 5 of 6" in words
    assert "classes 1 and 4 are predicted most alike" in words
    assert diagnose(batch.logits.to(device), batch.target.to(device)).rank == 6


def test_advice_on_a_permuted_solution(device: torch.device) -> None:
    """An even permutation: the sign says nothing."""
    batch = problem(400, 4, absent=(3,)).to(device=device)
    report = diagnose(batch.logits[:, [1, 2, 0, 3]], batch.target)
    assert report.sign == 1
    assert report.permutation == [2, 0, 1, -1]
    words = "\n".join(report.advice)
    assert "permutation of the labels (label 0 as 2, 1 as 0, 2 as 1)" in words
    assert diagnose(batch.logits, batch.target).permutation is None
    collapsed = batch.logits.clone()
    collapsed[:, 0] += 20
    assert diagnose(collapsed, batch.target).permutation is None


def test_a_batch_and_the_average(device: torch.device) -> None:
    criterion = ldmi_fast.DMILoss(5, momentum=0.9).to(device)
    population = problem(200 * 60, 5, seed=1, dtype=torch.float64).to(device=device)
    batches = list(zip(population.logits.split(200), population.target.split(200), strict=True))
    empty = criterion.diagnose(*batches[0])
    assert "the average is empty" in "\n".join(empty.advice)
    for batch in batches[:50]:
        criterion(*batch)
    before = criterion.average_joint.clone()
    reports = [criterion.diagnose(*batch) for batch in batches[50:]]
    assert torch.equal(criterion.average_joint, before)
    assert criterion.average is not None
    B = criterion.average.mean()[0]
    for report in reports:
        assert report.average is not None
        assert report.average.steps == 50
        assert report.average.kept == 5
        assert report.average.log_abs_det == pytest.approx(torch.linalg.slogdet(B)[1].item(), rel=REORDERED)
        assert report.average.spread == pytest.approx(report.spread * math.sqrt(0.1 / 1.9))
    drifts = [report.average.drift for report in reports if report.average is not None]
    # this batch's noise and B's own: the root of 1 + 0.1 / 1.9
    assert sum(drifts) / len(drifts) == pytest.approx(1.03, abs=0.15)
    logits, target = batches[50]
    moved = criterion.diagnose(logits.roll(2, 1), target)
    assert moved.average is not None
    assert moved.average.drift > 3
    assert "lags behind" in "\n".join(moved.advice)
    swapped = criterion.diagnose(logits[:, [1, 0, 2, 3, 4]], target)
    assert swapped.sign == -1
    assert "keeps this batch from pulling the wrong way" in "\n".join(swapped.advice)
    assert ldmi_fast.DMILoss(5).to(device).diagnose(logits, target).average is None
    assert "drift" in str(moved)


def smoothed(target: Tensor, classes: int, rate: float = 0.1) -> Tensor:
    return torch.nn.functional.one_hot(target, classes).double() * (1 - rate) + rate / classes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_smoothed_targets_of_a_class_that_is_missing(engine: str, device: torch.device, dtype: torch.dtype, weighted: bool) -> None:
    batch = problem(576, 10, absent=(9,), weighted=weighted)
    target = smoothed(batch.target, 10).to(device, dtype)
    here = batch.to(device=device)
    report = diagnose(here.logits, target, sample_weight=here.sample_weight, engine=engine)
    assert report.loss == dmi_loss(here.logits, target, sample_weight=here.sample_weight, engine=engine).item()
    assert math.isfinite(report.loss)
    assert report.log_abs_det == pytest.approx(-report.loss, rel=1e-6)
    assert (report.absent_classes, report.kept, report.rank, report.singular) == ([9], 9, 9, False)
    assert report.counts[9] > 0
    words = "\n".join(report.advice)
    assert "class 9 has no sample of its own: the targets have rank 9 of 10, because its column is the same in every row" in words
    assert "the determinant is of the other classes only" in words
    assert "predicted most alike" not in words
    assert "have no sample in this batch" not in words
    strict = diagnose(here.logits, target, sample_weight=here.sample_weight, absent="strict", engine=engine)
    assert strict.loss == math.inf
    words = "\n".join(strict.advice)
    assert "class 9 has no sample of its own" in words
    assert "absent='present'" in words
    assert "predicted most alike" not in words


def test_smoothed_targets_of_some_classes_that_are_missing(engine: str, device: torch.device) -> None:
    """Together with a class whose targets are 0: the report distinguishes the two kinds."""
    batch = problem(300, 8, absent=(2, 5, 7))
    target = smoothed(batch.target, 8)
    target[:, 7] = 0
    target /= target.sum(1, keepdim=True)
    report = diagnose(batch.logits.to(device), target.to(device), engine=engine)
    assert report.absent_classes == [2, 5, 7]
    assert math.isfinite(report.loss)
    words = "\n".join(report.advice)
    assert "classes 2, 5 have no samples of their own: the targets have rank 5 of 7" in words
    assert "1 of 8 classes have no sample in this batch" in words


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_mixed_targets_of_a_class_that_is_missing(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    """A mixing that differs between classes: no column is constant, but the rank of the targets is too low by one."""
    batch = problem(576, 6, absent=(3,), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(6, dtype=torch.float64) + 0.3 * torch.rand(6, 6, generator=generator, dtype=torch.float64)
    target = (mixing / mixing.sum(1, keepdim=True))[batch.target].to(device, dtype)
    report = diagnose(batch.logits.to(device), target, engine=engine)
    words = "\n".join(report.advice)
    assert report.singular
    assert "whatever the model predicts: the targets have rank 5 of 6" in words
    assert "class 3 has no sample of its own" in words
    assert "predicted most alike" not in words


def test_strict_names_the_cause_alone(engine: str, device: torch.device) -> None:
    batch = problem(300, 6, absent=(4,)).to(device=device)
    report = diagnose(batch.logits, batch.target, absent="strict", engine=engine)
    assert report.singular
    assert "predicted most alike" not in "\n".join(report.advice)
    collapsed = diagnose(torch.zeros_like(batch.logits), batch.target, absent="strict", engine=engine)
    assert "predicted most alike" in "\n".join(collapsed.advice)


def test_a_class_of_next_to_no_weight_is_absent(engine: str, device: torch.device) -> None:
    """The report and the loss agree on that."""
    batch = problem(300, 6, dtype=torch.float64).to(device=device)
    weight = torch.where(batch.target == 4, 1e-14, 1.0).double()
    report = diagnose(batch.logits, batch.target, sample_weight=weight, engine=engine)
    without = diagnose(batch.logits, batch.target, sample_weight=(weight == 1).double(), engine=engine)
    assert report.absent_classes == without.absent_classes == [4]
    assert report.kept == without.kept == 5
    assert report.log_abs_det == pytest.approx(without.log_abs_det, rel=REORDERED)
    assert report.log_abs_det == pytest.approx(-dmi_loss(batch.logits, batch.target, sample_weight=weight, engine=engine).item())


@pytest.mark.parametrize("share", [1e-14, 1e-300, 1e-320, 0.0])
def test_the_average_is_that_of_the_loss(engine: str, device: torch.device, share: float) -> None:
    """Also when a class left the data long ago."""
    batch = problem(300, 6, dtype=torch.float64).to(device=device)
    criterion = ldmi_fast.DMILoss(6, momentum=0.9, engine=engine).to(device)
    criterion.calibrate([(batch.logits, batch.target)], lambda x: x)
    with torch.no_grad():
        for state in (criterion.average_joint, criterion.average_counts):
            state[5] *= share
    report = criterion.diagnose(batch.logits, batch.target)
    assert report.average is not None
    assert (report.average.kept, report.average.sign) == (5, 1)
    rest = criterion.average_joint[:5, :5]
    assert report.average.log_abs_det == pytest.approx(torch.linalg.slogdet(rest)[1].item(), rel=REORDERED)


def test_an_average_that_is_elsewhere() -> None:
    criterion = ldmi_fast.DMILoss(5, momentum=0.9)
    criterion.calibrate([(torch.randn(50, 5), torch.arange(50) % 5)], lambda x: x)
    with pytest.raises(ValueError, match=r"the average of this DMILoss is on meta, the logits on cpu: call criterion.to\('cpu'\)"):
        criterion.to("meta").diagnose(torch.randn(50, 5), torch.arange(50) % 5)


def test_weights_that_require_a_gradient(engine: str, device: torch.device) -> None:
    batch = problem(60, 5, weighted=True).to(device=device)
    assert batch.sample_weight is not None
    weight = batch.sample_weight.clone().requires_grad_()
    report = diagnose(batch.leaf(), batch.target, sample_weight=weight, engine=engine)
    expected = diagnose(batch.logits, batch.target, sample_weight=batch.sample_weight, engine=engine)
    assert report.loss == expected.loss
    assert report.spread == expected.spread
    assert not report.counts.requires_grad
    assert weight.grad is None
    assert explain(batch.logits, batch.target, sample_weight=weight, engine=engine).engine == engine


@pytest.mark.parametrize("function", [diagnose, explain, joint_matrix, ldmi_fast.DMILoss(5).diagnose], ids=str)
def test_what_is_no_tensor(function: Any) -> None:
    batch = problem(20, 5)
    for wrong in ({"logits": batch.logits}, None, [1.0]):
        with pytest.raises(TypeError, match="logits must be a floating point tensor, got"):
            function(wrong, batch.target)
        with pytest.raises(TypeError, match="target must be an integer"):
            function(batch.logits, wrong)


def test_advice_on_one_class(engine: str, device: torch.device) -> None:
    logits, target = torch.randn(20, 1, device=device), torch.zeros(20, dtype=torch.int64, device=device)
    words = advice(logits, target, engine=engine)
    assert "with one class the loss is constant and its gradient 0" in words
    assert "torch.cat([torch.zeros_like(z), z], 1)" in words
    assert "torch.cat([1 - p, p], 1)" in advice(logits.sigmoid(), target, input="probs", engine=engine)


@pytest.mark.parametrize("dtype", FLOATS)
def test_advice_on_probabilities_in_place_of_logits(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    batch = problem(400, 5, weighted=True).to(device=device)
    assert batch.sample_weight is not None
    probs = batch.logits.softmax(1).to(dtype)
    probs[batch.sample_weight == 0] = 7  # rows that do not count
    options: dict[str, Any] = {"sample_weight": batch.sample_weight, "engine": engine}
    assert "pass input='probs'" in advice(probs, batch.target, **options)
    assert diagnose(probs, batch.target, input="probs", **options).advice == []
    assert diagnose(batch.logits.to(dtype), batch.target, **options).advice == []
    some = torch.where(torch.arange(400, device=device).unsqueeze(-1) < 398, probs, batch.logits.to(dtype))
    assert "input='probs'" not in advice(some, batch.target, **options)


def test_advice_on_logits_in_place_of_probabilities(engine: str, device: torch.device) -> None:
    batch = problem(400, 5).to(device=device)
    for rows in (batch.logits, batch.logits.sigmoid()):
        words = advice(rows, batch.target, input="probs", engine=engine)
        assert "400 of 400 rows are no probabilities" in words
        assert "leave out input" in words


def test_advice_on_several_labels_per_sample(engine: str, device: torch.device) -> None:
    batch = problem(400, 5).to(device=device)
    labels = torch.nn.functional.one_hot(batch.target, 5).float()
    labels[:100, 0] = 1
    twice = int((batch.target[:100] != 0).sum())
    words = advice(batch.logits, labels, engine=engine)
    assert f"{twice} of 400 rows of the soft targets do not sum to 1" in words
    assert "target.sum(1, keepdim=True)" in words
    weight = torch.where(labels.sum(1) > 1, 0.0, 1.0)
    assert diagnose(batch.logits, labels, sample_weight=weight, engine=engine).advice == []
    for dtype in FLOATS:
        rounded = problem(400, 5, soft=True, dtype=dtype).to(device=device)
        assert "do not sum to 1" not in advice(rounded.logits, rounded.target, engine=engine)


def test_advice_on_negative_targets(device: torch.device) -> None:
    """The targets of one class are negative: the loss of the others is a number. This is an error only on the CPU: elsewhere the check
    would wait for the device."""
    batch = problem(400, 5).to(device=device)
    labels = torch.nn.functional.one_hot(batch.target, 5).double()
    labels[:, 2] *= -1
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"soft targets must be probabilities.*got -1 for class 2"):
            diagnose(batch.logits, labels)
        return
    words = advice(batch.logits, labels)
    assert "soft targets below 0: those of class 2 sum to -80 (1 such of 5 classes)" in words
