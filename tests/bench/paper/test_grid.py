"""The grid of runs: which runs it has, their file, how it continues after being killed, and the report."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.experiments.paper.__main__ import app
from bench.experiments.paper.grid import cells, missing
from bench.experiments.paper.report import interval, losses, markdown, rows_of, summary, write_report
from bench.experiments.paper.results import alone, append, key, read, repair
from bench.experiments.paper.sets import EXPERIMENTS, transition
from bench.experiments.paper.train import (
    Cell,
    Options,
    accuracy,
    accuracy_by_threshold,
    balanced_accuracy,
    first_stage,
    load_data,
    run,
)

RECIPE = replace(EXPERIMENTS["digits"].short, epochs_first=1, epochs=2)
OPTIONS = Options(RECIPE, limit=300)
GRID = ["--set", "digits", "--noise", "pair", "--r", "0,0.2", "--method", "ce,dmi", "--seeds", "2"]
SMALL = ["--limit", "300", "--epochs-first", "1", "--epochs", "2"]


def line(method: str, last: float, seed: int = 0, noise: str = "pair", r: float | None = 0.2) -> dict[str, Any]:
    return {
        "set": "fashion10",
        "noise": noise,
        "r": r,
        "method": method,
        "seed": seed,
        "recipe": {"epochs_first": 1, "epochs": 1, "lr_first": 1e-3, "lr": 1e-4, "batch_size": 128},
        "limit": None,
        "last": last,
        "selected": last,
        "noise_rate": 20.0,
        "failed": "",
    }


# ----------------------------------------------------------------------------------------------------------- which runs


def test_cells_are_all_combinations_and_no_noise_is_one_kind() -> None:
    found = cells("fashion", ["1", "3"], None, ["ce", "dmi"], [0, 1])
    assert len(found) == 2 * 2 * (1 + 2 * 5)
    assert Cell("fashion", "clean", 0.0, "ce", 1) in found
    assert not any(cell.noise != "clean" and cell.r == 0 for cell in found)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)


def test_cells_of_noise_without_an_amount() -> None:
    assert cells("fashion10", ["cifar10n-worst"], [0.1, 0.2], ["ce"], [0]) == [Cell("fashion10", "cifar10n-worst", None, "ce", 0)]
    assert cells("fashion10", ["pair"], [0.1, 0.3], ["ce"], [0])[1].r == 0.3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_noises(name: str) -> None:
    experiment = EXPERIMENTS[name]
    for noise, amounts in experiment.noises.items():
        for r in amounts:
            T = transition(noise, r, experiment.num_classes)
            if noise == "human":
                assert T is None
                continue
            assert T is not None
            assert T.shape == (experiment.num_classes, experiment.num_classes)
            torch.testing.assert_close(T.sum(1), torch.ones_like(T[0]))


@pytest.mark.parametrize(
    ("noise", "r", "classes", "message"),
    [
        ("4", 0.1, 2, "unknown noise '4'"),
        ("3", 0.1, 10, "is for 2 classes, this data set has 10"),
        ("cifar10n-worst", None, 2, "is for 10 classes"),
        ("cifar10n-worst", 0.5, 10, "has no amount: got r = 0.5"),
        ("pair", None, 10, "needs an amount"),
        ("human", 0.2, 2, "has no amount"),
        ("pair", 1.5, 10, "1.5"),
    ],
)
def test_bad_noise_is_said(noise: str, r: float | None, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transition(noise, r, classes)


# --------------------------------------------------------------------------------------------------------- the file


def test_a_line_cut_short_is_taken_away_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, line("ce", 90.0))
    append(path, line("dmi", 95.0))
    whole = path.read_bytes()
    for cut in (1, 20, 100):
        path.write_bytes(whole[:-cut])
        # without only its line break, the last run is complete
        assert len(read(path)) == (2 if cut == 1 else 1)
        repair(path)
        append(path, line("gce", 91.0))
        assert [found["method"] for found in read(path)] == (["ce", "dmi", "gce"] if cut == 1 else ["ce", "gce"])


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a run of this program"):
        read(path)


def test_two_grids_do_not_share_a_file(tmp_path: Path) -> None:
    with alone(tmp_path / "runs.jsonl"), pytest.raises(RuntimeError, match="another grid writes to"), alone(tmp_path / "runs.jsonl"):
        pass


def test_runs_are_the_same_only_with_the_same_schedule() -> None:
    wanted = cells("digits", ["pair"], [0.2], ["ce", "dmi"], [0])
    done = [{**vars(wanted[0]), **OPTIONS.same()}]
    assert missing(wanted, OPTIONS, done) == [[wanted[1]]]
    other = replace(OPTIONS, recipe=replace(RECIPE, epochs=3))
    assert missing(wanted, other, done) == [wanted]
    # as the file has it, where tuples have become lists
    assert missing(wanted, OPTIONS, json.loads(json.dumps(done))) == [[wanted[1]]]


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_is_repeatable_and_its_checkpoint_changes_nothing(tmp_path: Path) -> None:
    cell = Cell("digits", "pair", 0.2, "dmi", 0)
    found = []
    for options in (OPTIONS, *[replace(OPTIONS, checkpoints=tmp_path)] * 2):
        data = load_data(cell, options)
        state = first_stage(cell, data, options, lambda what: None)
        found.append(run(cell, data, state, options, lambda what: None))
        assert found[-1]["checks"][1:] == found[0]["checks"][1:]
    assert len(list(tmp_path.iterdir())) == 1
    assert found[0]["noise_rate"] == pytest.approx(20, abs=8)
    assert [check["epoch"] for check in found[0]["checks"]] == [0, 1, 2]
    best = min(found[0]["checks"][1:], key=lambda check: check["valid_loss"])
    assert found[0]["selected"] == best["test_accuracy"]
    assert found[0]["selected_balanced"] == best["test_balanced_accuracy"]


def test_a_rare_class_counts_as_much_in_the_balanced_accuracy() -> None:
    labels = torch.tensor([0] * 9 + [2])
    always_zero = torch.tensor([[1.0, 0.0, 0.0]]).expand(10, 3)
    assert accuracy(always_zero, labels) == pytest.approx(90)
    assert balanced_accuracy(always_zero, labels) == pytest.approx(50)


def test_a_grid_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    result = CliRunner().invoke(app, ["grid", *GRID, *SMALL, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert len(read(out)) == 8
    lines = out.read_text().splitlines()
    out.write_text("\n".join([*lines[:5], lines[5][:50]]))
    result = CliRunner().invoke(app, ["grid", *GRID, *SMALL, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "8 runs, 5 of them" in result.output.replace("\n", " ")
    again = out.read_text().splitlines()
    assert again[:5] == lines[:5]
    timeless = [{name: value for name, value in json.loads(text).items() if name != "seconds"} for text in (*lines, *again)]
    by_key: dict[str, Any] = {}
    for found in timeless:
        text = json.dumps(found, sort_keys=True)
        assert by_key.setdefault(key(found), text) == text, "made again, a run comes out the same"
    assert len(again) == len(by_key) == 8


@pytest.mark.parametrize(("name", "noise", "r"), [("mr-human", "human", None), ("letter", "pair", 0.2), ("fashion", "3", 0.2)])
def test_one_run_has_the_data_sets_noise(name: str, noise: str, r: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("bench.experiments.paper.__main__._run", lambda cells, *_: asked.extend(cells))
    result = CliRunner().invoke(app, ["run", "--set", name, *([] if r is None else ["--r", str(r)])])
    assert result.exit_code == 0, result.output
    assert [(cell.set, cell.noise, cell.r, cell.method) for cell in asked] == [(name, noise, r, "dmi")]


@pytest.mark.slow
def test_killed_at_any_moment_no_run_is_lost_or_doubled(tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    command = [sys.executable, "-m", "bench.experiments.paper", "grid", *GRID, *SMALL, "--jobs", "2", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chance = random.Random(0)
    before: list[str] = []
    for _ in range(4):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(4.0, 12.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1.5)  # the workers see that they are alone
        now = [json.dumps(found) for found in read(out)]
        assert now[: len(before)] == before
        before = now
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    keys = [key(found) for found in read(out)]
    assert len(keys) == len(set(keys)) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "nothing"], "unknown ['nothing']"),
        (["--method", "dmi,magic"], "unknown ['magic']"),
        (["--noise", "5"], "unknown noise '5'"),
        (["--r", "a"], "expected numbers"),
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
        (["--profile", "long"], "expected paper or short"),
        (["--epochs", "0"], "--epochs 0: expected 1 or more"),
        (["--jobs", "0"], "jobs must be at least 1"),
    ],
)
def test_bad_arguments_are_said(arguments: list[str], message: str, tmp_path: Path) -> None:
    base = ["--set", "digits", "--r", "0.2", "--noise", "pair", "--limit", "300", "--out", str(tmp_path / "runs.jsonl")]
    result = CliRunner().invoke(app, ["grid", *base, *arguments])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


# -------------------------------------------------------------------------------------------------------------- report


def test_summaries() -> None:
    assert summary([]) == "-"
    assert summary([90.0]) == "90.0"
    assert summary([90.0, 92.0]) == "91.0 ± 1.4"
    # 4.30 is Student's t at 2 degrees of freedom: 91 +- 4.30 * 1 / sqrt(3)
    assert interval([90.0, 91.0, 92.0]) == "91.0 [88.5, 93.5]"


def test_rows_have_the_runs_without_noise() -> None:
    lines = [line("ce", 90.0), line("ce", 95.0, noise="clean", r=0.0), line("ce", 85.0, noise="cifar10n-worst", r=None)]
    assert [r for r, _ in rows_of(lines, "pair")] == [0.0, 0.2]
    assert [r for r, _ in rows_of(lines, "cifar10n-worst")] == [None]


def test_every_row_where_ours_loses_is_told() -> None:
    lines = [line("ce", 90.0, 0), line("ce", 92.0, 1), line("dmi", 89.0, 0), line("dmi", 89.5, 1), line("gce", 80.0)]
    assert losses(lines, ["ce", "gce", "dmi"], "last") == ["- noise pair, r = 0.2: ce by 1.8 points, beyond the spread (1.5)."]
    assert "nowhere" in markdown([line("ce", 80.0), line("dmi", 89.0)], "plot.png")


def test_report_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    for seed in range(2):
        for r, noise in ((0.0, "clean"), (0.2, "pair"), (None, "cifar10n-worst")):
            for method in ("ce", "dmi"):
                append(path, line(method, 90.0 + seed, seed, noise, r))
    result = CliRunner().invoke(app, ["report", str(path)])
    assert result.exit_code == 0, result.output
    text = path.with_suffix(".md").read_text()
    assert "| 0.2 | 90.5 ± 0.7 | 90.5 ± 0.7 |" in text
    assert "| 20 % wrong |" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, ["report", str(tmp_path / "none.jsonl")]).exit_code == 2


def test_accuracy_by_threshold() -> None:
    """Nine of class 1, one of class 0, which is third in the order: calling all class 1 is best; balanced, the first three are not."""
    logits = torch.zeros(10, 2)
    logits[:, 1] = torch.arange(10.0)
    labels = torch.ones(10, dtype=torch.int64)
    labels[2] = 0
    found = accuracy_by_threshold(logits, labels)
    assert found["best_threshold"] == pytest.approx(90)
    assert found["balanced_threshold"] == pytest.approx(80)  # seven of class 1 and the one of class 0
    assert accuracy_by_threshold(torch.zeros(10, 3), labels) == {}
    assert accuracy_by_threshold(logits, torch.ones(10, dtype=torch.int64)) == {}


def test_thresholds_have_tables_and_no_verdict() -> None:
    lines = [{**line("ce", 80.0), "selected_best_threshold": 91.0, "selected_balanced_threshold": 71.0}, line("dmi", 70.0)]
    text = markdown(lines, "plot.png")
    assert "at the best threshold\n\n| r | ce | dmi |\n| :-- | --: | --: |\n| 0.2 | 91.0 | - |" in text
    assert "at the balanced threshold\n\n| r | ce | dmi |\n| :-- | --: | --: |\n| 0.2 | 71.0 | - |" in text
    assert "Where a counterpart is ahead of dmi, epoch picked on noisy validation labels, at" not in text
    assert "threshold\n\n|" not in markdown([line("ce", 80.0)], "plot.png")


def test_the_balanced_accuracy_has_a_table_where_it_is_another_number() -> None:
    same = [{**line("ce", 80.0), "last_balanced": 80.0, "selected_balanced": 80.0}, line("dmi", 70.0)]
    assert "balanced over the classes |" not in markdown(same, "plot.png")
    assert "### Noise pair, last epoch, balanced" not in markdown(same, "plot.png")
    other = [{**one, "last_balanced": balanced, "selected_balanced": 50.0} for one, balanced in zip(same, (60.0, 75.0), strict=True)]
    text = markdown(other, "plot.png")
    assert (
        "### Noise pair, last epoch, balanced over the classes\n\n| r | ce | dmi |\n| :-- | --: | --: |\n| 0.2 | 60.0 | 75.0 |" in text
    )
    assert "Where a counterpart is ahead of dmi, last epoch, balanced over the classes: nowhere." in text
    assert "Where a counterpart is ahead of dmi, last epoch:\n\n- noise pair, r = 0.2: ce by 10.0 points" in text


def test_report_of_several_sets(tmp_path: Path) -> None:
    lines = [line("dmi", 90.0), {**line("dmi", 80.0, noise="human", r=None), "set": "mr-human"}]
    text = write_report(lines, tmp_path / "all.md")[0].read_text()
    assert "## fashion10" in text
    assert "## mr-human" in text
