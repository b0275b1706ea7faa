"""Which rows of a batch count, with their labels and weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import accumulator
from .tracing import may_need_gradient


class CountedRows(NamedTuple):
    """Which rows of a batch count, with their labels and weights.

    Attributes:
        used: [N] bool; None: all rows.
        label: [N] int64, or [N, K] floating: the labels or targets, 0 in rows that do not count.
        weight: [N], 0 in rows that do not count; None: all are 1.
        nan: [], NaN if a label or a weight is out of range, else 0; None: neither can be.
    """

    used: Tensor | None
    label: Tensor
    weight: Tensor | None
    nan: Tensor | None


def counted_labels(target: Tensor, num_labels: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Integer labels as int64 [N] (num_labels for a uint64 that int64 cannot hold), and which are not ignored [N] bool."""
    if target.dtype == torch.uint64:
        target = torch.where(target.view(torch.int64) < 0, num_labels, target.view(torch.int64))
    target = target.to(torch.int64)
    return target, target != ignore_index


def used_rows(target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int, acc: torch.dtype) -> CountedRows:
    """Which rows count, their labels and their weights in the dtype ``acc``. Hard labels always have all four."""
    soft = target.is_floating_point()
    used: Tensor | None = None
    poison: Tensor | None = None
    weight: Tensor | None = None
    if sample_weight is not None:
        weight = sample_weight.to(acc)
        used = weight != 0
    if not soft:
        target, kept = counted_labels(target, num_labels, ignore_index)
        used = kept if used is None else used & kept
        bad = used & ((target < 0) | (target >= num_labels))
        poison = bad.any()
        target = torch.where(used & ~bad, target, 0)
    elif used is not None:
        target = torch.where(used.unsqueeze(-1), target, 0)
    if weight is not None and used is not None:
        bad_weight = (used & ~((weight >= 0) & (weight < torch.inf))).any()
        poison = bad_weight if poison is None else poison | bad_weight
    if used is not None:
        weight = used.to(acc) if weight is None else torch.where(used, weight, 0)
    nan = None if poison is None else torch.where(poison, torch.nan, 0.0).to(acc)
    return CountedRows(used, target, weight, nan)


def rows_with_derivatives(
    x: Tensor, target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int, input: str
) -> CountedRows:
    """As ``used_rows``; but where the weights may need a gradient, a row of weight 0 counts too if its label does and its values are
    finite: it adds nothing, and the loss has a derivative by its weight."""
    acc = accumulator(x.device)
    used, label, weight, nan = used_rows(target, sample_weight, num_labels, ignore_index, acc)
    if sample_weight is None or not may_need_gradient(sample_weight):
        return CountedRows(used, label, weight, nan)
    logp = torch.log_softmax(x.detach(), -1) if input == "logits" else x.detach().log()
    finite = ~logp.isnan().any(-1)
    if target.is_floating_point():
        finite = finite & torch.where(target == 0, 0, logp * target.detach()).isfinite().all(-1)
        used = (sample_weight != 0) | finite
        label = torch.where(used.unsqueeze(-1), target, 0)
    else:
        label, counted = counted_labels(target, num_labels, ignore_index)
        counted = counted & (label >= 0) & (label < num_labels)
        label = torch.where(counted, label, 0)
        own = logp.gather(-1, (label % x.shape[-1]).unsqueeze(-1)).squeeze(-1)
        used = counted & ((sample_weight != 0) | (finite & own.isfinite()))
    return CountedRows(used, label, torch.where(used, sample_weight.to(acc), 0), nan)
