"""logits_grad: w_i (scale p_i (<p_i, V[y_i]> - V[y_i]) + ce_scale (p_i - e_{y_i})), each row read once and written once.

The softmax is computed again from the row that is in registers anyway: it costs no traffic, and the rounding of a saved log-sum-exp
far from 0 does not reach the result (the argument ``lse`` is there for engines that need it). A row of V may be shifted by a constant
without changing the gradient of logits; it is taken relative to its own class's entry before it is rounded to fp32, which is exact
where a prediction is right and sure.

Out of range: a label or weight that is makes its own row NaN (in the loss V is then NaN, and with it every row that counts).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...precision import compute_dtype
from .. import composite
from . import plan, tuning
from .joint import sort_by_label
from .launch import on_device_of, plain_labels, row_alignment, strides, wrap_triton
from .rows import exponential, inverse, online, predictions, row_status


@triton.jit
def scaled_rows(V, PROBS: tl.constexpr, B_K: tl.constexpr, B_C: tl.constexpr, dtype: tl.constexpr):
    """V [B_K, B_C] fp64 in ``dtype``, relative to its diagonal (not for probabilities) and to its largest entry; and that entry."""
    k, c = tl.arange(0, B_K), tl.arange(0, B_C)
    if not PROBS:
        V = V - tl.sum(tl.where(k[:, None] == c[None, :], V, 0.0), axis=1)[:, None]
    largest = tl.max(tl.max(tl.abs(V), axis=1), axis=0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    return (V / largest).to(dtype), largest


@triton.jit
def finish_gradient(t, factor, p, x, gamma, onehot, A, used, bad, SOFT: tl.constexpr, PROBS: tl.constexpr):
    """From t factor = -w scale V[y_i] (or the mean of such rows, for soft targets) [BLOCK_N, BLOCK_C] to the gradient.

    factor [BLOCK_N]: applied to differences. As a product before, it could be fused with one side of them, and what is to be 0 would
    be its rounding. gamma: w ce_scale [BLOCK_N]; A: soft targets; onehot: where the label's column is.
    """
    ce = (gamma != 0)[:, None]
    if PROBS:
        g = t * factor[:, None]
        if SOFT:
            g -= tl.where(ce & (A != 0), gamma[:, None] * A / x, 0.0)
        else:
            g -= tl.where(ce & onehot, gamma[:, None] / x, 0.0)
    else:
        g = p * ((t - tl.sum(p * t, axis=1)[:, None]) * factor[:, None])
        if SOFT:
            g += tl.where(ce, gamma[:, None] * (p * tl.sum(A, axis=1)[:, None] - A), 0.0)
        else:
            g += tl.where(ce, gamma[:, None] * (p - tl.where(onehot, 1.0, 0.0)), 0.0)
    g = tl.where(used[:, None], g, 0.0)
    return tl.where(bad[:, None], float("nan"), g)


@triton.jit(do_not_specialize=["total", "ignore_index"])
def _rows_kernel(
    logits,
    x_row,
    x_col,
    target,
    t_row,
    t_col,
    weight,
    w_row,
    order,
    V,
    V_scale,
    scale,
    ce_scale,
    out,
    total,
    num_labels,
    classes,
    ignore_index,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PROBS: tl.constexpr,
    WIDE: tl.constexpr,
    TABLE: tl.constexpr,
    ORDERED: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Tiles of whole rows. TABLE: V is the table of ``_table_kernel``; ORDERED: rows in the order of ``order``."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    cols = tl.arange(0, BLOCK_C)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < total
    if ORDERED:
        rows = tl.load(order + rows, mask=inside, other=0).to(tl.int64)
    used, label, w, bad = row_status(target, t_row, weight, w_row, rows, inside, num_labels, ignore_index, SOFT, WEIGHTED)
    where = used[:, None] & (cols < classes)[None, :]
    at = (rows * (x_row * ALIGN))[:, None] + (cols.to(tl.int64) * x_col)[None, :]
    x = tl.load(logits + at, mask=where, other=0.0 if PROBS else -float("inf")).to(dtype)
    p = predictions(x, PROBS)
    alpha = -w * tl.load(scale)
    gamma = (w * tl.load(ce_scale)).to(dtype)
    A = p
    column = label % classes
    if SOFT:
        ks = tl.arange(0, BLOCK_K)
        V_where = (ks < num_labels)[:, None] & (cols < classes)[None, :]
        rounded, largest = scaled_rows(
            tl.load(V + ks[:, None] * classes + cols[None, :], mask=V_where, other=0.0), PROBS, BLOCK_K, BLOCK_C, dtype
        )
        t_at = (rows * t_row)[:, None] + (ks.to(tl.int64) * t_col)[None, :]
        A = tl.load(target + t_at, mask=used[:, None] & (ks < num_labels)[None, :], other=0.0).to(dtype)
        t = tl.dot(A, rounded, input_precision="ieee", out_dtype=dtype)
        factor = (alpha * largest).to(dtype)
    else:
        V_row = label.to(tl.int64) * classes
        t = tl.load(V + V_row[:, None] + cols[None, :], mask=where, other=0.0)
        if TABLE:
            factor = (alpha * tl.load(V_scale + label, mask=used, other=0.0)).to(dtype)
        else:
            if not PROBS:
                t = t - tl.load(V + V_row + column, mask=used, other=0.0)[:, None]
            if WIDE:
                factor = alpha
            else:  # V alone may be too large
                t = (t * alpha[:, None]).to(dtype)
                factor = tl.full([BLOCK_N], 1.0, dtype)
    g = finish_gradient(t, factor, p, x, gamma, cols[None, :] == column[:, None], A, used, bad, SOFT, PROBS)
    to = (rows * (classes // OUT_ALIGN * OUT_ALIGN))[:, None] + cols[None, :]
    tl.store(out + to, g.to(out.dtype.element_ty), mask=inside[:, None] & (cols < classes)[None, :])


@triton.jit(do_not_specialize=["total", "ignore_index"])
def _long_kernel(
    logits,
    x_row,
    x_col,
    target,
    t_row,
    weight,
    w_row,
    order,
    V,
    V_scale,
    scale,
    ce_scale,
    out,
    total,
    num_labels,
    classes,
    ignore_index,
    WEIGHTED: tl.constexpr,
    PROBS: tl.constexpr,
    WIDE: tl.constexpr,
    ORDERED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row a program, block by block: first its sums (online), then the gradient; the second reading comes out of a cache."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    if ORDERED:
        rows = tl.load(order + rows).to(tl.int64)
    used, label, w, bad = row_status(target, t_row, weight, w_row, rows, rows >= 0, num_labels, ignore_index, False, WEIGHTED)
    # one row: scalars from here on
    row = tl.sum(rows, axis=0)
    count = tl.sum(used.to(tl.int32), axis=0) > 0
    wrong = tl.sum(bad.to(tl.int32), axis=0) > 0
    y = tl.sum(label, axis=0).to(tl.int64)
    w_y = tl.sum(w, axis=0)
    column = y % classes
    alpha = (-w_y * tl.load(scale) * tl.load(V_scale + y)).to(dtype)
    gamma = (w_y * tl.load(ce_scale)).to(dtype)
    m = tl.full([], -float("inf"), dtype)
    s = tl.zeros([], dtype)
    d = tl.zeros([], dtype)
    if not PROBS:
        for first in range(0, classes, BLOCK_C):
            cols = first + tl.arange(0, BLOCK_C)
            where = (cols < classes) & count
            x = tl.load(logits + row * (x_row * ALIGN) + cols.to(tl.int64) * x_col, mask=where, other=-float("inf")).to(dtype)
            t = tl.load(V + y * classes + cols, mask=where, other=0.0)
            m, s, d = online(m, s, d, x, t)
    for first in range(0, classes, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        where = (cols < classes) & count
        x = tl.load(logits + row * (x_row * ALIGN) + cols.to(tl.int64) * x_col, mask=where, other=0.0).to(dtype)
        t = tl.load(V + y * classes + cols, mask=where, other=0.0)
        own = cols == column
        if PROBS:
            g = alpha * t - tl.where(gamma != 0, tl.where(own, gamma / x, 0.0), 0.0)
        else:
            p = exponential(x - m) * inverse(s)
            g = p * (alpha * (t - d * inverse(s)))
            g += tl.where(gamma != 0, gamma * (p - tl.where(own, 1.0, 0.0)), 0.0)
        g = tl.where(wrong, float("nan"), tl.where(count, g, 0.0))
        tl.store(out + row * classes + cols, g.to(out.dtype.element_ty), mask=cols < classes)


@triton.jit
def _table_kernel(V, table, V_scale, classes, PROBS: tl.constexpr, BLOCK_C: tl.constexpr):
    """A row of V relative to its own class's entry (not for probabilities) and to its largest entry, in the table's dtype."""
    label = tl.program_id(0).to(tl.int64)
    V += label * classes
    shift = tl.zeros([], tl.float64)
    if not PROBS:
        shift = tl.load(V + label % classes)
    largest = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, classes, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        largest = tl.maximum(largest, tl.abs(tl.load(V + cols, mask=cols < classes, other=shift) - shift))
    top = tl.max(largest, axis=0)
    top = tl.where(top > 0.0, top, 1.0)
    for first in range(0, classes, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        v = (tl.load(V + cols, mask=cols < classes, other=0.0) - shift) / top
        tl.store(table + label * classes + cols, v.to(table.dtype.element_ty), mask=cols < classes)
    tl.store(V_scale + label, top)


def gradient(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    lse: Tensor,
    V: Tensor,
    scale: Tensor,
    ce_scale: Tensor,
    ignore_index: int,
    input: str,
) -> Tensor:
    """What ``composite.logits_grad`` defines."""
    rows, classes, num_labels = logits.shape[0], int(logits.shape[1]), int(V.shape[0])
    soft, probs, wide = target.is_floating_point(), input == "probs", logits.dtype == torch.float64
    how = plan.logits_grad(rows, classes, num_labels, soft, logits.dtype.itemsize)
    out = logits.new_empty(logits.shape)
    if rows == 0:
        return out
    if soft and wide and target.dtype.itemsize == 2:
        target = target.float()  # triton 3.6 cannot compile a product in fp64 with a factor that was loaded in 16 bits
    if how.regime == "soft":
        return _by_blocks(logits, target, sample_weight, lse, V, scale, ce_scale, ignore_index, input)
    V = V.to(torch.float64).contiguous()
    target = target if soft else plain_labels(target, num_labels)
    weight = logits if sample_weight is None else sample_weight
    align = row_alignment(logits.stride(0))
    order, table, V_scale = V, V, V
    longest = plan.row_classes(logits.dtype.itemsize)
    block_c = min(plan.power_of_two(classes), longest)
    with on_device_of(logits):
        if how.table:
            table = torch.empty_like(V, dtype=compute_dtype(logits.dtype))
            V_scale = V.new_empty(num_labels)
            wrap_triton(_table_kernel)[(num_labels,)](V, table, V_scale, classes, PROBS=probs, BLOCK_C=min(block_c, 1024))
        if how.ordered:
            order = sort_by_label(target, sample_weight, num_labels, ignore_index)[2]
        if how.regime == "long":
            wrap_triton(_long_kernel)[(rows,)](
                logits,
                logits.stride(0) // align,
                logits.stride(1),
                target,
                target.stride(0),
                weight,
                weight.stride(0),
                order,
                table,
                V_scale,
                scale,
                ce_scale,
                out,
                rows,
                num_labels,
                classes,
                ignore_index,
                WEIGHTED=sample_weight is not None,
                PROBS=probs,
                WIDE=wide,
                ORDERED=how.ordered,
                ALIGN=align,
                BLOCK_C=block_c,
                num_warps=8,
            )
            return out
        block_k = plan.tile_width(num_labels) if soft else 16
        if soft:
            block_c = plan.tile_width(classes)

        def run(config: tuning.Config) -> None:
            block_n = max(16 if soft else 1, config.rows(max(block_c, block_k if soft else 1)))
            wrap_triton(_rows_kernel)[(plan.ceil_div(rows, block_n),)](
                logits,
                logits.stride(0) // align,
                logits.stride(1),
                target,
                *strides(target),
                weight,
                weight.stride(0),
                order,
                table,
                V_scale,
                scale,
                ce_scale,
                out,
                rows,
                num_labels,
                classes,
                ignore_index,
                SOFT=soft,
                WEIGHTED=sample_weight is not None,
                PROBS=probs,
                WIDE=wide,
                TABLE=how.table,
                ORDERED=how.ordered,
                ALIGN=align,
                OUT_ALIGN=row_alignment(classes),
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                BLOCK_C=block_c,
                num_warps=config.warps if block_c < longest else 8,
            )

        regime = "grad-soft" if soft else "grad-narrow" if block_c <= plan.TILE_CLASSES else "grad-broad"
        run(tuning.choose(regime, logits, run))
    return out


def _by_blocks(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    lse: Tensor,
    V: Tensor,
    scale: Tensor,
    ce_scale: Tensor,
    ignore_index: int,
    input: str,
) -> Tensor:
    out = logits.new_empty(logits.shape)
    step = plan.soft_rows(int(logits.shape[1]), int(V.shape[0]))
    for start in range(0, logits.shape[0], step):
        block = slice(start, start + step)
        weight = None if sample_weight is None else sample_weight[block]
        args = (logits[block], target[block], weight, lse[block], V, scale, ce_scale, ignore_index, input)
        out[block] = composite.logits_grad(*args)
    return out
