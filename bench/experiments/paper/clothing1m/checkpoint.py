"""Checkpoints: written completely or not at all, and checked before anything in them is used.

A file is one of ``torch.save`` and so a zip archive, which has a checksum for every record. torch does not check them, so they
are checked here: a file that is cut short or changed is refused.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldmi_fast.files import replacing

FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.pt")
_HALF_WRITTEN = "*.pt.*.tmp"
"""What an interrupted ``replacing`` leaves behind."""


class BadCheckpoint(ValueError):
    """A file that is no good checkpoint."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that it is complete or not there at all, even after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        torch.save({"format": FORMAT, **state}, stream)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """What a file holds, on the CPU.

    Raises:
        BadCheckpoint: it cannot be read, is cut short or changed, or is something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise BadCheckpoint(f"{path}: the checksum of {broken} is wrong: the file was changed or badly copied")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except BadCheckpoint:
        raise
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: there is no such file") from None
    except Exception as error:  # zip, pickle and torch each have their own exceptions
        size = path.stat().st_size if path.is_file() else 0
        raise BadCheckpoint(f"{path}: not a complete checkpoint ({size} bytes): {type(error).__name__}: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format", "none") if isinstance(state, dict) else type(state).__name__
        raise BadCheckpoint(f"{path}: no checkpoint of this program: format {found}, expected {FORMAT}")
    return state


def name_of(step: int) -> str:
    """The file's name for a number of steps, counted over both stages."""
    return f"step-{step:09d}.pt"


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: path.name, reverse=True)


def newest(folder: Path, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest good checkpoint, or None where there is none at all. ``tell`` is called for each bad one, with what is used instead.

    Raises:
        BadCheckpoint: there are some, and all are bad.
    """
    reasons = []
    for path in found(folder):
        try:
            state = read(path)
        except BadCheckpoint as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            tell(f"{reason}; going on from {path.name} instead")
        return path, state
    if reasons:
        listed = "\n  ".join(reasons)
        raise BadCheckpoint(f"no checkpoint in {folder} is good:\n  {listed}\nRemove them to start anew, or put a good one there")
    return None


def read_or_name_another(path: Path) -> dict[str, Any]:
    """The checkpoint that was asked for.

    Raises:
        BadCheckpoint: it is bad; the message names the newest good one next to it, if there is one.
    """
    try:
        return read(path)
    except BadCheckpoint as error:
        for other in found(path.parent):
            if other != path and is_good(other):
                raise BadCheckpoint(f"{error}. The newest good one next to it: {other}") from None
        raise


def is_good(path: Path) -> bool:
    """Whether a file is a good checkpoint."""
    try:
        read(path)
    except BadCheckpoint:
        return False
    return True


def tidy(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest ``keep``, and all that are half written."""
    for path in found(folder)[keep:]:
        path.unlink(missing_ok=True)
    if folder.is_dir():
        for path in folder.glob(_HALF_WRITTEN):
            path.unlink(missing_ok=True)
