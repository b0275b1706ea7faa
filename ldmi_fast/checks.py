"""What can be known of the arguments without reading device data: shapes, dtypes, devices, and clear errors about them.

The one check that does read data, :func:`raise_for_values`, runs only after a loss on the CPU came out NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .options import Options

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTEGERS = frozenset(
    {
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    }
)


def _tensor(name: str, value: object, kind: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a {kind} tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}; call .to_dense()")


def check_tensors(logits: Any, target: Any, sample_weight: Any, options: Options) -> bool:
    """Raise what ``F.cross_entropy`` would raise for such arguments. Returns True for soft (floating) targets.

    Raises:
        TypeError: an argument is no dense tensor or has a dtype that cannot work.
        ValueError: shapes or devices do not fit, or a tensor requires a gradient that it cannot have.
    """
    _tensor("logits", logits, "floating point")
    _tensor("target", target, "integer (N, ...) or floating point (N, C, ...)")
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    shape = logits.shape
    if len(shape) < 2:
        raise ValueError(
            f"logits must have shape (N, C) or (N, C, d1, ...), got {tuple(shape)}; for one sample use logits.unsqueeze(0)"
        )
    if shape[1] == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(shape)} with C = 0")
    soft = target.dtype in FLOATS
    if soft:
        if target.shape != shape:
            raise ValueError(
                f"floating point target must have the shape of the logits, {tuple(shape)} (one distribution over the "
                f"classes a sample), got {tuple(target.shape)}; for class indices pass an integer tensor"
            )
        if options.ignore_index >= 0:
            raise ValueError(
                f"ignore_index={options.ignore_index} applies to class indices only, and the target is {target.dtype}; "
                "give such samples sample_weight 0"
            )
    elif target.dtype in INTEGERS:
        if len(target.shape) != len(shape) - 1 or target.shape[0] != shape[0] or target.shape[1:] != shape[2:]:
            expected = (shape[0], *shape[2:])
            raise ValueError(f"target must have shape {tuple(expected)} for logits of shape {tuple(shape)}, got {tuple(target.shape)}")
    else:
        raise TypeError(f"target must hold class indices (an integer dtype) or probabilities (a floating dtype), got {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, logits on {logits.device}; expected one device")
    if sample_weight is not None:
        _tensor("sample_weight", sample_weight, "floating point")
        if sample_weight.dtype not in FLOATS:
            raise TypeError(
                f"sample_weight must be float16, bfloat16, float32 or float64, got {sample_weight.dtype}; convert it with .float()"
            )
        expected = (shape[0], *shape[2:])
        if tuple(sample_weight.shape) != tuple(expected):
            raise ValueError(f"sample_weight must have one weight a sample, shape {tuple(expected)}, got {tuple(sample_weight.shape)}")
        if sample_weight.device != logits.device:
            raise ValueError(f"sample_weight is on {sample_weight.device}, logits on {logits.device}; expected one device")
        if sample_weight.requires_grad:
            raise ValueError("sample_weight requires a gradient, and the loss has none for it; pass sample_weight.detach()")
    return soft


def flatten(logits: Tensor, target: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, C, d1, ...) and its companions as (N * d1 * ..., C): one row a sample."""
    if logits.dim() == 2:
        return logits, target, sample_weight
    classes = logits.shape[1]
    target = target.movedim(1, -1).reshape(-1, classes) if target.dim() == logits.dim() else target.reshape(-1)
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    return logits.movedim(1, -1).reshape(-1, classes), target, sample_weight


def raise_for_values(target: Tensor, sample_weight: Tensor | None, classes: int, ignore_index: int) -> None:
    """Raise if data on the CPU explains a NaN loss: labels out of range (in rows that count), or bad sample weights.

    Raises:
        IndexError: a label is neither in 0..C-1 nor ignore_index.
        ValueError: a sample weight is negative, infinite or NaN.
    """
    label = None
    if target.dtype not in FLOATS:
        if target.dtype == torch.uint64:  # most operators do not take it; what does not fit is out of range anyway
            label = torch.where(target.view(torch.int64) < 0, torch.iinfo(torch.int64).max, target.view(torch.int64))
        else:
            label = target.to(torch.int64)
    if sample_weight is not None:
        bad = ~(torch.isfinite(sample_weight) & (sample_weight >= 0))
        if label is not None:
            bad &= label != ignore_index
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"sample_weight must be finite and >= 0, got {sample_weight[i].item()} for sample {i} "
                f"({int(bad.sum())} such of {bad.numel()})"
            )
    if label is None:
        return
    bad = ((label < 0) | (label >= classes)) & (label != ignore_index)
    if sample_weight is not None:
        bad &= sample_weight != 0
    if bad.any():
        i = int(bad.nonzero()[0])
        raise IndexError(
            f"target {label[i].item()} of sample {i} is out of range: expected 0 <= target < {classes} (the number of "
            f"classes) or ignore_index = {ignore_index} ({int(bad.sum())} such of {bad.numel()})"
        )
