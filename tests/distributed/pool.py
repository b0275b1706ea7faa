"""Processes that wait for work: starting them anew for every test would take most of the tests' time.

All belong to a gloo group of four; smaller groups are the first 1, 2 or 3 of them.
"""

from __future__ import annotations

import importlib
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 4
#: Time limit of a test in seconds, far more than it needs.
PATIENCE = 90
#: How long a rank waits for another in a group that is made to fail.
SHORT = timedelta(seconds=2)


class Failure(Exception):
    """An error on a rank, with its traceback."""


def _serve(rank: int, store: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=PATIENCE))
    groups: dict[int, Any] = {size: dist.new_group(list(range(size))) for size in range(1, SIZE)}
    groups[SIZE] = dist.group.WORLD
    while (work := pipe.recv()) is not None:
        module, name, size, arguments = work
        try:
            # without a size: a separate group, which the test may break
            group = dist.new_group(list(range(2)), timeout=SHORT) if size is None else groups[size]
            result: tuple[bool, Any] = (True, None)
            if rank < (size or 2):
                torch.manual_seed(0)
                result = (True, getattr(importlib.import_module(module), name)(group, *arguments))
        except BaseException:
            result = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(result))  # by value: torch's own way of sending tensors keeps files open
    dist.destroy_process_group()


class Pool:
    """Four processes."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, size: int | None, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(group, *arguments)`` on the first ``size`` ranks; None: on two ranks, in a group with the timeout ``SHORT``.

        Returns:
            The results, by rank.
        """
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__name__, size, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE):
                raise Failure(f"rank {rank} does not answer")
            results.append(pickle.loads(pipe.recv_bytes()))
        for rank, (fine, result) in enumerate(results):
            if not fine:
                raise Failure(f"rank {rank}:\n{result}")
        return [result for _, result in results[: size or 2]]

    def close(self) -> None:
        """Let the processes end."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
