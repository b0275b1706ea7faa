"""The demo's data: Fashion-MNIST as bag against the rest, or digits where it is not available."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.experiments.demo.noise import corrupt
from bench.experiments.demo.sources import FILES, SourceUnavailable, existing, require_files, sources

BAG = 8  # Fashion-MNIST's class number
IDX_UINT8 = b"\x00\x00\x08"
MEAN, STD = 0.1307, 0.3081  # the paper's, though they are MNIST's


@dataclass(frozen=True)
class Split:
    """x (N, ...), fp32; clean and given (N,), int64: the true labels and those that training may see."""

    x: Tensor
    clean: Tensor
    given: Tensor

    def __len__(self) -> int:
        return len(self.given)


@dataclass(frozen=True)
class DataSet:
    """A data set in three splits. ``skipped``: the sources tried before ``source``, and why each could not be used."""

    name: str
    source: str
    skipped: tuple[str, ...]
    classes: tuple[str, ...]
    train: Split
    valid: Split
    test: Split

    def corrupted(self, matrix: Tensor, seed: int) -> DataSet:
        """The same with noisy labels given for training and validation; the test labels stay clean."""
        generator = torch.Generator().manual_seed(seed)
        train, valid = (Split(split.x, split.clean, corrupt(split.clean, matrix, generator)) for split in (self.train, self.valid))
        return DataSet(self.name, self.source, self.skipped, self.classes, train, valid, self.test)


def read_idx(path: Path) -> Tensor:
    """Read an idx file of bytes, gzipped or not.

    Returns:
        uint8, in the shape that the file says.

    Raises:
        ValueError: not such a file, or cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if len(content) < 4 or content[:3] != IDX_UINT8:
        raise ValueError(f"{path}: not an idx file of bytes, it starts with {content[:4].hex(' ') or 'nothing'}")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    expected = start + torch.Size(shape).numel()
    if len(content) != expected:
        raise ValueError(f"{path}: {len(content)} bytes, but {expected} expected for shape {tuple(shape)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def _clean_split(x: Tensor, labels: Tensor) -> Split:
    return Split(x, labels, labels)


def read_fashion(folder: Path, source: str = "", skipped: tuple[str, ...] = ()) -> DataSet:
    """Fashion-MNIST from a folder with its four files: class 0 is bag, class 1 the rest.

    The last sixth of the training images is for validation, as in the paper (50,000 / 10,000 / 10,000).

    Raises:
        ValueError: a file that is not what it should be.
    """
    images, labels, test_images, test_labels = (read_idx(existing(folder, name)) for name in FILES)
    for x, y in ((images, labels), (test_images, test_labels)):
        if x.ndim != 3 or x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or not len(y):
            raise ValueError(f"{folder}: expected (N, 28, 28) images and (N,) labels, got {tuple(x.shape)}, {tuple(y.shape)}")
    x, x_test = (((part.float() / 255 - MEAN) / STD).unsqueeze(1) for part in (images, test_images))
    y, y_test = ((part != BAG).long() for part in (labels, test_labels))
    cut = len(y) - len(y) // 6
    return DataSet(
        "Fashion-MNIST, bag against the rest",
        source,
        skipped,
        ("bag", "rest"),
        _clean_split(x[:cut], y[:cut]),
        _clean_split(x[cut:], y[cut:]),
        _clean_split(x_test, y_test),
    )


def read_digits(skipped: tuple[str, ...] = ()) -> DataSet:
    """scikit-learn's digits, 1,797 handwritten ones of 8 x 8 pixels: nothing to download. 1,100 / 300 / 397.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RuntimeError("the digits need scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    # The file is ordered by writer: shuffled once, in the same order whatever the seed of the run.
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(bunch.data).float()[order] / 16
    y = torch.from_numpy(bunch.target).long()[order]
    parts = zip(x.split([1100, 300, 397]), y.split([1100, 300, 397]), strict=True)
    return DataSet(
        "scikit-learn's digits",
        "scikit-learn (inside the package)",
        skipped,
        tuple(str(digit) for digit in range(10)),
        *(_clean_split(*part) for part in parts),
    )


def load(where: str | None, say: Callable[[str], None]) -> DataSet:
    """The demo's data: Fashion-MNIST from the first source that has it, else the digits.

    Args:
        where: a folder with Fashion-MNIST's files, which is then the only place to look; ``"digits"``; None searches.
        say: is called with what is tried and why it is not used.

    Raises:
        ValueError: the given folder does not have the files, or they are damaged.
        RuntimeError: no data set is available.
    """
    if where == "digits":
        return read_digits()
    if where is not None:
        try:
            return read_fashion(require_files(Path(where)), str(where))
        except SourceUnavailable as error:
            raise ValueError(
                f"--data {where}: {error}; expected a folder with Fashion-MNIST's four idx files, or the word digits"
            ) from None
    skipped: list[str] = []
    for name, find in sources():
        try:
            return read_fashion(find(), name, tuple(skipped))
        except (SourceUnavailable, ValueError) as error:
            skipped.append(f"{name}: {error}")
            say(f"not from {skipped[-1]}")
    say("Fashion-MNIST CANNOT BE HAD here: using scikit-learn's digits (10 classes) instead")
    return read_digits(tuple(skipped))
