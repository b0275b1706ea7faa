"""The options of the loss, declared once: their types, defaults, checks, and what else in the package has to know of each.

:class:`Options` is the declaration. Everything else follows from it: the keywords of the public functions and their signatures
(:func:`shows_options`, :func:`make_options`), the arguments of the ops (``Options.for_ops``), what the ranks of a group have to agree
on (``Options.as_numbers``), and what a saved state holds (``Options.saved``). CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from typing import Any, NoReturn, TypedDict, TypeVar

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


def raise_unexpected_keyword(function: str, name: str, known: Sequence[str]) -> NoReturn:
    """Raise the TypeError for a keyword that ``function``, which takes ``known``, does not take, with what to do instead."""
    if name in _EXPLAINED:
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}: {_EXPLAINED[name]}")
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected some of {', '.join(known)}"
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {hint}")


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


def _check_ignore_index(name: str, value: Any) -> int:
    found = as_int(name, value)
    if not -(2**63) <= found < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {found}")
    return found


def _check_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__}: {value!r}")


def _check_share(name: str, value: Any, unit: str) -> float:
    number = as_float(name, value, unit)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and >= 0 ({unit}), got {value!r}")
    return number


def _check_word(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, one of {allowed}, got {type(value).__name__}: {value!r}")
    if value not in allowed:
        close = difflib.get_close_matches(value, allowed, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}{hint}")
    return value


def _check_engine(name: str, value: Any) -> str | None:
    return None if value is None else _check_word(name, value, ENGINES)


def _check_group(name: str, value: Any) -> Any:
    if value is not None:
        from .process_groups import check_group  # imports torch.distributed, which most programs do without

        check_group(value)
    return value


def _about(
    check: Callable[[str, Any], Any], *, words: tuple[Any, ...] = (), of_loss: bool = True, of_ops: bool = True
) -> dict[str, Any]:
    """The metadata of a field of :class:`Options`.

    Args:
        check: (name, value) -> the value as a plain Python one, for the ops, graphs and files take no others. It raises TypeError or
            ValueError for what cannot work.
        words: its values, if it has a fixed list of them.
        of_loss: whether it decides what the loss is. Such an option has to be the same on all ranks of a group, and is part of a
            saved state. The others say where and by what the loss is computed.
        of_ops: whether it is an argument of the ops ``loss_forward`` and ``fused``, too.
    """
    return {"check": check, "words": words, "of_loss": of_loss, "of_ops": of_loss and of_ops}


@dataclass(frozen=True)
class Options:
    """The options of the loss. Numbers of numpy are accepted, and stored as plain Python numbers.

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
        for_ops: the options that the ops ``loss_forward`` and ``fused`` take after their tensors, in this order. It follows from the
            others.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option has a value outside its range.
    """

    ignore_index: int = field(default=-100, metadata=_about(_check_ignore_index))
    absent: str = field(default="present", metadata=_about(partial(_check_word, allowed=ABSENT), words=ABSENT))
    eps: float = field(
        default=0.0, metadata=_about(partial(_check_share, unit="added to |det U|; 0 for the exact loss, 1e-3 in the published form"))
    )
    normalize: bool = field(default=True, metadata=_about(_check_bool, words=(False, True)))
    cross_entropy_weight: float = field(
        default=0.0, metadata=_about(partial(_check_share, unit="the weight of the cross entropy term; 0 for none"))
    )
    input: str = field(default="logits", metadata=_about(partial(_check_word, allowed=INPUT), words=INPUT))
    engine: str | None = field(default=None, metadata=_about(_check_engine, of_loss=False))
    group: Any = field(default=None, metadata=_about(_check_group, of_loss=False))
    for_ops: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, check in _CHECKS:
            object.__setattr__(self, name, check(name, getattr(self, name)))
        object.__setattr__(self, "for_ops", tuple([getattr(self, name) for name in _OP_OPTION_NAMES]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        return self  # nothing in it changes, and a process group cannot be copied

    def as_numbers(self) -> tuple[float, ...]:
        """The options that decide what the loss is as numbers, a word as its place among the words: for ranks to compare."""
        return tuple(float(_WORDS[name].index(value) if _WORDS[name] else value) for name, value in self.saved().items())

    def changed(self) -> list[str]:
        """The options that do not have their defaults, each as ``name=value``."""
        return [f"{item.name}={getattr(self, item.name)!r}" for item in _DECLARED if getattr(self, item.name) != item.default]

    def saved(self) -> dict[str, Any]:
        """The options that decide what the loss is, by name: what a file holds."""
        return {name: getattr(self, name) for name in LOSS_OPTION_NAMES}


_DECLARED = tuple(item for item in fields(Options) if item.init)
_CHECKS: tuple[tuple[str, Callable[[str, Any], Any]], ...] = tuple((item.name, item.metadata["check"]) for item in _DECLARED)
_WORDS: dict[str, tuple[Any, ...]] = {item.name: item.metadata["words"] for item in _DECLARED}
OPTION_NAMES = tuple(item.name for item in _DECLARED)
LOSS_OPTION_NAMES = tuple(item.name for item in _DECLARED if item.metadata["of_loss"])
_OP_OPTION_NAMES = tuple(item.name for item in _DECLARED if item.metadata["of_ops"])

#: The arguments of ``Options.for_ops`` in the schemas of the ops.
OP_OPTIONS_SCHEMA = ", ".join(f"{item.type} {item.name}" for item in _DECLARED if item.metadata["of_ops"])


def describe_number(name: str, number: float) -> str:
    """An option in words, from its number in ``Options.as_numbers``."""
    words = _WORDS.get(name)
    return f"{name}={words[int(number)]!r}" if words else f"{name}={number:g}"


class OptionKeywords(TypedDict, total=False):
    """The fields of :class:`Options` as keywords, for type checkers."""

    ignore_index: int
    absent: str
    eps: float
    normalize: bool
    cross_entropy_weight: float
    input: str
    engine: str | None
    group: Any


_Function = TypeVar("_Function", bound=Callable[..., Any])


def shows_options(*without: str) -> Callable[[_Function], _Function]:
    """A decorator for functions that take ``**options``: their signature shows each option with its default, but for ``without``."""

    def show(function: _Function) -> _Function:
        signature = inspect.signature(function)
        shown = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        for item in _DECLARED:
            if item.name not in without:
                shown.append(inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type))
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return show


def _build(function: str, without: tuple[str, ...], others: tuple[str, ...], /, **given: Any) -> Options:
    for name in given:
        if name not in OPTION_NAMES or name in without:
            known = [option for option in OPTION_NAMES if option not in without]
            raise_unexpected_keyword(function, name, (*others, *known))
    return Options(**given)


_cached = lru_cache(maxsize=256, typed=True)(_build)
_DEFAULT = Options()


def make_options(
    function: str, given: Mapping[str, Any], *, without: tuple[str, ...] = (), others: tuple[str, ...] = ("sample_weight",)
) -> Options:
    """The options that a public function was given as keywords, without paying for the checks at every step of a training loop.

    Args:
        function: its name, for messages.
        given: the keywords.
        without: options that it does not take.
        others: its other keywords, for messages.

    Raises:
        TypeError: a keyword that is no option, with what to do instead; an option of the wrong type.
        ValueError: an option with a value outside its range.
    """
    if not given:
        return _DEFAULT
    if torch.compiler.is_compiling():  # Dynamo cannot look into lru_cache
        return _build(function, without, others, **given)
    if given.get("group") is not None:  # a cache would keep a process group from being destroyed
        return _build(function, without, others, **given)
    try:
        return _cached(function, without, others, **given)
    except TypeError:  # unhashable values fall through to the checks, which say what is wrong with them
        return _build(function, without, others, **given)


def forced_engine(options: Options) -> str | None:
    """The engine that the caller or the environment variable LDMI_FAST_ENGINE forces, or None."""
    if options.engine is not None:
        return options.engine
    name = os.environ.get(ENGINE_VARIABLE) or None
    if name is not None and name not in ENGINES:
        raise ValueError(f"the environment variable {ENGINE_VARIABLE} must be one of {ENGINES}, got {name!r}")
    return name
