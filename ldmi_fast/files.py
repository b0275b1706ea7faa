"""Files that are complete or not there at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A binary file to write that takes the place of ``path`` at the end, or leaves it as it was if something is raised.

    A new file has the permissions that ``open`` would give it; one that is replaced keeps its own. Through a symbolic link the file
    that it leads to is replaced, not the link.

    Args:
        path: of the file.
        sync: whether to wait until the content is on the disk, so that it is complete even after a power failure.

    Raises:
        OSError: the path is no regular file, or cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a device or another special file"
        raise OSError(f"{target} is {kind}, and cannot be replaced by a file: pass the path of a file")
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
    # not tempfile: its files are for their owner alone
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
