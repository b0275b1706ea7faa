"""The ops of the namespace ``ldmi_fast``: schemas, fake kernels, and the loading of the compiled kernels.

    joint(logits [N, C], target [N] int | [N, K] float, sample_weight [N]?, num_labels K, ignore_index, input)
        -> S [K, C] fp64, n [K] fp64, lse [N] fp32 (fp64 for fp64 logits), ce [] fp64
    logdet_inverse(S [..., C, C], n [..., C], absent) -> log_abs_det [...], sign [...], kept [...] int64, V [..., C, C]
    logits_grad(logits, target, sample_weight?, lse, V [K, C], scale [], ce_scale [], ignore_index, input) -> dZ [N, C]
    loss_forward(logits, target, sample_weight?, ignore_index, absent, eps, normalize, cross_entropy_weight, input, gradient)
        -> loss [], lse [N], V [C, C], scale [], ce_scale []: joint, logdet_inverse and the scalars behind them, for logits_grad;
        V is [0, 0] where no gradient is asked for
    fused(logits, target, sample_weight?, ignore_index, absent, eps, normalize, cross_entropy_weight, input) -> loss [], dZ

``engines.composite`` defines what they compute, and runs them on every device that has no kernels of its own. The ops carry
no autograd formula: a gradient saved by a forward would give a silently wrong second derivative. ``autograd`` has it.
"""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType

import torch
from torch import Tensor

from .engines import composite

_LIBRARY = torch.library.Library("ldmi_fast", "DEF")
_SCHEMAS = (
    "joint(Tensor logits, Tensor target, Tensor? sample_weight, SymInt num_labels, int ignore_index, str input)"
    " -> (Tensor S, Tensor n, Tensor lse, Tensor ce)",
    "logdet_inverse(Tensor S, Tensor n, str absent) -> (Tensor log_abs_det, Tensor sign, Tensor kept, Tensor V)",
    "logits_grad(Tensor logits, Tensor target, Tensor? sample_weight, Tensor lse, Tensor V, Tensor scale,"
    " Tensor ce_scale, int ignore_index, str input) -> Tensor",
    "loss_forward(Tensor logits, Tensor target, Tensor? sample_weight, int ignore_index, str absent, float eps,"
    " bool normalize, float cross_entropy_weight, str input, bool gradient)"
    " -> (Tensor loss, Tensor lse, Tensor V, Tensor scale, Tensor ce_scale)",
    "fused(Tensor logits, Tensor target, Tensor? sample_weight, int ignore_index, str absent, float eps,"
    " bool normalize, float cross_entropy_weight, str input) -> (Tensor loss, Tensor grad)",
)
for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, getattr(composite, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("ldmi_fast::joint", lib=_LIBRARY)
def _joint_fake(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int, input: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = composite.accumulator(logits.device)
    rows, classes = logits.shape
    return (
        logits.new_empty((num_labels, classes), dtype=acc),
        logits.new_empty((num_labels,), dtype=acc),
        logits.new_empty((rows,), dtype=composite.compute_dtype(logits.dtype)),
        logits.new_empty((), dtype=acc),
    )


@torch.library.register_fake("ldmi_fast::logdet_inverse", lib=_LIBRARY)
def _logdet_inverse_fake(S: Tensor, n: Tensor, absent: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = S.shape[:-2]
    return S.new_empty(batch), S.new_empty(batch), S.new_empty(batch, dtype=torch.int64), S.new_empty(S.shape)


@torch.library.register_fake("ldmi_fast::logits_grad", lib=_LIBRARY)
def _logits_grad_fake(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    lse: Tensor,
    V: Tensor,
    scale: Tensor,
    ce_scale: Tensor,
    ignore_index: int,
    input: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("ldmi_fast::loss_forward", lib=_LIBRARY)
def _loss_forward_fake(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    ignore_index: int,
    absent: str,
    eps: float,
    normalize: bool,
    cross_entropy_weight: float,
    input: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = composite.accumulator(logits.device)
    dtype = composite.compute_dtype(logits.dtype)
    rows, classes = logits.shape
    kept = classes if gradient else 0
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((kept, kept), dtype=acc),
        logits.new_empty((), dtype=acc),
        logits.new_empty((), dtype=acc),
    )


@torch.library.register_fake("ldmi_fast::fused", lib=_LIBRARY)
def _fused_fake(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    ignore_index: int,
    absent: str,
    eps: float,
    normalize: bool,
    cross_entropy_weight: float,
    input: str,
) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=composite.compute_dtype(logits.dtype)), logits.new_empty(logits.shape)


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module (importing it registers its kernels), and why there is none."""
    if importlib.util.find_spec("ldmi_fast._C") is None:
        return None, "this installation is pure Python (built with LDMI_FAST_NATIVE=0 or without a C++ compiler)"
    try:
        from . import _C
    except ImportError as error:
        reason = f"the compiled kernels of ldmi_fast do not load with torch {torch.__version__}: {error}"
        warnings.warn(f"{reason}; falling back to the composite engine. Reinstall ldmi_fast.", stacklevel=2)
        return None, reason
    return _C, ""


compiled, why_not_compiled = _load()
