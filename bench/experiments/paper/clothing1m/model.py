"""The networks, and weights from a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.experiments.paper.clothing1m.options import Options

_IMAGENET = "such as torchvision's resnet50-0676ba61.pth (ResNet50_Weights.IMAGENET1K_V1)"


class Tiny(nn.Sequential):
    """Some 3,000 parameters, for tests. With group norm it treats every image separately, whatever is in the batch."""

    def __init__(self, classes: int, dropout: float, batchnorm: bool) -> None:
        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if batchnorm else nn.GroupNorm(4, channels)

        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            norm(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            norm(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64, classes),
        )


def build(options: Options) -> nn.Module:
    """Images [N, 3, H, W] -> logits [N, C], with the weights that the options name.

    Raises:
        RuntimeError: torchvision is needed and not installed. ValueError: weights that do not fit.
    """
    if options.model.startswith("tiny"):
        model: Any = Tiny(options.classes, options.dropout, options.model == "tiny-bn")
    else:
        try:
            from torchvision import models
        except ImportError:
            raise RuntimeError(f"--model {options.model} needs torchvision: pip install torchvision") from None
        model = getattr(models, options.model)(weights=None, num_classes=options.classes)
        if options.dropout:
            model.fc = nn.Sequential(nn.Dropout(options.dropout), model.fc)
    if options.weights:
        load_weights(model, Path(options.weights))
    return model


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load a state dict; entries of the last layer that have another shape stay as they are.

    Returns:
        The names of these.

    Raises:
        ValueError: no such file, not a state dict, or one of another network.
    """
    if not path.is_file():
        raise ValueError(f"--weights {path}: there is no such file: expected a state dict, {_IMAGENET}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"--weights {path}: not a state dict: {error}") from None
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]  # a checkpoint of this program
    if not isinstance(state, Mapping):
        raise ValueError(f"--weights {path}: holds a {type(state).__name__}, expected a state dict, {_IMAGENET}")
    mine = model.state_dict()
    head = list(mine)[-1].rsplit(".", 1)[0] + "."
    strange = sorted(set(state) - set(mine))
    lacking = sorted(name for name in set(mine) - set(state) if not name.startswith(head) and "num_batches_tracked" not in name)
    odd = [name for name, value in state.items() if name in mine and value.shape != mine[name].shape and not name.startswith(head)]
    if [name for name in strange if not name.startswith(("fc.", head))] or lacking or odd:
        raise ValueError(
            f"--weights {path}: of another network: {len(strange)} unknown entries {strange[:3]}, "
            f"{len(lacking)} missing {lacking[:3]}, "
            f"{len(odd)} of another shape {odd[:3]}"
        )
    fits: dict[str, Tensor] = {name: value for name, value in state.items() if name in mine and value.shape == mine[name].shape}
    model.load_state_dict(fits, strict=False)
    return sorted(name for name in mine if name.startswith(head) and name not in fits)
