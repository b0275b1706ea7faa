"""Options and hooks of the kernel benchmarks; ``python -m bench.kernels.run`` is the usual entry point."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.kernels.cases import DIRECTIONS, SHAPES, Direction, Shape, parse_shapes
from bench.kernels.measure import COPY, CaseResult, measure
from bench.kernels.peers import PEERS
from bench.kernels.results import environment

TIME_CAP = 5.0
"""Seconds of timing for each shape and direction, besides compilation and warm-up."""


def parse_peers(text: str) -> tuple[str, ...]:
    """Read a comma-separated list of peers; ``ours``, the reference, is always among them."""
    names = tuple(dict.fromkeys(("ours", *(item.strip() for item in text.split(",")))))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown peers {unknown}: expected some of {list(PEERS)}")
    return names


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels", "kernel benchmarks")
    group.addoption("--shapes", type=parse_shapes, default=SHAPES, help="ROWSxCLASSES, comma-separated")
    group.addoption("--peers", type=parse_peers, default=tuple(PEERS), help=f"comma-separated, among {', '.join(PEERS)}")
    group.addoption("--rounds", type=int, default=None, help="exactly this many rounds instead of a time cap")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "peer" not in metafunc.fixturenames:
        return
    config = metafunc.config
    cases = [
        pytest.param(shape, direction, peer, id=f"{shape}-{direction}-{peer}")
        for shape in config.getoption("shapes")
        for direction in DIRECTIONS
        for peer in (*config.getoption("peers"), *((COPY,) if shape.large else ()))
    ]
    metafunc.parametrize(("shape", "direction", "peer"), cases)


@dataclass
class Runner:
    """Measures a case when its first peer is asked for and keeps the result for the others."""

    config: pytest.Config
    progress: Progress
    results: dict[tuple[Shape, Direction], CaseResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = len(self.config.getoption("shapes")) * len(DIRECTIONS)
        self.task = self.progress.add_task("kernels", total=total)

    def case(self, shape: Shape, direction: Direction) -> CaseResult:
        key = (shape, direction)
        if key not in self.results:
            rounds = self.config.getoption("rounds")
            done = len(self.results)
            self.progress.update(self.task, description=f"{shape} {direction}")
            self.results[key] = measure(
                shape,
                direction,
                self.config.getoption("peers"),
                time_cap=TIME_CAP if rounds is None else 0.0,
                **({} if rounds is None else {"min_rounds": rounds, "max_rounds": rounds}),
                on_round=lambda fraction: self.progress.update(self.task, completed=done + fraction),
            )
            self.progress.update(self.task, completed=done + 1)
            self.progress.console.print(summary(self.results[key]), highlight=False, soft_wrap=True)
        return self.results[key]


def summary(case: CaseResult) -> str:
    """One line on a measured case."""
    timings = case.timings
    ratios = ", ".join(f"{name} {timings.reference_over(name).p50:.2f}" for name in timings.rounds if name not in ("ours", COPY))
    mine = timings.seconds("ours")
    return f"{case.shape} {case.direction}: ours {mine.p50 * 1e3:.3f} ms, {mine.count} rounds; ours/peer: {ratios}"


ENVIRONMENT = pytest.StashKey[dict[str, Any]]()
UNAVAILABLE = pytest.StashKey[list[dict[str, str]]]()


@pytest.fixture(scope="session")
def runner(pytestconfig: pytest.Config) -> Iterator[Runner]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        runner = Runner(pytestconfig, progress)
        yield runner
        pytestconfig.stash[UNAVAILABLE] = [
            {"shape": str(case.shape), "direction": case.direction, "peer": peer, "reason": reason}
            for case in runner.results.values()
            for peer, reason in case.unavailable.items()
        ]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots between the progress lines."""
    if not (report.passed or report.skipped):
        return None
    return (report.outcome if report.when == "call" or report.skipped else "", "", "")


def pytest_configure(config: pytest.Config) -> None:
    # now, while the load average is still that of the other processes
    config.stash[ENVIRONMENT] = environment()


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return config.stash[ENVIRONMENT]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """List what could not be timed; drop the single timings, which would make the committed file large."""
    output_json["unavailable"] = config.stash.get(UNAVAILABLE, [])
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        benchmark["params"] = {name: str(value) for name, value in benchmark["params"].items()}
