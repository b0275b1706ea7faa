"""The result file: one JSON line per run, each written completely or not at all, never two of one run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.kernels.results import write_atomic

Line = dict[str, Any]


def key(line: Line) -> str:
    """What makes two lines the same run: the cell, the schedule and the limit."""
    return json.dumps([line[name] for name in ("set", "noise", "r", "method", "seed", "recipe", "limit")], sort_keys=True)


def read(path: Path) -> list[Line]:
    """The runs of a file, none if there is no file; a last line cut short by a crash is left out.

    Raises:
        ValueError: a line that is not a run, other than a last one without its end.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    *whole, rest = text.split("\n")
    lines = []
    for number, line in enumerate([*whole, *([rest] if rest else [])], 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            key(found)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if rest and number == len(whole) + 1:
                continue
            raise ValueError(f"{path}, line {number}: not a run of this program ({error}): {line[:80]!r}") from error
        lines.append(found)
    return lines


def repair(path: Path) -> None:
    """Remove a last line that a crash cut short, so that the next run starts on a new line."""
    if path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in read(path)))


def append(path: Path, line: Line) -> None:
    """Add a run with one write, which is on the disk when this returns."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the file for one grid.

    Raises:
        RuntimeError: another one has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(path.suffix + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"another grid writes to {path}: wait for it, or name another file with --out") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
