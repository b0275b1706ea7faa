"""The options of the loss: one dataclass, shared by the functions and the module, checked in one place."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
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
        "smoothing mixes the labels by an invertible matrix, which moves this loss by a constant and leaves its gradient exactly "
        "as it is; pass the hard labels. A class without a sample in the batch stays absent either way. Only for the value itself "
        "pass soft targets of shape (N, C)"
    ),
}
_EXPLAINED["num_items_in_batch"] = (
    "the loss is not a sum over items; for Hugging Face's Trainer pass compute_loss_func=ldmi_fast.integrations.hf(criterion)"
)
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


def as_int(name: str, value: Any, unit: str = "") -> int:
    """An integer of any kind (of numpy, say) as a plain int. No bool and no tensor is one.

    Raises:
        TypeError: no integer.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an int{unit and f' ({unit})'}, got {type(value).__name__}: {value!r}")
    return operator.index(value)


def as_float(name: str, value: Any, unit: str = "") -> float:
    """A real number of any kind (of numpy, say) as a plain float. No bool and no tensor is one.

    Raises:
        TypeError: no real number. ValueError: an integer too large for a float.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a float{unit and f' ({unit})'}, got {type(value).__name__}: {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite{unit and f' ({unit})'}, got an integer that no float can hold") from None


def _as_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__}: {value!r}")


def _as_share(name: str, value: Any, unit: str) -> float:
    number = as_float(name, value, unit)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and >= 0 ({unit}), got {value!r}")
    return number


def check_num_classes(num_classes: Any) -> int:
    """A number of classes as a plain int.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(num_classes, str):
        raise TypeError(
            f"num_classes must be an int, got str: {num_classes!r}. The loss has no reduction: it is one number for the whole batch "
            "(a determinant). Other options are keywords"
        )
    found = as_int("num_classes", num_classes)
    if found < 1:
        raise ValueError(f"num_classes must be at least 1, got {found}")
    return found


@dataclass(frozen=True)
class Options:
    """What the loss may be told, besides its tensors.

    Numbers of numpy are taken, and kept as plain ones.

    Attributes:
        ignore_index: an integer; rows whose integer label equals it contribute nothing.
        absent: ``"present"``: the determinant of the classes that have weight in this batch; ``"strict"``: a batch
            that lacks a class is singular.
        eps: a real number >= 0, added to ``|det U|`` before the logarithm (the published form has 1e-3).
        normalize: True: ``U = S / W``; False: the raw weighted counts ``S``.
        cross_entropy_weight: a real number >= 0; that much of the weighted mean cross entropy is added.
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
        ignore_index = as_int("ignore_index", self.ignore_index)
        if not -(2**63) <= ignore_index < 2**63:
            raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")
        _one_of("absent", self.absent, ABSENT)
        _one_of("input", self.input, INPUT)
        eps = _as_share("eps", self.eps, "added to |det U|; 0 for the exact loss, 1e-3 in the published form")
        ce = _as_share("cross_entropy_weight", self.cross_entropy_weight, "the weight of the cross entropy term; 0 for none")
        normalize = _as_bool("normalize", self.normalize)
        # Plain numbers from here on: the ops, graphs and files take no others.
        for name, value in (("ignore_index", ignore_index), ("eps", eps), ("cross_entropy_weight", ce), ("normalize", normalize)):
            object.__setattr__(self, name, value)
        if self.engine is not None:
            _one_of("engine", self.engine, ENGINES)
        if self.group is not None:
            from .process_groups import check_group  # imports torch.distributed, which most programs do without

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
