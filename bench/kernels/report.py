"""``python -m bench.kernels.report``: a result file as a markdown report with plots, written next to it.

It reads the result of ``python -m bench.kernels.run`` and, if there is one next to it, that of ``python -m bench.memory``.
It writes ``<name>.md``, ``<name>-speedup.png`` and ``<name>-roofline.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.kernels.cases import DIRECTIONS, Direction, Shape
from bench.kernels.measure import COPY
from bench.kernels.peers import PEERS
from bench.kernels.results import KERNELS_JSON, Record, RunResult, load_result, write_atomic
from bench.memory import MEMORY_JSON, MemoryResult, load_memory, memory_markdown
from bench.reporting import (
    FAMILIES,
    LABELS,
    Outcome,
    at_most,
    goals_markdown,
    markdown_table,
    plot_speedups,
    png,
    times_faster,
)

METHOD = (
    "All peers of a shape are timed round-robin in one run, in random order within a round; ratios are medians over "
    "the rounds of the ratio within a round, with their 20th and 80th percentiles. Shapes are rows x classes, logits "
    "in float32; large shapes rotate through buffers larger than the cache, small ones (overhead of a call) run on one "
    "thread. Forward alone runs without gradients."
)
DIGITS = ".1f"
"""How the table of goals prints a speed-up."""
BAR_NOTE = (
    "The bar is the fastest member of a family of peers: `cross_entropy` eager or compiled; `index_add` with `index_add_` or "
    "`scatter_add_`, joint in fp32 or fp64."
)


@dataclass(frozen=True)
class Goal:
    """For one shape, forward and backward: our time at most ``of_cross_entropy`` times that of ``cross_entropy``, and at most
    ``1 / over_index_add`` times that of ``index_add``."""

    shape: Shape
    of_cross_entropy: float
    over_index_add: float


GOALS = (
    *(Goal(Shape(65536, classes), of_cross_entropy=0.5, over_index_add=4.0) for classes in (10, 14, 100)),
    Goal(Shape(65536, 1000), of_cross_entropy=0.7, over_index_add=2.5),
    Goal(Shape(256, 14), of_cross_entropy=1.0, over_index_add=3.0),
)


def outcomes(result: RunResult) -> list[Outcome]:
    """Every speed goal against a result. The bar of a family is the member that ours compares worst with."""
    found: list[Outcome] = []
    for goal in GOALS:
        where = f"{goal.shape} {LABELS['forward_backward']}"
        of_cross_entropy, of_index_add = (
            result.fastest(goal.shape, "forward_backward", family) for family in ("cross_entropy", "index_add")
        )
        found.append(at_most(where, f"<= {goal.of_cross_entropy:g}x cross_entropy", of_cross_entropy, goal.of_cross_entropy))
        found.append(times_faster(where, f">= {goal.over_index_add:g}x index_add", of_index_add, goal.over_index_add, digits=DIGITS))
    for shape in result.shapes():
        for direction in DIRECTIONS:
            if result.find(shape, direction, "ours") is not None:
                record = result.fastest(shape, direction, "index_add")
                found.append(times_faster(f"{shape} {LABELS[direction]}", "never slower than index_add", record, 1.0, digits=DIGITS))
    return found


def speedup_markdown(result: RunResult) -> str:
    """The table of how many times faster ours is than each peer."""
    peers = [name for name in PEERS if name != "ours" and any(record.peer == name for record in result.records)]
    rows = []
    for direction in reversed(DIRECTIONS):
        for shape in result.shapes():
            mine = result.find(shape, direction, "ours")
            if mine is None:
                continue
            found = [result.find(shape, direction, peer) for peer in peers]
            cells = ["-" if record is None else f"{1 / record.ours_over_peer.p50:.2f}" for record in found]
            rows.append((str(shape), LABELS[direction], f"{mine.seconds.p50 * 1e3:.3g}", *cells))
    return markdown_table(("shape", "", "ours, ms", *peers), rows)


def bandwidth(result: RunResult, record: Record) -> float:
    """Bytes per second: of the copy, what it reads and writes; of a loss, the least traffic that it needs.

    The forward has to read the logits; forward and backward read them twice and write the gradient.
    """
    if record.peer == COPY:
        return 2 * result.environment["copy_bytes"] / record.seconds.p50
    return record.shape.logits_bytes * (1 if record.direction == "forward" else 3) / record.seconds.p50


def bandwidth_markdown(result: RunResult) -> str:
    """What ours and the copy of the same run achieved, in GB/s."""
    rows = []
    for shape in result.shapes():
        for direction in DIRECTIONS:
            mine, copied = result.find(shape, direction, "ours"), result.find(shape, direction, COPY)
            if mine is None or copied is None:
                continue
            ours_rate, copy_rate = bandwidth(result, mine), bandwidth(result, copied)
            cells = (f"{ours_rate / 1e9:.2f}", f"{copy_rate / 1e9:.2f}", f"{ours_rate / copy_rate:.0%}")
            elements = f"{shape.rows * shape.classes / mine.seconds.p50 / 1e9:.3f}"
            rows.append((str(shape), LABELS[direction], *cells, elements))
    return markdown_table(("shape", "", "ours, GB/s", "copy, GB/s", "share", "logits per ns"), rows)


def environment_markdown(result: RunResult) -> str:
    """One line on the date and the machine."""
    env = result.environment
    load = "unknown" if env["load_average"] is None else f"{env['load_average']:.1f}"
    return (
        f"Measured on {result.date[:10]}: {env['cpu']} ({env['isa']}), {env['threads']} threads, "
        f"load average at the start {load}, {env['system']}, "
        f"Python {env['python']}, torch {env['torch']}, ldmi_fast {env['ldmi_fast']} (engine `{env['engine']}`)."
    )


def report_markdown(result: RunResult, memory: MemoryResult | None, plots: Sequence[str]) -> str:
    """The complete report."""
    found = outcomes(result)
    judged = [outcome for outcome in found if outcome.met is not None]
    parts = [
        "# Speed and memory on the CPU",
        environment_markdown(result),
        METHOD,
        "## Goals",
        f"{sum(outcome.met is True for outcome in judged)} of {len(judged)} met.",
        goals_markdown(found),
        BAR_NOTE,
        "## How many times faster ours is",
        speedup_markdown(result),
        "\n".join(f"- {peer.name}: {peer.description}" for peer in PEERS.values() if peer.name != "ours"),
    ]
    if result.unavailable:
        parts.append("Not timed:")
        parts.append(
            "\n".join(
                f"- {item['peer']} at {item['shape']} {LABELS[item['direction']]}: {item['reason']}" for item in result.unavailable
            )
        )
    if large_rows(result) is not None:
        parts += ["## Bandwidth", bandwidth_markdown(result)]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    if memory is not None:
        parts += ["## Peak memory", memory_markdown(memory)]
    return "\n\n".join(parts) + "\n"


def large_rows(result: RunResult) -> int | None:
    """The row count whose class counts make the curves: the largest one timed."""
    return max((shape.rows for shape in result.shapes() if shape.large), default=None)


def plot_speedup(result: RunResult) -> Figure:
    """Speed-up over each family by class count, one panel per direction."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    rows = large_rows(result)
    shapes = [shape for shape in result.shapes() if shape.rows == rows]
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        for family in FAMILIES:
            points = [(s.classes, record.ours_over_peer) for s in shapes if (record := result.fastest(s, direction, family))]
            plot_speedups(axis, family, points)
        axis.axhline(1.0, color="black", linewidth=1, linestyle=":")
        log_classes(axis, shapes)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, which="both", alpha=0.25)
        axis.set_title({"forward": "forward", "forward_backward": "forward + backward"}[direction])
    axes[0].set_ylabel("peer's time / ours")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Speed-up of ldmi_fast by class count, N = {rows} (bars: p20 to p80)")
    return figure


def log_classes(axis: Axes, shapes: Sequence[Shape]) -> None:
    """A logarithmic class axis with a tick at each class count that was timed."""
    axis.set_xscale("log")
    axis.set_xticks([shape.classes for shape in shapes], [str(shape.classes) for shape in shapes], rotation=45)
    axis.minorticks_off()
    axis.set_xlabel("classes C")


def plot_roofline(result: RunResult) -> Figure:
    """Achieved bandwidth of ours against the copy's in the same run, and logits per nanosecond next to index_add and cross entropy."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows = large_rows(result)
    shapes = [shape for shape in result.shapes() if shape.rows == rows]
    classes = [shape.classes for shape in shapes]

    def curve(direction: Direction, peer: str, value: Callable[[Record], float]) -> list[float]:
        found = [result.find(shape, direction, peer) for shape in shapes]
        return [float("nan") if record is None else value(record) for record in found]

    def gigabytes(record: Record) -> float:
        return bandwidth(result, record) / 1e9

    for direction, color in zip(DIRECTIONS, ("tab:green", "tab:blue"), strict=True):
        left.plot(classes, curve(direction, "ours", gigabytes), marker="o", color=color, label=f"ours, {LABELS[direction]}")
        copies = curve(direction, COPY, gigabytes)
        left.plot(classes, copies, color=color, linestyle="--", label=f"copy in the same run ({LABELS[direction]} case)")
    left.set_ylabel("GB/s")
    left.set_title("Bandwidth: N*C*4 bytes forward, 3*N*C*4 with backward")

    def rate(record: Record) -> float:
        return record.shape.rows * record.shape.classes / record.seconds.p50 / 1e9

    timed = {record.peer for record in result.records}
    for peer, color in (
        ("ours", "tab:green"),
        ("cross_entropy", "tab:orange"),
        ("cross_entropy_compiled", "tab:red"),
        ("index_add", "tab:blue"),
    ):
        if peer not in timed:
            continue
        right.plot(classes, curve("forward_backward", peer, rate), marker="o", color=color, label=peer)
    right.set_ylabel("logits per ns, forward + backward")
    right.set_title("Throughput")
    for axis in (left, right):
        log_classes(axis, shapes)
        axis.set_ylim(bottom=0)
        axis.grid(True, alpha=0.25)
        axis.legend(frameon=False)
    figure.suptitle(f"Roofline of ldmi_fast, N = {rows}, float32")
    return figure


def write_report(kernels: Path, memory: Path | None) -> list[Path]:
    """Write the report and its plots next to the result file; returns the files written."""
    result = load_result(kernels)
    written: list[Path] = []
    if large_rows(result) is not None:
        for name, draw in (("speedup", plot_speedup), ("roofline", plot_roofline)):
            path = kernels.with_name(f"{kernels.stem}-{name}.png")
            write_atomic(path, png(draw(result)))
            written.append(path)
    text = report_markdown(result, None if memory is None else load_memory(memory), [path.name for path in written])
    report = kernels.with_suffix(".md")
    write_atomic(report, text)
    return [report, *written]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.report", description=__doc__)
    parser.add_argument("kernels", type=Path, nargs="?", default=KERNELS_JSON, help="default: %(default)s")
    parser.add_argument("--memory", type=Path, help=f"default: {MEMORY_JSON.name} next to the result, if it exists")
    options = parser.parse_args(arguments)
    if not options.kernels.exists():
        parser.error(f"no result file {options.kernels}: run `python -m bench.kernels.run` first")
    memory = options.memory
    if memory is None:
        neighbour = options.kernels.with_name(MEMORY_JSON.name)
        memory = neighbour if neighbour.exists() else None
    elif not memory.exists():
        parser.error(f"no memory result {memory}: run `python -m bench.memory` first")
    for path in write_report(options.kernels, memory):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
