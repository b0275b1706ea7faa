"""``python -m bench.experiments.demo``: train a classifier on wrong labels, with cross entropy and then with L_DMI.

Cross entropy trains first. From that checkpoint L_DMI goes on, and so does cross entropy, for the same number of epochs on
the same batches. The result is a table of accuracies on clean test labels, a picture of the curves and the numbers as JSON.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

import ldmi_fast
from bench.experiments.demo import report
from bench.experiments.demo.cost import loss_cost
from bench.experiments.demo.data import DataSet, load
from bench.experiments.demo.model import digits_mlp, fashion_cnn
from bench.experiments.demo.noise import KINDS, noise_matrix
from bench.experiments.demo.train import Stage, run_stage


@dataclass(frozen=True)
class Recipe:
    """How to train. The epochs of dmi are also those for which cross entropy goes on, with the same learning rate."""

    noise: str
    r: float
    epochs_ce: int
    epochs_dmi: int
    lr_ce: float
    lr_dmi: float
    batch_ce: int
    batch_dmi: int
    checks_per_epoch: int


# The paper trains 20 + 20 epochs at 1e-4; larger steps do the same in minutes.
FASHION = Recipe("3", 0.6, 3, 3, 1e-3, 3e-4, 128, 128, 3)
# Ten classes in so few images: L_DMI takes all of them as one batch, whose determinant is exact.
DIGITS = Recipe("pair", 0.4, 30, 150, 1e-3, 1e-3, 64, 1100, 1)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="folder with Fashion-MNIST's four files, or the word digits (default: search)")
    add("--noise", choices=KINDS, help="1, 2, 3: the paper's for two classes (default: 3; for digits: pair)")
    add("--r", type=float, help=f"amount of noise, 0..1 (default: {FASHION.r}; for digits: {DIGITS.r})")
    add("--epochs-ce", type=int, help=f"epochs of cross entropy (default: {FASHION.epochs_ce}; {DIGITS.epochs_ce})")
    add("--epochs-dmi", type=int, help=f"epochs after it (default: {FASHION.epochs_dmi}; {DIGITS.epochs_dmi})")
    add("--lr-ce", type=float, help=f"Adam's learning rate (default: {FASHION.lr_ce:g}; {DIGITS.lr_ce:g})")
    add("--lr-dmi", type=float, help=f"after the first stage (default: {FASHION.lr_dmi:g}; {DIGITS.lr_dmi:g})")
    add("--batch-dmi", type=int, help=f"L_DMI's batch (default: {FASHION.batch_dmi}; {DIGITS.batch_dmi})")
    add("--seed", type=int, default=0, help="of the noise, the weights and the batches (default: 0)")
    add("--out", type=Path, default=Path("demo-results"), help="folder for the results (default: demo-results)")
    add("--quick", action="store_true", help="a third of the epochs: to see it run, not to see it converge")
    options = parser.parse_args(arguments)
    for name in ("epochs_ce", "epochs_dmi", "lr_ce", "lr_dmi", "batch_dmi"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} {value}: expected more than 0")
    if options.r is not None and not 0 <= options.r <= 1:
        parser.error(f"--r {options.r}: expected 0..1")
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: expected 0 or more")
    return options


def choose_recipe(base: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe of the data, with what the user asked for."""
    if options.quick:
        base = replace(base, epochs_ce=max(1, base.epochs_ce // 3), epochs_dmi=max(1, base.epochs_dmi // 3))
    names = ("noise", "r", "epochs_ce", "epochs_dmi", "lr_ce", "lr_dmi", "batch_dmi")
    return replace(base, **{name: value for name in names if (value := getattr(options, name)) is not None})


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def train(
    data: DataSet, network: Callable[[int], nn.Module], recipe: Recipe, seed: int, console: Console
) -> tuple[Stage, Stage, Stage]:
    """The three stages: cross entropy, cross entropy continued, L_DMI."""
    torch.manual_seed(seed)
    model = network(len(data.classes))
    with progress_bar(console) as progress:
        tasks = {
            name: progress.add_task(name, total=1.0, start=False, note="")
            for name in ("cross entropy", "cross entropy, continued", "L_DMI")
        }

        def note(stage: Stage, fraction: float) -> None:
            text = f"clean test {stage.last:.1f}%" if stage.checks else ""
            progress.update(tasks[stage.name], completed=fraction, note=text)

        def stage(name: str, model: nn.Module, loss: Callable, epochs: int, lr: float, size: int, seed: int) -> Stage:
            progress.start_task(tasks[name])
            return run_stage(
                name,
                model,
                loss,
                data,
                epochs=epochs,
                lr=lr,
                batch_size=size,
                seed=seed,
                checks_per_epoch=recipe.checks_per_epoch,
                on_batch=note,
            )

        names = iter(tasks)
        warm_up = stage(next(names), model, F.cross_entropy, recipe.epochs_ce, recipe.lr_ce, recipe.batch_ce, seed)
        branch = copy.deepcopy(model)
        rest = (recipe.epochs_dmi, recipe.lr_dmi)
        continued = stage(next(names), branch, F.cross_entropy, *rest, recipe.batch_ce, seed + 1)
        dmi = stage(next(names), model, ldmi_fast.DMILoss(), *rest, recipe.batch_dmi, seed + 1)
    return warm_up, continued, dmi


def run(options: argparse.Namespace, console: Console) -> report.Result:
    """Everything but the reports."""
    start = time.perf_counter()
    data = load(options.data, lambda message: console.print(f"  {message}", highlight=False, markup=False))
    is_digits = len(data.classes) == 10
    recipe = choose_recipe(DIGITS if is_digits else FASHION, options)
    matrix = noise_matrix(recipe.noise, recipe.r, len(data.classes))
    data = data.corrupted(matrix, options.seed)
    console.print(f"[bold]Data:[/] {data.name}, from {data.source}: {len(data.train):,} images to train on")
    stages = train(data, digits_mlp if is_digits else fashion_cnn, recipe, options.seed, console)
    cost = loss_cost(min(recipe.batch_dmi, len(data.train)), len(data.classes))
    settings = {**asdict(recipe), "seed": options.seed, "quick": options.quick}
    return report.Result(data, recipe.noise, recipe.r, matrix, settings, *stages, cost, time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse_arguments(arguments)
    console = Console()
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written to is found before the training
        result = run(options, console)
        paths = report.write(result, options.out)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print()
    console.print(report.table(result))
    gain = result.dmi.last - result.continued.last
    console.print(f"L_DMI against cross entropy continued: {gain:+.1f} points.", highlight=False)
    console.print(str(result.cost), highlight=False, soft_wrap=True)
    console.print(f"{result.seconds:.0f} s in all. Written: {', '.join(map(str, paths))}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
