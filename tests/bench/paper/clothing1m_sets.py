"""Small sets in memory for the tests of the Clothing1M program, named by ``--sets``; and faults on demand, from the environment."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bench.experiments.paper.clothing1m.options import Options
from bench.experiments.paper.clothing1m.sets import Sets

SIDE = 16
NOISE = 0.35


class Blobs(Dataset[tuple[Tensor, int]]):
    """Images [3, 16, 16] of one colour per class under noise, shifted at random if ``moves``."""

    def __init__(self, count: int, classes: int, seed: int, *, noisy: bool, moves: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.truth = torch.arange(count) % classes
        colours = torch.rand(classes, 3, 2, 2, generator=torch.Generator().manual_seed(99)).repeat_interleave(SIDE // 2, 2)
        base = colours.repeat_interleave(SIDE // 2, 3)[self.truth]
        self.images = 2 * base - 1 + 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
        wrong = torch.rand(count, generator=generator) < (NOISE if noisy else 0.0)
        self.labels = torch.where(wrong, (self.truth + 1) % classes, self.truth)
        self.moves = moves

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.moves:
            image = image.roll(int(torch.randint(-2, 3, ())), 2) + 0.1 * torch.randn(image.shape)
        time.sleep(float(os.environ.get("TEST_SECONDS_AN_IMAGE", "0")))
        if os.environ.get("TEST_RAISE_ON_RANK") == os.environ.get("RANK", "0") and self.moves and torch.rand(()) < 0.1:
            raise ValueError("this image was asked to raise")
        return image, int(self.labels[index])


def make(options: Options) -> Sets:
    """The sets."""
    classes = options.classes
    return Sets(
        Blobs(240, classes, 0, noisy=True, moves=True),
        Blobs(61, classes, 1, noisy=False, moves=False),
        Blobs(61, classes, 2, noisy=False, moves=False),
        Blobs(240, classes, 0, noisy=True, moves=False),
    )
