"""What an engine is: a module with these functions, which take and return tensors on its devices.

:mod:`.composite` defines what each of the five ops computes; its docstrings have shapes and dtypes. The others compute the same.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

#: The five ops.
OPS = ("joint", "logdet_inverse", "logits_grad", "loss_forward", "fused")


class Engine(Protocol):
    """The functions of an engine."""

    def can_run(self, device: torch.device, /) -> str:
        """Why the engine cannot run on ``device``; empty if it can."""

    def is_fused(self, logits: Tensor, target: Tensor, /) -> bool:
        """Whether the engine computes the loss and its gradient in one call, by ``fused``."""

    def joint(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int, input: str, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S, n, lse and the summed cross entropy."""

    def logdet_inverse(self, S: Tensor, n: Tensor, absent: str, /) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log|det S|, its sign, the number of classes kept and V."""

    def logits_grad(
        self,
        logits: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        lse: Tensor,
        V: Tensor,
        scale: Tensor,
        ce_scale: Tensor,
        ignore_index: int,
        input: str,
        /,
    ) -> Tensor:
        """The gradient of the logits."""

    # The options of ``Options.for_ops``, one after the other, come after the tensors.
    def loss_forward(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None, /, *options_and_gradient: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The loss, lse, V, scale and ce_scale. The last argument says whether V is wanted."""

    def fused(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None, /, *options: Any) -> tuple[Tensor, Tensor]:
        """The loss and the gradient of the logits."""
