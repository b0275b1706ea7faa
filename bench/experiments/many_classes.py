"""``python -m bench.experiments.many_classes``: more classes than samples in a batch, with noisy labels.

Synthetic clusters; a share of each class is labelled as the next. A linear model trains with cross entropy on clean labels for the
bar; with cross entropy on the noisy ones, and from there with each loss. Accuracies are on clean test labels. ``DMILoss.recommended``
takes its momentum from the ladder of momenta that is compared here.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernels.results import RESULTS_DIR, dump_lines, environment, write_atomic
from bench.reporting import markdown_table, png
from ldmi_fast import DMILoss, dmi_loss

RESULT_JSON = RESULTS_DIR / "many-classes.json"
BAR = "clean labels, cross entropy"
WARM = "cross entropy"
PLOTTED = ("cross entropy, continued", "published formula", "exact per batch", "recommended, not calibrated", "recommended")
"""The losses whose curves the plot shows, of the first seed."""


@dataclass(frozen=True)
class Setting:
    """A problem and its training. ``momenta``: the ladder to compare with the recommended one."""

    classes: int
    batch: int
    width: int
    separation: float
    samples: int
    steps_ce: int
    steps: int
    noise: float = 0.4
    momenta: tuple[float, ...] = ()
    lr: float = 1e-2
    checks: int = 10


LADDER = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
SETTINGS = {
    "10x128": Setting(10, 128, 32, 4.0, 20_000, 300, 1000, momenta=LADDER),
    "30x128": Setting(30, 128, 48, 4.5, 20_000, 400, 1000, momenta=LADDER),
    "100x256": Setting(100, 256, 64, 5.0, 40_000, 600, 1500, momenta=LADDER),
    "100x64": Setting(100, 64, 64, 5.0, 40_000, 600, 1500, momenta=LADDER),
    "100x64-hard": Setting(100, 64, 64, 5.0, 40_000, 600, 1500, noise=0.45, momenta=LADDER),
    "1000x256": Setting(1000, 256, 128, 6.0, 400_000, 1200, 2000),
}


def published(logits: Tensor, labels: Tensor) -> Tensor:
    """As the paper's repository writes it: -log(|det(one_hot^T P / N)| + 0.001) in fp32."""
    one_hot = F.one_hot(labels, logits.shape[1]).float()
    return -(torch.det(one_hot.T @ logits.softmax(1) / len(labels)).abs() + 0.001).log()


def make(setting: Setting, seed: int) -> tuple[Callable[[int, torch.Generator], tuple[Tensor, Tensor, Tensor]], Tensor, Tensor]:
    """A function that draws a batch (x, noisy labels, true ones) from the training set; and the test set."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(setting.classes, setting.width, generator=generator)) * setting.separation
    truth = torch.randint(setting.classes, (setting.samples,), generator=generator)
    x = centres[truth] + torch.randn(setting.samples, setting.width, generator=generator)
    noisy = torch.where(torch.rand(setting.samples, generator=generator) < setting.noise, (truth + 1) % setting.classes, truth)
    truth_test = torch.randint(setting.classes, (10_000,), generator=generator)
    x_test = centres[truth_test] + torch.randn(10_000, setting.width, generator=generator)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.randint(setting.samples, (count,), generator=generator)
        return x[index], noisy[index], truth[index]

    return draw, x_test, truth_test


def compare(setting: Setting, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Every arm: its accuracy at the checks, percent."""
    draw, x_test, truth_test = make(setting, seed)

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * (model(x_test).argmax(1) == truth_test).double().mean().item()

    def train(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], steps: int, clean: bool, seed: int) -> list[list[float]]:
        optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
        generator = torch.Generator().manual_seed(seed)
        curve = [[0, accuracy(model)]]
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for step in range(1, steps + 1):
            # without any gradient the remaining steps would change nothing either
            if step == 100 and all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)):
                return [*curve, [steps, accuracy(model)]]
            for group in optimizer.param_groups:  # to 0, linearly, so that noise in the gradients averages out
                group["lr"] = setting.lr * (1 - (step - 1) / steps)
            x, noisy, truth = draw(setting.batch, generator)
            loss = loss_of(model(x), truth if clean else noisy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % max(steps // setting.checks, 1) == 0:
                curve.append([step, accuracy(model)])
        return curve

    torch.manual_seed(seed)
    fresh = nn.Linear(setting.width, setting.classes)
    curves: dict[str, list[list[float]]] = {}
    seconds: dict[str, float] = {}

    def arm(name: str, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], steps: int, clean: bool = False) -> nn.Module:
        start = time.perf_counter()
        curves[name] = train(model, loss_of, steps, clean, seed)
        seconds[name] = time.perf_counter() - start
        say(f"{title(setting)}, seed {seed}: {name}: {curves[name][-1][1]:.1f}% ({seconds[name]:.0f} s)")
        return model

    arm(BAR, copy.deepcopy(fresh), F.cross_entropy, setting.steps_ce + setting.steps, clean=True)
    warm = arm(WARM, fresh, F.cross_entropy, setting.steps_ce)
    arm("cross entropy, continued", copy.deepcopy(warm), F.cross_entropy, setting.steps)
    arm("published formula", copy.deepcopy(warm), published, setting.steps)
    arm("exact per batch", copy.deepcopy(warm), dmi_loss, setting.steps)

    def calibrated(criterion: DMILoss) -> DMILoss:
        generator = torch.Generator().manual_seed(seed)
        criterion.calibrate([draw(1000, generator)[:2] for _ in range(max(20, setting.classes // 4))], warm)  # 250 samples per class
        return criterion

    recommended = DMILoss.recommended(setting.classes, setting.batch)
    for momentum in setting.momenta:
        arm(f"momentum {momentum:g}", copy.deepcopy(warm), calibrated(DMILoss(setting.classes, momentum=momentum)), setting.steps)
    arm("recommended, not calibrated", copy.deepcopy(warm), copy.deepcopy(recommended), setting.steps)
    arm("recommended", copy.deepcopy(warm), calibrated(recommended), setting.steps)
    return {
        "setting": asdict(setting),
        "seed": seed,
        "recommended_momentum": recommended.momentum,
        "curves": curves,
        "seconds": seconds,
    }


def title(setting: Setting) -> str:
    """What distinguishes the settings."""
    return f"C = {setting.classes}, batch {setting.batch}, noise {setting.noise:.0%}"


def by_setting(result: dict[str, Any]) -> list[tuple[Setting, list[dict[str, Any]]]]:
    """The runs of each setting, one per seed."""
    found: dict[Setting, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        setting = Setting(**{**run["setting"], "momenta": tuple(run["setting"]["momenta"])})
        found.setdefault(setting, []).append(run)
    return list(found.items())


def ends(runs: list[dict[str, Any]], name: str) -> list[float]:
    """Accuracy at the end, one value per seed."""
    return [run["curves"][name][-1][1] for run in runs]


def markdown(result: dict[str, Any], plot: str) -> str:
    """The tables."""
    parts = [
        "# More classes than samples in a batch",
        f"Measured on {result['date'][:10]} with torch {result['environment']['torch']} on the CPU; synthetic clusters, a share of "
        "each class labelled as the next, a linear model, accuracy on clean test labels in percent. All but the first two go on "
        f"from `{WARM}`; averages are calibrated where it does not say otherwise. Shares of the clean run are of the same seed.",
    ]
    header = (
        "loss",
        "at the end, every seed",
        "mean",
        "share of the clean run, worst seed",
        "samples per class in the average",
        "seconds",
    )
    for setting, runs in by_setting(result):
        rows = []
        for name in runs[0]["curves"]:
            values = ends(runs, name)
            share = min(value / bar for value, bar in zip(values, ends(runs, BAR), strict=True))
            momentum = runs[0]["recommended_momentum"] if name.startswith("recommended") else None
            if name.startswith("momentum "):
                momentum = float(name.split()[1])
            samples = "" if momentum is None else f"{setting.batch * (1 + momentum) / (1 - momentum) / setting.classes:.0f}"
            shown = f"{name} ({momentum:.4g})" if name.startswith("recommended") else name
            seconds = f"{sum(run['seconds'][name] for run in runs) / len(runs):.0f}"
            listed = ", ".join(f"{value:.1f}" for value in values)
            rows.append((shown, listed, f"{sum(values) / len(values):.1f}", f"{share:.1%}", samples, seconds))
        parts += [
            f"## {title(setting)}",
            f"{setting.steps_ce} steps of cross entropy, {setting.steps} after it.",
            markdown_table(header, rows),
        ]
    return "\n\n".join([*parts, f"![accuracy over steps, and against momentum]({plot})"]) + "\n"


def shortened(result: dict[str, Any]) -> dict[str, Any]:
    """What the tables and the plot need: the curves of the first seed that the plot shows, and the last point of all others."""
    runs = []
    for _, of_setting in by_setting(result):
        for run in of_setting:
            plotted = PLOTTED if run is of_setting[0] else ()
            curves = {name: curve if name in plotted else curve[-1:] for name, curve in run["curves"].items()}
            runs.append({**run, "curves": curves})
    return {**result, "runs": runs}


def draw_curves(result: dict[str, Any]) -> bytes:
    """One column per setting: curves of the first seed; below, the ladder of momenta with every seed."""
    settings = by_setting(result)
    figure, axes = plt.subplots(2, len(settings), figsize=(4.6 * len(settings), 7.6), squeeze=False, layout="constrained")
    for (setting, runs), above, below in zip(settings, axes[0], axes[1], strict=True):
        for name in PLOTTED:
            above.plot(*zip(*runs[0]["curves"][name], strict=True), marker=".", label=name)
        above.set_xlabel("steps after cross entropy")
        names = [f"momentum {momentum:g}" for momentum in setting.momenta]
        for run in runs:
            curves = run["curves"]
            below.plot(
                [1 / (1 - momentum) for momentum in setting.momenta],
                [curves[name][-1][1] for name in names],
                marker=".",
                alpha=0.6,
                color="tab:blue",
            )
            below.plot(1 / (1 - run["recommended_momentum"]), curves["recommended"][-1][1], "*", color="tab:red", markersize=12)
        below.set_xscale("log")
        below.set_xlabel("1 / (1 - momentum); stars: recommended")
        bar = sum(ends(runs, BAR)) / len(runs)
        for axis in (above, below):
            axis.axhline(0.95 * bar, color="gray", linestyle=":", label="95% of the clean run")
            axis.set_ylabel("clean test accuracy, %")
            axis.grid(True, alpha=0.3)
        above.set_title(title(setting))
    axes[0][0].legend(fontsize="small")
    return png(figure)


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write plot and table next to the result file, and print the table."""
    plot = path.with_suffix(".png")
    write_atomic(plot, draw_curves(result))
    text = markdown(result, plot.name)
    write_atomic(path.with_suffix(".md"), text)
    print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.many_classes", description="More classes than samples in a batch."
    )
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"comma-separated, of: {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT_JSON, help="JSON file; table and plot go next to it (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write table and plot again, from the JSON file")
    options = parser.parse_args(arguments)
    if options.report:
        if not options.out.exists():
            parser.error(f"--report: there is no result file {options.out}")
        write_report(json.loads(options.out.read_text(encoding="utf-8")), options.out)
        return 0
    names = options.settings.split(",")
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"--settings: unknown {', '.join(unknown)}: expected some of {', '.join(SETTINGS)}")
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {options.seeds}: expected integers, comma-separated")
    runs = [compare(SETTINGS[name], seed, lambda text: print(text, flush=True)) for name in names for seed in seeds]
    result = {"environment": environment(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "runs": runs}
    write_atomic(options.out, dump_lines(shortened(result), "runs"))
    write_report(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
