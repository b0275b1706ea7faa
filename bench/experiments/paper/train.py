"""A run: the cross entropy stage, or its checkpoint, then a method, with a look at the end of every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, roc_curve
from torch import Tensor

from bench.experiments.demo.train import batches, logits_of
from bench.experiments.paper.data import DataSet, load
from bench.experiments.paper.methods import METHODS, Setting
from bench.experiments.paper.models import build
from bench.experiments.paper.sets import EXPERIMENTS, Recipe, transition
from ldmi_fast.files import replacing


@dataclass(frozen=True)
class Cell:
    """One run of a grid. noise "clean" and r 0: without noise, whatever kind was requested."""

    set: str
    noise: str
    r: float | None
    method: str
    seed: int

    @property
    def group(self) -> tuple[Any, ...]:
        """What the runs that share a data set and a cross entropy stage have in common."""
        return (self.set, self.noise, self.r, self.seed)


@dataclass(frozen=True)
class Options:
    """How to run: the schedule, samples of each split at most, folders of data and checkpoints."""

    recipe: Recipe
    limit: int | None = None
    data: str | None = None
    checkpoints: Path | None = None

    def same(self) -> dict[str, Any]:
        """What makes two runs of a cell the same run."""
        return {"recipe": asdict(self.recipe), "limit": self.limit}


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of right answers."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of right answers in each class that occurs, averaged over the classes: a rare class counts as much as a frequent one."""
    return 100 * float(balanced_accuracy_score(labels.numpy(), logits.argmax(1).numpy()))


def accuracy_by_threshold(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """How well the order of the samples separates two classes, whatever threshold the method put between them; empty for more classes.

    ``best_threshold``: the highest accuracy that a threshold on z_1 - z_0 can have; ``balanced_threshold``: the accuracy, over the
    samples, with the threshold that is best balanced over the classes. In percent; both look at the clean labels.
    """
    if logits.shape[1] != 2 or len(labels.unique()) != 2:
        return {}
    positive = labels.double().mean().item()
    wrong, right, _ = roc_curve(labels.numpy(), (logits[:, 1] - logits[:, 0]).numpy(), drop_intermediate=False)
    plain = positive * right + (1 - positive) * (1 - wrong)
    return {"best_threshold": 100 * float(plain.max()), "balanced_threshold": 100 * float(plain[(right - wrong).argmax()])}


def load_data(cell: Cell, options: Options) -> DataSet:
    """The cell's data with its noise, the same for the same seed."""
    T = transition(cell.noise, cell.r, EXPERIMENTS[cell.set].num_classes)
    return load(cell.set, folder=options.data, seed=cell.seed, transition=T, limit=options.limit)


def save_atomic(state: Any, path: Path) -> None:
    """Write a file with ``torch.save`` so that a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)


def first_stage(cell: Cell, data: DataSet, options: Options, tick: Callable[[str], None]) -> dict[str, Any]:
    """The model's state after cross entropy on the noisy labels; kept in a file, if there is a folder for it."""
    recipe = options.recipe
    path = None
    if options.checkpoints is not None:
        name = "-".join(str(part) for part in (*cell.group, recipe.epochs_first, recipe.lr_first, options.limit))
        path = options.checkpoints / f"{name}.pt"
        if path.exists():
            for _ in range(recipe.epochs_first):
                tick("cross entropy")
            return torch.load(path, weights_only=True)
    torch.manual_seed(cell.seed)
    model = build(data)
    optimizer, schedule = recipe.build(model.parameters(), 1)
    for _ in range(recipe.epochs_first):
        for index in batches(len(data.train.x), recipe.batch_size):
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(data.train.x[index]), data.train.noisy[index]).backward()
            optimizer.step()
        schedule.step()
        tick("cross entropy")
    if path is not None:
        save_atomic(model.state_dict(), path)
    return model.state_dict()


def run(cell: Cell, data: DataSet, state: dict[str, Any], options: Options, tick: Callable[[str], None]) -> dict[str, Any]:
    """One method from the checkpoint on: the result's line.

    Clean accuracies are in percent; ``balanced``: the mean over the classes; ``..._threshold``: :func:`accuracy_by_threshold`.
    ``selected``: at the epoch of the lowest loss of the method's own on noisy validation labels.
    """
    start = time.perf_counter()
    recipe, classes = options.recipe, len(data.classes)
    torch.manual_seed(cell.seed + 1)
    model = build(data)
    model.load_state_dict(state)
    method = METHODS[cell.method]()
    T = transition(cell.noise, cell.r, classes)
    method.start(model, Setting(data.train.x, data.train.noisy, classes, recipe.batch_size, T))
    optimizer, schedule = recipe.build(model.parameters(), 2)
    checks: list[dict[str, float]] = []

    def check(epoch: int, train_loss: float) -> None:
        valid, test = logits_of(model, data.valid.x), logits_of(model, data.test.x)
        checks.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "valid_loss": method.valid_loss(valid, data.valid.noisy).item(),
                "valid_noisy_accuracy": accuracy(valid, data.valid.noisy),
                "test_accuracy": accuracy(test, data.test.clean),
                "test_balanced_accuracy": balanced_accuracy(test, data.test.clean),
                **{f"test_{name}": value for name, value in accuracy_by_threshold(test, data.test.clean).items()},
            }
        )

    torch.manual_seed(cell.seed + 1)  # every method sees the same batches, whatever it drew to start
    order = torch.Generator().manual_seed(cell.seed + 2)
    check(0, math.nan)
    infinite, failed = 0, ""
    for epoch in range(1, recipe.epochs + 1):
        losses = []
        size = min(recipe.batch_size, len(data.train.x))
        for index in torch.randperm(len(data.train.x), generator=order).split(size)[: len(data.train.x) // size]:
            model.train()
            optimizer.zero_grad()
            loss = method.loss(model(data.train.x[index]), data.train.noisy[index], index)
            losses.append(loss.item())
            if math.isnan(losses[-1]):
                failed = f"NaN in epoch {epoch}"
                break
            loss.backward()
            optimizer.step()
        finite = [value for value in losses if math.isfinite(value)]
        infinite += len(losses) - len(finite)
        check(epoch, sum(finite) / len(finite) if finite else math.nan)
        schedule.step()
        tick(cell.method)
        if failed:
            break
    best = min(checks[1:], key=lambda seen: seen["valid_loss"] if math.isfinite(seen["valid_loss"]) else math.inf)
    return {
        **asdict(cell),
        **options.same(),
        "first": checks[0]["test_accuracy"],
        "last": checks[-1]["test_accuracy"],
        "selected": best["test_accuracy"],
        "last_balanced": checks[-1]["test_balanced_accuracy"],
        "selected_balanced": best["test_balanced_accuracy"],
        **{key.replace("test", "selected"): value for key, value in best.items() if key.endswith("_threshold")},
        "selected_epoch": best["epoch"],
        "noise_rate": 100 * (data.train.noisy != data.train.clean).double().mean().item(),
        "infinite_batches": infinite,
        "failed": failed,
        "checks": checks,
        "problems": dict(data.problems),
        "seconds": round(time.perf_counter() - start, 1),
    }
