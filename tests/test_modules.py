"""DMILoss: the function with its options fixed."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from ldmi_fast import DMILoss, dmi_loss
from tests.support.compare import loss_dtype
from tests.support.problems import Problem, problem

OPTION_SETS: list[dict[str, Any]] = [
    {},
    {"ignore_index": 2},
    {"absent": "strict", "eps": 1e-3},
    {"normalize": False, "cross_entropy_weight": 0.5},
]


@pytest.mark.parametrize("options", OPTION_SETS, ids=["plain", "ignore", "strict-eps", "counts-ce"])
@pytest.mark.parametrize("num_classes", [None, 8])
def test_is_the_function(engine: str, device: torch.device, options: dict[str, Any], num_classes: int | None) -> None:
    batch = problem(100, 8, weighted=True).to(device=device)
    criterion = DMILoss(num_classes, engine=engine, **options)
    ours, theirs = batch.leaf(), batch.leaf()
    loss = criterion(ours, batch.target, batch.sample_weight)
    expected = dmi_loss(theirs, batch.target, sample_weight=batch.sample_weight, engine=engine, **options)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_probabilities(engine: str, device: torch.device) -> None:
    batch = problem(100, 8).to(device=device)
    probs = batch.logits.softmax(1)
    assert torch.equal(
        DMILoss(input="probs", engine=engine)(probs, batch.target),
        dmi_loss(probs, batch.target, input="probs", engine=engine),
    )


def test_trains(engine: str, device: torch.device) -> None:
    """A linear model on labels of which 40% moved to the next class: the loss falls, and the model finds the true classes."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(900) % 3
    features = torch.nn.functional.one_hot(clean, 3) + 0.3 * torch.randn(900, 3, generator=generator)
    flipped = torch.rand(900, generator=generator) < 0.4
    noisy = torch.where(flipped, (clean + 1) % 3, clean).to(device)
    features, clean = features.to(device), clean.to(device)
    model = torch.nn.Linear(3, 3).to(device)
    with torch.no_grad():
        model.weight.copy_(0.5 * torch.eye(3))
        model.bias.zero_()
    criterion = DMILoss(3, engine=engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = criterion(model(features), noisy)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert (model(features).argmax(1) == clean).float().mean().item() > 0.9


def test_has_no_parameters_and_an_empty_state() -> None:
    criterion = DMILoss(10, eps=1e-3)
    assert not list(criterion.parameters())
    assert not criterion.state_dict()
    criterion.load_state_dict({})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_module_dtype_conversion_leaves_the_computation_alone(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    batch = problem(100, 8, dtype=dtype).to(device=device)
    criterion = DMILoss(8, engine=engine)
    before = criterion(batch.logits, batch.target)
    after = criterion.half().to(device)(batch.logits, batch.target)
    assert before.dtype == loss_dtype(dtype)
    assert torch.equal(before, after)


def test_copies_pickles_and_saves() -> None:
    batch = problem(50, 5)
    criterion = DMILoss(5, eps=1e-3, normalize=False, cross_entropy_weight=0.25)
    expected = criterion(batch.logits, batch.target)
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(criterion),
        pickle.loads(pickle.dumps(criterion)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(batch.logits, batch.target), expected)


def test_repr_names_what_is_not_default() -> None:
    assert repr(DMILoss()) == "DMILoss()"
    assert repr(DMILoss(14, eps=1e-3, absent="strict")) == "DMILoss(14, absent='strict', eps=0.001)"


def test_inside_sequential_modules_and_hooks() -> None:
    """An ordinary module: hooks run, train and eval change nothing."""
    criterion = DMILoss(5)
    seen: list[torch.Tensor] = []
    criterion.register_forward_hook(lambda module, args, output: seen.append(output))
    batch: Problem = problem(50, 5)
    trained = criterion.train()(batch.logits, batch.target)
    evaluated = criterion.eval()(batch.logits, batch.target)
    assert len(seen) == 2
    assert torch.equal(trained, evaluated)


def test_target_and_weight_by_keyword() -> None:
    batch = problem(50, 5, weighted=True)
    criterion = DMILoss()
    assert torch.equal(
        criterion(logits=batch.logits, target=batch.target, sample_weight=batch.sample_weight),
        criterion(batch.logits, batch.target, batch.sample_weight),
    )


def test_what_libraries_look_for() -> None:
    """fastai calls activation and decodes for predictions, and asks for a reduction that this loss cannot have."""
    logits = torch.randn(6, 4, 5)
    criterion = DMILoss(4)
    torch.testing.assert_close(criterion.activation(logits), logits.softmax(1))
    assert torch.equal(criterion.decodes(logits), logits.argmax(1))
    probabilities = logits.softmax(1)
    assert torch.equal(DMILoss(4, input="probs").activation(probabilities), probabilities)
    with pytest.raises(TypeError, match="'reduction': the loss is one number for the whole batch"):
        criterion(logits[..., 0], torch.zeros(6, dtype=torch.int64), reduction="none")
    with pytest.raises(TypeError, match=r"compute_loss_func=ldmi_fast\.integrations\.hf\(criterion\)"):
        criterion(logits[..., 0], torch.zeros(6, dtype=torch.int64), num_items_in_batch=6)
