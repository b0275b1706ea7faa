"""The plots of a result of the GPU benchmark. They need matplotlib."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.gpu.goals import LARGE_ROWS, STEPS, step_bandwidth
from bench.gpu.results import Clock, Result
from bench.reporting import FAMILIES, plot_speedups


def plot_speedup(result: Result) -> Figure:
    """Peer over ours by class count, forward and backward, in the graphs and by the host's clock."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    cases = [case for case in result.cases() if case.dtype == "float32" and case.rows == LARGE_ROWS]
    cases = cases or [case for case in result.cases() if case.dtype == "float32"]
    clocks: tuple[Clock, Clock] = ("graph", "wall")
    for axis, clock in zip(axes, clocks, strict=True):
        for family in FAMILIES:
            points = [(c.classes, r.ours_over_peer) for c in cases if (r := result.fastest(c, "forward_backward", clock, family))]
            plot_speedups(axis, family, [(classes, ratio) for classes, ratio in points if ratio is not None])
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
    """The share of the copy's bandwidth that the steps reach; log|det| and inverse next to slogdet."""
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
