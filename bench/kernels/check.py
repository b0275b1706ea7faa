"""``python -m bench.kernels.check``: the regression gate, on ratios.

It times a few shapes again and compares ours / peer with the same ratio in the last committed result. A ratio may be worse
by a noise margin: twice the spread (half of p20 to p80, relative) of the two measurements together, at least ``FLOOR``,
at most ``CEILING``. A ratio that looks worse is measured once more, and fails only if it is worse again.

Exit status: 0 no regression, 1 a regression, 2 nothing to compare with.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.kernels.cases import Direction, Shape
from bench.kernels.interleave import Quantiles
from bench.kernels.measure import measure
from bench.kernels.results import (
    KERNELS_JSON,
    Record,
    RunResult,
    busy_warning,
    committed_text,
    environment,
    parse_result,
    records_of,
)

SHAPES = (Shape(256, 14), Shape(65536, 10), Shape(65536, 14), Shape(65536, 100), Shape(65536, 1000))
DIRECTION: Direction = "forward_backward"
PEERS = ("ours", "index_add", "cross_entropy")
"""Eager peers only: compiling would take longer than measuring. A ratio is compared with that of the same peer."""
TIME_CAP = 4.0

FLOOR = 0.15
"""Two runs of the same code differ by several per cent in their median ratios, more on a shared machine."""
OTHER_MACHINE_FLOOR = 0.40
"""The same where the committed result is from another CPU, instruction set or thread count: ratios differ there."""
CEILING = 0.60
"""The largest margin, however noisy the measurement: one that would let more than this pass shows nothing, and should fail."""
MACHINE_KEYS = ("cpu", "isa", "threads")


@dataclass(frozen=True)
class Verdict:
    """One ratio (ours / peer, smaller is better) against the committed one."""

    shape: Shape
    peer: str
    committed: Quantiles
    measured: Quantiles
    margin: float

    @property
    def limit(self) -> float:
        """The largest ratio that passes."""
        return self.committed.p50 * (1 + self.margin)

    @property
    def worse(self) -> bool:
        """Whether the measured ratio is above the limit."""
        return self.measured.p50 > self.limit


def noise_margin(committed: Quantiles, measured: Quantiles, floor: float) -> float:
    """How much worse, relative, a ratio may be before it counts as a regression."""
    return min(CEILING, max(floor, 2 * math.hypot(committed.spread, measured.spread)))


def compare(baseline: RunResult, records: Sequence[Record], floor: float) -> list[Verdict]:
    """A verdict for each record that the baseline has too, our own times left out."""
    verdicts = []
    for record in records:
        before = baseline.find(record.shape, record.direction, record.peer)
        if before is None or record.peer not in PEERS or record.peer == "ours":
            continue
        margin = noise_margin(before.ours_over_peer, record.ours_over_peer, floor)
        verdicts.append(Verdict(record.shape, record.peer, before.ours_over_peer, record.ours_over_peer, margin))
    return verdicts


def better_of(first: Sequence[Verdict], second: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts of ``first``, each replaced by that of ``second`` where it has one that is better."""
    later = {(verdict.shape, verdict.peer): verdict for verdict in second}

    def excess(verdict: Verdict) -> float:
        return verdict.measured.p50 / verdict.limit

    return [min(verdict, later.get((verdict.shape, verdict.peer), verdict), key=excess) for verdict in first]


def floor_for(baseline: dict[str, Any], current: dict[str, Any]) -> float:
    """The floor of the margin: wider where the committed result comes from another kind of machine."""
    same = all(baseline.get(key) == current.get(key) for key in MACHINE_KEYS)
    return FLOOR if same else OTHER_MACHINE_FLOOR


def measure_records(shapes: Sequence[Shape], time_cap: float, console: Console) -> list[Record]:
    """Time ``shapes`` with a progress bar."""
    records: list[Record] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("check", total=len(shapes))
        for index, shape in enumerate(shapes):
            progress.update(task, description=str(shape))

            def advance(fraction: float, done: int = index) -> None:
                progress.update(task, completed=done + fraction)

            records += records_of(measure(shape, DIRECTION, PEERS, time_cap=time_cap, min_rounds=5, on_round=advance))
            progress.update(task, completed=index + 1)
    return records


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """One row per ratio: committed, measured, the limit and the outcome."""
    table = Table(title="ours / peer, forward + backward, median of per-round ratios (smaller is better)")
    for column in ("shape", "peer", "committed", "measured", "change", "limit", "margin", "outcome"):
        table.add_column(column, justify="right", no_wrap=True)
    for verdict in verdicts:
        table.add_row(
            str(verdict.shape),
            verdict.peer,
            f"{verdict.committed.p50:.3f}",
            f"{verdict.measured.p50:.3f}",
            f"{verdict.measured.p50 / verdict.committed.p50 - 1:+.0%}",
            f"{verdict.limit:.3f}",
            f"{verdict.margin:.0%}",
            "[red]WORSE[/red]" if verdict.worse else "ok",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.check", description=__doc__)
    parser.add_argument("--baseline", type=Path, default=KERNELS_JSON, help="result file to compare with")
    parser.add_argument("--time-cap", type=float, default=TIME_CAP, help="seconds of timing a shape (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console()
    console.width = max(console.width, 100)
    found = committed_text(options.baseline)
    if found is None:
        console.print(f"no result {options.baseline.name} to compare with: run `python -m bench.kernels.run` and commit it")
        return 2
    text, source = found
    baseline = parse_result(text, source)
    current = environment()
    floor = floor_for(baseline.environment, current)
    console.print(f"against {source}, of {baseline.date[:10]}; margin at least {floor:.0%}")
    warning = busy_warning()
    if warning:
        console.print(f"  {warning}")
    for key in ("cpu", "isa", "threads", "torch", "engine"):
        if baseline.environment.get(key) != current[key]:
            console.print(f"  {key} differs: {baseline.environment.get(key)!r} then, {current[key]!r} now")
    shapes = [shape for shape in SHAPES if shape in baseline.shapes()]
    for shape in SHAPES:
        if shape not in shapes:
            console.print(f"  {shape} is not in the committed result: not compared")
    verdicts = compare(baseline, measure_records(shapes, options.time_cap, console), floor)
    if not verdicts:
        console.print(f"{source} has none of the shapes {', '.join(map(str, SHAPES))}: nothing compared")
        return 2
    suspects = sorted({verdict.shape for verdict in verdicts if verdict.worse})
    if suspects:
        console.print(verdict_table(verdicts))
        console.print(f"measuring once more: {', '.join(map(str, suspects))}")
        verdicts = better_of(verdicts, compare(baseline, measure_records(suspects, options.time_cap, console), floor))
    console.print(verdict_table(verdicts))
    return 1 if any(verdict.worse for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
