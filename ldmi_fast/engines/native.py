"""The compiled engines, reached through the dispatcher: C++ kernels for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops

joint = torch.ops.ldmi_fast.joint.default
logdet_inverse = torch.ops.ldmi_fast.logdet_inverse.default
logits_grad = torch.ops.ldmi_fast.logits_grad.default
loss_forward = torch.ops.ldmi_fast.loss_forward.default
fused = torch.ops.ldmi_fast.fused.default

# One call for the whole problem up to either of these; csrc/plan says why.
_FUSED_ELEMENTS, _FUSED_ROWS_PER_CLASS = ops.compiled.fused_limits() if ops.compiled is not None else (-1, -1)
_FUSED_DTYPES = frozenset({torch.float32, torch.float64})


def can_run(device: torch.device) -> str:
    """Why this engine cannot run on ``device``; empty if it can."""
    if ops.compiled is None:
        return ops.why_not_compiled
    if device.type != "cpu":
        return f"it has kernels for the CPU, and the logits are on {device}"
    return ""


def is_fused(logits: Tensor, target: Tensor) -> bool:
    """Whether the loss and its gradient come from one call: small problems with hard labels, not in half precision."""
    return (
        target.dim() == 1
        and (logits.numel() <= _FUSED_ELEMENTS or logits.size(0) <= _FUSED_ROWS_PER_CLASS * logits.size(1))
        and logits.dtype in _FUSED_DTYPES
    )
