"""What every set is handed over as: three splits of inputs with their noisy and their true labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bench.experiments.paper.noise import check_transition, corrupt

Kind = Literal["image", "text", "table"]
Transition = Tensor | Callable[[int], Tensor] | None
"""A matrix, or a function of the number of classes that gives one; None leaves the labels clean."""


@dataclass(frozen=True)
class Split:
    """x (N, ...): fp32, or int64 ids of words; noisy and clean (N,), int64: the labels that training sees, and the truth."""

    x: Tensor
    noisy: Tensor
    clean: Tensor

    def __len__(self) -> int:
        return len(self.clean)


@dataclass(frozen=True)
class DataSet:
    """A set in three splits: the labels of train and valid are noisy, those of test are the truth.

    Attributes:
        name: the name it was loaded by.
        classes: names, in the order of the labels.
        kind: what x holds: ``"image"`` (N, channels, height, width), ``"text"`` (N, words), ``"table"`` (N, features).
        source: where it was found.
        vocabulary_size: number of word ids, padding and unknown included; 0 where x is no text.
        problems: what was found wrong with the files, or was cut from them, and how often; empty if nothing.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    valid: Split
    test: Split
    kind: Kind
    source: str
    vocabulary_size: int = 0
    problems: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.train.x.shape[1:])


class Seeds:
    """Streams of random numbers that do not share a seed, for the parts of one run's data."""

    def __init__(self, seed: int) -> None:
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        self.split, self.train, self.valid, self.votes = (4 * seed + part for part in range(4))


FIXED = 0
"""Seed of a choice that every run shares: which samples are the test set."""


def permutation(count: int, seed: int) -> Tensor:
    """0..count-1 in random order, the same for the same seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def three_way(count: int, sizes: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices for train, valid and test of a set that comes in one piece.

    Args:
        count: number of samples.
        sizes: of valid and test; train is the rest.
        seed: for train and valid. The test set is the same in every run.
    """
    valid, test = sizes
    order = permutation(count, FIXED)
    rest = order[test:]
    rest = rest[permutation(len(rest), seed)]
    return rest[valid:], rest[:valid], order[:test]


def first(indices: Tensor, limit: int | None) -> Tensor:
    """At most the first ``limit`` of them."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    return indices[:limit]


def resolve(transition: Transition, num_classes: int) -> Tensor | None:
    """The transition matrix for this many classes, checked."""
    if transition is None:
        return None
    if not isinstance(transition, Tensor):
        if not callable(transition):
            raise TypeError(f"transition must be a matrix, a function of the number of classes, or None, got {transition!r}")
        transition = transition(num_classes)
    return check_transition(transition, num_classes)


def noisy_split(x: Tensor, clean: Tensor, T: Tensor | None, seed: int) -> Split:
    """A split whose labels are corrupted by T, or clean if there is none."""
    return Split(x, clean.clone() if T is None else corrupt(clean, T, seed), clean)


def standardised(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Each feature less its mean over train, divided by its standard deviation there (by 1 where it is constant)."""
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return tuple((part - mean) / std for part in (train, *others))
