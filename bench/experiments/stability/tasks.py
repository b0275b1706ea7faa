"""The tasks: Fashion-MNIST with label noise under which single-batch determinants are noisy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.experiments.demo.data import MEAN, STD, DataSet, Split, read_fashion, read_idx
from bench.experiments.demo.noise import noise_matrix
from bench.experiments.demo.sources import FILES, SourceUnavailable, existing, require_files, sources

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@dataclass(frozen=True)
class Task:
    """A data set and its noise."""

    name: str
    read: Callable[[Path], DataSet]
    noise: str
    r: float

    def load(self, folder: Path, seed: int, limit: int | None) -> DataSet:
        """The data with noisy training and validation labels; ``limit``: of samples in each split."""
        data = self.read(folder)
        if limit is not None:
            splits = (Split(s.x[:limit], s.clean[:limit], s.given[:limit]) for s in (data.train, data.valid, data.test))
            data = DataSet(data.name, data.source, data.skipped, data.classes, *splits)
        return data.corrupted(noise_matrix(self.noise, self.r, len(data.classes)), seed)


def read_ten(folder: Path) -> DataSet:
    """All ten classes, split as :func:`bench.experiments.demo.data.read_fashion` does."""
    images, labels, test_images, test_labels = (read_idx(existing(folder, name)) for name in FILES)
    x, x_test = (((part.float() / 255 - MEAN) / STD).unsqueeze(1) for part in (images, test_images))
    y, y_test = labels.long(), test_labels.long()
    cut = len(y) - len(y) // 6
    splits = ((x[:cut], y[:cut]), (x[cut:], y[cut:]), (x_test, y_test))
    return DataSet("Fashion-MNIST", str(folder), (), CLASSES, *(Split(images, labels, labels) for images, labels in splits))


TASKS = {
    task.name: task
    for task in (
        Task("bag-3-0.8", read_fashion, "3", 0.8),
        Task("ten-pair-0.4", read_ten, "pair", 0.4),
        Task("ten-symmetric-0.5", read_ten, "symmetric", 0.5),
    )
}


def find_data(where: str | None) -> Path:
    """The folder with Fashion-MNIST's files.

    Raises:
        SourceUnavailable: no source has them.
    """
    if where is not None:
        return require_files(Path(where))
    reasons = []
    for name, find in sources():
        try:
            return find()
        except SourceUnavailable as error:
            reasons.append(f"{name}: {error}")
    raise SourceUnavailable("; ".join(reasons))


def accuracy(logits: torch.Tensor, clean: torch.Tensor) -> float:
    """Percent of right answers."""
    return 100 * (logits.argmax(1) == clean).double().mean().item()
