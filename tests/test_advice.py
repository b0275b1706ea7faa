"""The advice of diagnose: that it names the cause, and that it fits the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmi_fast import diagnose, dmi_loss
from tests.support.problems import conditioned, problem

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


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
    assert "classes 1 and 4 have the most similar predictions" in words
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
    assert "most similar predictions" not in words
    assert "have no sample in this batch" not in words
    strict = diagnose(here.logits, target, sample_weight=here.sample_weight, absent="strict", engine=engine)
    assert strict.loss == math.inf
    words = "\n".join(strict.advice)
    assert "class 9 has no sample of its own" in words
    assert "absent='present'" in words
    assert "most similar predictions" not in words


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
    assert "most similar predictions" not in words


def test_strict_names_the_cause_alone(engine: str, device: torch.device) -> None:
    batch = problem(300, 6, absent=(4,)).to(device=device)
    report = diagnose(batch.logits, batch.target, absent="strict", engine=engine)
    assert report.singular
    assert "most similar predictions" not in "\n".join(report.advice)
    collapsed = diagnose(torch.zeros_like(batch.logits), batch.target, absent="strict", engine=engine)
    assert "most similar predictions" in "\n".join(collapsed.advice)


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
