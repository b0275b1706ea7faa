"""Batches for the tests: logits, targets and weights with a prescribed shape, signal and condition number."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.support import oracle


@dataclass(frozen=True)
class Problem:
    """One batch. ``logits`` never requires a gradient: tests take a leaf that does from ``leaf``."""

    logits: Tensor
    target: Tensor
    sample_weight: Tensor | None = None

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Problem:
        """The batch with its floating tensors in another dtype (weights stay), on another device."""
        target = self.target.to(device)
        if target.is_floating_point() and dtype is not None:
            target = target.to(dtype)
        weight = None if self.sample_weight is None else self.sample_weight.to(device)
        return Problem(self.logits.to(device=device, dtype=dtype), target, weight)

    @property
    def weight(self) -> Tensor:
        """The sample weights of a batch that has them."""
        assert self.sample_weight is not None
        return self.sample_weight

    def with_target(self, target: Tensor) -> Problem:
        return replace(self, target=target)

    def leaf(self) -> Tensor:
        return self.logits.detach().clone().requires_grad_()

    def answer(self, **options: Any) -> oracle.Answer:
        """The oracle's answer for exactly these numbers (half precision inputs are exact in float64)."""
        weight = None if self.sample_weight is None else as_array(self.sample_weight)
        return oracle.dmi(as_array(self.logits), as_array(self.target), sample_weight=weight, **options)


def gradient_of(leaf: Tensor | torch.nn.Parameter) -> Tensor:
    """The gradient that a backward has left in ``leaf``."""
    assert leaf.grad is not None
    return leaf.grad


def as_array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def labels_of(n: int, classes: int, generator: torch.Generator, *, absent: tuple[int, ...] = ()) -> Tensor:
    """Shuffled labels in which every class that is not ``absent`` occurs, where n allows it."""
    present = torch.tensor([c for c in range(classes) if c not in absent])
    labels = present[torch.arange(n) % len(present)]
    return labels[torch.randperm(n, generator=generator)]


def problem(
    n: int,
    classes: int,
    *,
    seed: int = 0,
    signal: float | None = None,
    soft: bool = False,
    weighted: bool = False,
    absent: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """A classifier with some class signal: normal logits, raised by ``signal`` at the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = labels_of(n, classes, generator, absent=absent)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    signal = 1 + math.log(classes) if signal is None else signal
    logits[torch.arange(n), labels] += signal
    target: Tensor = labels
    if soft:
        target = 0.3 * torch.rand(n, classes, generator=generator, dtype=torch.float64)
        target[torch.arange(n), labels] += 1
        target[:, list(absent)] = 0
        target /= target.sum(1, keepdim=True)
    weight = None
    if weighted:
        weight = 0.25 + torch.rand(n, generator=generator)
        weight[::7] = 0
    return Problem(logits, target, weight).to(dtype)


def conditioned(n: int, classes: int, cond: float, *, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Problem:
    """Logits whose matrix of mean predictions R has about the condition number ``cond``.

    ``kind``: "flat", a classifier that has barely begun to learn, every row of R nearly uniform (all but one of the
    singular values are small); "twins", a good one that cannot tell two classes apart (one is small).
    """
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(classes, dtype=torch.float64)
    if kind == "flat":
        strength = 1 / cond
        rates = (1 - strength) / classes + strength * eye
    elif kind == "twins":
        rates = 0.3 / classes + 0.7 * eye
        # Rows a and b differ by 2d in two places: the smallest singular value is about d * sqrt(2).
        middle, d = (rates[0] + rates[1]) / 2, 0.7 / cond
        rates[0], rates[1] = middle, middle.clone()
        rates[0, 0] += d
        rates[0, 1] -= d
        rates[1, 0] -= d
        rates[1, 1] += d
    else:
        raise ValueError(kind)
    labels = labels_of(n, classes, generator)
    # Rows scatter around their class's rates in pairs that cancel, so that the mean stays what it is.
    scatter = torch.zeros(n, classes, dtype=torch.float64)
    for c in range(classes):
        mine = (labels == c).nonzero().flatten()
        half = len(mine) // 2
        direction = rates[c] * (torch.rand(half, classes, generator=generator, dtype=torch.float64) - 0.5)
        direction -= rates[c] * direction.sum(1, keepdim=True)
        scatter[mine[:half]] = direction
        scatter[mine[half : 2 * half]] = -direction
    probs = rates[labels] + scatter
    return Problem(probs.log().to(dtype), labels)
