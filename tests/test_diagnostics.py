"""diagnose: the numbers of its report, for a batch and for a moving average."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import ldmi_fast
from ldmi_fast import JointReport, diagnose, dmi_loss, explain, joint_matrix
from tests.support.compare import DERIVATIVE, EXACT, REORDERED
from tests.support.problems import Problem, as_array, problem


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


def test_diagnose_leaves_autograd_alone(engine: str, device: torch.device) -> None:
    batch = problem(40, 5, soft=True).to(device=device)
    logits, target = batch.leaf(), batch.target.clone().requires_grad_()
    report = diagnose(logits, target, engine=engine)
    assert logits.grad is None
    assert not report.counts.requires_grad
    assert torch.is_grad_enabled()


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


@pytest.mark.parametrize(
    "function", [diagnose, explain, joint_matrix, ldmi_fast.DMILoss(5).diagnose], ids=lambda function: function.__qualname__
)
def test_what_is_no_tensor(function: Any) -> None:
    batch = problem(20, 5)
    for wrong in ({"logits": batch.logits}, None, [1.0]):
        with pytest.raises(TypeError, match="logits must be a floating point tensor, got"):
            function(wrong, batch.target)
        with pytest.raises(TypeError, match="target must be an integer"):
            function(batch.logits, wrong)
