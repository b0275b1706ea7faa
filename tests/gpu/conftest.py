"""Fixtures of the tests that need a GPU: every engine with its own kernels there. Without a GPU all of them are skipped."""

from __future__ import annotations

import pytest
import torch

from ldmi_fast.engines.choose import available

REASONS = available("cuda") if torch.cuda.is_available() else {}
ENGINES = [name for name, reason in REASONS.items() if not reason and name != "composite"]
WHY_NONE = "; ".join(f"{name}: {reason}" for name, reason in REASONS.items() if reason)


@pytest.fixture(params=[f"{name}-cuda" for name in ENGINES] or ["none"])
def engine(request: pytest.FixtureRequest) -> str:
    """An engine whose kernels run on this GPU. composite is left out: it guarantees neither capture nor equal bits."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use")
    if not ENGINES:
        pytest.skip(f"no engine with its own kernels runs on this GPU ({WHY_NONE})")
    name: str = request.param
    return name.removesuffix("-cuda")


@pytest.fixture
def device(engine: str) -> torch.device:
    """The current GPU, by its index."""
    return torch.device("cuda", torch.cuda.current_device())
