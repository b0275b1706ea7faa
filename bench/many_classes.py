"""``python -m bench.many_classes``: more classes than samples in a batch, with noisy labels.

Synthetic clusters; 45% of each class are labelled as the next. A linear model trains with cross entropy on clean labels for the
bar; with cross entropy on the noisy ones, and from there with each loss. Accuracies are on clean test labels.
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

from bench.kernels.results import RESULTS_DIR, environment, write_atomic
from bench.markdown import markdown_table
from bench.report import png
from ldmi_fast import DMILoss, dmi_loss

RESULT_JSON = RESULTS_DIR / "many-classes.json"
NOISE = 0.45


@dataclass(frozen=True)
class Setting:
    """A problem and its training."""

    classes: int
    batch: int
    width: int
    separation: float
    samples: int
    steps_ce: int
    steps: int
    momentum: float
    lr: float = 1e-2
    checks: int = 10


SETTINGS = {
    "100x64": Setting(100, 64, 64, 5.0, 40_000, 600, 1500, 0.99),
    "1000x256": Setting(1000, 256, 128, 6.0, 200_000, 1200, 2000, 0.998),
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
    noisy = torch.where(torch.rand(setting.samples, generator=generator) < NOISE, (truth + 1) % setting.classes, truth)
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
            # without any gradient the other steps would be the same again
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
        curves[name] = train(model, loss_of, steps, clean, seed + len(name))
        seconds[name] = time.perf_counter() - start
        say(f"C = {setting.classes}, batch {setting.batch}: {name}: {curves[name][-1][1]:.1f}% ({seconds[name]:.0f} s)")
        return model

    arm("clean labels, cross entropy", copy.deepcopy(fresh), F.cross_entropy, setting.steps_ce + setting.steps, clean=True)
    warm = arm("cross entropy", fresh, F.cross_entropy, setting.steps_ce)
    arm("cross entropy, continued", copy.deepcopy(warm), F.cross_entropy, setting.steps)
    arm("published formula", copy.deepcopy(warm), published, setting.steps)
    arm("exact per batch", copy.deepcopy(warm), dmi_loss, setting.steps)
    criterion = DMILoss(setting.classes, momentum=setting.momentum)
    generator = torch.Generator().manual_seed(seed)
    criterion.calibrate([draw(1000, generator)[:2] for _ in range(20)], warm)
    arm(f"momentum {setting.momentum:g}", copy.deepcopy(warm), criterion, setting.steps)
    return {"setting": asdict(setting), "seed": seed, "curves": curves, "seconds": seconds}


def markdown(result: dict[str, Any], plot: str) -> str:
    """The table."""
    rows = []
    for run in result["runs"]:
        bar = run["curves"]["clean labels, cross entropy"][-1][1]
        for name, curve in run["curves"].items():
            shape = f"C = {run['setting']['classes']}, batch {run['setting']['batch']}"
            seconds = f"{run['seconds'][name]:.0f}"
            rows.append((shape, name, f"{curve[0][1]:.1f}", f"{curve[-1][1]:.1f}", f"{curve[-1][1] / bar:.1%}", seconds))
    header = ("", "loss", "at the start, %", "at the end, %", "of the clean run", "seconds")
    return (
        f"# More classes than samples in a batch\n\nMeasured on {result['date'][:10]} with torch {result['environment']['torch']}; "
        f"synthetic clusters, {NOISE:.0%} of each class labelled as the next, a linear model, accuracy on clean test labels. The last "
        f"four go on from `cross entropy`.\n\n{markdown_table(header, rows)}\n\n![accuracy over steps]({plot})\n"
    )


def draw_curves(result: dict[str, Any]) -> bytes:
    """A panel a setting."""
    runs = result["runs"]
    figure, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 4.2), squeeze=False, layout="constrained")
    for axis, run in zip(axes[0], runs, strict=True):
        bar = run["curves"]["clean labels, cross entropy"][-1][1]
        axis.axhline(0.95 * bar, color="gray", linestyle=":", label="95% of the clean run")
        for name, curve in list(run["curves"].items())[2:]:
            axis.plot(*zip(*curve, strict=True), marker=".", label=name)
        axis.set_title(f"C = {run['setting']['classes']}, batch {run['setting']['batch']}")
        axis.set_xlabel("steps after cross entropy")
        axis.set_ylabel("clean test accuracy, %")
        axis.legend()
        axis.grid(True, alpha=0.3)
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.many_classes", description="More classes than samples in a batch.")
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"comma-separated, of: {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT_JSON, help="JSON file; table and plot go beside it (default: %(default)s)")
    options = parser.parse_args(arguments)
    names = options.settings.split(",")
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"--settings: unknown {', '.join(unknown)}: expected some of {', '.join(SETTINGS)}")
    runs = [compare(SETTINGS[name], options.seed, lambda text: print(text, flush=True)) for name in names]
    result = {"environment": environment(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "runs": runs}
    write_atomic(options.out, json.dumps(result, indent=1) + "\n")
    plot = options.out.with_suffix(".png")
    write_atomic(plot, draw_curves(result))
    write_atomic(options.out.with_suffix(".md"), markdown(result, plot.name))
    print(markdown(result, plot.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
