"""A training stage: one loss, some epochs, and looks at the noisy validation loss and the clean test accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.experiments.demo.data import DataSet

Loss = Callable[[Tensor, Tensor], Tensor]
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Check:
    """What one look showed. epoch: since the stage began; losses: the stage's own; test_accuracy: clean, 0..100."""

    epoch: float
    train_loss: float
    valid_loss: float
    test_accuracy: float


@dataclass
class Stage:
    """What a stage did.

    singular_batches: batches whose loss was infinite, which teach nothing; test_predictions: the classes predicted for
    the test set at the last check, (N,).
    """

    name: str
    epochs: int
    checks: list[Check] = field(default_factory=list)
    singular_batches: int = 0
    test_predictions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    @property
    def last(self) -> float:
        """Clean test accuracy at the end."""
        return self.checks[-1].test_accuracy

    @property
    def last_epoch_mean(self) -> float:
        """Mean clean test accuracy of the checks of the last epoch."""
        values = [check.test_accuracy for check in self.checks if check.epoch > self.epochs - 1]
        return sum(values) / len(values)

    @property
    def selected(self) -> float:
        """Clean test accuracy at the check of the lowest validation loss, which needs no clean label to choose."""
        return min(self.checks, key=lambda check: check.valid_loss).test_accuracy


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The model's outputs in eval mode, (N, C), without gradient."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(EVALUATION_BATCH)])


def batches(n: int, size: int) -> Iterator[Tensor]:
    """Indices of one epoch's batches in a random order: full ones only, as in the paper; all samples where too few."""
    size = min(size, n)
    yield from torch.randperm(n).split(size)[: n // size]


def run_stage(
    name: str,
    model: nn.Module,
    loss: Loss,
    data: DataSet,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    checks_per_epoch: int = 1,
    on_batch: Callable[[Stage, float], None] = lambda stage, fraction: None,
) -> Stage:
    """Train a model in place with Adam.

    Args:
        loss: (logits, labels) -> scalar.
        seed: of the order of batches and of dropout: two stages with the same seed and batch size see the same batches.
        checks_per_epoch: how often to look, at most once per batch.
        on_batch: is called after every batch with the stage and the fraction that is done.

    Raises:
        RuntimeError: the loss became NaN.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    stage = Stage(name, epochs)
    n = len(data.train)
    steps = max(1, n // batch_size)
    look_at = {math.ceil(steps * (i + 1) / checks_per_epoch) for i in range(checks_per_epoch)}
    losses: list[float] = []
    for epoch in range(epochs):
        for step, index in enumerate(batches(n, batch_size), 1):
            model.train()
            value = loss(model(data.train.x[index]), data.train.given[index])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
            if math.isnan(losses[-1]):
                raise RuntimeError(f"{name}: the loss is NaN in epoch {epoch + 1}, batch {step}: lower the learning rate")
            if step in look_at:
                finite = [x for x in losses if math.isfinite(x)]
                stage.singular_batches += len(losses) - len(finite)
                stage.test_predictions = logits_of(model, data.test.x).argmax(1)
                stage.checks.append(
                    Check(
                        epoch=epoch + step / steps,
                        train_loss=sum(finite) / len(finite) if finite else math.inf,
                        valid_loss=loss(logits_of(model, data.valid.x), data.valid.given).item(),
                        test_accuracy=100 * (stage.test_predictions == data.test.clean).double().mean().item(),
                    )
                )
                losses = []
            on_batch(stage, (epoch + step / steps) / epochs)
    return stage
