"""Runs of the Clothing1M program in separate processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.experiments.paper.clothing1m import checkpoint
from bench.experiments.paper.clothing1m.log import read_log
from bench.experiments.paper.clothing1m.options import Options, to_arguments

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 120

SMALL = Options(
    sets="tests.bench.paper.clothing1m_sets:make",
    classes=4,
    model="tiny",
    batch_size=24,
    epochs_ce=3,
    epochs_dmi=3,
    lr_ce=0.1,
    lr_ce_later=0.05,
    lr_dmi=5e-3,
    lr_dmi_later=2e-3,
    drop_at=2,
    precision="fp32",
    workers=0,
    log_every=1,
    save_every=3,
    timeout=60,
    tensorboard=False,
    device="cpu",
)


class Run:
    """A run on some processes, started as torchrun starts them, but left alone when one of them dies."""

    def __init__(self, options: Options, processes: int = 1, **environment: str) -> None:
        base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        base["PYTHONFAULTHANDLER"] = "1"  # a process that hangs prints where: see wait
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.errors: list[str] = []
        self.processes = []
        for rank in range(processes):
            mine = dict(base)
            if processes > 1:
                mine |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, "-m", "bench.experiments.paper.clothing1m", "train", *to_arguments(options)]
            # files, not pipes: a pipe that no process reads would fill
            log = Path(options.out).parent / f"{Path(options.out).name}-rank{rank}.txt"
            with log.open("w") as stream:
                process = subprocess.Popen(command, cwd=ROOT, env=mine, stdout=stream, stderr=stream, start_new_session=True)
            self.processes.append((process, log))

    def wait(self, patience: float = PATIENCE) -> list[int]:
        """The exit statuses."""
        end = time.monotonic() + patience
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process, _ in self.processes]
        except subprocess.TimeoutExpired:
            for process, _ in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGABRT)  # its loaders too: each prints its stack
            time.sleep(2)
            self.kill()
            raise AssertionError(f"still running after {patience} s:\n{self.text}") from None

    def kill(self) -> bool:
        """Send SIGKILL to all; returns whether all were still running."""
        alive = all(process.poll() is None for process, _ in self.processes)
        for process, _ in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return alive

    @property
    def alive(self) -> bool:
        """Whether any process still runs."""
        return any(process.poll() is None for process, _ in self.processes)

    @property
    def text(self) -> str:
        """What the processes have printed."""
        return "\n".join(log.read_text() for _, log in self.processes)


def finish(options: Options, processes: int = 1, **environment: str) -> str:
    """Run to the end and return what was printed."""
    run = Run(options, processes, **environment)
    statuses = run.wait()
    assert not any(statuses), run.text
    return run.text


def last_state(out: Path) -> dict[str, Any]:
    """The newest checkpoint."""
    return checkpoint.read(checkpoint.found(out / "checkpoints")[0])


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Where two states differ, to the bit."""
    if isinstance(first, torch.Tensor):
        return [] if isinstance(second, torch.Tensor) and torch.equal(first, second) else [name]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{name}: other keys"]
        return [entry for key in first for entry in differences(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{name}: other length"]
        return [entry for i, (a, b) in enumerate(zip(first, second, strict=True)) for entry in differences(a, b, f"{name}[{i}]")]
    return [] if first == second else [f"{name}: {first} and {second}"]


def same_end(first: Path, second: Path) -> list[str]:
    """Where the ends of two runs differ: weights, optimizer, schedule, average, generators, validation. Not the log's size."""
    a, b = last_state(first), last_state(second)
    for state in (a, b):
        del state["log_size"]
    return differences(a, b)


def steps(out: Path) -> list[tuple[int, float, str]]:
    """Step, loss and stage of the lines of a log."""
    return [(line["step"], line["loss"], line["stage"]) for line in read_log(out / "log.jsonl") if line["event"] == "train"]
