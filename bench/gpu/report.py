"""``python -m bench.gpu.report FILE``: a result of the GPU benchmark as a markdown report with plots, written next to it.

Needs no GPU, and draws the plots where matplotlib is installed. Writes ``<name>.md``, ``<name>-speedup.png`` and
``<name>-bandwidth.png``.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu.cases import HOT_BYTES, Case
from bench.gpu.floor import factorise_seconds, floor, minimal_bytes
from bench.gpu.results import CLOCKS, Clock, Peak, Result, Row, load
from bench.kernels.cases import DIRECTIONS
from bench.kernels.interleave import Quantiles
from bench.kernels.peers import PEERS
from bench.kernels.results import write_atomic
from bench.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOTHING = Case(256, 14)
LARGE_BYTES = 256_000_000
LARGE_ROWS = 65536
FEW_CLASSES = 100
LOGDET_GOALS = {100: 10.0, 1000: 5.0, 4096: 3.0, 10000: 2.0}
LOGDET_FAMILIES = ("slogdet", "inv", "lu")
SAME = 0.03
"""Two that do the same work, as torch's LU and ours by it, may differ by so much."""
STEPS = ("joint", "logits_grad")
LABELS = {"forward": "fwd", "forward_backward": "fwd+bwd"}

METHOD = (
    "All functions of a line are timed in turn in one run, in random order; ratios are medians of the ratios within a round, "
    "with their 20th and 80th percentiles. `graph`: replays of a CUDA graph of calls, logits rotating through more than twice the "
    "level 2 cache where they are large and in the cache where they are small. `device`: events round one eager call with a cold "
    "cache, the host far ahead. `wall`: the host's clock over eager calls in a row. E and D stand for the fastest of their family; "
    "the compiled ones are timed forward and backward at the shapes that have a goal."
)


@dataclass(frozen=True)
class Outcome:
    """One goal and what was measured; ``met`` is None where nothing was."""

    where: str
    goal: str
    clock: str
    measured: str
    met: bool | None


def quantiles_text(value: Quantiles, digits: int = 2) -> str:
    """``0.45x (0.43-0.48)``."""
    return f"{value.p50:.{digits}f}x ({value.p20:.{digits}f}-{value.p80:.{digits}f})"


def inverse_text(value: Quantiles) -> str:
    """How many times faster ours is."""
    return f"{1 / value.p50:.3g}x ({1 / value.p80:.3g}-{1 / value.p20:.3g})"


def microseconds(row: Row) -> str:
    """Median, p20 and p80 in microseconds."""
    seconds = row.seconds
    return f"{seconds.p50 * 1e6:.2f} us ({seconds.p20 * 1e6:.2f}-{seconds.p80 * 1e6:.2f})"


def at_most(result: Result, case: Case, clock: Clock, family: str, limit: float) -> Outcome:
    """Ours takes at most ``limit`` times as long as the fastest of a family."""
    row = result.fastest(case, "forward_backward", clock, family)
    where, goal = f"{case} fwd+bwd", f"<= {limit:g}x {family}"
    if row is None or row.ours_over_peer is None:
        return Outcome(where, goal, clock, "not measured", None)
    return Outcome(where, goal, clock, f"{quantiles_text(row.ours_over_peer)} of {row.peer}", row.ours_over_peer.p50 <= limit)


def faster(result: Result, case: Case, direction: str, clock: Clock, family: str, times: float, goal: str = "") -> Outcome:
    """Ours is at least so many times as fast as the fastest of a family."""
    row = result.fastest(case, direction, clock, family)
    where, goal = f"{case} {LABELS[direction]}", goal or f">= {times:g}x {family}"
    if row is None or row.ours_over_peer is None:
        return Outcome(where, goal, clock, "not measured", None)
    return Outcome(where, goal, clock, f"{inverse_text(row.ours_over_peer)} of {row.peer}", 1 / row.ours_over_peer.p50 >= times)


def launch_outcomes(result: Result) -> list[Outcome]:
    """One launch each way at Clothing1M's batch."""
    found = {
        entry.direction: entry
        for entry in result.launches
        if (entry.rows, entry.classes, entry.dtype, entry.peer) == (CLOTHING.rows, CLOTHING.classes, CLOTHING.dtype, "ours")
    }
    goal = "one launch forward, one backward"
    if set(found) != set(DIRECTIONS):
        return [Outcome(str(CLOTHING), goal, "-", "not measured", None)]
    forward, both = found["forward"], found["forward_backward"]
    counts = (forward.kernels + forward.others, both.kernels + both.others - forward.kernels - forward.others)
    return [Outcome(str(CLOTHING), goal, "-", f"{counts[0]} and {counts[1]}", counts == (1, 1))]


def step_outcomes(result: Result) -> list[Outcome]:
    """joint and logits_grad of the engine that runs: a share of the copy's bandwidth where they are large, else near the model."""
    found: list[Outcome] = []
    bandwidth = result.bandwidth()
    engine = str(result.machine.get("engine"))
    for case in result.cases("step"):
        rows = {step: result.find(case, step, "graph", engine, "step") for step in STEPS}
        if bandwidth is None or any(row is None for row in rows.values()):
            found.append(Outcome(str(case), "bandwidth or model", "graph", "not measured", None))
        elif case.logits_bytes >= LARGE_BYTES:
            for step, row in rows.items():
                assert row is not None
                share = step_bandwidth(row) / bandwidth
                found.append(Outcome(f"{case} {step}", ">= 90% of copy bandwidth", "graph", f"{share:.0%}", share >= 0.9))
        else:
            spent = sum(row.seconds.p50 for row in rows.values() if row is not None)
            model = sum(step_floor(case, step, bandwidth) for step in STEPS)
            text = f"{spent / model:.2f}x ({spent * 1e6:.1f} us, model {model * 1e6:.1f} us)"
            found.append(Outcome(f"{case} {' + '.join(STEPS)}", "<= 1.2x the model", "graph", text, spent <= 1.2 * model))
    return found


def step_floor(case: Case, step: str, bandwidth: float) -> float:
    """The model's seconds of one step."""
    assert step in ("joint", "logits_grad")
    return floor(case.rows, case.classes, case.torch_dtype.itemsize, step).seconds(bandwidth)


def step_bandwidth(row: Row) -> float:
    """Bytes per second that a step moved, counting the logits and the gradient alone."""
    assert row.direction in ("joint", "logits_grad")
    return minimal_bytes(row.rows, row.classes, row.case.torch_dtype.itemsize, row.direction) / row.seconds.p50


def logdet_outcomes(result: Result) -> list[Outcome]:
    """log|det| and inverse against slogdet and its backward, the faster of fp32 and fp64; nowhere slower than any way of torch's."""
    found = []
    for classes, times in LOGDET_GOALS.items():
        case = Case(classes, classes, "float64")
        row = result.fastest(case, "logdet_inverse", "device", "slogdet", "logdet")
        goal = f">= {times:g}x slogdet + backward"
        if row is None or row.ours_over_peer is None:
            found.append(Outcome(f"C = {classes}", goal, "device", "not measured", None))
        else:
            text = f"{inverse_text(row.ours_over_peer)} of {row.peer}"
            found.append(Outcome(f"C = {classes}", goal, "device", text, 1 / row.ours_over_peer.p50 >= times))
    for case in result.cases("logdet"):
        rows = [result.fastest(case, "logdet_inverse", "device", family, "logdet") for family in LOGDET_FAMILIES]
        ratios = [(row.ours_over_peer, row.peer) for row in rows if row is not None and row.ours_over_peer is not None]
        if ratios:
            ratio, peer = max(ratios, key=lambda pair: pair[0].p50)
            text = f"{inverse_text(ratio)} of {peer}"
            found.append(Outcome(logdet_text(case), "never slower than torch", "device", text, ratio.p50 <= 1 + SAME))
    return found


def logdet_text(case: Case) -> str:
    """How many matrices of how many classes."""
    count = case.rows // case.classes
    return f"C = {case.classes}" if count == 1 else f"C = {case.classes}, {count} at once"


def goal_bytes(peak: Peak) -> float:
    """The goal for ours: 1.05 (dZ + 16 C^2 + 16 N) + 4 MB."""
    logits = Case(peak.rows, peak.classes, peak.dtype).logits_bytes
    return 1.05 * (logits + 16 * peak.classes**2 + 16 * peak.rows) + 4e6


def outcomes(result: Result) -> list[Outcome]:
    """Every goal on a GPU against a result."""
    found = launch_outcomes(result)
    row = result.find(CLOTHING, "forward_backward", "graph", "ours")
    text, met = ("not measured", None) if row is None else (microseconds(row), row.seconds.p50 <= 10e-6)
    found.append(Outcome(f"{CLOTHING} fwd+bwd", "<= 10 us", "graph", text, met))
    found.append(at_most(result, CLOTHING, "wall", "E", 1.0))
    found.append(faster(result, CLOTHING, "forward_backward", "wall", "B", 10.0))
    found += step_outcomes(result)
    for case in result.cases():
        if case.rows >= LARGE_ROWS and case.classes <= FEW_CLASSES:
            for clock in ("graph", "wall"):
                found += [
                    at_most(result, case, clock, "E", 1.0),
                    faster(result, case, "forward_backward", clock, "D", 5.0),
                ]
    found += logdet_outcomes(result)
    for case in result.cases():
        for direction in DIRECTIONS:
            for clock in CLOCKS:
                if result.find(case, direction, clock, "ours") is not None:
                    found.append(faster(result, case, direction, clock, "D", 1.0, "never slower than D"))
    for peak in result.peaks:
        if peak.peer == "ours":
            text = f"{peak.extra_bytes / 1e6:.1f} MB of {goal_bytes(peak) / 1e6:.1f}"
            case = Case(peak.rows, peak.classes, peak.dtype)
            found.append(Outcome(str(case), "peak memory", "-", text, peak.extra_bytes <= goal_bytes(peak)))
    return found


def goals_markdown(found: Sequence[Outcome]) -> str:
    """The table of goals."""
    verdicts = {True: "yes", False: "**no**", None: "-"}
    rows = [(o.where, o.goal, o.clock, o.measured, verdicts[o.met]) for o in found]
    return markdown_table(("where", "goal", "clock", "measured (p20-p80)", "met"), rows)


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
    """What the steps reach of the copy's bandwidth, and their time beside the model."""
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


def whole_markdown(result: Result) -> str:
    """The whole operation beside the whole model, factorisation included."""
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
    """On what, when and with which versions."""
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
    """The whole report."""
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
    parts += ["## The whole operation beside its model", whole_markdown(result)]
    parts += ["## log|det| and inverse alone, and how many times as long torch's ways to them take", logdet_markdown(result)]
    if result.peaks:
        parts += ["## Peak memory beyond the inputs, MB", memory_markdown(result)]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    if result.left_out:
        parts.append("## Left out")
        parts.append("\n".join(f"- {item['where']}: {item['what']}: {item['reason']}" for item in result.left_out))
    return "\n\n".join(parts) + "\n"


FAMILIES = {
    "A": ("A: published formula", "tab:gray", "o"),
    "B": ("B: one-hot + slogdet", "tab:brown", "v"),
    "D": ("D: best eager index_add/scatter_add", "tab:blue", "s"),
    "Dc": ("Dc: D compiled", "tab:cyan", "^"),
    "E": ("E: cross-entropy, better of eager and compiled", "tab:orange", "D"),
}


def plot_speedup(result: Result) -> Figure:
    """Peer over ours by class count, forward and backward, in the graphs and by the host's clock."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    cases = [case for case in result.cases() if case.dtype == "float32" and case.rows == LARGE_ROWS]
    cases = cases or [case for case in result.cases() if case.dtype == "float32"]
    clocks: tuple[Clock, Clock] = ("graph", "wall")
    for axis, clock in zip(axes, clocks, strict=True):
        for family, (label, color, marker) in FAMILIES.items():
            points = [(c.classes, r.ours_over_peer) for c in cases if (r := result.fastest(c, "forward_backward", clock, family))]
            values = [(classes, ratio) for classes, ratio in points if ratio is not None]
            if not values:
                continue
            middle = [1 / ratio.p50 for _, ratio in values]
            below = [1 / ratio.p50 - 1 / ratio.p80 for _, ratio in values]
            above = [1 / ratio.p20 - 1 / ratio.p50 for _, ratio in values]
            classes = [count for count, _ in values]
            axis.errorbar(classes, middle, yerr=(below, above), color=color, marker=marker, markersize=5, capsize=3, label=label)
        axis.axhline(1.0, color="black", linewidth=1, linestyle=":")
        counts = sorted({case.classes for case in cases})
        if counts:
            axis.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(counts, [str(count) for count in counts], rotation=45)
        axis.minorticks_off()
        axis.set_xlabel("classes C")
        axis.set_title(f"forward + backward, {clock}")
        axis.grid(True, alpha=0.25)
    axes[0].set_ylabel("peer's time / ours")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    rows = cases[0].rows if cases else LARGE_ROWS
    figure.suptitle(f"Speed-up of ldmi_fast by class count, N = {rows}, fp32 (bars: p20 to p80)")
    return figure


def plot_bandwidth(result: Result) -> Figure:
    """What the steps reach of the copy's bandwidth; log|det| and inverse beside slogdet."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    engine = str(result.machine.get("engine"))
    for step, color in zip(STEPS, ("tab:green", "tab:blue"), strict=True):
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            found = [(case, result.find(case, step, "graph", engine, "step")) for case in result.cases("step") if case.dtype == dtype]
            points = sorted((case.logits_bytes / 1e6, step_bandwidth(row) / 1e9) for case, row in found if row is not None)
            if points:
                left.plot(*zip(*points, strict=True), marker="o", color=color, linestyle=style, label=f"{step}, {dtype}")
    bandwidth = result.bandwidth()
    if bandwidth is not None:
        left.axhline(bandwidth / 1e9, color="black", linestyle=":", label="copy in the same run")
    left.set_xscale("log")
    left.set_xlabel("logits, MB (below 1: in the cache)")
    left.set_ylabel("GB/s")
    left.set_title("Bandwidth: N*C*b forward, 2*N*C*b backward")
    for peer in dict.fromkeys(row.peer for row in result.rows if row.what == "logdet"):
        single = [case for case in result.cases("logdet") if case.rows == case.classes]
        found = [(case, result.find(case, "logdet_inverse", "device", peer, "logdet")) for case in single]
        points = sorted((case.classes, row.seconds.p50 * 1e6) for case, row in found if row is not None)
        if points:
            right.plot(*zip(*points, strict=True), marker="o", label=peer)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("classes C")
    right.set_ylabel("us")
    right.set_title("log|det| and inverse")
    for axis in (left, right):
        axis.grid(True, alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as PNG; closes it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def write_report(path: Path) -> list[Path]:
    """Write the report, and the plots where matplotlib is there; returns the files written."""
    result = load(path)
    written: list[Path] = []
    if importlib.util.find_spec("matplotlib") is not None:
        import matplotlib

        matplotlib.use("Agg")
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
