"""joint: S = sum_i w_i e_{y_i} p_i^T [K, C], n [K], the rows' log-sum-exp [N], and the weighted sum of their cross entropies.

Two stages: programs leave partial sums, a second kernel adds them in the order of the programs. No atomics, so the same bits every
time. Which regime runs is for ``plan`` to say:

    tile    K, C <= 64. S = A^T (w P) of tiles of rows, A one-hot or soft targets, S in registers
    label   rows are visited in the order of their labels, so that one row of S at a time is summed, in fp64 registers
    soft    soft targets of many classes: the composite engine, a block of rows at a time

Products and sums are in fp64 everywhere. ``tile`` uses an fp64 matrix product, which data-centre GPUs since sm_80 and gfx90a have in
their tensor cores: a product of two or three fp32 numbers is then exact or off by 2^-53, and two classes with equal predictions
give a matrix that is singular to 2^-52, as the contract has it. An fp32 product, even one rounded to nearest, would leave 2^-24 there:
a finite loss of a collapsed model, and a huge gradient in a random direction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...precision import compute_dtype
from .. import composite
from . import plan, tuning
from .launch import on_device_of, plain_labels, row_alignment, strides, wide_enough, wrap_triton
from .rows import exponential, hard_cross_entropy, inverse, online, row_status, soft_cross_entropy, softmax


@triton.jit
def tile_sums(
    logits,
    x_row,
    x_col,
    target,
    t_row,
    t_col,
    weight,
    w_row,
    lse,
    start,
    stop,
    num_labels,
    classes,
    ignore_index,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PROBS: tl.constexpr,
    WIDE: tl.constexpr,
    CE: tl.constexpr,
    LSE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S [BLOCK_K, BLOCK_C], n [BLOCK_K] and the cross entropy of the rows start..stop, in fp64; NaN if one is out of range."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    cols, ks = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    S = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    n = tl.zeros([BLOCK_K, 16], tl.float64)  # in its first column: a product, too
    ce = tl.zeros([BLOCK_N], tl.float64)
    wrong = tl.zeros([BLOCK_N], tl.int32)
    # A tile is loaded one round ahead. For logits in half precision that is no option: Triton (seen in 3.6 and 3.8) lays out the
    # operand of an fp64 product for the narrowest load that it is computed from, and then fails; it does not look
    # beyond the loop's variables.
    column_at = (cols.to(tl.int64) * x_col)[None, :]
    inside_columns = (cols < classes)[None, :]
    nothing: tl.constexpr = 0.0 if PROBS else -float("inf")
    rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
    ahead = tl.load(
        logits + (rows * (x_row * ALIGN))[:, None] + column_at, mask=(rows < stop)[:, None] & inside_columns, other=nothing
    )
    for first in range(start, stop, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
        used, label, w, bad = row_status(target, t_row, weight, w_row, rows, rows < stop, num_labels, ignore_index, SOFT, WEIGHTED)
        wrong = tl.maximum(wrong, bad.to(tl.int32))
        where = used[:, None] & inside_columns
        x = ahead.to(dtype)
        later = rows + BLOCK_N
        later_at = (later * (x_row * ALIGN))[:, None] + column_at
        ahead = tl.load(logits + later_at, mask=(later < stop)[:, None] & inside_columns, other=nothing)
        p, shifted, m, s = softmax(x, PROBS)
        p = tl.where(where, p, 0.0)
        q = p.to(tl.float64)
        if WEIGHTED:
            q = q * w[:, None]
        if SOFT:
            t_at = (rows * t_row)[:, None] + (ks.to(tl.int64) * t_col)[None, :]
            A = tl.load(target + t_at, mask=used[:, None] & (ks < num_labels)[None, :], other=0.0).to(tl.float64)
        else:
            A = ((label[:, None] == ks[None, :]) & used[:, None]).to(tl.float64)
        S = tl.dot(tl.trans(A), q, S, input_precision="ieee", out_dtype=tl.float64)
        first_column = (tl.arange(0, 16) == 0).to(tl.float64)[None, :]
        n = tl.dot(tl.trans(A), w[:, None] * first_column, n, input_precision="ieee", out_dtype=tl.float64)
        if LSE:
            tl.store(lse + rows, tl.where(used, 0.0 if PROBS else m + tl.log(s), 0.0).to(dtype), mask=rows < stop)
        if CE:
            if SOFT:
                each = soft_cross_entropy(p, shifted, s, A.to(dtype), PROBS)
            else:
                own_at = rows * (x_row * ALIGN) + (label % classes).to(tl.int64) * x_col
                own = tl.load(logits + own_at, mask=used, other=0.0).to(dtype)  # was read a moment ago
                each = hard_cross_entropy(own, m, s, PROBS)
            ce += tl.where(used, w * each.to(tl.float64), 0.0)
    poison = tl.where(tl.max(wrong, axis=0) > 0, float("nan"), 0.0).to(tl.float64)
    return S + poison, tl.sum(n, axis=1) + poison, tl.sum(ce, axis=0) + poison


@triton.jit(do_not_specialize=["total", "per_program", "ignore_index"])
def _tile_kernel(
    logits,
    x_row,
    x_col,
    target,
    t_row,
    t_col,
    weight,
    w_row,
    lse,
    partial,
    total,
    per_program,
    num_labels,
    classes,
    ignore_index,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PROBS: tl.constexpr,
    WIDE: tl.constexpr,
    CE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[program] = S [K, C], n [K], ce of its rows, one after the other."""
    program = tl.program_id(0).to(tl.int64)
    start = program * per_program
    stop = tl.minimum(start + per_program, total)
    S, n, ce = tile_sums(
        logits,
        x_row,
        x_col,
        target,
        t_row,
        t_col,
        weight,
        w_row,
        lse,
        start,
        stop,
        num_labels,
        classes,
        ignore_index,
        SOFT,
        WEIGHTED,
        PROBS,
        WIDE,
        CE,
        True,
        ALIGN,
        BLOCK_N,
        BLOCK_K,
        BLOCK_C,
    )
    cols, ks = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    entries = num_labels * classes
    base = partial + program * (entries + num_labels + 1)
    tl.store(base + ks[:, None] * classes + cols[None, :], S, mask=(ks < num_labels)[:, None] & (cols < classes)[None, :])
    tl.store(base + entries + ks, n, mask=ks < num_labels)
    tl.store(base + entries + num_labels, ce)


@triton.jit(do_not_specialize=["programs"])
def _add_kernel(partial, S, n, ce, programs, num_labels, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """S, n, ce = the sum of the partial sums, in the order of the programs."""
    entries = num_labels * classes
    size = entries + num_labels + 1
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float64)
    for first in range(0, programs, ROWS):
        p = first + tl.arange(0, ROWS)
        where = (p < programs)[:, None] & (at < size)[None, :]
        acc += tl.sum(tl.load(partial + p.to(tl.int64)[:, None] * size + at[None, :], mask=where, other=0.0), axis=0)
    tl.store(S + at, acc, mask=at < entries)
    tl.store(n + at - entries, acc, mask=(at >= entries) & (at < size - 1))
    tl.store(ce + at * 0, acc, mask=at == size - 1)


@triton.jit(do_not_specialize=["total", "ignore_index"])
def _keys_kernel(
    target,
    t_row,
    weight,
    w_row,
    keys,
    total,
    num_labels,
    ignore_index,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """keys[i] = the label; K for rows that do not count, K + 1 for rows out of range: sorted, those come last."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used, label, _, bad = row_status(target, t_row, weight, w_row, rows, rows < total, num_labels, ignore_index, False, WEIGHTED)
    key = tl.where(bad, num_labels + 1, tl.where(used, label, num_labels))
    tl.store(keys + rows, key.to(keys.dtype.element_ty), mask=rows < total)


@triton.jit(do_not_specialize=["total"])
def _stats_kernel(
    logits,
    x_row,
    x_col,
    keys,
    maxima,
    sums,
    total,
    num_labels,
    classes,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Max and sum of exponentials of the rows that count, block by block; one program per row."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    if tl.load(keys + row).to(tl.int64) < num_labels:
        m = tl.full([], -float("inf"), dtype)
        s = tl.zeros([], dtype)
        for first in range(0, classes, BLOCK_C):
            cols = first + tl.arange(0, BLOCK_C)
            at = row * (x_row * ALIGN) + cols.to(tl.int64) * x_col
            x = tl.load(logits + at, mask=cols < classes, other=-float("inf")).to(dtype)
            m, s, _ = online(m, s, s * 0, x, x * 0)
        tl.store(maxima + row, m)
        tl.store(sums + row, s)


@triton.jit(do_not_specialize=["total", "per_program"])
def _label_kernel(
    logits,
    x_row,
    x_col,
    keys,
    order,
    weight,
    w_row,
    maxima,
    sums,
    lse,
    S,
    n,
    side,
    total,
    per_program,
    num_labels,
    classes,
    WEIGHTED: tl.constexpr,
    PROBS: tl.constexpr,
    WIDE: tl.constexpr,
    CE: tl.constexpr,
    LONG: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The rows start..stop of the sorted order, in runs of one label.

    A run that begins here is summed into S[label], n[label]; one that began in an earlier program into side[program], which holds
    C sums, their weight, and the cross entropy of the program. Long rows: the second axis of the grid goes over blocks of columns.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    program = tl.program_id(0).to(tl.int64)
    first_block = tl.program_id(1) == 0
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lanes = tl.arange(0, BLOCK_N)
    position = program * per_program
    stop = tl.minimum(position + per_program, total)
    mine = side + program * (classes + 2)
    ce = tl.zeros([BLOCK_N], tl.float64)
    label = tl.load(keys + position, mask=position < stop, other=num_labels).to(tl.int64)
    following = label
    before = tl.load(keys + position - 1, mask=(position > 0) & (position < stop), other=-1).to(tl.int64)
    while label < num_labels:
        acc = tl.zeros([BLOCK_C], tl.float64)
        acc_n = tl.zeros([BLOCK_N], tl.float64)
        column = label % classes
        more = label == label
        while more:
            at = position + lanes
            same = (at < stop) & (tl.load(keys + at, mask=at < stop, other=-1).to(tl.int64) == label)
            rows = tl.load(order + at, mask=same, other=0).to(tl.int64)
            if WEIGHTED:
                w = tl.load(weight + rows * w_row, mask=same, other=0.0).to(tl.float64)
            else:
                w = same.to(tl.float64)
            where = same[:, None] & (cols < classes)[None, :]
            x_at = (rows * (x_row * ALIGN))[:, None] + (cols.to(tl.int64) * x_col)[None, :]
            x = tl.load(logits + x_at, mask=where, other=0.0 if PROBS else -float("inf")).to(dtype)
            own = tl.load(logits + rows * (x_row * ALIGN) + column * x_col, mask=same, other=0.0).to(dtype)
            if LONG:
                if PROBS:
                    m = own * 0
                    s = m + 1
                    p = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
                else:
                    m = tl.load(maxima + rows, mask=same, other=0.0)
                    s = tl.load(sums + rows, mask=same, other=1.0)
                    p = exponential(x - m[:, None]) * inverse(s)[:, None]
            else:
                p, _, m, s = softmax(x, PROBS)
            acc += tl.sum(tl.where(where, p.to(tl.float64) * w[:, None], 0.0), axis=0)
            acc_n += w
            if first_block:
                tl.store(lse + rows, 0.0 * m if PROBS else m + tl.log(s), mask=same)
            if CE:
                each = hard_cross_entropy(own, m, s, PROBS)
                ce += tl.where(same, w * each.to(tl.float64), 0.0)
            position += tl.sum(same.to(tl.int32), axis=0)
            following = tl.load(keys + position, mask=position < stop, other=num_labels).to(tl.int64)
            more = following == label
        to = mine
        if label != before:
            to = S + label * classes
        tl.store(to + cols, acc, mask=cols < classes)
        if first_block:
            to_n = mine + classes
            if label != before:
                to_n = n + label
            tl.store(to_n, tl.sum(acc_n, axis=0))
        label = following
        before = before * 0 - 1
    if first_block:
        tl.store(mine + classes + 1, tl.sum(ce, axis=0))


@triton.jit(do_not_specialize=["total", "per_program", "programs"])
def _add_sides_kernel(
    keys, begins, S, n, ce, side, total, per_program, programs, num_labels, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """S[label], n[label] += the side rows of the programs into which the label's run went on; 0 for a label without rows."""
    label = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, ROWS)
    begin, end = tl.load(begins + label), tl.load(begins + label + 1)
    poison = tl.where(tl.load(keys + total - 1).to(tl.int64) > num_labels, float("nan"), 0.0).to(tl.float64)
    here = (cols < classes) & (begin < end)
    acc = tl.load(S + label * classes + cols, mask=here, other=0.0)
    acc_n = tl.load(n + label, mask=begin < end, other=0.0)
    # an absent label has begin == end: no programs
    for first in range(begin // per_program + 1, (end - 1) // per_program + 1, ROWS):
        p = first + lanes
        where = (p <= (end - 1) // per_program) & (begin < end)
        row = side + p * (classes + 2)
        acc += tl.sum(tl.load(row[:, None] + cols[None, :], mask=where[:, None] & (cols < classes)[None, :], other=0.0), axis=0)
        acc_n += tl.sum(tl.load(row + classes, mask=where, other=0.0), axis=0)
    tl.store(S + label * classes + cols, acc + poison, mask=cols < classes)
    if tl.program_id(1) == 0:
        tl.store(n + label, acc_n + poison)
        if label == 0:
            sums = tl.zeros([ROWS], tl.float64)
            for program in range(0, programs, ROWS):
                q = (program + lanes).to(tl.int64)
                sums += tl.load(side + q * (classes + 2) + classes + 1, mask=q < programs, other=0.0)
            tl.store(ce, tl.sum(sums, axis=0) + poison)


def sort_by_label(target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [N] (the label; K: does not count; K + 1: out of range), the same sorted, and the rows in that order [N] int64.

    torch.sort is a stable radix sort on a GPU: the same order every time, no synchronisation, allowed in graph capture.
    """
    rows = target.shape[0]
    target = plain_labels(target, num_labels)
    keys = torch.empty(rows, dtype=torch.int16 if plan.key_bytes(num_labels) == 2 else torch.int32, device=target.device)
    weight = target if sample_weight is None else sample_weight
    block = 1024
    with on_device_of(target):
        wrap_triton(_keys_kernel)[(plan.ceil_div(rows, block),)](
            target,
            target.stride(0),
            weight,
            weight.stride(0),
            keys,
            rows,
            num_labels,
            ignore_index,
            WEIGHTED=sample_weight is not None,
            BLOCK=block,
        )
    return keys, *torch.sort(keys, stable=True)


def joint_sums(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    num_labels: int,
    ignore_index: int,
    input: str,
    need_ce: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``composite.joint`` defines; ce is 0 without ``need_ce``."""
    rows, classes, num_labels = logits.shape[0], int(logits.shape[1]), int(num_labels)
    soft = target.is_floating_point()
    width = max(plan.tile_width(classes), plan.tile_width(num_labels))
    if width <= plan.TILE_CLASSES:
        return _joint_by_tiles(logits, target, sample_weight, num_labels, ignore_index, input, need_ce, f"joint-tile-{width}")
    if soft:
        return _joint_by_blocks(logits, target, sample_weight, num_labels, ignore_index, input, need_ce)
    if rows == 0:
        sums = logits.new_zeros((num_labels, classes), dtype=torch.float64)
        dtype = compute_dtype(logits.dtype)
        return sums, sums.new_zeros(num_labels), logits.new_zeros(0, dtype=dtype), sums.new_zeros(())
    return _joint_by_label(logits, target, sample_weight, num_labels, ignore_index, input, need_ce)


def _joint_by_tiles(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    num_labels: int,
    ignore_index: int,
    input: str,
    need_ce: bool,
    regime: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, classes = logits.shape[0], int(logits.shape[1])
    soft = target.is_floating_point()
    target = wide_enough(target) if soft else plain_labels(target, num_labels)
    sample_weight = None if sample_weight is None else wide_enough(sample_weight)
    block_k, block_c = plan.tile_width(num_labels), plan.tile_width(classes)
    if soft:
        block_k = block_c = max(block_k, block_c)
    S = logits.new_empty((num_labels, classes), dtype=torch.float64)
    n, ce = S.new_empty(num_labels), S.new_empty(())
    lse = logits.new_empty(rows, dtype=compute_dtype(logits.dtype))
    weight = logits if sample_weight is None else sample_weight
    align = row_alignment(logits.stride(0))
    size = num_labels * classes + num_labels + 1

    def run(config: tuning.Config) -> None:
        block_n = max(16, config.rows(max(block_k, block_c)))
        how = plan.joint(rows, classes, num_labels, soft, logits.dtype.itemsize, block_n)
        partial = S.new_empty((how.programs, size))
        wide = logits.dtype == torch.float64
        with on_device_of(logits):
            wrap_triton(_tile_kernel)[(how.programs,)](
                logits,
                logits.stride(0) // align,
                logits.stride(1),
                target,
                *strides(target),
                weight,
                weight.stride(0),
                lse,
                partial,
                rows,
                how.rows,
                num_labels,
                classes,
                ignore_index,
                SOFT=soft,
                WEIGHTED=sample_weight is not None,
                PROBS=input == "probs",
                WIDE=wide,
                CE=need_ce,
                ALIGN=align,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                BLOCK_C=block_c,
                num_warps=config.warps,
                num_stages=1,  # the kernel loads ahead itself; Triton's own pipeline on top of it spills registers
            )
            block = 128
            wrap_triton(_add_kernel)[(plan.ceil_div(size, block),)](
                partial, S, n, ce, how.programs, num_labels, classes, ROWS=16, BLOCK=block
            )

    run(tuning.choose(regime, logits, run))
    return S, n, lse, ce


def _joint_by_label(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    num_labels: int,
    ignore_index: int,
    input: str,
    need_ce: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, classes = logits.shape[0], int(logits.shape[1])
    probs, wide = input == "probs", logits.dtype == torch.float64
    S = logits.new_empty((num_labels, classes), dtype=torch.float64)
    n, ce = S.new_empty(num_labels), S.new_empty(())
    lse = logits.new_zeros(rows, dtype=compute_dtype(logits.dtype))
    how = plan.joint(rows, classes, num_labels, False, logits.dtype.itemsize, 1)
    unsorted, keys, order = sort_by_label(target, sample_weight, num_labels, ignore_index)
    weight = logits if sample_weight is None else sample_weight
    align = row_alignment(logits.stride(0))
    at = (logits, logits.stride(0) // align, logits.stride(1))
    maxima = sums = lse
    longest = plan.row_classes(logits.dtype.itemsize)
    block_c = min(plan.power_of_two(classes), longest)
    with on_device_of(logits):
        if how.long and not probs:
            maxima, sums = torch.empty_like(lse), torch.empty_like(lse)
            wrap_triton(_stats_kernel)[(rows,)](
                *at, unsorted, maxima, sums, rows, num_labels, classes, WIDE=wide, ALIGN=align, BLOCK_C=block_c, num_warps=8
            )
        side = S.new_empty((how.programs, classes + 2))

        def run(config: tuning.Config) -> None:
            wrap_triton(_label_kernel)[(how.programs, plan.ceil_div(classes, block_c))](
                *at,
                keys,
                order,
                weight,
                weight.stride(0),
                maxima,
                sums,
                lse,
                S,
                n,
                side,
                rows,
                how.rows,
                num_labels,
                classes,
                WEIGHTED=sample_weight is not None,
                PROBS=probs,
                WIDE=wide,
                CE=need_ce,
                LONG=how.long,
                ALIGN=align,
                BLOCK_N=config.rows(block_c),
                BLOCK_C=block_c,
                num_warps=config.warps if block_c < longest else 8,
            )

        run(tuning.choose("joint-label", logits, run))
        # where the rows of each label begin in the sorted order
        begins = torch.searchsorted(keys, torch.arange(num_labels + 1, dtype=keys.dtype, device=keys.device))
        block = min(256, plan.power_of_two(classes))
        wrap_triton(_add_sides_kernel)[(num_labels, plan.ceil_div(classes, block))](
            keys, begins, S, n, ce, side, rows, how.rows, how.programs, num_labels, classes, ROWS=8, BLOCK=block
        )
    return S, n, lse, ce


def _joint_by_blocks(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    num_labels: int,
    ignore_index: int,
    input: str,
    need_ce: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, step = logits.shape[0], plan.soft_rows(int(logits.shape[1]), num_labels)
    lse: list[Tensor] = []
    sums: list[Tensor] = []
    for start in range(0, max(rows, 1), step):
        block = slice(start, start + step)
        weight = None if sample_weight is None else sample_weight[block]
        S, n, block_lse, ce = composite.joint(logits[block], target[block], weight, num_labels, ignore_index, input, need_ce)
        sums = [S, n, ce] if not sums else [total.add_(part) for total, part in zip(sums, (S, n, ce), strict=True)]
        lse.append(block_lse)
    return sums[0], sums[1], torch.cat(lse), sums[2]
