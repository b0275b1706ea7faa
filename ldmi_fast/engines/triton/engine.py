"""The Triton engine: every op as kernels in Python, for GPUs that have no compiled ones.

Importing this module imports neither triton nor the kernels; the first call does. The ops have the signatures of
``engines.contract``; ``engines.composite`` says what they compute.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import plan, tuning

INTERPRET_VARIABLE = "TRITON_INTERPRET"

#: Whether triton is installed; asked once, without importing it, because torch.compile cannot trace the question.
INSTALLED = importlib.util.find_spec("triton") is not None


def can_run(device: torch.device) -> str:
    """Why this engine cannot run on ``device``; empty if it can. On CPU tensors it does with Triton's interpreter (for tests)."""
    if not INSTALLED:
        return "triton is not installed"
    if device.type == "cpu":
        if os.environ.get(INTERPRET_VARIABLE) == "1":
            return ""
        return f"it has kernels for GPUs, and the logits are on the CPU ({INTERPRET_VARIABLE}=1 interprets them, very slowly)"
    if device.type != "cuda":
        return f"it has kernels for CUDA and ROCm GPUs, and the logits are on {device}"
    if not torch.compiler.is_compiling() and _is_old(device):
        name = torch.cuda.get_device_name(device)
        return f"it is for compute capability 8.0 and later (products in fp64 on tensor cores), and {name} is older"
    return ""


def _is_old(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU that the kernels are not for."""
    return torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)


def is_fused(logits: Tensor, target: Tensor) -> bool:
    """Whether the loss and its gradient come from one launch: small problems with hard labels in fp32."""
    return plan.is_fused(logits.shape[0], logits.shape[1], target.is_floating_point(), logits.dtype.itemsize)


def explanation(rows: int, classes: int, soft: bool, dtype: torch.dtype) -> plan.Explanation:
    """What ``ldmi_fast.explain`` tells of this engine."""
    return plan.explain(rows, classes, soft, dtype.itemsize, tuning.tile_rows(classes))


def joint(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``composite.joint``."""
    from . import ops

    return ops.joint(*args)


def logdet_inverse(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``composite.logdet_inverse``."""
    from . import ops

    return ops.logdet_inverse(*args)


def logits_grad(*args: Any) -> Tensor:
    """``composite.logits_grad``; an out of range label or weight makes its own row NaN."""
    from . import ops

    return ops.logits_grad(*args)


def loss_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``composite.loss_forward``."""
    from . import ops

    return ops.loss_forward(*args)


def fused(*args: Any) -> tuple[Tensor, Tensor]:
    """``composite.fused``."""
    from . import ops

    return ops.fused(*args)
