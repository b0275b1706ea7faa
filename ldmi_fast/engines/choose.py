"""The choice of an engine, and its explanation."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import few_rows, ops
from ..checks import check_tensors
from ..options import ENGINE_VARIABLE, ENGINES, OPTION_NAMES, Options, explain_keywords, forced_engine, make_options
from . import composite, guard, native
from .triton import engine as triton


@dataclass(frozen=True)
class Plan:
    """What would run for given arguments.

    Attributes:
        engine: the name of the engine.
        kernels: its kernels in the order in which they would run, forward then backward.
        regime: which algorithm the shape falls into.
        workspace_bytes: scratch memory beside the outputs, at its peak.
        reason: why this engine, and why this regime.
    """

    engine: str
    kernels: tuple[str, ...]
    regime: str
    workspace_bytes: int
    reason: str

    def __str__(self) -> str:
        return (
            f"engine {self.engine}: {' -> '.join(self.kernels)}\n  regime: {self.regime}\n"
            f"  workspace: {self.workspace_bytes:,} bytes\n  reason: {self.reason}"
        )


# The module that holds the ops of each engine.
_MODULES: dict[str, ModuleType] = {"cpu": native, "cuda": native, "triton": triton, "composite": composite}

# Which engines to try for a kind of device, the fastest first; composite, which runs everywhere, after them.
_PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# What each compiled engine has kernels for.
_COMPILED = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}

_FEW_ROWS = "few rows"

# What the reason says of an engine that was chosen.
_WHAT = {name: f"compiled kernels for {what}" for name, what in _COMPILED.items()}
_WHAT["triton"] = "kernels in Triton for GPUs that have no compiled ones"


def why_not(name: str, device: torch.device) -> str:
    """Why an engine cannot run on a device; empty if it can."""
    if name in _COMPILED and device.type != name:
        return f"it has kernels for {_COMPILED[name]}, and the logits are on {device}"
    return _MODULES[name].can_run(device)


def engine_module(name: str) -> ModuleType:
    """The module that has the ops of an engine, as they are: no :mod:`.guard` checks them."""
    return _MODULES[name]


def available(device: torch.device | str = "cpu") -> dict[str, str]:
    """Every engine by name, and why it cannot run on ``device`` (empty: it can)."""
    return {name: why_not(name, torch.device(device)) for name in ENGINES}


def choose(logits: Tensor, options: Options) -> ModuleType:
    """The engine for these logits; one for GPUs checks each kernel at its first use (see :mod:`.guard`).

    Raises:
        RuntimeError: the engine that was forced cannot run there, and why.
    """
    free = options.engine is None and ENGINE_VARIABLE not in os.environ
    if free and logits.is_cpu and ops.compiled is not None:
        return native  # the usual case, at every step
    if free and logits.is_cuda and not torch.compiler.is_compiling() and native.runs_on(logits.device):
        name = "cuda"  # the next one: what is asked of the device is asked once
    else:
        name = choose_name(logits.device, options)
    if name not in guard.GUARDED or not guard.enabled():
        return _MODULES[name]
    if torch.compiler.is_compiling():  # nothing can be checked, but what was found before holds
        return composite if (name, logits.device.type) in guard.refused else _MODULES[name]
    return guard.guarded(name, _MODULES[name])


def choose_name(device: torch.device, options: Options) -> str:
    """The name of the engine for tensors on ``device``: the forced one, else the first that can run."""
    forced = forced_engine(options)
    if forced is None:
        preferred = _PREFERRED.get(device.type, ())
        name = next((name for name in preferred if not why_not(name, device)), "composite")
        if name == "composite" and preferred:
            ops.warn_if_slow()
        return name
    reason = why_not(forced, device)
    if reason:
        raise RuntimeError(f"engine {forced!r} was asked for and cannot run: {reason}")
    return forced


def explain(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    absent: str = "present",
    eps: float = 0.0,
    normalize: bool = True,
    cross_entropy_weight: float = 0.0,
    input: str = "logits",
    group: Any = None,
    engine: str | None = None,
    **unknown: Any,
) -> Plan:
    """Which engine and kernels :func:`ldmi_fast.dmi_loss` would run for these arguments, and why. Runs nothing.

    Args:
        logits, target and the options: as for :func:`ldmi_fast.dmi_loss`. With ``group`` no rank has to call, and the plan is that for
            the samples of this one.

    Returns:
        A :class:`Plan`; print it.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ldmi_fast.dmi_loss` would.
    """
    if unknown:
        explain_keywords("explain", unknown, ("sample_weight", *OPTION_NAMES))
    options = make_options(ignore_index, absent, eps, normalize, cross_entropy_weight, input, engine, group)
    soft = check_tensors(logits, target, sample_weight, options)
    classes = logits.shape[1]
    rows = logits.numel() // classes
    name = choose_name(logits.device, options)
    if forced_engine(options) is not None:
        why = "forced by engine=" if options.engine is not None else "forced by LDMI_FAST_ENGINE"
    elif name == "composite":
        tried = _PREFERRED.get(logits.device.type, ("cpu",))
        why = "; ".join(f"the {engine} engine cannot run: {why_not(engine, logits.device)}" for engine in tried)
    else:
        why = _WHAT[name]
    if group is None and not soft and few_rows.pays(rows, classes):
        found = _plan_of_few_rows(name, logits, rows, options)
    else:
        found = _plan(name, logits, rows, soft, options)
    weights_learn = sample_weight is not None and composite.may_need_gradient(sample_weight)
    if group is not None or (weights_learn and name != "composite" and found.regime != _FEW_ROWS):
        found = _in_stages(found, name, logits, rows, soft, options)
    lost = "".join(f"; not used after a check: {path.name}" for path in guard.refusals(name, logits.device))
    return replace(found, reason=f"{why}{'; ' if found.reason and why else ''}{found.reason}{lost}")


def _plan(name: str, logits: Tensor, rows: int, soft: bool, options: Options) -> Plan:
    """The plan of one engine, its reason that of the kernels alone."""
    classes, probs = logits.shape[1], options.input == "probs"
    if name == "composite":
        acc = composite.accumulator(logits.device).itemsize
        compute = composite.compute_dtype(logits.dtype).itemsize
        workspace = rows * classes * (2 * compute + acc) + 6 * classes * classes * acc
        return Plan(name, ("joint", "logdet_inverse", "combine", "autograd"), "plain PyTorch", workspace, "")
    if name == "triton":
        found = triton.explanation(rows, classes, soft, logits.dtype)
        return Plan(name, found.kernels, found.regime, found.workspace_bytes, found.reason)
    shape = (rows, classes, classes, soft, logits.dtype.itemsize, probs)
    if name == "cpu":
        plan = ops.compiled.plan(*shape)
    else:
        plan = ops.compiled.cuda_plan(*shape, ops.compiled.cuda_limits(logits.device.index))
    return Plan(name, tuple(plan["kernels"]), plan["regime"], plan["workspace_bytes"], plan["reason"])


def _plan_of_few_rows(name: str, logits: Tensor, rows: int, options: Options) -> Plan:
    """The plan for far fewer samples than classes: the joint of the labels that occur, in at most as many slots as there are rows."""
    classes, probs = logits.shape[1], options.input == "probs"
    labels = max(rows, 1)
    shape = (rows, classes, labels, False, logits.dtype, probs)
    joint, _, logits_grad = guard.staged_kernels(name, logits.device, *shape)
    square = guard.staged_kernels(name, logits.device, rows, labels, labels, False, logits.dtype, probs)[1]
    workspace = (2 * labels * classes + 2 * labels * labels) * composite.accumulator(logits.device).itemsize
    return Plan(
        name,
        ("slots of the labels that occur", joint, square, logits_grad),
        _FEW_ROWS,
        workspace,
        f"of {classes} classes at most {rows} occur: the determinant is of those",
    )


def _in_stages(alone: Plan, name: str, logits: Tensor, rows: int, soft: bool, options: Options) -> Plan:
    """The plan where something stands between joint and logdet_inverse: the sums of all ranks, or the gradient of sample weights. No
    engine then does it in one call."""
    classes = logits.shape[1]
    how, rest = alone.kernels, ()
    if name == "composite":
        how, rest = alone.kernels[:2], alone.kernels[2:]
    elif len(how) == 1:
        how = guard.staged_kernels(name, logits.device, rows, classes, classes, soft, logits.dtype, options.input == "probs")
    sums = (classes * classes + classes + 4) * composite.accumulator(logits.device).itemsize
    ranks = options.group is not None
    reason = "the sums of all ranks are added up before the determinant" if ranks else "the sample weights get a gradient"
    return Plan(
        name,
        (how[0], *(("all_reduce",) if ranks else ()), *how[1:], *rest),
        "over the ranks of a group, staged" if ranks else "staged",
        alone.workspace_bytes + sums,
        f"{reason}; {alone.reason}" if alone.reason and len(alone.kernels) > 1 else reason,
    )
