"""The ops of the namespace ``ldmi_fast``: schemas, fake kernels, and the loading of the compiled kernels.

    joint(logits [N, C], target [N] int | [N, K] float, sample_weight [N]?, num_labels K, ignore_index, input)
        -> S [K, C] fp64, n [K] fp64, lse [N] fp32 (fp64 for fp64 logits), ce [] fp64
    logdet_inverse(S [..., C, C], n [..., C], absent) -> log_abs_det [...], sign [...], kept [...] int64, V [..., C, C]
    logits_grad(logits, target, sample_weight?, lse, V [K, C], scale [], ce_scale [], ignore_index, input) -> dZ [N, C]
    loss_forward(logits, target, sample_weight?, ignore_index, absent, eps, normalize, cross_entropy_weight, input, gradient)
        -> loss [], lse [N], V [C, C], scale [], ce_scale []: joint, logdet_inverse and the scalars behind them, for logits_grad;
        V is [0, 0] where no gradient is asked for
    fused(logits, target, sample_weight?, ignore_index, absent, eps, normalize, cross_entropy_weight, input) -> loss [], dZ

``engines.composite`` defines what they compute, and runs them on every device without compiled kernels. The ops carry
no autograd formula: a gradient saved by a forward would give a silently wrong second derivative. ``autograd`` has it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .options import OP_OPTIONS_SCHEMA
from .precision import accumulator, compute_dtype

_LIBRARY = torch.library.Library("ldmi_fast", "DEF")
#: What the ops take and return, by name.
SCHEMAS = {
    "joint": "(Tensor logits, Tensor target, Tensor? sample_weight, SymInt num_labels, int ignore_index, str input)"
    " -> (Tensor S, Tensor n, Tensor lse, Tensor ce)",
    "logdet_inverse": "(Tensor S, Tensor n, str absent) -> (Tensor log_abs_det, Tensor sign, Tensor kept, Tensor V)",
    "logits_grad": "(Tensor logits, Tensor target, Tensor? sample_weight, Tensor lse, Tensor V, Tensor scale,"
    " Tensor ce_scale, int ignore_index, str input) -> Tensor",
    "loss_forward": f"(Tensor logits, Tensor target, Tensor? sample_weight, {OP_OPTIONS_SCHEMA}, bool gradient)"
    " -> (Tensor loss, Tensor lse, Tensor V, Tensor scale, Tensor ce_scale)",
    "fused": f"(Tensor logits, Tensor target, Tensor? sample_weight, {OP_OPTIONS_SCHEMA}) -> (Tensor loss, Tensor grad)",
}
for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str, function: Callable[..., Any]) -> None:
    """Let ``function`` compute an op on every device without a compiled kernel."""
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")


@torch.library.register_fake("ldmi_fast::joint", lib=_LIBRARY)
def _joint_fake(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int, input: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(logits.device)
    rows, classes = logits.shape
    return (
        logits.new_empty((num_labels, classes), dtype=acc),
        logits.new_empty((num_labels,), dtype=acc),
        logits.new_empty((rows,), dtype=compute_dtype(logits.dtype)),
        logits.new_empty((), dtype=acc),
    )


@torch.library.register_fake("ldmi_fast::logdet_inverse", lib=_LIBRARY)
def _logdet_inverse_fake(S: Tensor, n: Tensor, absent: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = S.shape[:-2]
    return S.new_empty(batch), S.new_empty(batch), S.new_empty(batch, dtype=torch.int64), S.new_empty(S.shape)


@torch.library.register_fake("ldmi_fast::logits_grad", lib=_LIBRARY)
def _logits_grad_fake(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("ldmi_fast::loss_forward", lib=_LIBRARY)
def _loss_forward_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(logits.device)
    dtype = compute_dtype(logits.dtype)
    rows, classes = logits.shape
    gradient = rest[-1]
    kept = classes if gradient else 0
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((kept, kept), dtype=acc),
        logits.new_empty((), dtype=acc),
        logits.new_empty((), dtype=acc),
    )


@torch.library.register_fake("ldmi_fast::fused", lib=_LIBRARY)
def _fused_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=compute_dtype(logits.dtype)), logits.new_empty(logits.shape)


def _why_pure() -> str:
    """What the build wrote down when it left out the compiled kernels."""
    note = Path(__file__).with_name("without_kernels.txt")
    return note.read_text().strip() if note.is_file() else "built with LDMI_FAST_NATIVE=0 or without a C++ compiler"


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module (importing it registers its kernels), and why there is none."""
    if importlib.util.find_spec("ldmi_fast._C") is None:
        return None, f"this installation is pure Python ({_why_pure()})"
    try:
        _C = importlib.import_module("ldmi_fast._C")
    except ImportError as error:
        reason = f"the compiled kernels of ldmi_fast do not load with torch {torch.__version__}: {error}"
        warnings.warn(f"{reason}; falling back to the composite engine. Reinstall ldmi_fast.", stacklevel=2)
        return None, reason
    return _C, ""


#: The module with the plan; None without compiled kernels. Its functions are untyped.
compiled: Any
compiled, why_not_compiled = _load()

# Whether it has been said that there are none: where they do not load, importing says so.
_told = compiled is None and not why_not_compiled.startswith("this installation is pure Python")


def warn_if_slow() -> None:
    """Say once in a process that there are no compiled kernels, and what to do. For calls that do not force an engine."""
    global _told
    if _told or compiled is not None or torch.compiler.is_compiling():
        return
    _told = True
    way_out = (
        "With a C++20 compiler (GCC 12 or clang) reinstall it: pip install --force-reinstall --no-deps --no-cache-dir, and the source "
        "that it came from"
    )
    warnings.warn(
        f"ldmi_fast runs without compiled kernels, 10 to 20 times slower on a CPU: {why_not_compiled}. "
        f"{way_out if sys.platform.startswith('linux') else 'There are kernels for Linux only'}. "
        'To keep it as it is and hide this warning set LDMI_FAST_ENGINE=composite, or pass engine="composite"',
        stacklevel=2,
    )
