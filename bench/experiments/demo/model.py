"""The demo's networks."""

from __future__ import annotations

import torch
from torch import nn


def fashion_cnn(num_classes: int) -> nn.Module:
    """The paper's CNN for Fashion-MNIST: (N, 1, 28, 28) -> (N, C).

    Pooling before ReLU is the same function as after it, on a quarter of the values; with channels last it takes half
    the time on a CPU.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(32 * 4 * 4, num_classes),
    )
    return model.to(memory_format=torch.channels_last)


def digits_mlp(num_classes: int) -> nn.Module:
    """For the digits: (N, 64) -> (N, C)."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, num_classes))
