"""Soft targets without information about a class: smoothed labels of a batch in which the class does not occur."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmi_fast import DMILoss, JointState, dmi_loss, linear_dmi_loss
from tests.support.compare import DERIVATIVE, REORDERED, SECOND_DERIVATIVE, assert_matches, run
from tests.support.problems import Problem, problem


def smoothed(batch: Problem, rate: float, dtype: torch.dtype = torch.float64) -> Problem:
    classes = batch.logits.shape[1]
    return batch.with_target(F.one_hot(batch.target, classes).to(dtype) * (1 - rate) + rate / classes)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def log_det_of_smoothing(kept: int, classes: int, rate: float) -> float:
    """log|det| of (1 - rate) I + rate / C 1 1^T over the kept classes."""
    mixing = (1 - rate) * torch.eye(kept, dtype=torch.float64) + rate / classes
    return torch.linalg.slogdet(mixing)[1].item()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(
    ("n", "classes", "absent"), [(64, 5, (2,)), (128, 10, (0, 9)), (32, 14, (3,)), (576, 10, (9,)), (300, 100, (7, 50, 99))]
)
def test_gradient_is_that_of_the_hard_labels(
    engine: str, device: torch.device, n: int, classes: int, absent: tuple[int, ...], weighted: bool
) -> None:
    hard = problem(n, classes, absent=absent, weighted=weighted, dtype=torch.float64).to(device=device)
    soft = smoothed(hard, 0.1)
    logits = hard.leaf()
    theirs = dmi_loss(logits, hard.target, sample_weight=hard.sample_weight, engine=engine)
    ours = dmi_loss(logits, soft.target, sample_weight=soft.sample_weight, engine=engine)
    kept = len(hard.target[hard.sample_weight != 0].unique()) if weighted else len(hard.target.unique())
    assert ours.item() == pytest.approx(theirs.item() - log_det_of_smoothing(kept, classes, 0.1), rel=REORDERED)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), rtol=DERIVATIVE, atol=DERIVATIVE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"eps": 1e-9}, {"normalize": False, "cross_entropy_weight": 0.3}], ids=["", "eps", "counts-ce"]
)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_is_the_definition(engine: str, device: torch.device, dtype: torch.dtype, options: dict[str, Any], weighted: bool) -> None:
    batch = smoothed(problem(200, 6, absent=(4,), weighted=weighted, dtype=torch.float64), 0.2).to(dtype, device)
    answer = batch.answer(**options)
    assert not answer.singular
    assert answer.absent == [4]
    assert_matches(run(batch, engine, **options), answer, dtype)


def test_strict_is_singular_as_for_hard_labels(engine: str, device: torch.device) -> None:
    batch = smoothed(problem(60, 6, absent=(4,), dtype=torch.float64), 0.1).to(device=device)
    logits = batch.leaf()
    loss = dmi_loss(logits, batch.target, absent="strict", engine=engine)
    assert loss.item() == float("inf")
    assert not gradient(loss, logits).any()


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_mixup_of_smoothed_labels(engine: str, device: torch.device, wide: torch.dtype) -> None:
    """As timm mixes them: the constant column is constant up to rounding."""
    batch = problem(96, 7, absent=(6,)).to(device=device)
    off, on = 0.1 / 7, 1 - 0.1 + 0.1 / 7
    labels = torch.full((96, 7), off, device=device).scatter_(1, batch.target.unsqueeze(1), on)
    ratio = torch.rand(96, 1, generator=torch.Generator().manual_seed(3)).to(device)
    target = (labels * ratio + labels.flip(0) * (1.0 - ratio)).to(wide)
    assert target[:, 6].min() < target[:, 6].max()  # the rounding is there
    logits = batch.leaf()
    loss = dmi_loss(logits, target, engine=engine)
    one_hot = F.one_hot(batch.target, 7).double()
    mixed = one_hot * ratio.double() + one_hot.flip(0) * (1 - ratio.double())
    expected = dmi_loss(logits.double(), mixed, engine=engine)
    assert loss.isfinite()
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits).float(), rtol=1e-4, atol=1e-6)


def test_one_sample_and_one_class(engine: str, device: torch.device) -> None:
    logits = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    target = torch.full((3, 4), 0.025, device=device, dtype=torch.float64)
    target[:, 2] = 0.925
    for n in (1, 3):
        soft = dmi_loss(logits[:n], target[:n], engine=engine)
        hard = dmi_loss(logits[:n], torch.full((n,), 2, device=device), engine=engine)
        assert soft.item() == pytest.approx(hard.item() - torch.tensor(0.925).log().item(), rel=1e-6)
        torch.testing.assert_close(gradient(soft, logits), gradient(hard, logits))
    uniform = torch.full((3, 4), 0.25, device=device, dtype=torch.float64)
    assert dmi_loss(logits, uniform, engine=engine).item() == float("inf")  # the targets say nothing about any class
    assert dmi_loss(logits[:0], uniform[:0], engine=engine).item() == 0


def test_rows_that_are_no_distributions(engine: str, device: torch.device) -> None:
    """A label that every sample has, together with a varying number of others: here the constant column is information."""
    batch = problem(60, 4, soft=True, dtype=torch.float64).to(device=device)
    target = batch.target.clone()
    target[:, 3] = 1.0
    loss = dmi_loss(batch.logits, target, engine=engine)
    S = target.T @ batch.logits.softmax(-1) / 60
    assert loss.item() == pytest.approx(-torch.linalg.slogdet(S)[1].item(), rel=REORDERED)


@pytest.mark.parametrize("kind", ["padding", "weights"])
def test_rows_of_other_sums(engine: str, device: torch.device, kind: str) -> None:
    """Rows of zeros, as padding has them; and weights that are folded into the targets."""
    batch = problem(80, 5, absent=(4,), dtype=torch.float64).to(device=device)
    soft = smoothed(batch, 0.1).target
    weight = torch.rand(80, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device) + 0.5
    if kind == "padding":
        weight = torch.ones_like(weight)
        weight[-8:] = 0
    logits = batch.leaf()
    ours = gradient(dmi_loss(logits, (soft * weight).float(), engine=engine), logits)
    theirs = gradient(dmi_loss(logits, batch.target, sample_weight=weight.squeeze(1), engine=engine), logits)
    assert theirs.any()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_micro_batches_of_any_size(engine: str, device: torch.device, size: int) -> None:
    """Smoothed by a prior that is not uniform: each micro-batch counts for the class that its sample has."""
    hard = problem(60, 4, absent=(3,), dtype=torch.float64).to(device=device)
    prior = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64, device=device)
    target = F.one_hot(hard.target, 4) * 0.8 + 0.2 * prior
    logits = hard.leaf()
    expected = gradient(dmi_loss(logits, hard.target, engine=engine), logits)
    state = JointState(4, engine=engine)
    parts = [slice(i, i + size) for i in range(0, 60, size)]
    for part in parts:
        state.update(logits[part], target[part])
    assert state.solve().kept.item() == 3
    found = gradient(torch.stack([state.loss(logits[part], target[part]) for part in parts]).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=SECOND_DERIVATIVE, atol=SECOND_DERIVATIVE)


def test_a_class_that_leaves_the_average(engine: str, device: torch.device) -> None:
    """Its part of the average beyond the smoothing decays. The gradient is that of the average of hard labels until the class is
    absent, then that of the remaining classes. It is never large, and the loss is never inf."""
    batch = problem(120, 5).to(device=device)
    hard, smooth = (DMILoss(5, momentum=0.5, engine=engine).to(device) for _ in range(2))
    target = smoothed(batch, 0.1).target
    hard(batch.logits, batch.target)
    smooth(batch.logits, target)
    left = batch.target != 4
    logits = batch.logits[left].requires_grad_()
    absent_since = None
    for step in range(60):
        ours, theirs = smooth(logits, target[left]), hard(logits, batch.target[left])
        assert ours.isfinite(), step
        assert smooth.average is not None
        if smooth.average.mean()[1][4] == 0:
            theirs = dmi_loss(logits, batch.target[left], engine=engine)
            absent_since = step if absent_since is None else absent_since
            if step < 40:  # the average has forgotten the first batch
                continue
        torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), rtol=1e-3, atol=1e-5, msg=f"step {step}")
    assert absent_since is not None


def test_rows_that_do_not_count_say_nothing_about_classes(engine: str, device: torch.device) -> None:
    batch = problem(60, 5, absent=(4,), dtype=torch.float64).to(device=device)
    soft = smoothed(batch, 0.1).target
    soft[:6] = torch.eye(5, dtype=torch.float64, device=device)[4]  # the only samples of class 4, of weight 0
    soft[6] = torch.nan
    weight = torch.ones(60, device=device)
    weight[:7] = 0
    logits = batch.leaf()
    ours = gradient(dmi_loss(logits, soft, sample_weight=weight, engine=engine), logits)
    theirs = gradient(dmi_loss(logits, batch.target, sample_weight=weight, engine=engine), logits)
    assert theirs.any()
    torch.testing.assert_close(ours, theirs, rtol=DERIVATIVE, atol=DERIVATIVE)


def test_average_state_and_linear_follow(engine: str, device: torch.device) -> None:
    hard = problem(120, 6, absent=(5,), dtype=torch.float64).to(device=device)
    soft = smoothed(hard, 0.1)
    logits = hard.leaf()
    expected = gradient(dmi_loss(logits, hard.target, engine=engine), logits)
    assert expected.any()

    criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
    for _ in range(3):
        loss = criterion(logits, soft.target)
        torch.testing.assert_close(gradient(loss, logits), expected, rtol=DERIVATIVE, atol=DERIVATIVE)

    state = JointState(6, engine=engine)
    for part in (slice(0, 50), slice(50, 51), slice(51, 120)):
        state.update(logits[part], soft.target[part])
    assert state.solve().kept.item() == 5
    parts = [state.loss(logits[part], soft.target[part]) for part in (slice(0, 50), slice(50, 51), slice(51, 120))]
    torch.testing.assert_close(gradient(sum(parts[1:], parts[0]), logits), expected, rtol=DERIVATIVE, atol=DERIVATIVE)

    weight = torch.eye(6, dtype=torch.float64, device=device)
    loss = linear_dmi_loss(logits, weight, soft.target, engine=engine, chunk_size=7)
    torch.testing.assert_close(gradient(loss, logits), expected, rtol=DERIVATIVE, atol=DERIVATIVE)


def test_a_class_that_comes_back_into_the_average(engine: str, device: torch.device) -> None:
    """Batches that lack the class keep their smoothing; the average is that of smoothed labels, of all classes."""
    criterion, smooth = (DMILoss(5, momentum=0.8, engine=engine).to(device) for _ in range(2))
    grads: list[list[Tensor]] = [[], []]
    for seed, absent in enumerate([(), (4,), (4,), (), (2,)]):
        batch = problem(80, 5, seed=seed, absent=absent, dtype=torch.float64).to(device=device)
        logits = batch.leaf()
        grads[0].append(gradient(criterion(logits, batch.target), logits))
        grads[1].append(gradient(smooth(logits, smoothed(batch, 0.1).target), logits))
    for hard, soft in zip(*grads, strict=True):
        torch.testing.assert_close(soft, hard, rtol=DERIVATIVE, atol=DERIVATIVE)


def test_derivatives_of_the_gradient(engine: str, device: torch.device) -> None:
    hard = problem(40, 4, absent=(1,), dtype=torch.float64).to(device=device)
    soft = smoothed(hard, 0.1)
    logits = hard.leaf()
    seconds = []
    for target in (hard.target, soft.target):
        (first,) = torch.autograd.grad(dmi_loss(logits, target, engine=engine), logits, create_graph=True)
        seconds.append(gradient((first**2).sum(), logits))
    torch.testing.assert_close(seconds[1], seconds[0], rtol=SECOND_DERIVATIVE, atol=SECOND_DERIVATIVE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_targets_of_a_lower_rank_stay_singular(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    """A transition matrix over labels of which one is missing: no column is constant, and the joint is singular, whatever the weights.
    A weight times a target that is rounded to fp32 would hide that behind a huge gradient."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        mixing = torch.eye(8) * 0.8 + 0.2 * torch.rand(8, 8, generator=generator).softmax(1)
        labels = torch.randint(7, (128,), generator=generator)
        logits = (torch.randn(128, 8, generator=generator) + 2 * F.one_hot(labels, 8)).to(device, dtype).requires_grad_()
        weight = torch.rand(128, generator=generator).to(device)
        loss = dmi_loss(logits, mixing[labels].to(device, dtype), sample_weight=weight, engine=engine)
        assert loss.item() == float("inf")
        assert not gradient(loss, logits).any()
