"""The options of the loss: one dataclass, shared by the functions and the module, checked in one place."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NoReturn

import torch

ABSENT = ("present", "strict")
INPUT = ("logits", "probs")
ENGINES = ("cpu", "cuda", "triton", "composite")
ENGINE_VARIABLE = "LDMI_FAST_ENGINE"
CHECK_VARIABLE = "LDMI_FAST_CHECK"

# Keywords that users of F.cross_entropy try, and what to do instead.
_EXPLAINED = {
    "weight": (
        "class weights multiply the rows of the joint matrix, which moves the loss by a constant and leaves its gradient "
        "exactly as it is; use sample_weight to weight samples"
    ),
    "reduction": "the loss is one number for the whole batch (a determinant), not a mean of per-sample losses",
    "label_smoothing": (
        "smoothing the labels with an invertible matrix moves this loss by a constant and leaves its gradient as it is; pass "
        "smoothed targets of shape (N, C) if you want the value"
    ),
}
_EXPLAINED |= {"class_weight": _EXPLAINED["weight"], "class_weights": _EXPLAINED["weight"]}
_EXPLAINED |= {"size_average": _EXPLAINED["reduction"], "reduce": _EXPLAINED["reduction"]}


def explain_keywords(function: str, unknown: dict[str, Any], known: Sequence[str]) -> NoReturn:
    """Raise the TypeError for keywords that ``function``, which takes ``known``, does not take, with what to do instead."""
    name = next(iter(unknown))
    if name in _EXPLAINED:
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}: {_EXPLAINED[name]}")
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected some of {', '.join(known)}"
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {hint}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, one of {allowed}, got {type(value).__name__}: {value!r}")
    if value not in allowed:
        close = difflib.get_close_matches(value, allowed, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}{hint}")


def _number(name: str, value: object, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float ({unit}), got {type(value).__name__}: {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0 ({unit}), got {value!r}")


@dataclass(frozen=True)
class Options:
    """What the loss may be told, besides its tensors.

    Attributes:
        ignore_index: an int; rows whose integer label equals it contribute nothing.
        absent: ``"present"``: the determinant of the classes that have weight in this batch; ``"strict"``: a batch
            that lacks a class is singular.
        eps: a float >= 0, added to ``|det U|`` before the logarithm (the published form has 1e-3).
        normalize: True: ``U = S / W``; False: the raw weighted counts ``S``.
        cross_entropy_weight: a float >= 0; that much of the weighted mean cross entropy is added.
        input: ``"logits"`` or ``"probs"``.
        engine: the name of an engine, or None for the best one that can run.
        group: a torch.distributed group over whose ranks the batch is spread, or None.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option has a value outside its range.
    """

    ignore_index: int = -100
    absent: str = "present"
    eps: float = 0.0
    normalize: bool = True
    cross_entropy_weight: float = 0.0
    input: str = "logits"
    engine: str | None = None
    group: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {type(self.ignore_index).__name__}: {self.ignore_index!r}")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index must fit in 64 bits, got {self.ignore_index}")
        _one_of("absent", self.absent, ABSENT)
        _one_of("input", self.input, INPUT)
        _number("eps", self.eps, "added to |det U|; 0 for the exact loss, 1e-3 in the published form")
        _number("cross_entropy_weight", self.cross_entropy_weight, "the weight of the cross entropy term; 0 for none")
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize must be a bool, got {type(self.normalize).__name__}: {self.normalize!r}")
        if self.engine is not None:
            _one_of("engine", self.engine, ENGINES)
        if self.group is not None:
            from .distributed import check_group  # imports torch.distributed, which most programs do without

            check_group(self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        return self  # nothing in it changes, and a process group cannot be copied

    @property
    def of_loss(self) -> tuple[int, str, float, bool, float, str]:
        """The options that the ops ``loss_forward`` and ``fused`` take after their tensors, in their order."""
        return (self.ignore_index, self.absent, self.eps, self.normalize, self.cross_entropy_weight, self.input)


OPTION_NAMES = tuple(field.name for field in fields(Options))


@lru_cache(maxsize=256, typed=True)
def _cached(*values: Any) -> Options:
    return Options(*values)


def make_options(*values: Any) -> Options:
    """``Options(*values)``, in the order of its fields, without paying for the checks at every step of a training loop."""
    if torch.compiler.is_compiling():  # Dynamo cannot look into lru_cache
        return Options(*values)
    if len(values) == len(OPTION_NAMES) and values[-1] is not None:  # a cache would keep a process group from being destroyed
        return Options(*values)
    try:
        return _cached(*values)
    except TypeError:  # unhashable values fall through to the checks, which say what is wrong with them
        return Options(*values)


def forced_engine(options: Options) -> str | None:
    """The engine that the caller or the environment variable LDMI_FAST_ENGINE forces, or None."""
    if options.engine is not None:
        return options.engine
    name = os.environ.get(ENGINE_VARIABLE) or None
    if name is not None and name not in ENGINES:
        raise ValueError(f"the environment variable {ENGINE_VARIABLE} must be one of {ENGINES}, got {name!r}")
    return name
