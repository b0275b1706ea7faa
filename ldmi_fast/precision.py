"""In which precision things are computed, and what is too small to be told from zero."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

#: Machine epsilon: the distance from 1 to the next larger number. Rounding to nearest is off by half of it.
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


def singular_threshold(size: int, norm: Tensor) -> Tensor:
    """The largest |pivot| with which R counts as singular: size * epsilon * ||R||_inf, epsilon that of the dtype of ``norm``.

    The rounding of an elimination of C rows moves a pivot by about that much, so a smaller one may stem from a pivot of zero.

    Args:
        size: the number of classes, C.
        norm: [...], the largest sum of magnitudes in a row of R.
    """
    return size * EPSILON[norm.dtype] * norm


def accumulator(device: torch.device) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the softmax and of the loss: fp64 for fp64 logits, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Keeps autocast from turning the matrix products into half precision."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
