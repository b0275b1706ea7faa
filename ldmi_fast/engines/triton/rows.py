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
def facts(
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
    """Of rows [BLOCK_N] int64: which count, their labels (0 elsewhere), weights (fp64; 0 elsewhere), and which are out of range.

    A label that is out of range becomes 0, so that no address is ever made of it.
    """
    used = inside
    bad = inside & False
    if WEIGHTED:
        w = tl.load(weight + rows * weight_stride, mask=inside, other=0.0).to(tl.float64)
        used = inside & (w != 0.0)  # NaN counts, and is bad
        bad = used & ((w >= 0.0) == 0)
    else:
        w = inside.to(tl.float64)
    label = rows * 0
    if not SOFT:
        label = tl.load(target + rows * target_stride, mask=inside, other=0).to(tl.int64)
        used = used & (label != ignore_index)
        outside = (label < 0) | (label >= num_labels)
        bad = used & (bad | outside)
        label = tl.where(used & (outside == 0), label, 0)
    return used, label, tl.where(used, w, 0.0), bad


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
def inverse(s):
    """1 / s, correctly rounded."""
    if s.dtype == tl.float64:
        return 1.0 / s
    else:
        return tl.div_rn(s * 0 + 1, s)


@triton.jit
def cross_entropy(p, shifted, s, picked, soft_target, SOFT: tl.constexpr, PROBS: tl.constexpr):
    """Cross entropy of each row [BLOCK_N]; ``picked``: where its label's column is. A soft target of 0 where p = 0 adds nothing."""
    if SOFT:
        logp = tl.log(p) if PROBS else shifted - tl.log(s)[:, None]
        return -tl.sum(tl.where((soft_target == 0) & (p == 0), 0.0, soft_target * logp), axis=1)
    else:
        own = tl.sum(tl.where(picked, shifted, 0.0), axis=1)
        return -tl.log(own) if PROBS else tl.log(s) - own


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
    return raw.to(tl.int64).to(tl.float64, bitcast=True)
