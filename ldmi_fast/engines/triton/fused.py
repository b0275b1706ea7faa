"""fused: the loss and its gradient of a small problem in one program, one launch.

The device functions of the other ops, one after the other: sums over tiles of rows, elimination in registers, the scalars, and
the gradient of the tiles, whose second reading comes out of the cache. Nothing goes through memory in between.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .joint import tile_sums
from .launch import bits, on_device_of, plain_labels, row_alignment, wide_enough, wrap_triton
from .logdet_inverse import along_columns, combined, equilibrated, gauss_jordan, log_abs_det_and_sign
from .logits_grad import finish_gradient
from .rows import predictions, row_status, to_double


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
    STRICT: tl.constexpr,
    EPS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    B: tl.constexpr,
):
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
        False,
        CE,
        False,
        ALIGN,
        BLOCK_N,
        B,
        B,
    )
    r, c = tl.arange(0, B), tl.arange(0, B)
    R, n_safe, present, finite, threshold = equilibrated(S, n, classes, False, B)
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
    # V = R^{-T} / n has M[i, c] in row perm[c] and column column_of[i]. It is left in that order: the gradient of a row does not mind
    # in which order its columns come, so logits are read, and gradients written, through column_of.
    n_to = tl.sum(tl.where(r[:, None] == perm[None, :], n_safe[:, None], 0.0), axis=0)
    present_to = tl.sum(tl.where(r[:, None] == perm[None, :], present.to(tl.int32)[:, None], 0), axis=0) > 0
    cols = along_columns(column_of, B)
    present_from = tl.sum(tl.where(column_of[:, None] == c[None, :], along_columns(present.to(tl.int32), B)[None, :], 0), axis=1) > 0
    V = tl.where(present_from[:, None] & present_to[None, :] & (singular == 0), M / n_to[None, :], 0.0)
    V += tl.where(finite, 0.0, float("nan")).to(tl.float64)
    if not PROBS:  # relative to the class's own entry, as everywhere (see logits_grad)
        V -= tl.sum(tl.where(column_of[:, None] == perm[None, :], V, 0.0), axis=0)[None, :]
    largest = tl.max(tl.max(tl.abs(V), axis=1), axis=0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    rounded = tl.trans((V / largest).to(tl.float32))
    for first in range(0, total, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = rows < total
        used, label, w, bad = row_status(target, t_row, weight, w_row, rows, inside, classes, ignore_index, False, WEIGHTED)
        at = (rows * (x_row * ALIGN))[:, None] + (cols.to(tl.int64) * x_col)[None, :]
        where = used[:, None] & (cols < classes)[None, :]
        x = tl.load(logits + at, mask=where, other=0.0 if PROBS else -float("inf"))
        p = predictions(x, PROBS)
        # V[y_i]: exact, one term a sum
        picked = tl.dot((perm[None, :] == label[:, None]).to(tl.float32), rounded, input_precision="ieee")
        factor = (-w * scale * largest).to(tl.float32)
        own = cols[None, :] == label[:, None]
        g = finish_gradient(picked, factor, p, x, (w * ce_scale).to(tl.float32), own, p, used, bad, False, PROBS)
        tl.store(out + rows[:, None] * classes + cols[None, :], g, mask=inside[:, None] & (cols < classes)[None, :])


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
    """The loss [] and its gradient [N, C] of fp32 logits and hard labels, in one program."""
    rows, classes = logits.shape[0], int(logits.shape[1])
    target = plain_labels(target, classes)
    weight = logits if sample_weight is None else wide_enough(sample_weight)
    loss = logits.new_empty(())
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
            STRICT=absent == "strict",
            EPS=eps > 0,
            NORMALIZE=normalize,
            CE=cross_entropy_weight != 0,
            ALIGN=align,
            BLOCK_N=512 // block,
            B=block,
            num_warps=4,
            num_stages=1,  # as in joint
        )
    return loss, out
