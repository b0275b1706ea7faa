"""Hugging Face's Trainer with the loss as its compute_loss_func: scaling, evaluation, checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ldmi_fast import DMILoss, dmi_loss

pytest.importorskip("transformers", reason="transformers is not installed: pip install .[integrations]")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install .[integrations]")

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from ldmi_fast.integrations import HFCallback, hf
from tests.integrations import ranks

ROOT = Path(__file__).resolve().parents[2]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.layer(self.dropout(x)))


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, n: int = 240, seed: int = 0, name: str = "labels") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(n) % 4
        self.x = torch.randn(n, 6, generator=generator)
        self.x[torch.arange(n), self.y] += 2
        self.name = name

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], self.name: self.y[index]}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Any:
        rows = Rows()
        return (rows[i] for i in range(len(rows)))


class Gradients(TrainerCallback):
    """The gradients at each step of the optimizer."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen.append(model.layer.weight.grad.clone())


def trainer(folder: Path, criterion: Any, *callbacks: TrainerCallback, data: Any = None, model: Any = None, **given: Any) -> Any:
    options: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 40,
        "per_device_eval_batch_size": 30,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        **given,
    }
    return Trainer(
        model or Classifier(),
        TrainingArguments(str(folder), **options),
        train_dataset=Rows() if data is None else data,
        eval_dataset=Rows(90, 1),
        compute_loss_func=hf(criterion),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_accumulation_is_a_mean(tmp_path: Path, momentum: float | None) -> None:
    """With a learning rate of 0: loss and gradient of a step are means over its micro-batches; the last step has fewer."""
    results = {}
    for steps in (1, 4):
        recorder = Gradients()
        model = Classifier()
        model.dropout.p = 0.0
        criterion = DMILoss(4, momentum=momentum)
        run = trainer(tmp_path, criterion, recorder, model=model, gradient_accumulation_steps=steps)
        run.train()
        results[steps] = ([entry["loss"] for entry in run.state.log_history if "loss" in entry], recorder.seen)
    (losses, gradients), (ours, summed) = results[1], results[4]
    assert len(losses) == 6
    assert ours == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2], rel=1e-3)
    torch.testing.assert_close(summed[0], sum(gradients[:4]) / 4)
    torch.testing.assert_close(summed[1], sum(gradients[4:]) / 2)


class Own(Trainer):
    """A Trainer that overrides compute_loss, without compute_loss_func: the Trainer then does the division."""

    criterion = hf(DMILoss(4))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        loss = self.criterion(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def test_a_compute_loss_of_ones_own(tmp_path: Path) -> None:
    def total(own: bool) -> list[float]:
        run = trainer(tmp_path, DMILoss(4), gradient_accumulation_steps=3)
        run.model.dropout.p = 0.0
        if own:
            run = Own(run.model, run.args, train_dataset=run.train_dataset, eval_dataset=run.eval_dataset)
        run.train()
        return [*(entry["loss"] for entry in run.state.log_history if "loss" in entry), run.evaluate()["eval_loss"]]

    assert total(True) == pytest.approx(total(False))


def test_evaluation_is_of_the_batch_alone_and_enters_nothing(tmp_path: Path) -> None:
    criterion = DMILoss(4, momentum=0.9)
    run = trainer(tmp_path, criterion, eval_strategy="epoch", num_train_epochs=2)
    run.train()
    assert criterion.average_steps.item() == 12
    data, model = Rows(90, 1), run.model.eval()
    with torch.no_grad():
        parts = [dmi_loss(model(x).logits, y).item() for x, y in zip(data.x.split(30), data.y.split(30), strict=True)]
    assert run.evaluate()["eval_loss"] == pytest.approx(sum(parts) / 3, rel=1e-4)
    assert criterion.average_steps.item() == 12


def test_outputs() -> None:
    data = Rows()
    z = data.x[:, :4]
    for outputs in (SequenceClassifierOutput(logits=z), {"logits": z}, (z,), (z.sum(), z), z):
        assert torch.equal(hf(DMILoss(4))(outputs, data.y, num_items_in_batch=240), dmi_loss(z, data.y))


def test_tokens_have_their_classes_last() -> None:
    z, y = torch.randn(3, 20, 4), torch.randint(0, 4, (3, 20))
    soft = torch.rand(3, 20, 4).softmax(-1)
    assert torch.equal(hf(DMILoss(4))(TokenClassifierOutput(logits=z), soft), dmi_loss(z.movedim(-1, 1), soft.movedim(-1, 1)))
    y[:, 15:] = -100
    assert torch.equal(hf(DMILoss(4))(TokenClassifierOutput(logits=z), y), dmi_loss(z.movedim(-1, 1), y))


def test_wrong_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="hf\\(\\) takes a criterion"):
        hf(DMILoss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="HFCallback takes the DMILoss"):
        HFCallback(F.cross_entropy)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the model must return logits"):
        hf(DMILoss(4))({"scores": torch.randn(8, 4)}, torch.arange(8) % 4)
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="samples must be"):
            HFCallback(DMILoss(4), samples=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two different criteria"):
        trainer(tmp_path, DMILoss(4), HFCallback(DMILoss(4))).train()
    run = trainer(tmp_path, DMILoss(4), HFCallback(DMILoss(4)))
    run.compute_loss_func = None
    with pytest.raises(ValueError, match=r"pass compute_loss_func=hf\(criterion\)"):
        run.train()
    run = trainer(tmp_path, DMILoss(4), data=Rows(name="noisy"), label_names=["noisy"], remove_unused_columns=False)
    run.model.forward = lambda x, noisy: Classifier.forward(run.model, x)
    with pytest.raises(ValueError, match="only what is under 'labels' in a batch, whatever label_names says"):
        run.train()


@pytest.mark.parametrize("data", [Rows, Stream])
def test_the_callback_calibrates(tmp_path: Path, data: Any) -> None:
    """It changes nothing else: batches, dropout."""
    after = []
    for callbacks in ([], [True]):
        criterion = DMILoss(4, momentum=0.9)
        gradients = Gradients()
        hooks = [HFCallback(criterion, samples=120)] if callbacks else []
        run = trainer(tmp_path, criterion, *hooks, gradients, data=data(), max_steps=3)
        seen: list[float] = []
        run.compute_loss_func = _spy(run.compute_loss_func, seen)
        run.train()
        assert criterion.average_steps.item() == 3
        after.append((seen, criterion.average_weight.item()))
    assert after[0][1] == pytest.approx(1 - 0.9**3)
    assert after[1][1] == pytest.approx(1)
    assert after[0][0] == after[1][0]  # sums of the logits: the same rows, the same dropout


def _spy(function: Any, seen: list[float]) -> Any:
    def spy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append(outputs.logits.sum().item())
        return function(outputs, labels, num_items_in_batch=num_items_in_batch)

    return spy


@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
def test_the_average_is_in_checkpoints(tmp_path: Path, moved: bool) -> None:
    """Resumed training continues like training that was not interrupted."""
    options = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2, "learning_rate": 0.05}
    whole = DMILoss(4, momentum=0.9)
    trainer(tmp_path / "whole", whole, HFCallback(whole), **options).train()
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    assert (checkpoint / "dmi_criterion.pt").is_file()
    if moved:
        checkpoint = checkpoint.rename(tmp_path / "elsewhere")
    resumed = DMILoss(4, momentum=0.9)
    run = trainer(tmp_path / "resumed", resumed, HFCallback(resumed), **options)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.average_steps.item() == whole.average_steps.item() == 12
    torch.testing.assert_close(resumed.average_joint, whole.average_joint)


def test_a_checkpoint_without_the_average_is_named(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, DMILoss(4, momentum=0.9), **options).train()
    criterion = DMILoss(4, momentum=0.9)
    with pytest.warns(UserWarning, match=r"checkpoint-3 has no dmi_criterion\.pt.*It is calibrated now"):
        trainer(tmp_path, criterion, HFCallback(criterion), **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert criterion.average_steps.item() == 3
    assert criterion.average_weight.item() == pytest.approx(1)


def test_nothing_is_left_of_another_model(tmp_path: Path) -> None:
    """Training begins again, as in a search over hyperparameters."""
    criterion = DMILoss(4, momentum=0.9)
    run = trainer(tmp_path, criterion, HFCallback(criterion), max_steps=2)
    run.train()
    criterion.average_joint.copy_(torch.eye(4))
    run.train()
    assert criterion.average_steps.item() == 2
    fresh = DMILoss(4, momentum=0.9)
    trainer(tmp_path, fresh, HFCallback(fresh), model=run.model, max_steps=2).train()
    torch.testing.assert_close(criterion.average_joint, fresh.average_joint, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("average", ["True", "False"])
def test_two_processes_have_the_gradient_of_one(tmp_path: Path, average: str) -> None:
    """group="world", with and without the Trainer's multiplication by the number of processes."""
    norms = []
    for processes in (1, 2):
        printed = ranks.run(processes, "tests.integrations.trainer_process", str(tmp_path), average)
        norms.append([float(found) for found in re.findall(r"gradient (\d+\.\d{8})", printed)])
    assert len(norms[0]) == 1
    assert len(norms[1]) == 2
    assert norms[1] == pytest.approx(norms[0] * 2, rel=1e-4)
