"""Fixtures: every test of the loss runs once for each engine that can run on this machine, on each kind of device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ldmi_fast.engines.choose import available
from ldmi_fast.engines.triton.engine import INTERPRET_VARIABLE

# cuBLAS reads it once; without it torch refuses matrix products where deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A kernel that is wrong is to fail its test, and not to be replaced by one that is right: tests/engines/test_guard.py turns this on.
os.environ.setdefault("LDMI_FAST_VERIFY", "0")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [(name, device) for device in DEVICES for name, reason in available(device).items() if not reason]
if os.environ.get(INTERPRET_VARIABLE) == "1":
    PLACES = [("triton", "cpu")]  # a run of its own (tests/engines/triton): the other engines have theirs


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
    """Where the tensors of a test with this engine live."""
    return torch.device(place[1])


@pytest.fixture(autouse=True)
def _composite_repeats_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """composite sums as torch does, on a GPU in an order that varies unless torch is told otherwise; tests compare bits."""
    names = request.fixturenames
    composite = "device" in names and "engine" not in names  # tests of the ops hold them against it
    if "place" in names:
        composite = request.getfixturevalue("place") == ("composite", "cuda")
    if not composite or not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
