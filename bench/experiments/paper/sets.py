"""The experiments: for each data set its noises, the paper's schedule, and a short one for a machine without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench.experiments.paper.noise import binary, cifar10_paper, cifar10n, pair, symmetric


@dataclass(frozen=True)
class Recipe:
    """A schedule: a cross entropy stage, then the method. ``milestones``: epochs of a stage after which its rate falls tenfold."""

    batch_size: int
    epochs_first: int
    lr_first: float
    epochs: int
    lr: float
    optimizer: str = "adam"
    weight_decay: float = 0.0
    milestones_first: tuple[int, ...] = ()

    def build(self, parameters: object, stage: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The optimizer of a stage, 1 or 2, and its schedule, which steps once an epoch."""
        lr = self.lr_first if stage == 1 else self.lr
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=self.weight_decay)  # type: ignore[arg-type]
        else:
            optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=self.weight_decay)  # type: ignore[arg-type]
        milestones = self.milestones_first if stage == 1 else ()
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones))


@dataclass(frozen=True)
class Experiment:
    """A data set as the tables have it.

    noises: kind -> the amounts r of a default grid; (None,) where the kind has no amount. Amount 0 is the same for all kinds.
    """

    name: str
    num_classes: int
    paper: Recipe
    short: Recipe
    noises: dict[str, tuple[float | None, ...]] = field(default_factory=dict)


_AMOUNTS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
_FASHION = Recipe(128, 20, 1e-4, 20, 1e-4)
# the rate of the first stage tenfold, so that two epochs go about as far as twenty
_FASHION_SHORT = Recipe(128, 2, 1e-3, 2, 1e-4)
_TEN = {"pair": (0.0, 0.2, 0.4), "symmetric": (0.2, 0.5), "cifar10n-aggregate": (None,), "cifar10n-worst": (None,)}
_MR = Recipe(128, 50, 1e-3, 50, 1e-4)
_MR_SHORT = replace(_MR, epochs_first=6, epochs=6)
_LETTER = Recipe(256, 60, 1e-3, 60, 1e-4)
_LETTER_SHORT = replace(_LETTER, epochs_first=40, epochs=40)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment("fashion", 2, _FASHION, _FASHION_SHORT, dict.fromkeys(("1", "2", "3"), _AMOUNTS)),
        Experiment("fashion10", 10, _FASHION, replace(_FASHION_SHORT, epochs_first=3, epochs=3), _TEN),
        Experiment("digits", 10, Recipe(128, 60, 1e-3, 60, 1e-4), Recipe(128, 60, 1e-3, 60, 1e-4), _TEN),
        Experiment("letter", 26, _LETTER, _LETTER_SHORT, {"pair": (0.0, 0.2, 0.4), "symmetric": (0.2, 0.5)}),
        Experiment("mr", 2, _MR, _MR_SHORT, {"3": _AMOUNTS}),
        Experiment("mr-human", 2, _MR, _MR_SHORT, {"human": (None,)}),
        Experiment(
            "cifar10",
            10,
            Recipe(256, 120, 0.1, 100, 1e-6, "sgd", 1e-4, (40, 80)),
            Recipe(256, 12, 0.1, 10, 1e-6, "sgd", 1e-4, (4, 8)),
            {"paper": _AMOUNTS, "symmetric": _AMOUNTS},
        ),
        Experiment("dogs-cats", 2, Recipe(128, 50, 1e-4, 50, 1e-5, "sgd"), Recipe(128, 5, 1e-4, 5, 1e-5, "sgd"), {"3": _AMOUNTS}),
    )
}

SYNTHETIC = ("1", "2", "3", "pair", "symmetric", "paper", "cifar10n-aggregate", "cifar10n-random1", "cifar10n-worst")


def transition(noise: str, r: float | None, num_classes: int) -> Tensor | None:
    """The matrix T[i, j] = P(noisy = j | true = i) of a kind of noise, (C, C); None where people made the noise.

    Raises:
        ValueError: an unknown kind, one that is not for this many classes, or an amount that it does not have or lacks.
    """
    if noise == "human":
        if r is not None:
            raise ValueError(f"noise human has no amount: got r = {r}")
        return None
    if noise not in (*SYNTHETIC, "clean"):
        raise ValueError(f"unknown noise {noise!r}: expected one of {', '.join(SYNTHETIC)}, clean, human")
    only = 2 if noise in ("1", "2", "3") else 10 if noise.startswith("cifar10n") or noise == "paper" else None
    if only is not None and num_classes != only:
        raise ValueError(f"noise {noise!r} is for {only} classes, this data set has {num_classes}")
    if noise.startswith("cifar10n") or noise == "clean":
        if r:
            raise ValueError(f"noise {noise!r} has no amount: got r = {r}")
        return cifar10n(noise.removeprefix("cifar10n-")) if noise != "clean" else torch.eye(num_classes, dtype=torch.float64)
    if r is None:
        raise ValueError(f"noise {noise!r} needs an amount r in 0..1")
    if noise in ("1", "2", "3"):
        return binary(int(noise), r)
    if noise == "paper":
        return cifar10_paper(r)
    return pair(num_classes, r) if noise == "pair" else symmetric(num_classes, r)
