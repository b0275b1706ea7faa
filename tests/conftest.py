"""Fixtures: every test of the loss runs once for each engine that can run on this machine, on each kind of device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ldmi_fast.engines.choose import available
from ldmi_fast.engines.triton.engine import INTERPRET_VARIABLE

# A failed assertion in a helper shows its values, as in a test.
pytest.register_assert_rewrite("tests.support")

# cuBLAS reads this once. Without it torch refuses matrix products under deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A wrong kernel has to fail its test instead of being replaced by a right one. tests/engines/test_guard.py turns the check on.
os.environ.setdefault("LDMI_FAST_VERIFY", "0")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [(name, device) for device in DEVICES for name, reason in available(device).items() if not reason]
if os.environ.get(INTERPRET_VARIABLE) == "1":
    PLACES = [("triton", "cpu")]  # a separate run (tests/engines/triton) of this engine alone


@pytest.fixture(params=PLACES, ids=lambda place: "-".join(place))
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """An engine and a device on which it can run."""
    pair: tuple[str, str] = request.param
    return pair


@pytest.fixture
def engine(place: tuple[str, str]) -> str:
    """The name of an engine, for ``engine=``."""
    return place[0]


@pytest.fixture
def device(place: tuple[str, str]) -> torch.device:
    """The device of the tensors of a test with this engine."""
    return torch.device(place[1])


@pytest.fixture(autouse=True)
def _composite_repeats_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make composite deterministic on a GPU, where torch otherwise adds in an order that varies: tests compare bits."""
    names = request.fixturenames
    composite = "device" in names and "engine" not in names  # tests of the ops compare them with it
    if "place" in names:
        composite = request.getfixturevalue("place") == ("composite", "cuda")
    if not composite or not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
