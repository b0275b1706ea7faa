"""The Clothing1M program on several processes: it learns, survives kill -9, gives the losses of one process, and never hangs.

CLOTHING1M_KILLS=20 kills 20 times instead of 3.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed: pip install .[integrations]")

from bench.experiments.paper.clothing1m import checkpoint
from bench.experiments.paper.clothing1m.log import read_log
from bench.experiments.paper.clothing1m.options import to_arguments
from tests.bench.paper.clothing1m_runs import PATIENCE, ROOT, SMALL, Run, finish, same_end, steps

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch was built without gloo"
)
KILLS = int(os.environ.get("CLOTHING1M_KILLS", "3"))


def test_torchrun_with_two_processes_learns(tmp_path: Path) -> None:
    options = replace(SMALL, out=str(tmp_path), model="tiny-bn", precision="bf16", workers=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "bench.experiments.paper.clothing1m", "train", *to_arguments(options)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = read_log(tmp_path / "log.jsonl")
    accuracies = [line["valid_accuracy"] for line in log if line["event"] == "valid"]
    assert len(accuracies) == 6
    assert accuracies[-1] > 90
    assert [line["event"] for line in log if line["event"] in ("start", "stage", "done")] == ["start", "stage", "stage", "done"]


@pytest.mark.parametrize("layout", ["annotations", "keys"])
def test_a_folder_in_the_published_layout(tmp_path: Path, layout: Literal["annotations", "keys"]) -> None:
    """Two processes read JPEG files, some of them cut short, and lists with bad lines; the images are cached once resized."""
    pytest.importorskip("torchvision", reason="torchvision is not installed: pip install .[paper]")
    from bench.experiments.paper.data.clothing1m import write_synthetic

    lists = write_synthetic(tmp_path / "data", layout, 280, 0, broken_lines=2, broken_images=3)
    options = replace(
        SMALL,
        sets="",
        data=str(tmp_path / "data"),
        cache=str(tmp_path / "cache"),
        out=str(tmp_path / "out"),
        classes=14,
        batch_size=56,
        resize=40,
        crop=32,
        epochs_dmi=1,
        lr_dmi=1e-6,
        lr_dmi_later=5e-7,
        workers=1,
    )
    finish(options, 2)
    log = read_log(tmp_path / "out" / "log.jsonl")
    assert log[0]["event"] == "start"
    assert sum(log[0]["problems"].values()) == sum(lists.problems.values()) == 2
    valid = [line for line in log if line["event"] == "valid"]
    assert valid[-1]["unreadable"] == 3
    assert valid[-1]["valid_accuracy"] > 40  # 7 by chance
    assert len(list((tmp_path / "cache").rglob("*.jpg"))) == 280 - 3 + 70 + 70


def test_one_two_and_four_processes_have_the_same_losses(tmp_path: Path) -> None:
    """The losses agree to rounding. The norm is of single images: batch norm has the statistics of a rank's part of the batch."""
    outs = {size: tmp_path / str(size) for size in (1, 2, 4)}
    for size, out in outs.items():
        finish(replace(SMALL, out=str(out), epochs_ce=2, epochs_dmi=2, drop_at=1), size)
    one = steps(outs[1])
    assert len(one) == 40
    for size in (2, 4):
        other = steps(outs[size])
        assert [line[::2] for line in other] == [line[::2] for line in one]
        torch.testing.assert_close(torch.tensor([x[1] for x in other]), torch.tensor([x[1] for x in one]), rtol=2e-5, atol=1e-6)
        valid = [[line["valid_dmi"] for line in read_log(outs[n] / "log.jsonl") if line["event"] == "valid"] for n in (1, size)]
        torch.testing.assert_close(*map(torch.tensor, valid), rtol=1e-4, atol=0)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """Both processes get kill -9 at random moments after the first step, also while a checkpoint is written: one comes every other
    step. Weights, optimizer, average and generators are equal to the bit; so is the log, which has no step twice."""
    slow = {"TEST_SECONDS_AN_IMAGE": "0.0005"}
    options = replace(SMALL, model="tiny-bn", dropout=0.3, save_every=2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(replace(options, out=str(whole)), 2, **slow)
    moments, kills, lives = random.Random(0), 0, 0
    while kills < KILLS:
        lives += 1
        assert lives < 3 * KILLS + 3, "too many runs ended before they could be killed"
        before = len(read_log(killed / "log.jsonl"))
        run = Run(replace(options, out=str(killed)), 2, **slow)
        end = time.monotonic() + PATIENCE
        while run.alive and len(read_log(killed / "log.jsonl")) <= min(before, 1) and time.monotonic() < end:
            time.sleep(0.02)
        if before:  # its log has lines before it starts: wait for the line of the start
            while run.alive and not any(line["event"] == "resume" for line in read_log(killed / "log.jsonl")[-8:]):
                time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5 / max(1, KILLS / 2)))
        kills += run.kill()
    finish(replace(options, out=str(killed)), 2, **slow)
    assert same_end(whole, killed) == []
    assert steps(whole) == steps(killed)


def test_four_processes_go_on_to_the_bit(tmp_path: Path) -> None:
    """With more than two ranks the order of a sum depends on how DDP has cut its buckets."""
    options = replace(SMALL, epochs_ce=1, epochs_dmi=1, save_every=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(replace(options, out=str(whole), keep=100), 4)
    early = whole / "checkpoints" / checkpoint.name_of(4)
    finish(replace(options, out=str(parts), resume=str(early)), 4)
    assert same_end(whole, parts) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_does_not_leave_the_other_waiting(tmp_path: Path, rank: int) -> None:
    """Here nothing ends the other process, as torchrun would: its own time limit does."""
    run = Run(replace(SMALL, out=str(tmp_path / "out"), timeout=4.0), 2, TEST_RAISE_ON_RANK=str(rank))
    start = time.monotonic()
    statuses = run.wait(60)
    assert all(statuses), run.text
    assert time.monotonic() - start < 45
    assert "this image was asked to raise" in run.text
