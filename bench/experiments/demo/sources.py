"""Where Fashion-MNIST is found: its four files on this machine, or a download that never hangs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)  # as published, each with .gz or unpacked
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

CONNECT_SECONDS = 5  # seconds until a server that does not answer is given up
DOWNLOAD_SECONDS = 90  # seconds for 31 MB over a slow link


class SourceUnavailable(Exception):
    """Why a source cannot give the files; the message is for the user."""


def cache_folder() -> Path:
    """Where downloads are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ldmi_fast" / "fashion-mnist"


def locate(folder: Path, name: str) -> Path | None:
    """A data file in the folder, packed or not, or where torchvision puts it."""
    for place in (folder, folder / "FashionMNIST" / "raw"):
        for path in (place / f"{name}.gz", place / name):
            if path.is_file():
                return path
    return None


def existing(folder: Path, name: str) -> Path:
    """The same for a file that has to be there.

    Raises:
        SourceUnavailable: it is missing.
    """
    path = locate(folder, name)
    if path is None:
        raise SourceUnavailable(f"{folder} has no {name}")
    return path


def require_files(folder: Path) -> Path:
    """The folder, if all four files are there.

    Raises:
        SourceUnavailable: which are missing.
    """
    if not folder.is_dir():
        raise SourceUnavailable(f"there is no folder {folder}")
    missing = [f"{name}.gz" for name in FILES if locate(folder, name) is None]
    if missing:
        raise SourceUnavailable(f"{folder} lacks {', '.join(missing)}")
    return folder


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"


def _run(command: list[str], folder: Path) -> None:
    """Run a command in a folder; whatever goes wrong, in words."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(f"gave up after {DOWNLOAD_SECONDS} s") from None
    except OSError as error:
        raise SourceUnavailable(f"{command[0]} does not start: {error}") from None
    if done.returncode:
        raise SourceUnavailable(_last_line(done.stderr))


def _keep(downloaded: Path, cache: Path) -> Path:
    """Move complete files into the cache, so that an incomplete download is never in the cache."""
    require_files(downloaded)
    for name in FILES:
        path = existing(downloaded, name)
        os.replace(path, cache / path.name)
    return cache


def _with_torchvision(cache: Path) -> Path:
    if importlib.util.find_spec("torchvision") is None:
        raise SourceUnavailable("torchvision is not installed")
    # A separate process, because torchvision's download has no time limit, and a torchvision built for
    # another torch does not import.
    code = (
        f"import socket, sys; socket.setdefaulttimeout({CONNECT_SECONDS}); "
        "from torchvision.datasets import FashionMNIST; FashionMNIST(sys.argv[1], download=True)"
    )
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _run([sys.executable, "-c", code, folder], Path(folder))
        return _keep(Path(folder), cache)


def _with_apt(cache: Path) -> Path:
    for command in ("apt-get", "dpkg"):
        if shutil.which(command) is None:
            raise SourceUnavailable(f"there is no {command}")
    limits = [f"-oAcquire::{kind}::Timeout={CONNECT_SECONDS}" for kind in ("http", "https")]
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = Path(name)
        _run(["apt-get", "-qq", *limits, "-oAcquire::Retries=0", "download", DEBIAN_PACKAGE], folder)
        packages = list(folder.glob("*.deb"))
        if not packages:
            raise SourceUnavailable("apt-get left no package")
        _run(["dpkg", "-x", str(packages[0]), str(folder)], folder)
        return _keep(folder / DEBIAN_FOLDER.relative_to("/"), cache)


def sources() -> Iterator[tuple[str, Callable[[], Path]]]:
    """The places to try, best first: a name, and a function that gives the folder or raises SourceUnavailable."""
    cache = cache_folder()

    def fetch(how: Callable[[Path], Path]) -> Callable[[], Path]:
        def run() -> Path:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                return how(cache)
            except OSError as error:
                raise SourceUnavailable(f"cannot write to {cache}: {error}") from None

        return run

    yield f"the Debian package {DEBIAN_PACKAGE}", lambda: require_files(DEBIAN_FOLDER)
    yield "the user cache", lambda: require_files(cache)
    yield "torchvision's download", fetch(_with_torchvision)
    yield f"apt-get download {DEBIAN_PACKAGE}", fetch(_with_apt)
