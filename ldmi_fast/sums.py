"""The sums of a batch, from which the loss follows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .options import Options
from .precision import compute_dtype
from .rows import rows_with_derivatives
from .tracing import may_need_gradient


class Sums(NamedTuple):
    """The sums of a batch. The sums of two batches add up to those of both together.

    Attributes:
        S: [K, C], the joint sums of labels (rows) and predictions; carries the gradient. K is C, but for ``few_rows``.
        n: [K], the weight of each class, 0 for one that the targets say nothing about; no gradient (the loss does not depend on it,
            given S).
        total: [], W, the weight of all rows that count; carries the gradient of sample weights.
        ce: [], the weighted sum of cross entropies; carries the gradient.
    """

    S: Tensor
    n: Tensor
    total: Tensor
    ce: Tensor


def total_weight(target: Tensor, sample_weight: Tensor | None, n: Tensor) -> Tensor:
    """W, the sum of the weights of the rows that count: [] in the dtype of n."""
    if not target.is_floating_point():
        return n.sum(-1)
    if sample_weight is None:
        return n.new_ones(()) * target.shape[0]  # float() would fix the size in an exported program
    return sample_weight.sum(dtype=n.dtype)


def differentiable_total(logits: Tensor, target: Tensor, sample_weight: Tensor | None, n: Tensor, options: Options) -> Tensor:
    """W [], with a derivative by the weights of the rows that have one."""
    if sample_weight is None or not may_need_gradient(sample_weight):
        return total_weight(target, sample_weight, n.detach())
    rows = rows_with_derivatives(
        logits.detach().to(compute_dtype(logits.dtype)), target, sample_weight, len(n), options.ignore_index, options.input
    )
    assert rows.weight is not None  # there are sample weights
    return rows.weight.sum(dtype=n.dtype)
