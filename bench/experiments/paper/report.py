"""The report of result files: tables of clean test accuracy, every row where ours loses, and plots with the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.experiments.paper.methods import METHODS
from bench.experiments.paper.sets import EXPERIMENTS
from bench.kernels.results import write_atomic
from bench.reporting import markdown_table, png

Lines = Sequence[dict[str, Any]]

OURS = "dmi"
#: Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


#: Where no accuracy over the classes differs from that over the samples by more, there is no second table.
_BALANCED = 0.05


def _values(lines: Lines, method: str, what: str) -> list[float]:
    return [line[what] for line in lines if line["method"] == method and what in line]


def measures(lines: Lines) -> dict[str, str]:
    """What there is a table of: the key in a line, and the title."""
    found = {"last": "last epoch", "selected": "epoch picked on noisy validation labels"}
    if any(abs(line["last_balanced"] - line["last"]) > _BALANCED for line in lines if "last_balanced" in line):
        found["last_balanced"] = "last epoch, balanced over the classes"
        found["selected_balanced"] = "epoch picked on noisy validation labels, balanced over the classes"
    for name, title in (("best_threshold", "at the best threshold"), ("balanced_threshold", "at the balanced threshold")):
        if any(f"selected_{name}" in line for line in lines):
            found[f"selected_{name}"] = f"epoch picked on noisy validation labels, {title}"
    return found


def summary(values: Sequence[float]) -> str:
    """``97.1 ± 0.4``: mean and standard deviation over seeds."""
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def interval(values: Sequence[float]) -> str:
    """``97.1 [96.5, 97.7]``: mean and the 95 % interval of the mean by Student's t."""
    if len(values) < 2:
        return summary(values)
    half = _STUDENT[min(len(values) - 2, len(_STUDENT) - 1)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.1f} [{mean(values) - half:.1f}, {mean(values) + half:.1f}]"


def noises(lines: Lines) -> list[str]:
    """The kinds of noise in the lines, in the order of the experiment; runs without noise belong to all of them."""
    present = list(dict.fromkeys(line["noise"] for line in lines if line["noise"] != "clean"))
    known = [noise for noise in EXPERIMENTS[lines[0]["set"]].noises if noise in present]
    return known + [noise for noise in present if noise not in known] or ["clean"]


def rows_of(lines: Lines, noise: str) -> list[tuple[float | None, Lines]]:
    """(amount, its runs) of a kind of noise, rising."""
    mine = [line for line in lines if line["noise"] in (noise, "clean") and (line["r"] is not None or line["noise"] == noise)]
    if any(line["r"] is None for line in mine):
        mine = [line for line in mine if line["noise"] == noise]
    return [
        (r, [line for line in mine if line["r"] == r])
        for r in sorted({line["r"] for line in mine}, key=lambda r: -1 if r is None else r)
    ]


def losses(lines: Lines, methods: Sequence[str], what: str) -> list[str]:
    """In words, every row where a counterpart's mean is above ours, with the difference, and whether the spread covers it."""
    found = []
    for noise in noises(lines):
        for r, runs in rows_of(lines, noise):
            ours = _values(runs, OURS, what)
            for method in methods:
                theirs = _values(runs, method, what)
                if method in (OURS, "fw-true") or not ours or not theirs or mean(theirs) <= mean(ours):
                    continue
                spread = math.hypot(*(stdev(values) if len(values) > 1 else 0.0 for values in (ours, theirs)))
                difference = mean(theirs) - mean(ours)
                where = f"noise {noise}" + ("" if r is None else f", r = {r:g}")
                verdict = "within" if difference <= spread else "beyond"
                found.append(f"- {where}: {method} by {difference:.1f} points, {verdict} the spread ({spread:.1f}).")
    return found


def section(name: str, lines: Lines) -> list[str]:
    """The section of one data set."""
    methods = [method for method in METHODS if any(line["method"] == method for line in lines)]
    recipe = lines[0]["recipe"]
    paper = EXPERIMENTS[name].paper
    as_published = (recipe["epochs_first"], recipe["epochs"]) == (paper.epochs_first, paper.epochs)
    schedule = ", as the paper" if as_published else f"; the paper: {paper.epochs_first} and {paper.epochs}"
    parts = [
        f"## {name}",
        f"{recipe['epochs_first']} epochs of cross entropy at a rate of {recipe['lr_first']:g}, then {recipe['epochs']} of the "
        f"method at {recipe['lr']:g}, batches of {recipe['batch_size']}{schedule}. "
        f"Seeds {', '.join(map(str, sorted({line['seed'] for line in lines})))}.",
    ]
    for noise in noises(lines):
        rows = rows_of(lines, noise)
        for what, title in measures(lines).items():
            show = interval if noise == "human" else summary
            table = [
                (
                    f"{runs[0]['noise_rate']:.0f} % wrong" if r is None else f"{r:g}",
                    *(show(_values(runs, method, what)) for method in methods),
                )
                for r, runs in rows
            ]
            parts += [f"### Noise {noise}, {title}", markdown_table(("r", *methods), table)]
        worst = min((line["last"] for r, runs in rows for line in runs if line["method"] == OURS), default=None)
        if worst is not None:
            failed = sum(bool(line["failed"]) for r, runs in rows for line in runs)
            parts.append(f"The worst seed of {OURS} over all rows: {worst:.1f}. Runs that ended in NaN: {failed}.")
    for what, title in measures(lines).items():
        if what.endswith("_threshold"):
            continue
        behind = losses(lines, methods, what)
        parts.append(f"Where a counterpart is ahead of {OURS}, {title}:" + ("\n\n" + "\n".join(behind) if behind else " nowhere."))
    return parts


def markdown(lines: Lines, plot: str) -> str:
    """The complete report."""
    parts = [
        "# Noisy labels: the paper's experiments",
        "Clean test accuracy in percent, mean and standard deviation over seeds (a 95 % interval of the mean where people made the "
        "noise). Balanced over the classes: the mean of the accuracies within each class, shown where it is another number. At the "
        "best threshold, of two classes: with the threshold between them that has the most test samples right; at the balanced one: "
        "with that which has the highest balanced accuracy, but the share of all samples. Neither is a result that one could have "
        "without clean labels: they tell what the order of the samples is worth, whatever threshold the method put there. All methods "
        "go on from the same checkpoint of cross entropy, on the same batches. The methods: `bench/experiments/paper/methods.py`; "
        "the noises: `bench/experiments/paper/noise.py`, T[i, j] = P(noisy = j | true = i).",
    ]
    for name in dict.fromkeys(line["set"] for line in lines):
        parts += section(name, [line for line in lines if line["set"] == name])
    return "\n\n".join([*parts, f"![accuracy by noise]({plot})"]) + "\n"


def draw(lines: Lines) -> bytes:
    """One panel per data set and kind of noise: accuracy against the amount, a band from the worst to the best seed."""
    panels = [
        (name, noise, mine)
        for name in dict.fromkeys(line["set"] for line in lines)
        for mine in [[line for line in lines if line["set"] == name]]
        for noise in noises(mine)
    ]
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(5.2 * columns, 3.8 * height), squeeze=False, layout="constrained")
    methods = [method for method in METHODS if any(line["method"] == method for line in lines)]
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, noise, mine) in zip(axes.flat, panels, strict=False):
        rows = rows_of(mine, noise)
        at = [0.0 if r is None else r for r, _ in rows]
        for number, method in enumerate(methods):
            values = [_values(runs, method, "last") for _, runs in rows]
            kept = [(x, v) for x, v in zip(at, values, strict=True) if v]
            if not kept:
                continue
            color = f"C{number}"
            if len(rows) == 1:
                axis.plot([number] * len(kept[0][1]), kept[0][1], "o", color=color, alpha=0.6, label=method)
                continue
            axis.plot([x for x, _ in kept], [mean(v) for _, v in kept], "o-", color=color, label=method, markersize=4)
            axis.fill_between([x for x, _ in kept], [min(v) for _, v in kept], [max(v) for _, v in kept], color=color, alpha=0.15)
        axis.set_title(f"{name}, noise {noise}")
        if len(rows) == 1:
            axis.set_xticks([])
        else:
            axis.set_xlabel("amount r")
        axis.set_ylabel("clean test accuracy, %")
        axis.grid(True, alpha=0.3)
    shown = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = [method for method in methods if method in shown]
    figure.legend([shown[method] for method in order], order, fontsize=8, ncols=6, loc="outside lower center")
    return png(figure)


def write_report(lines: Lines, target: Path) -> list[Path]:
    """Write ``target`` (markdown) and the plot next to it, and return both paths."""
    plot = target.with_suffix(".png")
    write_atomic(plot, draw(lines))
    write_atomic(target, markdown(lines, plot.name))
    return [target, plot]
