"""The paper harness's sets by name: ``load(name, seed=...)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.experiments.paper.data.dataset import DataSet, Seeds, Split, Transition
from bench.experiments.paper.data.images import load_cifar10, load_dogs_cats, load_fashion
from bench.experiments.paper.data.sources import DATA_VARIABLE, MissingData
from bench.experiments.paper.data.tables import load_digits, load_letter
from bench.experiments.paper.data.text import load_mr, load_mr_human

__all__ = ["DATA_VARIABLE", "NAMES", "DataSet", "MissingData", "Split", "Transition", "load"]

_LOADERS: dict[str, Callable[..., DataSet]] = {
    "fashion": partial(load_fashion, binary=True),
    "fashion10": partial(load_fashion, binary=False),
    "digits": load_digits,
    "letter": load_letter,
    "mr": load_mr,
    "mr-human": load_mr_human,
    "cifar10": load_cifar10,
    "dogs-cats": load_dogs_cats,
}
NAMES = tuple(_LOADERS)


def load(
    name: str, *, folder: Path | str | None = None, seed: int, transition: Transition = None, limit: int | None = None
) -> DataSet:
    """A set by name, split and with noisy labels for training and validation.

    Args:
        name: one of NAMES.
        folder: the only place to look for the files; None searches ($LDMI_FAST_DATA, packages, the cache, downloads).
        seed: of the split into train and valid and of the noise; the test set is the same whatever the seed.
        transition: T[i, j] = P(noisy = j | true = i), or a function of the number of classes that gives it; None adds no noise.
        limit: at most this many samples a split.

    Raises:
        MissingData: the files are not available; the message says what to put where.
        ValueError: an unknown name, an argument that does not fit, or a damaged file.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown set {name!r}: expected one of {', '.join(NAMES)}")
    return _LOADERS[name](name, folder, Seeds(seed), transition, limit)
