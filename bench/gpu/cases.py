"""The shapes that are timed on a GPU. The most important ones come first, so that a run that ends early has them."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch

from bench.kernels.cases import Batch, Shape, make_batch
from bench.logdet import Size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True, order=True)
class Case:
    """A batch of ``rows`` logits over ``classes`` classes; ``compiled`` asks for the compiled peers, which take long to build."""

    rows: int
    classes: int
    dtype: str = "float32"
    compiled: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read ``65536x100`` or ``65536x100:bf16``; such cases have all peers."""
        shape_text, _, short = text.partition(":")
        shape = Shape.parse(shape_text)
        names = {value: key for key, value in SHORT.items()} | {key: key for key in SHORT}
        if (short or "fp32") not in names:
            raise argparse.ArgumentTypeError(f"{text!r} has no dtype known: expected ROWSxCLASSES:{'|'.join(SHORT.values())}")
        return cls(shape.rows, shape.classes, names[short or "fp32"], compiled=True)

    @property
    def shape(self) -> Shape:
        """Rows and classes."""
        return Shape(self.rows, self.classes)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return DTYPES[self.dtype]

    @property
    def logits_bytes(self) -> int:
        """Size of the logits in bytes."""
        return self.rows * self.classes * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes}:{SHORT[self.dtype]}"


CASES: tuple[Case, ...] = (
    Case(256, 14, compiled=True),
    Case(65536, 14, compiled=True),
    Case(65536, 100, compiled=True),
    Case(65536, 1000, compiled=True),
    Case(65536, 10, compiled=True),
    Case(1048576, 100),
    Case(5242880, 14),
    Case(65536, 100, "bfloat16", compiled=True),
    Case(256, 14, "bfloat16"),
    Case(65536, 1000, "bfloat16"),
    Case(65536, 26),
    Case(65536, 200),
    Case(65536, 500),
    Case(65536, 14, "bfloat16"),
    Case(65536, 100, "float16"),
    Case(256, 2),
    Case(256, 100),
    Case(32, 14),
    Case(65536, 14, "float64"),
)
LOGDET_SIZES: tuple[Size, ...] = (
    *map(Size, (14, 100, 1000, 4096, 10000)),
    Size(14, 1024),
    Size(64, 256),
    Size(100, 256),
    *map(Size, (32, 64, 128, 200, 256, 512, 2048)),
)

REHEARSAL_CASES: tuple[Case, ...] = (Case(64, 3, compiled=True), Case(128, 14), Case(128, 14, "bfloat16"))
REHEARSAL_LOGDET_SIZES: tuple[Size, ...] = (Size(14), Size(32), Size(14, 3))

HOT_BYTES = 2**20
"""Logits up to this size come straight from the layer before and are in the cache: one batch, timed again and again."""


def batch_count(case: Case, l2_bytes: int) -> int:
    """How many batches to rotate through, so that together they hold more than twice the cache; one for a small case."""
    if case.logits_bytes <= HOT_BYTES:
        return 1
    return max(1, math.ceil(2.2 * l2_bytes / case.logits_bytes))


def make_batches(case: Case, device: torch.device, l2_bytes: int, seed: int = 0) -> list[Batch]:
    """``batch_count`` distinct batches of a case on ``device``."""
    generator = torch.Generator(device).manual_seed(seed)
    return [make_batch(case.shape, generator, case.torch_dtype) for _ in range(batch_count(case, l2_bytes))]
