"""What a step cannot beat: launches, bytes over the bandwidth that a copy reaches, and the factorisation.

    T = launches * LAUNCH + bytes / bandwidth + T_LU(C)

Bytes are the least that must move: the logits are read once forward and once backward, the gradient is written once, labels and row
sums of exponentials are read or written once, the C x C matrices once each. What stays in the level 2 cache between the passes
is still counted, so a small problem may come out below its model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LAUNCH = 1.24e-6
"""Seconds from one kernel's start to the next one's in a graph, on an H100."""

LABEL_BYTES = 8
LSE_BYTES = 4

ONE_BLOCK_CLASSES = 170
"""Up to this many classes the matrix fits into one multiprocessor's shared memory, and the forward is one launch."""
SORTED_FORWARD_LAUNCHES = 3
"""Above: labels in order, the joint, the factorisation."""

LU_SECONDS = {2: 0.5e-6, 14: 2e-6, 32: 5e-6, 100: 20e-6, 1000: 0.4e-3, 4096: 3.5e-3, 10000: 25e-3}
"""What log|det| and the inverse should cost on an H100 at some class counts: goals, not measurements."""

Part = Literal["joint", "logits_grad", "forward", "backward", "forward_backward"]


@dataclass(frozen=True)
class Floor:
    """The model of one part of the operation at one shape."""

    launches: int
    bytes: int
    factorise: float

    def seconds(self, bandwidth: float, *, factorisation: bool = True) -> float:
        """The least time at ``bandwidth`` bytes per second, with or without the factorisation's share."""
        if bandwidth <= 0:
            raise ValueError(f"bandwidth must be positive (bytes per second), got {bandwidth}")
        return self.launches * LAUNCH + self.bytes / bandwidth + (self.factorise if factorisation else 0.0)


def factorise_seconds(classes: int) -> float:
    """T_LU: log|det| and inverse of a C x C matrix, between the listed counts on a line of logarithms."""
    if classes < 2:
        return 0.0
    known = sorted(LU_SECONDS)
    at = min(max(classes, known[0]), known[-1])
    above = next(count for count in known if count >= at)
    below = max(count for count in known if count <= at)
    seconds = LU_SECONDS[below]
    if above != below:
        slope = math.log(LU_SECONDS[above] / seconds) / math.log(above / below)
        seconds *= (at / below) ** slope
    return seconds * (classes / known[-1]) ** 3 if classes > known[-1] else seconds


def floor(rows: int, classes: int, value_bytes: int, part: Part) -> Floor:
    """The model for hard labels: ``rows`` x ``classes`` logits of ``value_bytes`` each."""
    logits, matrix, labels, lse = rows * classes * value_bytes, 8 * classes**2, rows * LABEL_BYTES, rows * LSE_BYTES
    one_block = classes <= ONE_BLOCK_CLASSES
    joint = Floor(1 if one_block else SORTED_FORWARD_LAUNCHES - 1, logits + labels + lse + matrix, 0.0)
    backward = Floor(1, 2 * logits + labels + lse + matrix, 0.0)
    if part == "joint":
        return joint
    if part in ("backward", "logits_grad"):
        return backward
    forward = Floor(1 if one_block else SORTED_FORWARD_LAUNCHES, joint.bytes, factorise_seconds(classes))
    if part == "forward":
        return forward
    return Floor(forward.launches + backward.launches, forward.bytes + backward.bytes, forward.factorise)


def minimal_bytes(rows: int, classes: int, value_bytes: int, part: Part) -> int:
    """What counts as moved when a bandwidth is quoted: the logits and the gradient alone."""
    logits = rows * classes * value_bytes
    return {"joint": 1, "forward": 1, "logits_grad": 2, "backward": 2, "forward_backward": 3}[part] * logits
