"""``python -m bench.gpu.report FILE``: a result of the GPU benchmark as a markdown report with plots, written next to it.

It needs no GPU, and draws the plots where matplotlib is installed. It writes ``<name>.md``, ``<name>-speedup.png`` and
``<name>-bandwidth.png``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.cases import HOT_BYTES, Case
from bench.gpu.floor import factorise_seconds, floor
from bench.gpu.goals import STEPS, goal_bytes, logdet_text, microseconds, outcomes, step_bandwidth, step_floor
from bench.gpu.results import CLOCKS, Clock, Result, load
from bench.kernels.cases import DIRECTIONS
from bench.kernels.peers import PEERS
from bench.kernels.results import write_atomic
from bench.reporting import LABELS, goals_markdown, markdown_table, png

METHOD = (
    "All functions of a line are timed in turn in one run, in random order; ratios are medians of the ratios within a round, "
    "with their 20th and 80th percentiles. `graph`: replays of a CUDA graph of calls, logits rotating through more than twice the "
    "level 2 cache where they are large and in the cache where they are small. `device`: events round one eager call with a cold "
    "cache, the host far ahead. `wall`: the host's clock over eager calls in a row. `cross_entropy` and `index_add` stand for the "
    "fastest member of their family; "
    "the compiled ones are timed forward and backward at the shapes that have a goal."
)


def times_markdown(result: Result, clock: Clock) -> str:
    """Ours in microseconds, and how many times as long each peer takes."""
    rows_of = [row for row in result.rows if row.what == "loss" and row.clock == clock]
    peers = list(dict.fromkeys(row.peer for row in rows_of if row.peer != "ours"))
    rows = []
    for case in result.cases():
        for direction in reversed(DIRECTIONS):
            mine = result.find(case, direction, clock, "ours")
            if mine is None:
                continue
            found = [result.find(case, direction, clock, peer) for peer in peers]
            ratios = [row.ours_over_peer if row is not None else None for row in found]
            cells = ["-" if ratio is None else f"{1 / ratio.p50:.2f}" for ratio in ratios]
            rows.append((str(case), LABELS[direction], f"{mine.seconds.p50 * 1e6:.4g}", *cells))
    return markdown_table(("shape", "", "ours, us", *peers), rows)


def steps_markdown(result: Result) -> str:
    """The share of the copy's bandwidth that the steps reach, and their time next to the model's."""
    bandwidth = result.bandwidth()
    rows = []
    for case in result.cases("step"):
        for step in STEPS:
            engines = [r for r in result.rows if r.what == "step" and r.case == case and r.direction == step and r.family == "engine"]
            for row in engines:
                rate = step_bandwidth(row)
                share = "-" if bandwidth is None else f"{rate / bandwidth:.0%}"
                model = "-" if bandwidth is None else f"{step_floor(case, step, bandwidth) * 1e6:.2f}"
                where = "cache" if case.logits_bytes <= HOT_BYTES else "memory"
                rows.append((str(case), step, row.peer, microseconds(row), model, f"{rate / 1e9:.0f}", share, where))
    return markdown_table(("shape", "step", "engine", "time (p20-p80)", "model, us", "GB/s", "of copy", "from"), rows)


def complete_markdown(result: Result) -> str:
    """The complete operation next to the complete model, factorisation included."""
    bandwidth = result.bandwidth()
    rows = []
    for case in result.cases():
        for direction in DIRECTIONS:
            row = result.find(case, direction, "graph", "ours")
            if row is None or bandwidth is None:
                continue
            model = floor(case.rows, case.classes, case.torch_dtype.itemsize, direction)
            seconds = model.seconds(bandwidth)
            rows.append(
                (
                    str(case),
                    LABELS[direction],
                    microseconds(row),
                    f"{seconds * 1e6:.2f}",
                    f"{row.seconds.p50 / seconds:.2f}x",
                    f"{model.launches}",
                    f"{model.bytes / 1e6:.2f}",
                    f"{model.factorise * 1e6:.1f}",
                )
            )
    header = ("shape", "", "ours, graph", "model, us", "over it", "launches", "MB", "T_LU, us")
    return markdown_table(header, rows)


def logdet_markdown(result: Result) -> str:
    """log|det| and inverse alone."""
    peers = list(dict.fromkeys(row.peer for row in result.rows if row.what == "logdet" and row.peer != "ours"))
    rows = []
    for case in result.cases("logdet"):
        for clock in ("device", "graph"):
            mine = result.find(case, "logdet_inverse", clock, "ours", "logdet")
            if mine is None:
                continue
            found = [result.find(case, "logdet_inverse", clock, peer, "logdet") for peer in peers]
            ratios = [row.ours_over_peer if row is not None else None for row in found]
            cells = ["-" if ratio is None else f"{1 / ratio.p50:.2f}" for ratio in ratios]
            floor_text = f"{factorise_seconds(case.classes) * 1e6:.3g}" if case.rows == case.classes else "-"
            rows.append((logdet_text(case), clock, microseconds(mine), floor_text, *cells))
    return markdown_table(("", "clock", "ours", "goal of T_LU, us", *peers), rows)


def memory_markdown(result: Result) -> str:
    """Peak bytes beyond the inputs."""
    peers = list(dict.fromkeys(peak.peer for peak in result.peaks))
    cases = list(dict.fromkeys(Case(peak.rows, peak.classes, peak.dtype) for peak in result.peaks))
    rows = []
    for case in cases:
        peaks = {p.peer: p for p in result.peaks if (p.rows, p.classes, p.dtype) == (case.rows, case.classes, case.dtype)}
        cells = [f"{peaks[peer].extra_bytes / 1e6:.1f}" if peer in peaks else "-" for peer in peers]
        goal = f"{goal_bytes(peaks['ours']) / 1e6:.1f}" if "ours" in peaks else "-"
        rows.append((str(case), f"{case.logits_bytes / 1e6:.1f}", *cells, goal))
    return markdown_table(("shape", "dZ, MB", *peers, "goal for ours"), rows)


def machine_markdown(result: Result) -> str:
    """One line on the machine, the date and the versions."""
    machine = result.machine
    gpu, smi = machine.get("gpu"), machine.get("nvidia_smi") or {}
    bandwidth = result.bandwidth()
    parts = [
        f"{gpu['name']} ({gpu['multiprocessors']} SMs, {gpu['l2_bytes'] / 2**20:.0f} MiB of level 2 cache)" if gpu else "no GPU",
        f"driver {smi['driver_version']}" if "driver_version" in smi else "",
        f"clocks at the start {smi['clocks.sm']} and {smi['clocks.mem']} of memory" if "clocks.sm" in smi else "",
        f"copy bandwidth in the run {bandwidth / 1e9:.0f} GB/s" if bandwidth else "",
        f"Python {machine['python']}, torch {machine['torch']}, triton {machine['triton']}, nvcc {machine['nvcc'] or 'none'}",
        f"ldmi_fast {machine['ldmi_fast']} (engine `{machine['engine']}`, sources {machine['source_hash'][:12]})",
    ]
    return f"Measured on {result.date[:10]}: " + ", ".join(part for part in parts if part) + "."


def report_markdown(result: Result, plots: Sequence[str]) -> str:
    """The complete report."""
    found = outcomes(result)
    judged = [outcome for outcome in found if outcome.met is not None]
    parts = ["# Speed and memory on a GPU"]
    if result.rehearsal or result.machine.get("gpu") is None:
        parts.append("**A rehearsal on the CPU at tiny shapes. No GPU ran any of this, and the times mean nothing.**")
    parts += [
        machine_markdown(result),
        METHOD,
        "## Goals",
        f"{sum(outcome.met is True for outcome in judged)} of {len(judged)} met, {len(found) - len(judged)} not measured.",
        goals_markdown(found),
    ]
    for clock in CLOCKS:
        parts += [f"## How many times as long the peers take, clock `{clock}`", times_markdown(result, clock)]
    parts.append("\n".join(f"- {peer.name}: {peer.description}" for peer in PEERS.values() if peer.name != "ours"))
    parts += ["## The steps, and the bandwidth that they reach", steps_markdown(result)]
    parts += ["## The complete operation next to its model", complete_markdown(result)]
    parts += ["## log|det| and inverse alone, and how many times as long torch's paths to them take", logdet_markdown(result)]
    if result.peaks:
        parts += ["## Peak memory beyond the inputs, MB", memory_markdown(result)]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    if result.left_out:
        parts.append("## Left out")
        parts.append("\n".join(f"- {item['where']}: {item['what']}: {item['reason']}" for item in result.left_out))
    return "\n\n".join(parts) + "\n"


def write_report(path: Path) -> list[Path]:
    """Write the report, and the plots where matplotlib is there; returns the files written."""
    result = load(path)
    written: list[Path] = []
    if importlib.util.find_spec("matplotlib") is not None:
        from bench.gpu.plots import plot_bandwidth, plot_speedup

        for name, draw in (("speedup", plot_speedup), ("bandwidth", plot_bandwidth)):
            plot = path.with_name(f"{path.stem}-{name}.png")
            write_atomic(plot, png(draw(result)))
            written.append(plot)
    report = path.with_suffix(".md")
    write_atomic(report, report_markdown(result, [plot.name for plot in written]))
    return [report, *written]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.report", description=__doc__)
    parser.add_argument("result", type=Path, help="gpu.json, as `python -m bench.gpu` writes it")
    options = parser.parse_args(arguments)
    if not options.result.exists():
        parser.error(f"no result file {options.result}: run bench/gpu/run.sh on a machine with a GPU first")
    for path in write_report(options.result):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
