"""The moving average of the joint matrix, for ``DMILoss(momentum=m)``.

    A_t = m A_{t-1} + (1 - m) U_t,    c_t = m c_{t-1} + (1 - m),    B_t = A_t / c_t       (A_0 = 0, c_0 = 0, so c_t = 1 - m^t)

B_t includes the batch at hand. The loss is -log|det(B + U - stop_gradient(U))|: its value is that of B, its gradient what it would
be if the joint of the batch were B. The class counts are averaged as well, and decide which classes are present.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .precision import accumulator
from .presence import present_classes
from .sums import Sums

_LIBRARY = torch.library.Library("ldmi_fast", "FRAGMENT")
for _name in ("in_backward", "in_function_forward"):
    _LIBRARY.define(f"{_name}(Tensor like) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _in_backward() -> bool:
    """Whether a backward pass is running. A forward inside a backward pass repeats an earlier forward. Activation checkpointing does
    this: if reentrant, its backward calls the function again; otherwise a hook that unpacks a saved tensor does."""
    return torch._C._current_graph_task_id() != -1


def _in_function_forward() -> bool:
    """Whether the forward of a custom autograd Function is running. It turns gradients off and yet is part of training: reentrant
    activation checkpointing, in PyTorch and in other libraries, is such a Function, and its backward calls the model again."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, FunctionCtx):
                # a Function without edges cannot get a gradient: gradients were off outside too
                return len(getattr(ctx, "next_functions", ())) > 0
        frame = frame.f_back
    return False


def takes_part() -> bool:
    """Whether a forward that runs now belongs to training, that is, whether a gradient can be asked for. Evaluation under
    ``no_grad`` or ``inference_mode`` does not belong to training."""
    return torch.is_grad_enabled() or _in_function_forward()


# An outer checkpoint may repeat a compiled forward, so a graph has to ask this when it runs, not when it is traced.
@torch.library.impl(_LIBRARY, "in_backward", "CompositeExplicitAutograd")
def _in_backward_tensor(like: Tensor) -> Tensor:
    return torch.full((), _in_backward(), dtype=torch.bool, device=like.device)


@torch.library.impl(_LIBRARY, "in_function_forward", "CompositeExplicitAutograd")
def _in_function_forward_tensor(like: Tensor) -> Tensor:
    return torch.full((), _in_function_forward(), dtype=torch.bool, device=like.device)


@torch.library.register_fake("ldmi_fast::in_backward", lib=_LIBRARY)
@torch.library.register_fake("ldmi_fast::in_function_forward", lib=_LIBRARY)
def _flag_fake(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


# With smoothed targets, a class is absent if its samples make up less than this share of its row. The gradient would be a difference
# of terms that are 1e4 times larger than it, and single precision has 7 digits.
_LEAST_OF_ROW = 1e-4


class MovingAverage:
    """The state of a moving average, in tensors that belong to a module, and its update by a batch.

    Args:
        joint: [C, C], A.
        counts: [C], the same average of n / W.
        weight: [], c.
        steps: [] int64, how many batches have entered.
        momentum: m, 0 <= m < 1.
    """

    def __init__(self, joint: Tensor, counts: Tensor, weight: Tensor, steps: Tensor, momentum: float) -> None:
        self.joint, self.counts, self.weight, self.steps, self.momentum = joint, counts, weight, steps, momentum

    def mean(self) -> tuple[Tensor, Tensor]:
        """B [C, C] and the weight of its classes [C], 0 for absent ones; zeros before the first batch.

        With smoothed targets a class has a row of B also from batches without samples of the class. Then the weight is the sum of the
        row, which scales the row to 1 for the factorisation. The share of the row that comes from samples decides whether the class is
        present: the rest is a mixture of the other rows, and cancels.
        """
        safe = torch.where(self.weight > 0, self.weight, 1)
        B, shares = self.joint / safe, self.counts / safe
        row = B.sum(-1)
        weights = torch.where(2 * shares >= row, shares, row)
        return B, torch.where(present_classes(shares) & ~(shares < _LEAST_OF_ROW * row), weights, 0)

    def __call__(self, sums: Sums) -> Sums:
        """Enter a batch, and return sums whose determinant is that of the average, and whose gradient flows to the batch.

        A batch in which no row counts, or that is not finite, does not enter. Neither does a batch inside a backward pass, because it
        repeats a forward that has entered. Where no gradient can be asked for, the average stays as it is and the sums are returned
        unchanged.
        """
        tracing = torch.compiler.is_compiling()
        part = None  # None: this batch takes part; else a flag that is known when the graph runs
        if not torch.is_grad_enabled():
            if tracing:
                part = torch.ops.ldmi_fast.in_function_forward(sums.S.detach())
            elif not takes_part():
                return sums
        empty = sums.total == 0
        safe = torch.where(empty, 1, sums.total)
        U = sums.S / safe
        with torch.no_grad():
            U_now, shares = U.detach(), sums.n / safe.detach()
            enters = ~empty & torch.isfinite(U_now).all() & torch.isfinite(shares).all()
            if tracing:
                enters = enters & ~torch.ops.ldmi_fast.in_backward(U_now)
            elif _in_backward():
                enters = torch.zeros_like(enters)
            if part is not None:
                enters = enters & part
            m = self.momentum
            # The weight is written through a view with one dimension: a graph that torch 2.11 compiles loses what is written to a
            # 0-dimensional fp64 tensor.
            for state, new in ((self.joint, U_now), (self.counts, shares), (self.weight.view(1), 1.0)):
                state.copy_(torch.where(enters, m * state + (1 - m) * new, state))
            self.steps.add_(enters)
            averaged = self.weight > 0
            if part is not None:
                averaged = averaged & part
            B, counts = self.mean()
            B, counts = torch.where(averaged, B, U_now), torch.where(averaged, counts, shares)
        # U - U is exactly 0, and NaN where U is
        return Sums((B + (U - U_now)) * sums.total, counts * sums.total.detach(), sums.total, sums.ce)

    def set(self, sums: Sums) -> None:
        """Start again from the sums of a pass over data, with the weight of a fully warmed-up average."""
        total = torch.where(sums.total == 0, 1, sums.total)
        with torch.no_grad():
            self.joint.copy_(sums.S / total)
            self.counts.copy_(sums.n / total)
            self.weight.copy_(sums.total > 0)
            self.steps.zero_()

    def reset(self) -> None:
        """Forget every batch."""
        with torch.no_grad():
            for state in (self.joint, self.counts, self.weight, self.steps):
                state.zero_()


def new_state(classes: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The tensors of an empty average, by the names of a module's buffers."""
    device = torch.empty(0, device=device).device
    dtype = accumulator(device)
    return {
        "average_joint": torch.zeros(classes, classes, dtype=dtype, device=device),
        "average_counts": torch.zeros(classes, dtype=dtype, device=device),
        "average_weight": torch.zeros((), dtype=dtype, device=device),
        "average_steps": torch.zeros((), dtype=torch.int64, device=device),
    }
