"""Loaders and models of other libraries: what calibrate, update_from and dmi_score take."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmi_fast import DMILoss, JointState, dmi_score
from tests.support.problems import problem

BATCH = problem(60, 4)
WEIGHT = torch.linspace(0, 1, 60)


@dataclass
class Output:
    """Like Hugging Face's ModelOutput, which is also a dict."""

    logits: Tensor
    loss: Tensor | None = None


class Keywords(nn.Module):
    """A model that takes keywords and returns an object with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> Output:
        self.modes.append(self.training)
        return Output(pixel_values * self.scale)


def score(loader: Any, model: Any) -> float:
    return dmi_score(model, loader, 4).log_abs_det.item()


EXPECTED = score([(BATCH.logits, BATCH.target)], lambda x: x)
WEIGHTED = score([(BATCH.logits, BATCH.target, WEIGHT)], lambda x: x)


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("name", ["labels", "label", "targets"])
def test_mappings(kind: Any, name: str) -> None:
    model = Keywords()
    loader = [kind({"pixel_values": BATCH.logits[i::3], name: BATCH.target[i::3], "mask": None}) for i in range(3)]
    assert score(loader, model) == pytest.approx(EXPECTED)
    assert model.training
    assert model.modes == [False] * 3
    weighted = [kind({"pixel_values": BATCH.logits, name: BATCH.target, "sample_weight": WEIGHT})]
    assert score(weighted, model) == pytest.approx(WEIGHTED)
    assert score([({"pixel_values": BATCH.logits}, BATCH.target)], model) == pytest.approx(EXPECTED)


def test_tokens_have_their_classes_last() -> None:
    """In the layout of the loss of Hugging Face's Trainer: token classification can be calibrated, and scored."""
    logits, target = BATCH.logits.reshape(6, 10, 4), BATCH.target.reshape(6, 10)
    soft = nn.functional.one_hot(target, 4).float()
    for labels in (target, soft):
        loader = [{"pixel_values": logits, "labels": labels}]
        assert score(loader, Keywords()) == pytest.approx(EXPECTED)
        DMILoss(4, momentum=0.9).calibrate(loader, Keywords())


def test_calibrate_takes_them_too() -> None:
    criterion, plain = DMILoss(4, momentum=0.9), DMILoss(4, momentum=0.9)
    criterion.calibrate([{"pixel_values": BATCH.logits, "labels": BATCH.target}], Keywords())
    plain.calibrate([(BATCH.logits, BATCH.target)], lambda x: x)
    torch.testing.assert_close(criterion.average_joint, plain.average_joint)


Named = namedtuple("Named", ["logits", "hidden"])


@pytest.mark.parametrize(
    "model",
    [
        lambda x: Output(x),
        lambda x: {"logits": x, "loss": x.sum()},
        lambda x: UserDict(logits=x),
        lambda x: (x,),
        lambda x: (x, x[0]),
        lambda x: (x.sum(), x),
        lambda x: Named(x, None),
    ],
)
def test_outputs(model: Any) -> None:
    assert score([(BATCH.logits, BATCH.target)], model) == pytest.approx(EXPECTED)


@pytest.mark.parametrize("model", [lambda x: {"scores": x}, lambda x: x.numpy(), lambda x: None, lambda x: (), lambda x: Output(None)])  # type: ignore[arg-type]
def test_outputs_without_logits(model: Any) -> None:
    for call in (score, lambda loader, model: DMILoss(4, momentum=0.9).calibrate(loader, model)):
        with pytest.raises(TypeError, match=r"the model must return logits as a tensor, or something that has them as \.logits"):
            call([(BATCH.logits, BATCH.target)], model)


@pytest.mark.parametrize("value", [{"logits": BATCH.logits}, Output(BATCH.logits), None, [1.0]], ids=lambda v: type(v).__name__)
def test_update_takes_tensors_alone(value: Any) -> None:
    state = JointState(4)
    with pytest.raises(TypeError, match="logits must be a floating point tensor"):
        state.update(value, BATCH.target)
    with pytest.raises(TypeError, match="target must be"):
        state.update(BATCH.logits, value)
    assert not state.sums.n.any()


INDEX = torch.arange(60)
FIRST = r"the first item is an index of the samples or the like, leave it out: \(\(x, y\) for _, x, y in loader\)"
THIRD = r"the third item is an index of the samples or the like, leave it out: \(\(x, y\) for x, y, _ in loader\)"


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((BATCH.logits, BATCH.target, INDEX), TypeError, THIRD),
        ((BATCH.logits, BATCH.target, INDEX.tolist()), TypeError, THIRD),
        ((BATCH.logits, BATCH.target, INDEX.numpy()), TypeError, THIRD),
        ((BATCH.logits, BATCH.target, ["a.png"] * 60), TypeError, THIRD),
        ((BATCH.target, BATCH.target, INDEX), TypeError, THIRD),  # the model takes one token
        ((INDEX, BATCH.logits, BATCH.target), TypeError, FIRST),
        ((INDEX.tolist(), BATCH.logits, BATCH.target), TypeError, FIRST),
        ((INDEX, BATCH.target.expand(9, 60).T, BATCH.target), TypeError, FIRST),  # tokens
        ((BATCH.logits, BATCH.target, INDEX > 3), TypeError, r"\(of a mask: \.float\(\)\), got torch\.bool"),
        (
            {"pixel_values": BATCH.logits, "labels": BATCH.target, "sample_weight": INDEX},
            TypeError,
            "the 'sample_weight' of a batch must be sample weights",
        ),
        (BATCH.logits, ValueError, "got Tensor"),
        ((BATCH.logits,), ValueError, "got 1 items"),
        (
            {"pixel_values": BATCH.logits, "noisy": BATCH.target},
            ValueError,
            r"under 'labels', got the keys \['noisy', 'pixel_val",
        ),
    ],
)
def test_other_batches_are_named(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score([batch], lambda x: x)
    with pytest.raises(error, match=message):
        DMILoss(4, momentum=0.9).calibrate([batch], lambda x: x)


def test_no_data_gives_a_result_on_the_device_of_the_model() -> None:
    model = nn.Linear(3, 4, device="meta")
    assert JointState(4).update_from([], model).sums.S.device.type == "meta"
    assert JointState(4, device="cpu").update_from([], model).sums.S.device.type == "cpu"
