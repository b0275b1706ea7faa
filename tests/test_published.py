"""Agreement with the published formula, in fp64 where its determinant neither underflows nor overflows."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from ldmi_fast import dmi_loss
from tests.support.compare import DERIVATIVE, REORDERED, relative, run
from tests.support.problems import as_array, problem


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
    assert ours.loss.item() == pytest.approx(loss.item(), rel=REORDERED)
    assert theirs.grad is not None
    assert relative(ours.grad, as_array(theirs.grad)) < DERIVATIVE


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


#: The replacement for the scripts' DMI_loss that docs/from-the-paper.md recommends.
IN_ITS_PLACE = {
    "counts": functools.partial(dmi_loss, eps=1e-3, normalize=False),
    "mean": functools.partial(dmi_loss, eps=1e-3),
}


@pytest.mark.parametrize("form", IN_ITS_PLACE)
@pytest.mark.parametrize(("n", "classes"), [(128, 2), (256, 2), (256, 10), (256, 14)])
def test_what_replaces_the_published_code(device: torch.device, n: int, classes: int, form: str) -> None:
    """In fp32, as the scripts run it: loss and gradient are equal up to the rounding of their fp32 determinant."""
    batch = problem(n, classes)
    theirs, ours = batch.leaf(), batch.to(device=device).leaf()
    published(theirs, batch.target, classes, mean=form == "mean").backward()
    expected = published(batch.leaf(), batch.target, classes, mean=form == "mean").item()
    loss = IN_ITS_PLACE[form](ours, batch.target.to(device))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-6, abs=2e-5)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert relative(ours.grad, as_array(theirs.grad)) < 1e-4


@pytest.mark.parametrize("form", IN_ITS_PLACE)
def test_training_by_either_ends_with_the_same_predictions(device: torch.device, form: str) -> None:
    """Adam at the rate of the Fashion-MNIST and MR scripts, shuffled batches of noisy labels: after every epoch the same classes."""
    features = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0)).to(device)
    labels = (features.sum(1) > 0).long()
    labels[::3] = 0
    predictions = []
    for loss_of in (lambda z, y: published(z.cpu(), y.cpu(), 2, mean=form == "mean"), IN_ITS_PLACE[form]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        after = []
        for _ in range(5):
            for index in torch.randperm(len(labels)).split(128):
                optimizer.zero_grad()
                loss_of(model(features[index]), labels[index]).backward()
                optimizer.step()
            after.append(model(features).argmax(1))
        predictions.append(torch.stack(after))
    assert (predictions[0][-1] != predictions[0][0]).any()
    torch.testing.assert_close(*predictions)
