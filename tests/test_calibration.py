"""DMILoss.calibrate and DMILoss.recommended: the first average, and a momentum for a batch size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmi_fast import DMILoss, joint_matrix
from tests.support.compare import EXACT
from tests.support.problems import problem

STATE = ("average_joint", "average_counts", "average_weight", "average_steps")


def mean_of(criterion: DMILoss) -> tuple[Tensor, Tensor]:
    """B and the class shares of a criterion that has an average."""
    assert criterion.average is not None
    return criterion.average.mean()


def loader(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(50, 5, generator=generator), torch.arange(50) % 6) for _ in range(count)]


def test_calibration_is_the_joint_of_the_data() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5))
    model[1].eval()
    criterion = DMILoss(6, momentum=0.9)
    criterion(torch.randn(50, 6), torch.arange(50) % 6)
    statistics = copy.deepcopy(model.state_dict())
    criterion.calibrate(loader(), model)
    assert model.training
    assert not model[1].training
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())
    model.eval()
    x, y = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    U = joint_matrix(model(x).detach().double(), y)
    torch.testing.assert_close(mean_of(criterion)[0], U, rtol=1e-6, atol=0)
    assert criterion.average_steps.item() == 0
    batch = problem(60, 6, dtype=torch.float64)
    criterion(batch.logits, batch.target)
    expected = 0.9 * U + 0.1 * joint_matrix(batch.logits, batch.target)
    torch.testing.assert_close(mean_of(criterion)[0], expected, rtol=1e-6, atol=0)
    criterion.reset()
    assert not any(getattr(criterion, name).any() for name in STATE)


def test_calibration_takes_weights_and_functions() -> None:
    batch = problem(60, 6, weighted=True, dtype=torch.float64)
    criterion = DMILoss(6, momentum=0.9)
    criterion.calibrate([(batch.logits, batch.target, batch.sample_weight)], lambda z: z)
    expected = joint_matrix(batch.logits, batch.target, sample_weight=batch.sample_weight)
    torch.testing.assert_close(mean_of(criterion)[0], expected)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "found no sample that counts"),
        ([(torch.zeros(3, 6), torch.full((3,), -100))], ValueError, "found no sample that counts"),
        ([(torch.full((3, 6), torch.nan), torch.arange(3))], ValueError, "logits that are NaN"),
        ([torch.zeros(3, 6)], ValueError, r"\(input, target\).*got Tensor"),
        ([(torch.zeros(3, 6),)], ValueError, "got 1 items"),
        ([(torch.zeros(3, 5), torch.arange(3))], ValueError, "for 6 classes, got logits with 5"),
        ([(torch.zeros(3, 6), torch.tensor([0, 6, 1]))], IndexError, "target 6 of sample 1"),
    ],
)
def test_bad_calibration(data: list[Any], error: type[Exception], message: str) -> None:
    criterion, batch = DMILoss(6, momentum=0.9), problem(60, 6)
    criterion(batch.logits, batch.target)
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(error, match=message):
        criterion.calibrate(data, torch.nn.Identity())
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


@pytest.mark.parametrize(
    ("classes", "batch", "momentum"),
    [
        (2, 128, 0.9),  # an average of 10 batches has enough samples
        (14, 256, 0.9),
        (100, 64, 1 - 2 / (250 * 100 / 64 + 1)),  # 250 samples per class
        (1000, 256, 1 - 2 / (250 * 1000 / 256 + 1)),
        (10_000, 32, 0.999),  # more would lag too far behind
    ],
)
def test_recommended(classes: int, batch: int, momentum: float) -> None:
    criterion = DMILoss.recommended(classes, batch, ignore_index=255, group="world")
    assert criterion.momentum == pytest.approx(momentum, rel=EXACT)
    assert (criterion.num_classes, criterion.options.ignore_index, criterion.options.group) == (classes, 255, "world")


def test_recommended_is_a_class_method_of_subclasses() -> None:
    class Mine(DMILoss):
        pass

    assert type(Mine.recommended(3, 64)) is Mine


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DMILoss.recommended(10, 0), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: DMILoss.recommended(10, 64.0), TypeError, "batch_size must be an int, got float: 64.0"),  # type: ignore[arg-type]
        (lambda: DMILoss.recommended(10, True), TypeError, "batch_size must be an int, got bool"),
        (lambda: DMILoss.recommended(0, 64), ValueError, "num_classes"),
        (lambda: DMILoss.recommended(10, 64, momentum=0.5), TypeError, "chooses the momentum"),  # type: ignore[call-arg]
        (lambda: DMILoss.recommended(10, 64, reduction="none"), TypeError, "reduction"),  # type: ignore[call-arg]
    ],
)
def test_recommended_says_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
