"""Checks of the arguments that do not read device data: shapes, dtypes, devices, with clear errors.

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


# Rows that sum to 1 within this are distributions: half precision rounds each of many entries.
SUM_ROUNDING = 1e-2
# Soft targets of a class that sum to less than minus this share of all are wrong, more than rounding.
NEGATIVE_SHARE = 1e-6


def check_dense(name: str, value: Any, kind: str) -> None:
    """Raise TypeError unless ``value`` is a tensor whose elements lie in one dense block. ``kind``: what it should hold, such as
    "a floating point"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {kind} tensor, got {type(value).__name__}{_from_no_tensor(name, value)}")
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one ({value.layout}): pass its components as one batch, "
            "torch.cat(x.unbind()), or pad it, and give the padding the label ignore_index or sample_weight 0"
        )
    if type(value) is not Tensor and hasattr(value, "full_tensor"):  # without importing torch.distributed.tensor to ask
        raise TypeError(
            f"{name} must be a plain tensor, got {type(value).__name__}: where each rank holds its own samples pass x.to_local() "
            "of logits, target and sample_weight, with group= the process group; where all ranks are to see the whole, such as the "
            "weight of an FSDP2 layer, pass x.full_tensor()"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}; call .to_dense()")


def _from_no_tensor(name: str, value: Any) -> str:
    """How to get the tensor out of what models and data sets give."""
    if isinstance(getattr(value, "logits", None), Tensor):
        return "; pass its .logits"
    if isinstance(value, dict) and isinstance(value.get("logits"), Tensor):
        return '; pass its "logits"'
    if value is None and name == "target":
        return (
            ": the batch came without labels. Hugging Face's Trainer hands on labels of the name 'labels' alone: rename the column "
            "or the argument of the model"
        )
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
        return "; pass the one of its tensors that is meant"
    if isinstance(value, (list, tuple, int, float)) or type(value).__module__ == "numpy":
        return "; pass torch.as_tensor(...)"
    return ""


# What to pass in the place of one logit, or one probability, a sample.
TWO_CLASSES = {
    "logits": "for two classes pass both, torch.cat([torch.zeros_like(z), z], 1)",
    "probs": "for two classes pass both, torch.cat([1 - p, p], 1)",
}


def _for_soft(target: Tensor, shape: torch.Size) -> str:
    """What to do about a floating point target that does not have the shape (N, C, d1, ...) of the logits."""
    given, expected = tuple(target.shape), (shape[0], *shape[2:])
    if given == expected:
        return "class indices have to be integers: pass target.long()"
    if given == (shape[0], 1, *shape[2:]):
        return "class indices have to be integers, without a dimension for the classes: pass target.long().squeeze(1)"
    if len(given) == len(shape) and given == (shape[0], *shape[2:], shape[1]):
        return "both have the classes in dimension 1: where they come last, pass x.movedim(-1, 1)"
    if len(shape) > 2 and given == tuple(shape[:-1]):
        return (
            "class indices have to be integers, and the classes of the logits in dimension 1: pass logits.movedim(-1, 1) and "
            "target.long()"
        )
    return "for class indices pass an integer tensor"


def _for_indices(target: Tensor, shape: torch.Size) -> str:
    """What to do about class indices that do not have the shape (N, d1, ...) that fits the logits; empty if it is not clear."""
    given, expected = tuple(target.shape), (shape[0], *shape[2:])
    if given == (shape[0], 1, *shape[2:]):
        return "; pass target.squeeze(1)"
    if given == tuple(shape):
        return "; if it is one-hot, pass target.argmax(1), or target.float() for a distribution over the classes a sample"
    if given == (*expected, 1):
        return "; pass target.squeeze(-1)"
    if len(shape) > 2 and given == tuple(shape[:-1]):
        return "; if the classes of the logits are in the last dimension, pass logits.movedim(-1, 1)"
    return ""


def _for_weight(sample_weight: Tensor, shape: torch.Size) -> str:
    """What to do about weights that are not one per sample; empty if it is not clear."""
    given = tuple(sample_weight.shape)
    if given == (shape[1],):
        return "; weights of classes leave the gradient as it is; if you want them, pass weight[target]"
    if given == (shape[0], 1, *shape[2:]):
        return "; pass sample_weight.squeeze(1)"
    if len(shape) > 2 and given == (shape[0],):
        rest = ", ".join(["-1", *["1"] * (len(shape) - 2)])
        return f"; for one weight per row pass sample_weight.view({rest}).expand({', '.join(map(str, (shape[0], *shape[2:])))})"
    return ""


def check_tensors(logits: Any, target: Any, sample_weight: Any, options: Options) -> bool:
    """Raise what ``F.cross_entropy`` would raise for such arguments. Returns True for soft (floating) targets.

    Raises:
        TypeError: an argument is no dense tensor or has a dtype that cannot work.
        ValueError: shapes or devices do not fit.
    """
    check_dense("logits", logits, "a floating point")
    check_dense("target", target, "an integer (N, ...) or floating point (N, C, ...)")
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    shape = logits.shape
    if len(shape) < 2:
        raise ValueError(
            f"logits must have shape (N, C) or (N, C, d1, ...), got {tuple(shape)}; for one sample use logits.unsqueeze(0), for one "
            "logit a sample (a binary model) torch.stack([torch.zeros_like(z), z], 1) and integer labels"
        )
    if shape[1] == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(shape)} with C = 0")
    soft = target.dtype in FLOATS
    if soft:
        if shape[1] == 1:
            raise ValueError(
                f"logits of shape {tuple(shape)} are of one class, for which the loss is constant, and the target is "
                f"{target.dtype}, as for a binary cross entropy: {TWO_CLASSES[options.input]}, and integer labels, target.long()"
                f"{'' if target.dim() < len(shape) else '.squeeze(1)'}"
            )
        if target.shape != shape:
            raise ValueError(
                f"floating point target must have the shape of the logits, {tuple(shape)} (one distribution over the "
                f"classes a sample), got {tuple(target.shape)}; {_for_soft(target, shape)}"
            )
        if options.ignore_index >= 0:
            raise ValueError(
                f"ignore_index={options.ignore_index} applies to class indices only, and the target is {target.dtype}; "
                "give such samples sample_weight 0"
            )
    elif target.dtype in INTEGERS:
        if len(target.shape) != len(shape) - 1 or target.shape[0] != shape[0] or target.shape[1:] != shape[2:]:
            expected = (shape[0], *shape[2:])
            raise ValueError(
                f"target must have shape {tuple(expected)} for logits of shape {tuple(shape)}, got {tuple(target.shape)}"
                f"{_for_indices(target, shape)}"
            )
    else:
        hint = "; pass target.long()" if target.dtype == torch.bool and target.shape != shape else ""
        hint = "; pass target.float()" if target.dtype == torch.bool and target.shape == shape else hint
        raise TypeError(
            f"target must hold class indices (an integer dtype) or probabilities (a floating dtype), got {target.dtype}{hint}"
        )
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, logits on {logits.device}; expected one device")
    if sample_weight is not None:
        check_dense("sample_weight", sample_weight, "a floating point")
        if sample_weight.dtype not in FLOATS:
            raise TypeError(
                f"sample_weight must be float16, bfloat16, float32 or float64, got {sample_weight.dtype}; weights that are integers "
                "convert with .float(); if it is something else that the loader gives as its third item, such as the index of the "
                "sample, leave it out"
            )
        expected = (shape[0], *shape[2:])
        if tuple(sample_weight.shape) != tuple(expected):
            raise ValueError(
                f"sample_weight must have one weight per sample, shape {tuple(expected)}, got {tuple(sample_weight.shape)}"
                f"{_for_weight(sample_weight, shape)}"
            )
        if sample_weight.device != logits.device:
            raise ValueError(f"sample_weight is on {sample_weight.device}, logits on {logits.device}; expected one device")
    return soft


def flatten(logits: Tensor, target: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, C, d1, ...) and its companions as (N * d1 * ..., C): one row per sample."""
    if logits.dim() == 2:
        return logits, target, sample_weight
    classes = logits.shape[1]
    target = target.movedim(1, -1).reshape(-1, classes) if target.dim() == logits.dim() else target.reshape(-1)
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    return logits.movedim(1, -1).reshape(-1, classes), target, sample_weight


def check_place(place: torch.device, logits: Tensor) -> None:
    """Raise ValueError unless the logits are where the average of a DMILoss is."""
    if logits.device != place:
        raise ValueError(
            f"the average of this DMILoss is on {place}, the logits on {logits.device}: call criterion.to({str(logits.device)!r})"
        )


def probability_rows(rows: Tensor, slack: float | None = None) -> Tensor:
    """Which rows of [N, C] are >= 0 and sum to 1, [N] bool. ``slack``: how far the sum may be off; None: 1e-3, or what the dtype
    needs."""
    if slack is None:
        slack = max(1e-3, torch.finfo(rows.dtype).eps)
    sums = rows.sum(1, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)
    return (rows >= 0).all(1) & ((sums - 1).abs() <= slack)


def raise_for_values(target: Tensor, sample_weight: Tensor | None, classes: int, ignore_index: int) -> None:
    """Raise if data on the CPU explain a loss that is NaN, or 0 with nothing kept: labels out of range (in rows that count), bad
    sample weights, soft targets below 0.

    Raises:
        IndexError: a label is neither in 0..C-1 nor ignore_index.
        ValueError: a sample weight is negative, infinite or NaN; the soft targets of a class sum to less than 0.
    """
    # what a subclass makes of these operations is its own
    target = target.detach().as_subclass(Tensor)
    sample_weight = None if sample_weight is None else sample_weight.detach().as_subclass(Tensor)
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
        raise_for_negative_targets(target, sample_weight)
        return
    bad = ((label < 0) | (label >= classes)) & (label != ignore_index)
    if sample_weight is not None:
        bad &= sample_weight != 0
    if bad.any():
        i = int(bad.nonzero()[0])
        way_out = f"; {TWO_CLASSES['logits']}" if classes == 1 else ""
        raise IndexError(
            f"target {label[i].item()} of sample {i} is out of range: expected 0 <= target < {classes} (the number of "
            f"classes) or ignore_index = {ignore_index} ({int(bad.sum())} such of {bad.numel()}){way_out}"
        )


def raise_for_negative_targets(target: Tensor, sample_weight: Tensor | None) -> None:
    """A few entries below 0 are harmless (a target corrected for noise may have some); a class of negative weight is not counted."""
    T = target.to(torch.float64)
    if sample_weight is not None:
        used = sample_weight != 0
        T = torch.where(used.unsqueeze(-1), T * sample_weight.unsqueeze(-1), 0)
    sums = T.sum(0)
    bad = sums < -NEGATIVE_SHARE * T.abs().sum()
    if bad.any():
        c = int(bad.nonzero()[0])
        i = int(T[:, c].argmin())
        raise ValueError(
            f"soft targets must be probabilities, >= 0, got {target[i, c].item():g} for class {c} of sample {i}: the targets of "
            f"class {c} sum to less than 0 ({int(bad.sum())} such of {len(sums)} classes)"
        )
