"""The version: one place, read by the package and by setup.py; and a check of torch's. The package imports this module before any
other: without a torch that is new enough the next import would fail with the name of something that it lacks."""

from __future__ import annotations

import re

__version__ = "0.1.0"

LEAST_TORCH = (2, 10)


def _require_torch() -> None:
    """Raise ImportError, with what is needed and what is there, if torch is missing or too old."""
    needed = ".".join(map(str, LEAST_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"ldmi_fast needs torch >= {needed}, and this Python has no torch: pip install 'torch>={needed}'", name="torch"
        ) from None
    found = str(getattr(torch, "__version__", "none, as it is no complete package"))
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < LEAST_TORCH:
        raise ImportError(f"ldmi_fast needs torch >= {needed}, found {found}: pip install 'torch>={needed}'", name="torch")


_require_torch()
