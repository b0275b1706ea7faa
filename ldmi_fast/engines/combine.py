"""From log|det S| to the loss: a few scalars that all engines compute by the same formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def combine(
    log_abs_det: Tensor,
    kept: Tensor,
    total: Tensor,
    ce: Tensor,
    eps: float,
    normalize: bool,
    cross_entropy_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the two factors of its gradient.

    With l = log|det S| - k log W (without k log W when not normalised):

        loss = -l                       scale = 1                        eps = 0
        loss = -logaddexp(l, log eps)   scale = sigmoid(l - log eps)     eps > 0   (-log(|det| + eps), without forming det)

    and cross_entropy_weight / W times the summed cross entropy on top. Nothing has weight (W = 0): the loss is 0.

    Args:
        log_abs_det: [...], log|det S|; -inf if S is singular.
        kept: [...] int64, k, the number of classes that the determinant is of.
        total: [...], W.
        ce: [...], the summed cross entropy.
        eps: added to the determinant before the logarithm; 0: nothing.
        normalize: whether the determinant is that of S / W.
        cross_entropy_weight: the weight of the mean cross entropy.

    Returns:
        loss, scale, ce_scale: [...] each, in the dtype of log_abs_det.
    """
    empty = total == 0
    safe = torch.where(empty, 1, total)
    level = log_abs_det
    if normalize:
        # of a singular matrix there is no gradient, by W neither
        W = torch.where(torch.isneginf(log_abs_det), safe.detach(), safe) if total.requires_grad else safe
        level = log_abs_det - kept * W.log()
    if eps > 0:
        log_eps = math.log(eps)
        loss = -torch.logaddexp(level, torch.full_like(level, log_eps))
        scale = torch.sigmoid(level.detach() - log_eps)
    else:
        loss = -level
        scale = torch.ones_like(level)
    loss = torch.where(empty, 0, loss)
    ce_scale = cross_entropy_weight / safe
    if cross_entropy_weight != 0:
        loss = loss + ce_scale * ce
    return loss, scale, ce_scale
