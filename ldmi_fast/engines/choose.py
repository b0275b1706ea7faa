"""The choice of an engine."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import ops
from ..options import ENGINE_VARIABLE, ENGINES, Options, forced_engine
from . import composite, guard, native
from .contract import Engine
from .triton import engine as triton

# The module that holds the ops of each engine.
_MODULES: dict[str, Engine] = {"cpu": native, "cuda": native, "triton": triton, "composite": composite}

# Which engines to try for a kind of device, the fastest first; composite, which runs everywhere, after them.
PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# What each compiled engine has kernels for.
COMPILED = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}


def why_not(name: str, device: torch.device) -> str:
    """Why an engine cannot run on a device; empty if it can."""
    if name in COMPILED and device.type != name:
        return f"it has kernels for {COMPILED[name]}, and the logits are on {device}"
    return _MODULES[name].can_run(device)


def engine_module(name: str) -> Engine:
    """The module that has the ops of an engine, as they are: no :mod:`.guard` checks them."""
    return _MODULES[name]


def available(device: torch.device | str = "cpu") -> dict[str, str]:
    """Every engine by name, and why it cannot run on ``device`` (empty: it can)."""
    return {name: why_not(name, torch.device(device)) for name in ENGINES}


def choose(logits: Tensor, options: Options) -> Engine:
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
        preferred = PREFERRED.get(device.type, ())
        name = next((name for name in preferred if not why_not(name, device)), "composite")
        if name == "composite" and preferred:
            ops.warn_if_slow()
        return name
    reason = why_not(forced, device)
    if reason:
        raise RuntimeError(f"engine {forced!r} was asked for and cannot run: {reason}")
    return forced
