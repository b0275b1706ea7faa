"""Parity with the published formula, in fp64 where its determinant neither underflows nor overflows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compare import relative, run
from tests.problems import as_array, problem


def published(outputs: Tensor, targets: Tensor, classes: int, *, mean: bool) -> Tensor:
    """-log(|det(joint)| + 0.001) as the paper's scripts write it: one-hot product, counts or their mean."""
    probabilities = torch.softmax(outputs, 1)
    onehot = torch.zeros(len(targets), classes, dtype=outputs.dtype).scatter_(1, targets.view(-1, 1), 1)
    joint = onehot.t() @ probabilities
    if mean:
        joint = joint / len(targets)
    return -torch.log(torch.abs(torch.det(joint)) + 0.001)


@pytest.mark.parametrize("mean", [False, True], ids=["counts", "mean"])
@pytest.mark.parametrize(
    ("n", "classes"),
    [
        pytest.param(128, 2, id="fashion-mnist"),
        pytest.param(256, 10, id="cifar10"),
        pytest.param(256, 14, id="clothing1m"),
    ],
)
def test_published_formula(engine: str, device: torch.device, n: int, classes: int, mean: bool) -> None:
    batch = problem(n, classes, dtype=torch.float64)
    theirs = batch.leaf()
    loss = published(theirs, batch.target, classes, mean=mean)
    loss.backward()
    ours = run(batch.to(device=device), engine, normalize=mean, eps=1e-3)
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert theirs.grad is not None
    assert relative(ours.grad, as_array(theirs.grad)) < 1e-10


def test_published_formula_fails_where_this_one_does_not(engine: str, device: torch.device) -> None:
    """fp32, 14 classes, 65536 rows: the determinant of counts overflows, and the gradient is NaN."""
    batch = problem(65536, 14)
    theirs = batch.leaf()
    loss = published(theirs, batch.target, 14, mean=False)
    loss.backward()
    assert loss.item() == -torch.inf
    assert theirs.grad is not None
    assert theirs.grad.isnan().any()
    ours = run(batch.to(device=device), engine, normalize=False, eps=1e-3)
    assert ours.loss.isfinite()
    assert ours.grad.isfinite().all()
    assert ours.grad.any()
