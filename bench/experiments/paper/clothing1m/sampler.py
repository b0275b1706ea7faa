"""Which samples make which global batch: a function of the seed, the epoch and the labels alone.

So every number of processes sees the same global batches, of which each process takes its slice, and a resumed run goes on at
any step without drawing again what was drawn before.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

_MIX = 0x9E3779B97F4A7C15


def mixed(*numbers: int) -> int:
    """A seed from several numbers, 0 <= seed < 2^63, that changes wildly with each of them (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + _MIX & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def _permutation(count: int, *numbers: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed(*numbers)))


class Order:
    """The order of the training samples.

    Args:
        labels: [N] int64, the labels given.
        classes: C.
        batch_size: of all processes together.
        balanced: the classes take turns, in an order of the epoch, each giving the next of its samples: so every batch, and every
            rank's slice of it, holds each class equally often, to one. A class goes through all its samples before it repeats one,
            across epochs. Otherwise each epoch is a permutation of the samples.
        per_class: balanced: samples of each class an epoch; 0: N / C.
        seed: of everything.

    Raises:
        ValueError: a class without a sample, labels out of range, or not enough for one batch.
    """

    def __init__(
        self, labels: Tensor, classes: int, batch_size: int, *, balanced: bool = True, per_class: int = 0, seed: int = 0
    ) -> None:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"labels from {int(labels.min())} to {int(labels.max())}: expected 0 to {classes - 1}, for {classes} classes"
            )
        self.batch_size, self.balanced, self.seed, self.count = batch_size, balanced, seed, len(labels)
        self.members = [(labels == c).nonzero().squeeze(1) for c in range(classes)] if balanced else []
        missing = [c for c, members in enumerate(self.members) if not len(members)]
        if missing:
            raise ValueError(
                f"no training sample is labelled {', '.join(map(str, missing))}: a class-balanced order needs one of each class"
            )
        self.per_class = (per_class or self.count // classes) if balanced else 0
        self.length = self.per_class * classes if balanced else self.count
        if self.length < batch_size:
            raise ValueError(f"an epoch of {self.length} samples does not fill one batch of {batch_size}")

    @property
    def steps(self) -> int:
        """Full batches an epoch; what is left over waits for another."""
        return self.length // self.batch_size

    def epoch(self, epoch: int) -> Tensor:
        """Indices [steps, batch size] of an epoch, counted over both stages."""
        if not self.balanced:
            order = _permutation(self.count, self.seed, 0, epoch)
        else:
            q, classes = self.per_class, len(self.members)
            mine = torch.stack([self._of_class(c, epoch * q, q) for c in range(classes)], 1)  # [q, C]
            order = mine[:, _permutation(classes, self.seed, 1, epoch)].flatten()
        return order[: self.steps * self.batch_size].view(self.steps, self.batch_size)

    def _of_class(self, c: int, first: int, count: int) -> Tensor:
        """The samples at ``first`` and on in the endless sequence of a class, pass after pass."""
        members, parts = self.members[c], []
        while count:
            turn, offset = divmod(first, len(members))
            part = members[_permutation(len(members), self.seed, 2, c, turn)][offset : offset + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return torch.cat(parts)


class Batches(Sampler[list[tuple[int, int]]]):
    """One process's slices of an epoch's batches, from a step on: lists of (seed of the sample, index). ``set`` before every pass."""

    def __init__(self, order: Order, rank: int, processes: int) -> None:
        self.order, self.rank, self.local = order, rank, order.batch_size // processes
        self.set(0, 0)

    def set(self, epoch: int, step: int) -> None:
        """Where the next pass begins."""
        self.number, self.step = epoch, step

    def __len__(self) -> int:
        return self.order.steps - self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        indices = self.order.epoch(self.number)
        for step in range(self.step, self.order.steps):
            start = self.rank * self.local
            mine = indices[step, start : start + self.local].tolist()
            at = step * self.order.batch_size + start
            yield [(mixed(self.order.seed, 3, self.number, at + i), index) for i, index in enumerate(mine)]


def worker_start(workers: int) -> str | None:
    """How a DataLoader starts this number of workers: never by a fork of the training process.

    The training process has the threads of gloo, NCCL and autograd. A lock that one of them holds at the fork is never released in
    the worker, which waits for ever, and so does the training. A server without such threads is forked instead; it has imported what
    the workers need.
    """
    if workers == 0:
        return None
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(
        ["torch", "bench.experiments.paper.clothing1m.sampler", "bench.experiments.paper.data.clothing1m"]
    )
    return "forkserver"


class Seeded(Dataset[tuple[Tensor, int]]):
    """A data set whose random transforms depend on the sample's position in the run, not on the worker that makes it.

    Args:
        source: ``source[index]`` is (image, label) or more.
    """

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        seed, index = key
        with torch.random.fork_rng(devices=[]):  # without workers this is the training process, whose generator is the model's
            torch.default_generator.manual_seed(seed)
            image, label = self.source[index][:2]
        return image, int(label)
