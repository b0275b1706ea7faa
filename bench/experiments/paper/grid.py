"""A grid of runs on several processes, which continues where it was stopped.

A group, the runs that share a data set and a cross entropy stage, is one process's work. Each run is appended to the result file as
it ends, so killing everything at any moment loses only the runs that had not ended.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.experiments.paper.results import alone, append, key, read, repair
from bench.experiments.paper.sets import EXPERIMENTS
from bench.experiments.paper.train import Cell, Options, first_stage, load_data, run
from bench.kernels.results import environment

_ENVIRONMENT = ("cpu", "torch", "ldmi_fast", "threads")


def cells(
    set_name: str, noises: Iterable[str], amounts: Sequence[float] | None, methods: Iterable[str], seeds: Iterable[int]
) -> list[Cell]:
    """The runs, seeds outermost: whenever it is stopped, the methods have been compared on the same ones. ``amounts``: of all kinds of
    noise that have one; None: each kind's own."""
    found = []
    for seed in seeds:
        for noise in noises:
            own = EXPERIMENTS[set_name].noises.get(noise, (None,) if amounts is None else tuple(amounts))
            for r in own if amounts is None or own == (None,) else amounts:
                clean = r == 0
                found += [Cell(set_name, "clean" if clean else noise, 0.0 if clean else r, method, seed) for method in methods]
    return list(dict.fromkeys(found))


def missing(wanted: Sequence[Cell], options: Options, done: Iterable[dict[str, Any]]) -> list[list[Cell]]:
    """The groups of runs that the file does not have."""
    have = {key(line) for line in done}
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in wanted:
        if key({**vars(cell), **options.same()}) not in have:
            groups.setdefault(cell.group, []).append(cell)
    return list(groups.values())


def run_group(group: Sequence[Cell], options: Options, out: Path, tick: Callable[[str], None]) -> None:
    """The runs of one group, appended to the file."""
    data = load_data(group[0], options)
    state = first_stage(group[0], data, options, tick)
    kept = {name: value for name, value in environment().items() if name in _ENVIRONMENT}
    for cell in group:
        append(out, {**run(cell, data, state, options, tick), "environment": kept})


def _leave_with(parent: int) -> None:
    """End this process when its parent has ended: nothing else would stop it from working on its groups."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(parent: int, tasks: Any, events: Any, options: Options, out: Path, threads: int) -> None:
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    while (group := tasks.get()) is not None:
        label = " ".join(str(part) for part in group[0].group)
        try:
            run_group(group, options, out, lambda what, label=label: events.put(("tick", f"{label} {what}")))  # type: ignore[misc]
        except Exception:
            events.put(("error", f"{label}: {traceback.format_exc()}"))
        else:
            events.put(("done", label))


def run_grid(wanted: Sequence[Cell], options: Options, out: Path, jobs: int, console: Console) -> int:
    """Make the runs that the file lacks; returns how many groups failed, each reported.

    Raises:
        ValueError: jobs below 1, or a result file with lines of something else. RuntimeError: another grid has the file.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    with alone(out):
        repair(out)
        groups = missing(wanted, options, read(out))
        left = sum(map(len, groups))
        console.print(f"{len(wanted)} runs, {len(wanted) - left} of them in {out} already")
        if not groups:
            return 0
        context = multiprocessing.get_context("spawn")
        tasks, events = context.Queue(), context.Queue()
        jobs = min(jobs, len(groups))
        for group in [*groups, *[None] * jobs]:
            tasks.put(group)
        threads = max(1, torch.get_num_threads() // jobs)
        workers = [context.Process(target=_work, args=(os.getpid(), tasks, events, options, out, threads)) for _ in range(jobs)]
        for worker in workers:
            worker.start()
        recipe = options.recipe
        steps = len(groups) * recipe.epochs_first + left * recipe.epochs
        columns = (TextColumn("{task.description:48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        failed, ended = 0, 0
        try:
            with Progress(*columns, console=console) as progress:
                bar = progress.add_task("epochs", total=steps)
                while ended < len(groups):
                    try:
                        kind, text = events.get(timeout=1.0)
                    except queue.Empty:
                        if not any(worker.is_alive() for worker in workers):
                            failed += len(groups) - ended
                            console.print("error: the worker processes ended before their work; what they finished is in the file")
                            break
                        continue
                    if kind == "tick":
                        progress.update(bar, advance=1, description=text)
                        continue
                    ended += 1
                    if kind == "error":
                        failed += 1
                        console.print(f"error: {text}", markup=False)
        finally:
            for worker in workers:
                worker.join(timeout=5)
                if worker.is_alive():
                    worker.terminate()
                    worker.join()
    return failed
