"""What is timed: shapes, directions and the inputs made for them."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["forward", "forward_backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward_backward")

LARGE_ROWS = 16384
"""From this many rows on a shape measures throughput: its buffers together are larger than the cache."""
WORKING_SET_BYTES = 128 * 2**20
"""The buffers that a large shape rotates through hold at least this much, several times a last-level cache."""


@dataclass(frozen=True, order=True)
class Shape:
    """A batch of ``rows`` logits over ``classes`` classes, in float32."""

    rows: int
    classes: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``"65536x10"`` (rows x classes)."""
        rows, _, classes = text.strip().lower().partition("x")
        if not (rows.isdigit() and classes.isdigit()) or int(rows) < 1 or int(classes) < 2:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a shape: expected ROWSxCLASSES with ROWS >= 1 and CLASSES >= 2, like 65536x10"
            )
        return cls(int(rows), int(classes))

    @property
    def large(self) -> bool:
        """Whether the shape measures throughput (True) or the overhead of one call (False)."""
        return self.rows >= LARGE_ROWS

    @property
    def logits_bytes(self) -> int:
        """Size of the float32 logits in bytes."""
        return 4 * self.rows * self.classes

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes}"


SHAPES: tuple[Shape, ...] = (
    *(Shape(256, classes) for classes in (2, 14, 100)),
    *(Shape(65536, classes) for classes in (10, 14, 26, 100, 200, 500, 1000)),
)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Read a comma-separated list of shapes: ``"65536x10,256x14"``."""
    return tuple(Shape.parse(item) for item in text.split(","))


@dataclass(frozen=True)
class Batch:
    """Leaf ``logits [N, C]`` that require a gradient, the same storage without one, and ``target [N]`` int64."""

    logits: Tensor
    detached: Tensor
    target: Tensor


def make_batch(shape: Shape, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Batch:
    """Logits of a model that has learnt something, with every class in the batch (where N >= C), on the generator's device.

    The joint is then well conditioned at every class count, so that peers which do not handle absent classes and bad
    conditioning are timed on inputs that they can handle. Labels come in random order.
    """
    device = generator.device
    target = torch.randperm(shape.rows, generator=generator, device=device) % shape.classes
    logits = torch.randn(shape.rows, shape.classes, generator=generator, device=device)
    # softmax then gives the label of a row about 0.6 whatever C is
    logits[torch.arange(shape.rows, device=device), target] += math.log(shape.classes) + 1.0
    logits = logits.to(dtype)
    return Batch(logits.requires_grad_(), logits.detach(), target)


def make_batches(shape: Shape, seed: int = 0) -> list[Batch]:
    """Distinct batches of ``shape``: together larger than the cache for a large shape, one for a small shape."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, math.ceil(WORKING_SET_BYTES / shape.logits_bytes)) if shape.large else 1
    return [make_batch(shape, generator) for _ in range(count)]
