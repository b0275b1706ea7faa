"""Between torch and the kernels: how a kernel is launched, on which device, and what its arguments must look like."""

from __future__ import annotations

import math
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.library
from torch import Tensor
from triton.runtime.jit import JITFunction


def wrap_triton(kernel: Any) -> Any:
    """``torch.library.wrap_triton``, which lets torch.compile see the launch; as it is where the interpreter runs the kernel."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def has_data(tensor: Tensor) -> bool:
    """Whether this is a tensor with data, and not one of the kinds that represent a tensor while a graph is traced."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of the tensor. Traced code has its own guard."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda and has_data(tensor) else nullcontext()


def plain_labels(target: Tensor, num_labels: int) -> Tensor:
    """Labels as int32 or int64; unsigned ones that do not fit there are out of range. (Narrow ones: see ``wide_enough``.)"""
    if target.dtype == torch.uint64:
        signed = target.view(torch.int64)
        return torch.where(signed < 0, num_labels, signed)
    return target if target.dtype in (torch.int32, torch.int64) else target.to(torch.int64)


def wide_enough(tensor: Tensor) -> Tensor:
    """Weights and soft targets as fp32 or fp64: an fp64 product takes no operand from narrower loads (see ``joint.tile_sums``)."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def bits(value: float) -> int:
    """A double as the integer of the same bits: Triton would round a float argument to fp32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def row_alignment(stride: int) -> int:
    """The power of two, at most 16, that divides the distance of rows: how wide a load may be is a multiple of it.

    Triton itself only notices multiples of 16, so that rows of 1000 or 14 would be read an element at a time.
    """
    return math.gcd(int(stride), 16)


def strides(tensor: Tensor) -> tuple[int, int]:
    """The strides of a matrix; (stride, 0) for a vector."""
    return (tensor.stride(0), tensor.stride(1)) if tensor.dim() == 2 else (tensor.stride(0), 0)
