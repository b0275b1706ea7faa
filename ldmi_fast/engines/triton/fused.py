"""fused: the loss and its gradient of a small problem in one program, one launch.

The same functions as in the other rooms, one after the other: sums over tiles of rows, elimination in registers, the scalars, and
the gradient of the tiles, whose second reading comes out of the cache. Nothing goes through memory in between.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import composite
from . import plan
from .joint import tile_sums
from .launch import bits, on_device_of, plain_labels, row_alignment, wrap_triton
from .logdet_inverse import combined, equilibrated, gauss_jordan, log_abs_det_and_sign
from .logits_grad import finished, scaled_rows
from .rows import facts, softmax, to_double


@triton.jit(do_not_specialize=["total", "ignore_index", "log_eps", "cross_entropy_weight"])
def _fused_kernel(
    logits,
    x_row,
    x_col,
    target,
    t_row,
    weight,
    w_row,
    loss,
    out,
    total,
    classes,
    ignore_index,
    log_eps,
    cross_entropy_weight,
    WEIGHTED: tl.constexpr,
    PROBS: tl.constexpr,
    WIDE: tl.constexpr,
    STRICT: tl.constexpr,
    EPS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    B: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    S, n, ce = tile_sums(
        logits,
        x_row,
        x_col,
        target,
        t_row,
        0,
        weight,
        w_row,
        loss,
        0,
        total,
        classes,
        classes,
        ignore_index,
        False,
        WEIGHTED,
        PROBS,
        WIDE,
        WIDE,
        CE,
        False,
        ALIGN,
        BLOCK_N,
        B,
        B,
    )
    r, c = tl.arange(0, B), tl.arange(0, B)
    R, n_safe, present, finite, threshold = equilibrated(S, n, classes, 2.0**-52, B)
    kept = tl.sum(present.to(tl.int32), axis=0)
    M, perm, column_of, pivots, small = gauss_jordan(R, classes, threshold, B)
    singular = small > 0
    if STRICT:
        singular = singular | ((kept < classes) & (kept > 0))
        kept = tl.where(kept == 0, 0, classes)
    singular = singular & finite
    value, _ = log_abs_det_and_sign(n_safe, present, pivots, column_of, singular, finite, classes, B)
    result, scale, ce_scale = combined(
        value, kept, tl.sum(n, axis=0), ce, to_double(log_eps), to_double(cross_entropy_weight), EPS, NORMALIZE, CE
    )
    tl.store(loss, result)
    # R^{-T} in its natural order: products with the two permutations, which are exact
    rows_to = (r[:, None] == perm[None, :]).to(tl.float64)
    columns_to = (column_of[:, None] == c[None, :]).to(tl.float64)
    V = tl.dot(tl.dot(rows_to, tl.trans(M), out_dtype=tl.float64), columns_to, out_dtype=tl.float64) / n_safe[:, None]
    present_c = tl.sum(tl.where(r[:, None] == c[None, :], present.to(tl.int32)[:, None], 0), axis=0) > 0
    V = tl.where(present[:, None] & present_c[None, :] & (singular == 0), V, 0.0) + tl.where(finite, 0.0, float("nan")).to(tl.float64)
    rounded, largest = scaled_rows(V, PROBS, B, B, dtype)
    for first in range(0, total, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = rows < total
        used, label, w, bad = facts(target, t_row, weight, w_row, rows, inside, classes, ignore_index, False, WEIGHTED)
        at = (rows * (x_row * ALIGN))[:, None] + (c.to(tl.int64) * x_col)[None, :]
        where = used[:, None] & (c < classes)[None, :]
        x = tl.load(logits + at, mask=where, other=0.0 if PROBS else -float("inf")).to(dtype)
        p = x
        if not PROBS:
            p, _, _, _ = softmax(x, False)
        onehot = c[None, :] == label[:, None]
        picked = tl.dot(onehot.to(dtype), rounded, input_precision="ieee", out_dtype=dtype)  # V[y_i]: exact, one term a sum
        t = picked * (-w * scale * largest).to(dtype)[:, None]
        g = finished(t, p, x, (w * ce_scale).to(dtype), onehot, p, used, bad, False, PROBS)
        tl.store(out + rows[:, None] * classes + c[None, :], g.to(out.dtype.element_ty), mask=inside[:, None] & (c < classes)[None, :])


def loss_and_gradient(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    ignore_index: int,
    absent: str,
    eps: float,
    normalize: bool,
    cross_entropy_weight: float,
    input: str,
) -> tuple[Tensor, Tensor]:
    """The loss [] and its gradient [N, C] of hard labels, in one program."""
    rows, classes = logits.shape[0], int(logits.shape[1])
    target = plain_labels(target, classes)
    weight = logits if sample_weight is None else sample_weight
    loss = logits.new_empty((), dtype=composite.compute_dtype(logits.dtype))
    out = logits.new_empty(logits.shape)
    align = row_alignment(logits.stride(0))
    block = plan.tile_width(classes)
    with on_device_of(logits):
        wrap_triton(_fused_kernel)[(1,)](
            logits,
            logits.stride(0) // align,
            logits.stride(1),
            target,
            target.stride(0),
            weight,
            weight.stride(0),
            loss,
            out,
            rows,
            classes,
            ignore_index,
            bits(math.log(eps)) if eps > 0 else 0,
            bits(cross_entropy_weight),
            WEIGHTED=sample_weight is not None,
            PROBS=input == "probs",
            WIDE=logits.dtype == torch.float64,
            STRICT=absent == "strict",
            EPS=eps > 0,
            NORMALIZE=normalize,
            CE=cross_entropy_weight != 0,
            ALIGN=align,
            BLOCK_N=2048 // block,
            B=block,
            num_warps=4,
        )
    return loss, out
