"""What other libraries need besides the loss itself. Each part needs its library, the package does not; Lightning, Accelerate,
timm and ignite need nothing from here (``docs/beyond-one-batch.md``).

- Hugging Face's Trainer: :func:`hf`, the loss as its ``compute_loss_func``, and :class:`HFCallback`, which calibrates, saves and
  restores the moving average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .huggingface import HFCallback, hf

__all__ = ["HFCallback", "hf"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import huggingface

        return getattr(huggingface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
