"""pytest-benchmark records of interleaved timings.

pytest-benchmark times one function after another, minutes apart: on a shared machine that compares different loads. Here
the peers of a case are timed round-robin first. Each benchmark then replays its peer's timings on a clock that the
replay itself moves, so that pytest-benchmark's statistics, tables and JSON are those of the interleaved run.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.kernels.cases import Direction, Shape
from bench.kernels.conftest import Runner
from bench.kernels.results import records_of


class ReplayClock:
    """A clock that moves only by ``advance``."""

    __name__ = "interleaved"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayClock()


@pytest.mark.benchmark(timer=CLOCK)
def test_dmi_loss(benchmark: BenchmarkFixture, runner: Runner, shape: Shape, direction: Direction, peer: str) -> None:
    case = runner.case(shape, direction)
    if peer in case.unavailable:
        pytest.skip(f"{peer} is unavailable: {case.unavailable[peer]}")
    benchmark.group = f"{shape} {direction}"
    benchmark.extra_info.update(next(r for r in records_of(case) if r.peer == peer).to_extra_info())
    seconds = iter(case.timings.rounds[peer].values())
    benchmark.pedantic(lambda: CLOCK.advance(next(seconds)), rounds=len(case.timings.rounds[peer]))
