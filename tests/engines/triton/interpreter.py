"""A pytest plugin for runs under TRITON_INTERPRET=1: patches with which Triton's interpreter runs here, in reasonable time."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patched(tensor: Any, *rest: Any) -> None:
    """Triton 3.6 makes a loop bound an int by ``int(array)``, which numpy 2.5 refuses for an array of one element."""
    _patch_lang_tensor(tensor, *rest)
    if rest:
        rest[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
    else:
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())


interpreter._patch_lang_tensor = _patched

# The interpreter lists the members of triton.language again at every call of one jit function by another: a third of its time.
interpreter.inspect = types.SimpleNamespace(**vars(inspect))
interpreter.inspect.getmembers = functools.cache(inspect.getmembers)

_convert_float = interpreter._convert_float


def _rounded(data: Any, source: Any, to: Any, mode: Any) -> Any:
    """The interpreter truncates fp32 to bf16, where compiled kernels round to nearest."""
    if source == tl.float32 and to == tl.bfloat16:
        half = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return half.view(torch.int16).numpy().view(np.uint16)
    return _convert_float(data, source, to, mode)


interpreter._convert_float = _rounded

# The interpreter warns of every inf - inf, which kernels compute for rows of NaN and infinities.
np.seterr(all="ignore")
