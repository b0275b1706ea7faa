"""What the demo leaves: a table on the terminal, a picture of the curves, and the numbers as JSON."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from bench.experiments.demo.cost import LossCost
from bench.experiments.demo.data import DataSet
from bench.experiments.demo.train import Stage
from bench.kernels.results import environment, write_atomic

INK, MUTED = "#1f2933", "#7b8794"
CE_COLOUR, DMI_COLOUR = "#d9822b", "#1f6feb"


@dataclass(frozen=True)
class Result:
    """All of a run. settings: what it was asked for; seconds: wall time, data preparation included."""

    data: DataSet
    noise: str
    r: float
    matrix: Tensor
    settings: dict[str, Any]
    warm_up: Stage
    continued: Stage
    dmi: Stage
    cost: LossCost
    seconds: float

    @property
    def stages(self) -> tuple[Stage, Stage, Stage]:
        return self.warm_up, self.continued, self.dmi

    @property
    def wrong_labels(self) -> float:
        """Percentage of training labels that are wrong."""
        return 100 * (self.data.train.given != self.data.train.clean).double().mean().item()

    @property
    def constant_guess(self) -> float:
        """Clean test accuracy of always answering the commonest class."""
        counts = torch.bincount(self.data.test.clean)
        return 100 * counts.max().item() / counts.sum().item()


def table(result: Result) -> Table:
    """Clean test accuracies, one row per stage."""
    out = Table(
        title=f"{result.data.name}: accuracy on {len(result.data.test):,} clean test labels, "
        f"after training on {result.wrong_labels:.0f}% wrong ones",
        caption=f"Always answering the commonest class: {result.constant_guess:.1f}%. No clean label was used to train or to choose.",
        title_justify="left",
        caption_justify="left",
    )
    out.add_column("stage", no_wrap=True)
    for heading in ("epochs", "last", "mean of\nlast epoch", "best on noisy\nvalidation"):
        out.add_column(heading, justify="right")
    for stage in result.stages:
        numbers = (stage.last, stage.last_epoch_mean, stage.selected)
        style = "bold" if stage is result.dmi else ""
        out.add_row(stage.name, str(stage.epochs), *(f"{value:.1f}%" for value in numbers), style=style)
    return out


def _finite(value: Any) -> Any:
    """JSON has no infinities: null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(result: Result) -> str:
    """The numbers of a run; losses that were infinite are null."""
    content = {
        "data": {
            "name": result.data.name,
            "source": result.data.source,
            "skipped": list(result.data.skipped),
            "classes": list(result.data.classes),
            "train": len(result.data.train),
            "valid": len(result.data.valid),
            "test": len(result.data.test),
        },
        "noise": {
            "kind": result.noise,
            "r": result.r,
            "matrix": result.matrix.tolist(),
            "wrong_train_labels_percent": result.wrong_labels,
        },
        "settings": result.settings,
        "constant_guess": result.constant_guess,
        "stages": [
            {
                "name": stage.name,
                "epochs": stage.epochs,
                "last": stage.last,
                "last_epoch_mean": stage.last_epoch_mean,
                "selected": stage.selected,
                "singular_batches": stage.singular_batches,
                "checks": [asdict(check) for check in stage.checks],
            }
            for stage in result.stages
        ],
        "loss_cost": asdict(result.cost),
        "seconds": result.seconds,
        "environment": environment(),
    }
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def confusion(clean: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """(C, C), fp64: row i is how the samples of true class i are answered; rows of classes that occur sum to 1."""
    counts = torch.bincount(clean * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, -1).double()
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def _heatmap(axes: Axes, matrix: Tensor, classes: tuple[str, ...], title: str, across: str, colour: str) -> None:
    colours = LinearSegmentedColormap.from_list("", ["#f5f7fa", colour])
    axes.imshow(matrix.numpy(), cmap=colours, vmin=0, vmax=1, aspect="equal")
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, fontsize=8)
    axes.set_yticks(ticks, classes, fontsize=8)
    axes.set_xlabel(across, fontsize=8, color=MUTED)
    axes.set_ylabel("true", fontsize=8, color=MUTED)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    if len(classes) <= 4:
        for i in ticks:
            for j in ticks:
                value = matrix[i, j].item()
                ink = "white" if value > 0.5 else INK
                axes.text(j, i, f"{100 * value:.0f}%", ha="center", va="center", color=ink, fontsize=10)


def _curves(axes: Axes, result: Result) -> None:
    switch = result.warm_up.epochs
    start = result.warm_up.checks[-1].test_accuracy
    lines: tuple[tuple[Stage, int, list[tuple[float, float]], str, str], ...] = (
        (result.warm_up, 0, [], CE_COLOUR, ""),
        (result.continued, switch, [(switch, start)], CE_COLOUR, "cross entropy, continued"),
        (result.dmi, switch, [(switch, start)], DMI_COLOUR, "L_DMI"),
    )
    ends = []
    for stage, offset, points, colour, label in lines:
        points = [*points, *((offset + check.epoch, check.test_accuracy) for check in stage.checks)]
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) <= 40 else ""
        axes.plot(x, y, color=colour, linewidth=2.4, marker=marker, markersize=4.5, zorder=3)
        if label:
            ends.append((y[-1], f"{label}\n{y[-1]:.1f}%", colour))
    gap = 11.0  # the least distance of two labels, in points of accuracy
    ends.sort()
    (low, *below), (high, *above) = ends
    if high - low < gap:
        middle = min(max((low + high) / 2, gap / 2), 100 - gap / 2)
        low, high = middle - gap / 2, middle + gap / 2
    for at, (text, colour) in ((low, below), (high, above)):
        axes.annotate(text, (1.015, at), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=10, weight="bold")
    axes.axvline(switch, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(switch, 102.5, " L_DMI starts here", color=MUTED, fontsize=8.5, va="bottom")
    axes.text(0, 102.5, "cross entropy", color=MUTED, fontsize=8.5, va="bottom")
    axes.axhline(result.constant_guess, color=MUTED, linewidth=1, linestyle=":")
    note = f"always the commonest class, {result.constant_guess:.0f}%"
    axes.text(0.005, result.constant_guess + 1, note, fontsize=8.5, color=MUTED, transform=axes.get_yaxis_transform())
    axes.set_ylim(0, 102)
    axes.set_xlim(0, switch + max(result.continued.epochs, result.dmi.epochs))
    axes.set_xlabel("epochs", color=INK)
    axes.set_ylabel("accuracy on clean test labels, %", color=INK)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def picture(result: Result) -> bytes:
    """A PNG: the accuracies along the training, the noise, and what each loss made of the classes."""
    figure = Figure(figsize=(12.5, 6.2), facecolor="white")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(3.3, 1))[0]
    axes = left.add_axes((0.09, 0.11, 0.69, 0.68))
    _curves(axes, result)
    left.text(0.09, 0.93, f"{result.data.name}", fontsize=16, weight="bold", color=INK)
    left.text(
        0.09,
        0.882,
        f"{result.wrong_labels:.0f}% of the training labels are wrong (noise {result.noise}, r = {result.r:g}); "
        "no clean label is used in training",
        fontsize=10.5,
        color=INK,
    )
    classes = result.data.classes
    panels = (
        (result.matrix, "The labels given", "label given", "#52606d"),
        (_confusion_of(result, result.continued), "Cross entropy's answers", "answer", CE_COLOUR),
        (_confusion_of(result, result.dmi), "L_DMI's answers", "answer", DMI_COLOUR),
    )
    for row, (matrix, title, across, colour) in enumerate(panels):
        _heatmap(right.add_axes((0.12, 0.70 - 0.315 * row, 0.8, 0.22)), matrix, classes, title, across, colour)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _confusion_of(result: Result, stage: Stage) -> Tensor:
    return confusion(result.data.test.clean, stage.test_predictions, len(result.data.classes))


def write(result: Result, folder: Path) -> tuple[Path, Path]:
    """Write results.json and curves.png into the folder; returns their paths."""
    numbers, curves = folder / "results.json", folder / "curves.png"
    write_atomic(numbers, as_json(result))
    write_atomic(curves, picture(result))
    return numbers, curves
