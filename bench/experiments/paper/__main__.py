"""``python -m bench.experiments.paper``: run one setting, a grid, or report. typer: commands, types and help from the signatures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.experiments.paper.data import MissingData
from bench.experiments.paper.grid import cells, run_grid
from bench.experiments.paper.methods import COMPARED, METHODS
from bench.experiments.paper.report import noises, rows_of, summary, write_report
from bench.experiments.paper.results import key, read
from bench.experiments.paper.sets import EXPERIMENTS, transition
from bench.experiments.paper.train import Cell, Options, load_data
from bench.kernels.results import RESULTS_DIR

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Set = Annotated[str, typer.Option("--set", help=f"data set: {', '.join(EXPERIMENTS)}")]
Profile = Annotated[str, typer.Option(help="schedule: paper (as published) or short (for a machine without a GPU)")]
Out = Annotated[Path | None, typer.Option(help="result file (default: bench/results/paper/SET.jsonl)")]
Limit = Annotated[int | None, typer.Option(help="samples of each split at most: to see it run")]
Data = Annotated[str | None, typer.Option(help="folder or file of the data set (default: search)")]
EpochsFirst = Annotated[int | None, typer.Option(help="of cross entropy, instead of the schedule's")]
Epochs = Annotated[int | None, typer.Option(help="of the method, instead of the schedule's")]
Jobs = Annotated[int, typer.Option(help="processes")]


def _fail(message: object) -> typer.Exit:
    console.print(f"error: {message}", style="red", markup=False)
    return typer.Exit(2)


def _names(given: str, allowed: object, option: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := [name for name in names if name not in list(allowed)] or not names:  # type: ignore[call-overload]
        raise _fail(f"--{option} {given}: unknown {unknown}: expected some of {', '.join(allowed)}")  # type: ignore[arg-type]
    return names


def _options(
    set_name: str, profile: str, limit: int | None, data: str | None, first: int | None, epochs: int | None, out: Path
) -> Options:
    if profile not in ("paper", "short"):
        raise _fail(f"--profile {profile}: expected paper or short")
    recipe = getattr(EXPERIMENTS[set_name], profile)
    for name, value in (("epochs_first", first), ("epochs", epochs)):
        if value is not None:
            if value < 1:
                raise _fail(f"--{name.replace('_', '-')} {value}: expected 1 or more")
            recipe = replace(recipe, **{name: value})
    if limit is not None and limit < 1:
        raise _fail(f"--limit {limit}: expected 1 or more")
    return Options(recipe, limit, data, out.with_name(f"{out.stem}-checkpoints"))


def _run(wanted: list[Cell], options: Options, out: Path, jobs: int) -> None:
    try:
        for cell in {(c.noise, c.r): c for c in wanted}.values():
            transition(cell.noise, cell.r, EXPERIMENTS[cell.set].num_classes)
        load_data(wanted[0], options)  # what is missing is said once, before any process starts
        failed = run_grid(wanted, options, out, jobs, console)
    except (ValueError, RuntimeError, MissingData) as error:
        raise _fail(error) from error
    mine = {key({**vars(cell), **options.same()}) for cell in wanted}
    lines = [line for line in read(out) if key(line) in mine]
    if lines:
        methods = list(dict.fromkeys(cell.method for cell in wanted))
        table = Table(title=f"{wanted[0].set}: clean test accuracy, last epoch (epoch picked on noisy labels)")
        for column in ("noise", "r", *methods):
            table.add_column(column, justify="left" if column == "noise" else "right")
        for noise in noises(lines):
            for r, runs in rows_of(lines, noise):
                found = [[line for line in runs if line["method"] == method] for method in methods]
                text = [f"{summary([x['last'] for x in some])} ({summary([x['selected'] for x in some])})" for some in found]
                table.add_row(noise, "" if r is None else f"{r:g}", *text)
        console.print(table)
        console.print(f"runs: {out}; python -m bench.experiments.paper report {out} writes a table and a plot")
    if failed:
        raise _fail(f"{failed} groups of runs failed, see above; the same command makes what is missing")


@app.command()
def run(
    set_: Set = "fashion",
    noise: Annotated[str, typer.Option(help="kind of noise, or clean (default: 3, or the data set's first)")] = "",
    r: Annotated[float | None, typer.Option(help="its amount, where it has one")] = None,
    method: Annotated[str, typer.Option(help=f"one of {', '.join(METHODS)}, or several, comma-separated")] = "dmi",
    seeds: Annotated[int, typer.Option(help="how many, 0, 1, ...")] = 1,
    profile: Profile = "short",
    out: Out = None,
    limit: Limit = None,
    data: Data = None,
    epochs_first: EpochsFirst = None,
    epochs: Epochs = None,
    jobs: Jobs = 1,
) -> None:
    """One setting: a method, or several, on one noise, with some seeds."""
    _names(set_, EXPERIMENTS, "set")
    kinds = EXPERIMENTS[set_].noises
    noise = noise or ("3" if "3" in kinds else next(iter(kinds)))
    grid(set_, noise, None if r is None else str(r), method, seeds, profile, out, limit, data, epochs_first, epochs, jobs)


@app.command()
def grid(
    set_: Set = "fashion",
    noise: Annotated[str, typer.Option(help="kinds of noise, comma-separated (default: all of the data set)")] = "",
    r: Annotated[str | None, typer.Option(help="amounts, comma-separated (default: those of each kind)")] = None,
    method: Annotated[str, typer.Option(help="comma-separated")] = ",".join(COMPARED),
    seeds: Annotated[int, typer.Option(help="how many, 0, 1, ...")] = 3,
    profile: Profile = "short",
    out: Out = None,
    limit: Limit = None,
    data: Data = None,
    epochs_first: EpochsFirst = None,
    epochs: Epochs = None,
    jobs: Jobs = 1,
) -> None:
    """All combinations; those that the result file has are not made again."""
    _names(set_, EXPERIMENTS, "set")
    methods = _names(method, METHODS, "method")
    kinds = [kind.strip() for kind in noise.split(",") if kind.strip()] or list(EXPERIMENTS[set_].noises)
    try:
        amounts = None if r is None else [float(amount) for amount in r.split(",")]
    except ValueError as error:
        raise _fail(f"--r {r}: expected numbers, comma-separated") from error
    if seeds < 1:
        raise _fail(f"--seeds {seeds}: expected 1 or more")
    out = out if out is not None else RESULTS_DIR / "paper" / f"{set_}.jsonl"
    options = _options(set_, profile, limit, data, epochs_first, epochs, out)
    _run(cells(set_, kinds, amounts, methods, range(seeds)), options, out, jobs)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="result files")],
    out: Annotated[Path | None, typer.Option(help="markdown file (default: the first result file's name, .md)")] = None,
) -> None:
    """Write a table and a plot of result files."""
    try:
        lines = [line for file in files for line in read(file)]
    except ValueError as error:
        raise _fail(error) from error
    if not lines:
        raise _fail(f"no runs in {', '.join(map(str, files))}")
    for path in write_report(lines, out if out is not None else files[0].with_suffix(".md")):
        console.print(f"written: {path}")


if __name__ == "__main__":
    app()
