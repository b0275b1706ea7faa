"""Fixtures: every test of the loss runs once for each engine that can run on this machine, on each kind of device."""

from __future__ import annotations

import os

import pytest
import torch

from ldmi_fast.engines.choose import available
from ldmi_fast.engines.triton.engine import INTERPRET_VARIABLE

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
