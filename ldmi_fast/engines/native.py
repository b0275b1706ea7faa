"""The compiled engines, reached through the dispatcher: ``cpu`` (C++ kernels) and ``cuda`` (CUDA kernels for NVIDIA GPUs)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import ops

joint = torch.ops.ldmi_fast.joint.default
logdet_inverse = torch.ops.ldmi_fast.logdet_inverse.default
logits_grad = torch.ops.ldmi_fast.logits_grad.default
loss_forward = torch.ops.ldmi_fast.loss_forward.default
fused = torch.ops.ldmi_fast.fused.default

#: The kinds of devices that this build has kernels for; each is also the name of its engine.
DEVICES: tuple[str, ...] = ()
if ops.compiled is not None:
    DEVICES = ("cpu",) if ops.compiled.cuda_archs == "none" else ("cpu", "cuda")

# Asked here: torch.compile cannot trace a call of the module
_CUDA_TORCH = "cuda" in DEVICES and ops.compiled.cuda_torch()

# One call for the whole problem up to these; csrc/plan says why.
_FUSED_ELEMENTS, _FUSED_ROWS_PER_CLASS = ops.compiled.fused_limits() if ops.compiled is not None else (-1, -1)
_CUDA_FUSED_ELEMENTS, _CUDA_FUSED_CLASSES = ops.compiled.cuda_fused_limits() if ops.compiled is not None else (-1, -1)
_FUSED_DTYPES = frozenset({torch.float32, torch.float64})


def can_run(device: torch.device) -> str:
    """Why the compiled kernels cannot run on ``device``; empty if they can."""
    if ops.compiled is None:
        return ops.why_not_compiled
    if device.type == "cpu":
        return ""
    if device.type != "cuda" or torch.version.hip:
        return f"it has kernels for the CPU and for NVIDIA GPUs, and the logits are on {device}"
    if "cuda" not in DEVICES:
        return "this installation was built without CUDA kernels (LDMI_FAST_CUDA)"
    if not _CUDA_TORCH or not torch.cuda.is_available():
        return "this torch can use no CUDA device"
    return _architecture_missing(*torch.cuda.get_device_capability(device))


@cache
def runs_on(device: torch.device) -> bool:
    """Whether the compiled kernels run on ``device``, asked once."""
    return can_run(device) == ""


def _architecture_missing(major: int, minor: int) -> str:
    """Why the CUDA kernels cannot run on a device of this capability; empty if they can.

    Machine code runs on its own major version from its own minor version on ("90a": on 9.0 alone). PTX of the last architecture is
    compiled by the driver for any later one.
    """
    archs = ops.compiled.cuda_archs.split()
    capability = 10 * major + minor
    for arch in archs:
        number = int(arch.rstrip("a"))
        exact = arch.endswith("a")
        if number == capability or (not exact and number // 10 == major and number <= capability):
            return ""
    if int(archs[-1].rstrip("a")) <= capability:
        return ""
    return f"its CUDA kernels are built for {', '.join(archs)}, and the device has compute capability {major}.{minor}"


def is_fused(logits: Tensor, target: Tensor) -> bool:
    """Whether the loss and its gradient come from one call: small problems with hard labels, not in half precision."""
    if target.dim() != 1 or logits.dtype not in _FUSED_DTYPES:
        return False
    if logits.is_cuda:
        return logits.numel() <= _CUDA_FUSED_ELEMENTS and logits.size(1) <= _CUDA_FUSED_CLASSES
    return logits.numel() <= _FUSED_ELEMENTS or logits.size(0) <= _FUSED_ROWS_PER_CLASS * logits.size(1)
