"""Run the loss on one batch and compare it with the oracle, within the error budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmi_fast import dmi_loss
from tests.support import oracle
from tests.support.problems import Problem, as_array

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: Machine epsilon, the distance from 1 to the next number. Thresholds are in units of it, error budgets in units of the roundoff.
EPSILON = {dtype: 2 * roundoff for dtype, roundoff in UNIT_ROUNDOFF.items()}

#: The error budget of a gradient, relative to its largest entry, in units u of the dtype that the softmax runs in:
#: CONDITION_FACTOR * cond(R) * u + SOFTMAX_FACTOR * cancellation * u + GRADIENT_ROUNDING. Measured at cond 1e6, the largest of 300
#: draws at each of C = 2, 3, 5, 10, 14, flat and twins: 0.14 in fp32, where the rows' roundings average out in a joint kept in fp64;
#: 5.3 in fp64, where the joint's own additions round as much as its terms do, at C = 2 (C = 10: 1.8), equally in the cpu and the
#: composite engine. The usual error is well below that of the worst draw: test_numerics.test_usual_error_in_double checks the median.
CONDITION_FACTOR = {torch.float32: 1.0, torch.float64: 8.0}
#: Measured: 1 to 2 for 14 classes, 4 for 100. Predictions that are right and sure leave a gradient far smaller than the
#: terms that it is a difference of (as in cross entropy's p - 1): the softmax's rounding counts relative to the terms.
SOFTMAX_FACTOR = 4.0
#: What the budget allows at any condition number: the rounding of exponentials, sums and the last product.
GRADIENT_ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6}
#: The same for the loss, which also rounds logarithms and is stored in this dtype.
LOSS_ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6}

#: Tolerances of tests in fp64 that compare two results with each other, or with the oracle's, on batches that are well conditioned.
#: Each is what the budget allows at the condition number given, CONDITION_FACTOR * cond(R) * u. Relative; where a test passes one of
#: them as the absolute tolerance too, the largest entries are about 1, or the tolerance is multiplied by the largest entry.
#: Sums whose terms are added in another order, with no inverse in between: GRADIENT_ROUNDING and LOSS_ROUNDING alone.
EXACT = 1e-14
#: A loss or a joint matrix whose sums are added in another order: cond(R) = 1e2 (9e-14).
REORDERED = 1e-13
#: A gradient, or V, by another algorithm or another order of differentiation: cond(R) = 1e3 (9e-13).
DERIVATIVE = 1e-12
#: A derivative of a gradient, a product of two inverses: cond(R) = 1e4 (9e-12).
SECOND_DERIVATIVE = 1e-11


@dataclass(frozen=True)
class Result:
    loss: Tensor
    grad: Tensor
    target_grad: Tensor | None


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(batch: Problem, engine: str, *, upstream: float = 1.0, **options: Any) -> Result:
    """Compute the loss and the gradients of one batch, also those of soft targets."""
    logits = batch.leaf()
    target = batch.target
    if target.is_floating_point():
        target = target.detach().clone().requires_grad_()
    loss = dmi_loss(logits, target, sample_weight=batch.sample_weight, engine=engine, **options)
    assert loss.shape == ()
    assert loss.dtype == loss_dtype(logits.dtype)
    assert loss.device == logits.device
    (loss * upstream).backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    assert logits.grad.dtype == logits.dtype
    return Result(loss.detach(), logits.grad, target.grad)


def relative(ours: Tensor, exact: np.ndarray[Any, Any]) -> float:
    """The largest error, relative to the largest exact value. NaN counts as infinite."""
    if not exact.size:
        return 0.0
    error = np.abs(as_array(ours) - exact).max()
    return float(error / max(np.abs(exact).max(), 1e-300)) if np.isfinite(error) else math.inf


def loss_budget(answer: oracle.Answer, dtype: torch.dtype) -> float:
    """The error that the contract allows a loss, relative to it, in the dtype that the op computes in."""
    wide = loss_dtype(dtype)
    cond = answer.cond if math.isfinite(answer.cond) else 1.0
    return CONDITION_FACTOR[wide] * cond * UNIT_ROUNDOFF[wide] + LOSS_ROUNDING[wide]


def budget(answer: oracle.Answer, dtype: torch.dtype) -> float:
    """The error that the contract allows a gradient, relative to its largest entry, in the dtype that the op computes in."""
    wide = loss_dtype(dtype)
    cond = answer.cond if math.isfinite(answer.cond) else 1.0
    # With eps far above |det| the gradient holds exp(l - log eps): the rounding of l, an fp64 number of the size of the
    # loss, becomes a relative error.
    level = (1 - answer.share) * abs(answer.log_abs_det) * EPSILON[torch.float64] if math.isfinite(answer.log_abs_det) else 0.0
    return (
        (CONDITION_FACTOR[wide] * cond + SOFTMAX_FACTOR * answer.cancellation) * UNIT_ROUNDOFF[wide] + GRADIENT_ROUNDING[wide] + level
    )


def assert_matches(result: Result, answer: oracle.Answer, dtype: torch.dtype) -> None:
    """Check that value and gradients agree with the oracle within the budget, and infinities, NaN and zeros exactly."""
    loss = result.loss.item()
    if math.isfinite(answer.loss):
        allowed = loss_budget(answer, dtype) * max(1.0, abs(answer.loss))
        assert abs(loss - answer.loss) <= allowed, f"loss {loss!r}, oracle {answer.loss!r}"
    else:
        assert loss == answer.loss or (math.isnan(loss) and math.isnan(answer.loss)), f"{loss!r}, {answer.loss!r}"
    pairs = [("gradient", result.grad, answer.grad)]
    if answer.target_grad is not None and result.target_grad is not None:
        pairs.append(("target gradient", result.target_grad, answer.target_grad))
    for name, ours, exact in pairs:
        assert_gradient(name, ours, exact, budget(answer, dtype))


def assert_gradient(name: str, ours: Tensor, exact: np.ndarray[Any, Any], allowed: float) -> None:
    nans = np.isnan(exact)
    np.testing.assert_array_equal(np.isnan(as_array(ours)), nans, err_msg=f"{name}: NaN where and only where expected")
    if nans.any():
        np.testing.assert_array_equal(as_array(ours)[~nans], exact[~nans], err_msg=name)
        return
    if not exact.any():
        np.testing.assert_array_equal(as_array(ours), exact, err_msg=f"{name}: exactly zero expected")
        return
    # One rounding to the dtype it is stored in: half a unit in the last place, or of the smallest subnormal.
    info = torch.finfo(ours.dtype)
    allowed += info.eps / 2 * (1 + info.smallest_normal / np.abs(exact).max())
    error = relative(ours, exact)
    assert error <= allowed, f"{name}: error {error:.2e} of the largest, {allowed:.2e} allowed"
