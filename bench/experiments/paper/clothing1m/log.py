"""The log: one line of JSON per event, and TensorBoard's files next to it where TensorBoard is installed."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events in a log; a line that was cut short is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


class Log:
    """Appends events. Each line is one write to a file opened for appending, so no reader sees two of them mixed.

    Args:
        path: the file; None writes nothing, as on every process but the first.
        size: bytes to keep of an existing file: what a killed run wrote after its last checkpoint is done and logged again.
        tensorboard: folder for TensorBoard, or None.
    """

    def __init__(self, path: Path | None, size: int | None = None, tensorboard: Path | None = None, step: int = 0) -> None:
        self._file: int | None = None
        self._writer: Any = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if size is not None and os.fstat(self._file).st_size > size:
            os.ftruncate(self._file, size)
        self._end_line()
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._writer = SummaryWriter(str(tensorboard), purge_step=step)

    def _end_line(self) -> None:
        """A line that was cut short must not swallow the next."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def write(self, event: str, step: int, **values: Any) -> None:
        """An event at a step, counted over both stages. Numbers that JSON lacks become words."""
        if self._file is None:
            return
        line = {"event": event, "step": step, **{name: _plain(value) for name, value in values.items()}, "time": round(time.time(), 3)}
        os.write(self._file, (json.dumps(line) + "\n").encode())
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{event}/{name}", value, step)

    def sync(self) -> int:
        """Write it to the disk and return its size in bytes, for a checkpoint."""
        if self._file is None:
            return 0
        os.fsync(self._file)
        return os.fstat(self._file).st_size

    def close(self) -> None:
        """Nothing is written after it."""
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            os.close(self._file)
        self._file = self._writer = None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return value
