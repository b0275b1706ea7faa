"""What every kernel does with a row: whether it counts, its label and weight, and its softmax.

Rows are taken in tiles [BLOCK_N, BLOCK_C]; BLOCK_C is a power of two, and the columns from C on are padding. Everything here is
select, not multiply: rows that do not count may hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponential(x):
    """exp(x) for x <= 0 (or NaN), to the last bits.

    The hardware's exp2 of x log2(e) alone would inherit the rounding of that product, which grows with |x|. Reduced to
    x = k log 2 + r, |r| <= log(2) / 2 (Cody and Waite: k log 2 in two parts, the first exact), both factors are accurate.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -110.0, -110.0, x)  # 0 from here on; keeps -inf out of the products, lets NaN through
        k = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - k * 0.693359375) + k * 2.12194440e-4
        return tl.exp2(k) * tl.exp2(r * 1.4426950408889634)


@triton.jit
def row_status(
    target,
    target_stride,
    weight,
    weight_stride,
    rows,
    inside,
    num_labels,
    ignore_index,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Of rows [BLOCK_N] int64: which count, their labels (int32; 0 elsewhere), weights (fp64; 0 elsewhere), and which are bad.

    A label that is out of range becomes 0, so that no address is ever made of it.
    """
    used = inside
    label = (rows * 0).to(tl.int32)
    if SOFT:
        within = inside
    else:
        given = tl.load(target + rows * target_stride, mask=inside, other=0).to(tl.int64)
        used = used & (given != ignore_index)
        within = (given >= 0) & (given < num_labels)
        label = (given * within.to(tl.int64)).to(tl.int32)
    if WEIGHTED:
        # loaded where a row may count, instead of selected afterwards: Triton 3.6 fails to lay out that select
        w = tl.load(weight + rows * weight_stride, mask=used, other=0.0).to(tl.float64)
        used = used & (w != 0.0)  # NaN counts, and is bad
        within = within & (w >= 0.0)
    else:
        w = used.to(tl.float64)
    return used, label, w, used & (within == 0)


@triton.jit
def softmax(x, PROBS: tl.constexpr):
    """Predictions of a tile [BLOCK_N, BLOCK_C] whose padding is -inf (0 for probabilities).

    Returns p, the shifted logits x - max (p itself for probabilities), and per row max and the sum of exponentials. NaN, +inf or
    no finite logit make the whole row NaN: the maximum may drop a NaN, the sum does not.
    """
    if PROBS:
        p = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
        one = tl.sum(p * 0, axis=1) + 1
        return p, p, one * 0, one
    else:
        m = tl.max(x, axis=1)
        shifted = x - m[:, None]
        e = exponential(shifted)
        s = tl.sum(e, axis=1)
        return e * inverse(s)[:, None], shifted, m, s


@triton.jit
def predictions(x, PROBS: tl.constexpr):
    """p of a tile alone."""
    if PROBS:
        return x
    else:
        p, _, _, _ = softmax(x, False)
        return p


@triton.jit
def inverse(s):
    """1 / s, correctly rounded."""
    if s.dtype == tl.float64:
        return 1.0 / s
    else:
        return tl.div_rn(s * 0 + 1, s)


@triton.jit
def hard_cross_entropy(own, m, s, PROBS: tl.constexpr):
    """Cross entropy of rows, from the logit (or probability) of their label, max and sum of exponentials."""
    if PROBS:
        return -tl.log(own)
    else:
        return tl.log(s) - (own - m)


@triton.jit
def soft_cross_entropy(p, shifted, s, soft_target, PROBS: tl.constexpr):
    """Cross entropy of each row [BLOCK_N] with its soft target; a target of 0 where p = 0 contributes nothing."""
    if PROBS:
        logp = tl.log(p)
    else:
        logp = shifted - tl.log(s)[:, None]
    return -tl.sum(tl.where((soft_target == 0) & (p == 0), 0.0, soft_target * logp), axis=1)


@triton.jit
def online(m, s, d, x, t):
    """One more block x [BLOCK_C] of a long row into its running max m, sum of exponentials s and sum d of exponentials times t."""
    larger = tl.maximum(m, tl.max(x, axis=0))
    keep = tl.where(m == larger, 1.0, exponential(m - larger))
    e = exponential(x - tl.where(larger == -float("inf"), 0.0, larger))  # nothing but -inf so far: all zeros, not NaN
    return larger, s * keep + tl.sum(e, axis=0), d * keep + tl.sum(e * t, axis=0)


@triton.jit
def to_double(raw):
    """The double whose bits an integer argument holds (see launch.bits)."""
    return (tl.zeros([], tl.int64) + raw).to(tl.float64, bitcast=True)  # also of a constant, which torch.compile may make of it
