"""The loss as a module."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from .functional import evaluate
from .options import OPTION_NAMES, Options, explain_keywords


class DMILoss(nn.Module):
    """:func:`ldmi_fast.dmi_loss` as a module, its options fixed at construction.

    Args:
        num_classes: C, if it is to be checked against the logits; None takes any.
        ignore_index, absent, eps, normalize, cross_entropy_weight, input, engine: as for :func:`ldmi_fast.dmi_loss`.

    Raises:
        TypeError, ValueError: an option that cannot work.

    Example:
        >>> criterion = DMILoss(14)
        >>> criterion(model(images), noisy_labels).backward()
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        ignore_index: int = -100,
        absent: str = "present",
        eps: float = 0.0,
        normalize: bool = True,
        cross_entropy_weight: float = 0.0,
        input: str = "logits",
        engine: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            explain_keywords("DMILoss", unknown, OPTION_NAMES)
        if num_classes is not None:
            if isinstance(num_classes, bool) or not isinstance(num_classes, int):
                raise TypeError(f"num_classes must be an int or None, got {type(num_classes).__name__}: {num_classes!r}")
            if num_classes < 1:
                raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.options = Options(ignore_index, absent, eps, normalize, cross_entropy_weight, input, engine)

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar; see :func:`ldmi_fast.dmi_loss` for shapes and errors.

        Raises:
            ValueError: the logits do not have ``num_classes`` classes.
        """
        known = self.num_classes is not None and isinstance(logits, Tensor) and logits.dim() >= 2
        if known and logits.shape[1] != self.num_classes:
            raise ValueError(
                f"this DMILoss is for {self.num_classes} classes, got logits of shape {tuple(logits.shape)} "
                f"with {logits.shape[1]} in dimension 1"
            )
        return evaluate(logits, target, sample_weight, self.options)

    def extra_repr(self) -> str:
        defaults = Options()
        parts = [] if self.num_classes is None else [str(self.num_classes)]
        for field in fields(Options):
            value = getattr(self.options, field.name)
            if value != getattr(defaults, field.name):
                parts.append(f"{field.name}={value!r}")
        return ", ".join(parts)
