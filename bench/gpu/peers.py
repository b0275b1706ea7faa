"""The losses that are timed side by side on a GPU: those of the CPU benchmark, our other engines, and kernels of other projects.

``ours`` is the engine that would be chosen; ``ours-NAME`` are the other engines that can run. Liger's and quack's cross entropy are
timed where they are installed, but are not part of the bar: Liger writes its gradient over the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ldmi_fast
from bench.kernels.peers import PEERS, Loss, Peer
from ldmi_fast.engines import choose
from ldmi_fast.engines.contract import Engine

ENGINE_FAMILY = "engines"
OTHER_FAMILY = "other"
"""Families that are not a bar: our own other engines, and kernels that treat their arguments differently."""

ONE_HOT_ELEMENTS = 2**24
"""Above this the published formula's one-hot matrix, made on the CPU and copied, would take most of the run's time."""


def default_engine(device: torch.device) -> str:
    """The engine that a call on ``device`` would run."""
    logits = torch.zeros(2, 2, device=device)
    return ldmi_fast.explain(logits, torch.tensor([0, 1], device=device)).engine


def engines(device: torch.device) -> list[str]:
    """The engines that can run on ``device``."""
    return [name for name, reason in choose.available(device).items() if not reason]


def kernel_engines(device: torch.device) -> dict[str, Engine]:
    """The engines with their own kernels, by name, with what has their ops."""
    return {name: choose._MODULES[name] for name in engines(device) if name != "composite"}


def _with_engine(name: str) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return ldmi_fast.dmi_loss(logits, target, engine=name)

    return loss


def _liger() -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda logits, target: cross_entropy(logits, target, reduction="mean")


OTHERS: dict[str, tuple[Callable[[], Loss], str, bool]] = {
    "liger": (_liger, "Liger's cross entropy, which overwrites its logits", True),
    "quack": (_quack, "quack's cross entropy", False),
}


def gpu_peers(device: torch.device) -> tuple[dict[str, Peer], dict[str, str]]:
    """Every peer by name, and the reason why one is missing."""
    peers = dict(PEERS)
    missing: dict[str, str] = {}
    chosen = default_engine(device)
    for name in engines(device):
        if name != chosen:
            peer = Peer(f"ours-{name}", ENGINE_FAMILY, _with_engine(name), f"ldmi_fast.dmi_loss, engine {name}")
            peers[peer.name] = peer
    for name, (load, description, overwrites) in OTHERS.items():
        try:
            peers[name] = Peer(name, OTHER_FAMILY, load(), description, dmi=False, overwrites=overwrites)
        except Exception as error:  # not installed, or not for this device
            missing[name] = f"{type(error).__name__}: {error}"
    return peers, missing


def why_not_timed(name: str, rows: int, classes: int) -> str:
    """Why a peer is left out at a shape; empty if it is not."""
    if name == "published" and rows * classes > ONE_HOT_ELEMENTS:
        return "its one-hot matrix comes from the CPU and would take most of the run's time"
    return ""
