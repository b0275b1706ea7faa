"""Which classes are present in a batch or an average. The determinant is that of the present classes."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import raise_for_negative_targets
from .precision import compute_dtype
from .tracing import may_look

# A class with a smaller share of the total weight is absent. In a moving average the share of a class that has left the data decays
# forever; long before it underflows, its row of S says nothing about the model. csrc/plan/presence.h has the same number.
ABSENT_SHARE = 1e-12

# The largest relative difference between entries of a column of soft targets that are equal but for the rounding of mixing and
# smoothing.
_SAME = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 4 * 2.0**-10, torch.bfloat16: 4 * 2.0**-7}


def present_classes(n: Tensor) -> Tensor:
    """Which classes the determinant is of [..., C] bool: those with a share of at least ABSENT_SHARE of the weight n [..., C].

    The shares are scaled before they are added, so that the sum of the largest weights stays finite.
    """
    least = (ABSENT_SHARE * n.clamp(min=0)).sum(-1, keepdim=True)
    return (n > 0) & ~(n < least)


def with_samples(n: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
    """n [C], and 0 for a class that soft targets say nothing about: it is absent from this batch."""
    if not target.is_floating_point():
        return n
    told = classes_with_samples(target, sample_weight)
    return n if told is None else torch.where(told, n, 0)


def classes_with_samples(target: Tensor, sample_weight: Tensor | None) -> Tensor | None:
    """Which classes the soft targets T [N, C] say something about: [C] bool; None if it is clear at once that they all are present.

    A column c of T that has the same share a_c of each row's sum s_i, in all rows that count, says nothing about any sample; label
    smoothing makes such a column for a class that the batch lacks. Its row of S = T^T diag(w) P is a multiple of the sum of all rows,

        S_c = a_c sum_i w_i s_i p_i,    and    sum over k of S_k = sum_i w_i s_i p_i,

    so with it S is singular, whatever the model predicts. Without it, for hard labels H of the classes that remain and T_K = H M,
    S_KK = M^T (H^T diag(w) P)_KK: a constant, invertible M, so the gradient is that of the hard labels.

    If all columns are such (one sample, or samples of one class), the class with the largest share stays. If all shares are equal, all
    classes stay.
    """
    if target.shape[0] == 0:
        return None
    same = _SAME[target.dtype]
    T = target.detach()
    look = T.is_cpu and may_look(T)
    if look:
        if T.amin() < 0:
            raise_for_negative_targets(target, sample_weight)
        if sample_weight is None and _differ_at_once(T[:64]):
            return None
    sums = T.sum(-1, keepdim=True, dtype=compute_dtype(T.dtype))
    used = sums != 0
    if sample_weight is not None:
        used = used & (sample_weight.detach() != 0).unsqueeze(-1)
    share = T / torch.where(used, sums, 1)
    low, high = torch.where(used, share, torch.inf).amin(0), torch.where(used, share, -torch.inf).amax(0)
    constant = high - low <= same * high.abs()
    if look and not constant.any():
        return None
    all_constant = constant.all()
    top = high >= high.amax() * (1 - same)
    return ~torch.where(all_constant, ~top, constant)


def _differ_at_once(T: Tensor) -> bool:
    """Whether some rows of distributions differ so much in every column that no column's share can be the same: the usual batch, at a
    third of the cost of looking closely."""
    low, high = T.aminmax(dim=0)
    least, most = T.sum(-1).aminmax()
    return bool((high - low > 0.1 * high).all()) and bool(most - least < 0.01 * most)
