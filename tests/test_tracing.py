"""Programs that trace the loss instead of running it: torch.export, make_fx, fake tensors. Nothing may read data then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

from ldmi_fast import DMILoss, JointState, dmi_loss, few_rows, joint_matrix, linear_dmi_loss
from tests.support.problems import problem


class Step(nn.Module):
    """A layer and its loss."""

    def __init__(self, criterion: DMILoss, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(10, classes)
        self.criterion = criterion

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.layer(inputs), target)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("dynamic", [Dim("n", max=100_000), Dim.DYNAMIC, Dim.AUTO], ids=["bounded", "dynamic", "auto"])
@pytest.mark.parametrize("kind", ["plain", "average", "eval", "many-classes", "soft"])
def test_export_with_gradients(engine: str, device: torch.device, dynamic: Any, strict: bool, kind: str) -> None:
    """One program for batches of any size, on both sides of every size at which an engine changes its algorithm."""
    classes = 600 if kind == "many-classes" else 5
    criterion = DMILoss(classes, momentum=0.9 if kind in ("average", "eval") else None, engine=engine).to(device)
    step = Step(criterion, classes).to(device)
    if kind == "eval":
        step.criterion.eval()

    def batch(n: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(n)
        target = torch.randint(0, classes, (n,), generator=generator)
        if kind == "soft":
            target = torch.randn(n, classes, generator=generator).softmax(-1)
        return torch.randn(n, 10, generator=generator).to(device), target.to(device)

    program: Any = export(step, batch(64), dynamic_shapes=({0: dynamic}, {0: dynamic}), strict=strict).module()
    for n in (7, 640, 60_000 if classes == 5 else 900):
        step.criterion.reset() if kind == "average" else None
        program.criterion.average_weight.zero_() if kind == "average" else None
        program.criterion.average_joint.zero_() if kind == "average" else None
        program.criterion.average_counts.zero_() if kind == "average" else None
        loss, expected = program(*batch(n)), step(*batch(n))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        if not expected.isfinite():
            continue
        (grad,) = torch.autograd.grad(loss, program.layer.weight)
        (wanted,) = torch.autograd.grad(expected, step.layer.weight)
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


FORMS = {
    "loss": lambda z, y: dmi_loss(z, y),
    "joint": lambda z, y: joint_matrix(z, y),
    "linear": lambda z, y: linear_dmi_loss(z, torch.eye(6, dtype=z.dtype, device=z.device), y),
    "gradient": lambda z, y: torch.autograd.grad(dmi_loss(z, y), z)[0],
    "soft": lambda z, y: dmi_loss(z, torch.full_like(z, 0.1 / 6).scatter(1, y.unsqueeze(1), 0.9 + 0.1 / 6)),
}


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("form", FORMS)
def test_make_fx(device: torch.device, mode: Any, form: str) -> None:
    batch, other = (problem(60, 6, seed=seed).to(device=device) for seed in (0, 1))
    graph = make_fx(FORMS[form], tracing_mode=mode)(batch.leaf(), batch.target)
    for here in (batch, other):
        torch.testing.assert_close(graph(here.leaf(), here.target), FORMS[form](here.leaf(), here.target))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_fake_tensors(soft: bool) -> None:
    with FakeTensorMode():
        logits = torch.empty(60, 6, requires_grad=True)
        target = torch.empty(60, 6) if soft else torch.empty(60, dtype=torch.int64)
        weight = torch.empty(60)
        criterion = DMILoss(6, momentum=0.9)
        state = JointState(6)
        state.update(logits, target, weight)
        state.solve()
        losses = {
            "dmi_loss": dmi_loss(logits, target, sample_weight=weight),
            "linear": linear_dmi_loss(torch.empty(60, 3), torch.empty(6, 3, requires_grad=True), target),
            "average": criterion(logits, target),
            "state": state.loss(logits, target, weight),
        }
        for name, loss in losses.items():
            assert loss.shape == (), name
            loss.backward()


def test_fake_tensors_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_LEAST_CLASSES", 4)
    monkeypatch.setattr(few_rows, "_CLASSES_PER_ROW", 2)
    with FakeTensorMode():
        loss = dmi_loss(torch.empty(3, 6, requires_grad=True), torch.empty(3, dtype=torch.int64), cross_entropy_weight=0.1)
        loss.backward()
        assert loss.shape == ()


class Renamed(Tensor):
    """A subclass that changes nothing, like torchvision's masks."""


@pytest.mark.parametrize("which", ["logits", "target", "both"])
def test_labels_of_subclasses_are_checked(engine: str, which: str) -> None:
    batch = problem(20, 4)
    target = batch.target + 3
    logits = batch.logits.as_subclass(Renamed) if which != "target" else batch.logits
    target = target.as_subclass(Renamed) if which != "logits" else target
    with pytest.raises(IndexError, match="is out of range: expected 0 <= target < 4"):
        dmi_loss(logits, target, engine=engine)
    weight = torch.full((20,), -1.0).as_subclass(Renamed)
    with pytest.raises(ValueError, match="sample_weight must be finite and >= 0"):
        dmi_loss(batch.logits, batch.target, sample_weight=weight, engine=engine)
