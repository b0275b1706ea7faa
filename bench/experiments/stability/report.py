"""The report of a stability run: a table of clean test accuracies, and a plot of every seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.kernels.results import write_atomic
from bench.reporting import markdown_table, png

Lines = Sequence[dict[str, Any]]


def _ordered(lines: Lines, name: str) -> list[str]:
    return list(dict.fromkeys(line[name] for line in lines))


def cell(lines: Lines, name: str) -> str:
    """``97.1 +- 0.4 (3)``: mean, standard deviation and number of seeds."""
    values = [line[name] for line in lines]
    if not values:
        return "-"
    spread = f" +- {stdev(values):.1f}" if len(values) > 1 else ""
    failed = sum(bool(line["failed"]) for line in lines)
    return f"{mean(values):.1f}{spread}" + (f", {failed} failed" if failed else "")


def markdown(lines: Lines, plot: str) -> str:
    """The complete report."""
    tasks, methods = _ordered(lines, "task"), _ordered(lines, "method")
    parts = [
        "# What to do when determinants of single batches are noisy",
        "Fashion-MNIST, clean test accuracy in percent, mean and standard deviation over seeds. Cross entropy trains first; every "
        "method goes on from the same checkpoint on the same batches of 128. `selected`: at the epoch with the largest log|det| on "
        "noisy validation labels. The methods: `bench/experiments/stability/methods.py`.",
    ]
    for task in tasks:
        mine = [line for line in lines if line["task"] == task]
        seeds = sorted({line["seed"] for line in mine})
        rows = []
        for method in methods:
            found = [line for line in mine if line["method"] == method]
            if found:
                worst = f"{min(line['last'] for line in found):.1f}"
                lost = f"{mean(line['infinite_batches'] for line in found):.0f}"
                seconds = f"{mean(line['seconds'] for line in found):.0f}"
                rows.append((method, cell(found, "last"), worst, cell(found, "selected"), lost, str(len(found)), seconds))
        warm = cell(mine, "warm_up")
        parts += [
            f"## {task}",
            f"After cross entropy: {warm}. Seeds {', '.join(map(str, seeds))}; {mine[0]['epochs_ce']} epochs of cross entropy, "
            f"{mine[0]['epochs_dmi']} after it.",
            markdown_table(("method", "last", "worst seed", "selected", "infinite batches", "seeds", "seconds"), rows),
        ]
    return "\n\n".join([*parts, f"![accuracy by method]({plot})"]) + "\n"


def draw(lines: Lines) -> bytes:
    """One panel per task: the last accuracy of every seed, by method."""
    tasks, methods = _ordered(lines, "task"), _ordered(lines, "method")
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 0.32 * len(methods) + 1.6), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for row, method in enumerate(methods):
            values = [line["last"] for line in lines if line["task"] == task and line["method"] == method]
            axis.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6)
            if values:
                axis.plot([mean(values)], [row], "|", color="black", markersize=14)
        axis.set_title(task)
        axis.set_xlabel("clean test accuracy, %")
        axis.grid(True, axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(methods)), methods)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    return png(figure)


def write_report(lines: Lines, source: Path) -> list[Path]:
    """Write ``<name>.md`` and ``<name>.png`` next to the result file, and return both paths."""
    report, plot = source.with_suffix(".md"), source.with_suffix(".png")
    write_atomic(plot, draw(lines))
    write_atomic(report, markdown(lines, plot.name))
    return [report, plot]
