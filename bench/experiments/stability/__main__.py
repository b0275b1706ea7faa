"""``python -m bench.experiments.stability``: train every method on every task with every seed; append one line per run; report.

Cross entropy trains first, once per task and seed; every method goes on from that checkpoint, on the same batches. Runs that the
result file has already are not made again, so an interrupted grid continues where it was. ``--report`` writes a table and a plot of
the runs in the file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.experiments.demo.data import DataSet
from bench.experiments.demo.model import fashion_cnn
from bench.experiments.demo.sources import SourceUnavailable
from bench.experiments.demo.train import batches, logits_of
from bench.experiments.stability.methods import METHODS, Method
from bench.experiments.stability.report import write_report
from bench.experiments.stability.tasks import TASKS, accuracy, find_data
from bench.kernels.results import RESULTS_DIR, environment
from ldmi_fast import dmi_score
from ldmi_fast.files import replacing

BATCH = 128
LR_CE, LR_DMI = 1e-3, 1e-4


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The runs in a result file; a last line that was cut short is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return tuple(line[name] for name in ("task", "method", "seed", "epochs_ce", "epochs_dmi", "limit"))


def warm_up(data: DataSet, seed: int, epochs: int) -> dict[str, Any]:
    """The cross entropy stage: the model's state."""
    torch.manual_seed(seed)
    model = fashion_cnn(len(data.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR_CE)
    for _ in range(epochs):
        model.train()
        for index in batches(len(data.train), BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train.x[index]), data.train.given[index]).backward()
            optimizer.step()
    return model.state_dict()


def warmed_up(data: DataSet, task: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The same, read from a file if an earlier run has written it."""
    path = options.out.with_name(f"{options.out.stem}-checkpoints") / f"{task}-{seed}-{options.epochs_ce}-{options.limit}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    state = warm_up(data, seed, options.epochs_ce)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)
    return state


def run(task: str, name: str, seed: int, data: DataSet, options: argparse.Namespace) -> dict[str, Any]:
    """One method: its curve of clean test accuracy, and of the score on noisy validation labels."""
    classes = len(data.classes)
    model = fashion_cnn(classes)
    model.load_state_dict(warmed_up(data, task, seed, options))
    method: Method = METHODS[name]()
    size = BATCH * method.batches
    per_epoch = max(1, len(data.train) // size)
    loader = [(data.train.x[i], data.train.given[i]) for i in torch.arange(len(data.train)).split(1000)]
    checks: list[dict[str, float]] = []

    def check(epoch: float, mean_loss: float) -> None:
        score = dmi_score(lambda x: logits_of(model, x), [(data.valid.x, data.valid.given)], classes)
        checks.append(
            {
                "epoch": epoch,
                "train_loss": mean_loss,
                "test_accuracy": accuracy(logits_of(model, data.test.x), data.test.clean),
                "valid_log_abs_det": score.log_abs_det.item(),
            }
        )

    start = time.perf_counter()
    method.start(model, loader, classes, per_epoch * options.epochs_dmi)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR_DMI)
    check(0, math.nan)
    torch.manual_seed(seed + 1)
    lost, failed = 0, ""
    for epoch in range(options.epochs_dmi):
        losses = []
        for index in batches(len(data.train), size):
            model.train()
            optimizer.zero_grad()
            losses.append(method.step(model, data.train.x[index], data.train.given[index]))
            if math.isnan(losses[-1]):
                failed = f"NaN in epoch {epoch + 1}"
                break
            if method.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), method.clip)
            optimizer.step()
        finite = [loss for loss in losses if math.isfinite(loss)]
        lost += len(losses) - len(finite)
        check(epoch + 1, sum(finite) / len(finite) if finite else math.nan)
        if failed:
            break
    best = max(checks[1:], key=lambda c: c["valid_log_abs_det"] if math.isfinite(c["valid_log_abs_det"]) else -math.inf)
    return {
        "task": task,
        "method": name,
        "seed": seed,
        "epochs_ce": options.epochs_ce,
        "epochs_dmi": options.epochs_dmi,
        "limit": options.limit,
        "warm_up": checks[0]["test_accuracy"],
        "last": checks[-1]["test_accuracy"],
        "selected": best["test_accuracy"],
        "infinite_batches": lost,
        "failed": failed,
        "checks": checks,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": {name: value for name, value in environment().items() if name in ("cpu", "torch", "ldmi_fast", "threads")},
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.stability", description="Compare methods that cope with noisy determinants."
    )
    names = {"tasks": list(TASKS), "methods": list(METHODS)}
    for name, allowed in names.items():
        parser.add_argument(f"--{name}", default=",".join(allowed), help=f"comma-separated, of: {', '.join(allowed)} (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--epochs-ce", type=int, default=3, help="of cross entropy (default: %(default)s)")
    parser.add_argument("--epochs-dmi", type=int, default=6, help="of each method (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="of samples in each split: to see it run")
    parser.add_argument("--data", help="folder with Fashion-MNIST's files (default: search)")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "stability.jsonl", help="result file (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="train nothing: write the table and the plot of the result file")
    options = parser.parse_args(arguments)
    for name, allowed in names.items():
        given = getattr(options, name).split(",")
        if unknown := [item for item in given if item not in allowed]:
            parser.error(f"--{name}: unknown {', '.join(unknown)}: expected some of {', '.join(allowed)}")
        setattr(options, name, given)
    try:
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {options.seeds}: expected integers, comma-separated")
    for name in ("epochs_ce", "epochs_dmi"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    if options.limit is not None and options.limit < BATCH:
        parser.error(f"--limit {options.limit}: expected {BATCH} or more, which is one batch")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse_arguments(arguments)
    if options.report:
        if not read_lines(options.out):
            print(f"error: no runs in {options.out}", file=sys.stderr)
            return 1
        for path in write_report(read_lines(options.out), options.out):
            print(f"written: {path}")
        return 0
    try:
        folder = find_data(options.data)
    except SourceUnavailable as error:
        print(f"error: Fashion-MNIST is not available: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = {key(line) for line in read_lines(options.out)}
    # seeds outermost: whenever it is stopped, the methods have been compared on the same ones
    grid = [(task, method, seed) for seed in options.seeds for task in options.tasks for method in options.methods]
    same = (options.epochs_ce, options.epochs_dmi, options.limit)
    grid = [cell for cell in grid if (*cell, *same) not in done]
    loaded: dict[tuple[str, int], DataSet] = {}
    start = time.perf_counter()
    for position, (task, method, seed) in enumerate(grid):
        if (task, seed) not in loaded:
            loaded = {(task, seed): TASKS[task].load(folder, seed, options.limit)}
        line = run(task, method, seed, loaded[task, seed], options)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        left = (time.perf_counter() - start) / (position + 1) * (len(grid) - position - 1) / 60
        print(
            f"{position + 1}/{len(grid)} {task} {method} seed {seed}: {line['warm_up']:.1f} -> {line['last']:.1f}% "
            f"{line['failed']} ({line['seconds']:.0f} s, about {left:.0f} min left)",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
