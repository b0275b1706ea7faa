"""Data for the examples: four classes whose labels are often wrong, in one direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 4
FEATURES = 8


def noisy_data(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, 8]; noisy labels [N]: 45% of class 0 are labelled 1, of 1 labelled 2, and so on; and the true ones [N]."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(CLASSES, (count,), generator=generator)
    centres = 3 * torch.eye(FEATURES)[:CLASSES]
    x = centres[truth] + torch.randn(count, FEATURES, generator=generator)
    noisy = torch.where(torch.rand(count, generator=generator) < 0.45, (truth + 1) % CLASSES, truth)
    return x, noisy, truth


def network() -> nn.Module:
    """x [N, 8] -> logits [N, 4]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def accuracy(logits: Tensor, truth: Tensor) -> float:
    """The share of right answers, 0..1."""
    return (logits.argmax(1) == truth).double().mean().item()
