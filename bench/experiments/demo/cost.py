"""What the loss itself costs in a training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

import ldmi_fast
from bench.kernels.interleave import interleave


@dataclass(frozen=True)
class LossCost:
    """Median time of one forward and backward of each loss, and of the ratio of two taken side by side."""

    batch_size: int
    num_classes: int
    engine: str
    dmi_us: float
    cross_entropy_us: float
    dmi_over_cross_entropy: float

    def __str__(self) -> str:
        return (
            f"The loss of one step, forward and backward, batch {self.batch_size} x {self.num_classes} classes: "
            f"dmi_loss {self.dmi_us:.0f} us ({self.engine} engine), F.cross_entropy {self.cross_entropy_us:.0f} us, "
            f"ratio {self.dmi_over_cross_entropy:.2f} (medians, one thread)"
        )


def loss_cost(batch_size: int, num_classes: int, seconds: float = 1.0) -> LossCost:
    """Time dmi_loss against F.cross_entropy on random fp32 logits, in turns, for about this many seconds.

    On one thread: a batch is small, and what threads that wait for a busy machine cost says nothing about a loss.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch_size, num_classes, generator=generator).requires_grad_()
    target = torch.randint(num_classes, (batch_size,), generator=generator)
    losses = {
        "dmi": lambda: torch.autograd.grad(ldmi_fast.dmi_loss(logits, target), logits),
        "cross_entropy": lambda: torch.autograd.grad(F.cross_entropy(logits, target), logits),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = interleave(losses, reference="dmi", time_cap=seconds)
    finally:
        torch.set_num_threads(threads)
    return LossCost(
        batch_size,
        num_classes,
        ldmi_fast.explain(logits, target).engine,
        timings.seconds("dmi").p50 * 1e6,
        timings.seconds("cross_entropy").p50 * 1e6,
        timings.reference_over("cross_entropy").p50,
    )
