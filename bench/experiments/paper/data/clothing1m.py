"""Clothing1M: its lists in both published layouts, its images, and a synthetic set in its format.

Layouts, distinguished by the files that exist (in the folder or in its ``annotations``):

- ``"annotations"``, the paper's repository: noisy_train.txt, clean_val.txt, clean_test.txt, lines ``path label``;
- ``"keys"``, the data set's own: noisy_train_key_list.txt, clean_{val,test}_key_list.txt (clean_train_key_list.txt is read
  where there is one), a path a line, and noisy_label_kv.txt, clean_label_kv.txt, lines ``path label``.

Paths are relative to the folder and may hold commas and spaces: the label is what follows the last space.
"""

from __future__ import annotations

import colorsys
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from bench.experiments.paper.data.dataset import permutation
from bench.experiments.paper.data.images import IMAGENET_MEAN, IMAGENET_STD
from bench.experiments.paper.data.sources import MissingData
from bench.experiments.paper.noise import corrupt, symmetric
from bench.kernels.results import write_atomic

CLASSES = (
    "T-Shirt", "Shirt", "Knitwear", "Chiffon", "Sweater", "Hoodie", "Windbreaker",
    "Jacket", "Downcoat", "Suit", "Shawl", "Dress", "Vest", "Underwear",
)  # fmt: skip
IGNORE = -100
"""Label of an image that cannot be read: the losses' ``ignore_index``."""

Layout = Literal["annotations", "keys"]
Sample = tuple[str, int]

ANNOTATIONS = {"train": "noisy_train.txt", "valid": "clean_val.txt", "test": "clean_test.txt"}
KEYS = {
    "train": ("noisy_train_key_list.txt", "noisy_label_kv.txt"),
    "valid": ("clean_val_key_list.txt", "clean_label_kv.txt"),
    "test": ("clean_test_key_list.txt", "clean_label_kv.txt"),
}
CLEAN_TRAIN = ("clean_train_key_list.txt", "clean_label_kv.txt")


@dataclass(frozen=True)
class Lists:
    """What the list files say.

    Attributes:
        folder: what paths are relative to.
        layout: of the files.
        splits: (path, label) in the files' order, by ``"train"`` (noisy), ``"valid"``, ``"test"`` and, in the layout that has
            it, ``"clean_train"``.
        problems: lines left out, by file and reason.
    """

    folder: Path
    layout: Layout
    splits: dict[str, list[Sample]]
    problems: dict[str, int] = field(default_factory=dict)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.strip():
                yield line.strip()


def _is_relative(path: str) -> bool:
    """Whether the path stays inside the folder."""
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts


def _read_pairs(path: Path, problems: Counter[str]) -> dict[str, int]:
    """``path label`` lines; what cannot be used is counted. The first of several lines for one path counts."""
    pairs: dict[str, int] = {}
    for line in _lines(path):
        name, _, label = line.rpartition(" ")
        name = name.strip()
        if not name or not (label.isascii() and label.isdigit()):
            problems[f"{path.name}: lines without a label"] += 1
        elif int(label) >= len(CLASSES):
            problems[f"{path.name}: labels outside 0..{len(CLASSES) - 1}"] += 1
        elif not _is_relative(name):
            problems[f"{path.name}: paths that leave the folder"] += 1
        elif name in pairs:
            problems[f"{path.name}: duplicate lines"] += 1
        else:
            pairs[name] = int(label)
    return pairs


def _read_keys(path: Path, labels: dict[str, int], label_file: str, problems: Counter[str]) -> list[Sample]:
    """The paths of a key list with their labels."""
    samples: dict[str, int] = {}
    for name in _lines(path):
        if name in samples:
            problems[f"{path.name}: duplicate lines"] += 1
        elif name not in labels:
            problems[f"{path.name}: paths without a label in {label_file}"] += 1
        else:
            samples[name] = labels[name]
    return list(samples.items())


def read_lists(folder: Path | str) -> Lists:
    """Read the list files of a folder, in whichever layout they are.

    Raises:
        MissingData: neither layout is complete; the message says what is missing.
        ValueError: a split without a usable line.
    """
    folder = Path(folder)
    places = [place for place in (folder, folder / "annotations") if place.is_dir()]
    if not places:
        raise MissingData(f"Clothing1M: there is no folder {folder}")
    needed: dict[Layout, set[str]] = {
        "annotations": set(ANNOTATIONS.values()),
        "keys": {name for pair in KEYS.values() for name in pair},
    }
    for layout, names in needed.items():
        for place in places:
            if all((place / name).is_file() for name in names):
                lists = _read_layout(folder, place, layout)
                for split, samples in lists.splits.items():
                    if not samples:
                        raise ValueError(f"Clothing1M: {place} lists no usable image for {split} ({lists.problems})")
                return lists
    missing = " or ".join(
        ", ".join(sorted(name for name in names if not any((place / name).is_file() for place in places))) for names in needed.values()
    )
    raise MissingData(
        f"Clothing1M: {folder} lacks {missing}; expected the lists of one layout there or in annotations/, next to images/"
    )


def _read_layout(folder: Path, place: Path, layout: Layout) -> Lists:
    problems: Counter[str] = Counter()
    splits: dict[str, list[Sample]] = {}
    if layout == "annotations":
        for split, name in ANNOTATIONS.items():
            splits[split] = list(_read_pairs(place / name, problems).items())
    else:
        files = dict(KEYS)
        if (place / CLEAN_TRAIN[0]).is_file():
            files["clean_train"] = CLEAN_TRAIN
        labels = {name: _read_pairs(place / name, problems) for name in sorted({name for _, name in files.values()})}
        for split, (keys, label_file) in files.items():
            splits[split] = _read_keys(place / keys, labels[label_file], label_file, problems)
    return Lists(folder, layout, splits, dict(problems))


# -------------------------------------------------------------------------------------------------------------- images


def train_transform(crop: int = 224, resize: int = 256) -> Callable[[Image.Image], Tensor]:
    """The paper's: resize to a square, a random crop and flip, ImageNet's mean and std."""
    return transforms.Compose(
        [
            transforms.Resize((resize, resize)),
            transforms.RandomCrop(crop),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def eval_transform(size: int = 224) -> Callable[[Image.Image], Tensor]:
    """The paper's: resize to a square, ImageNet's mean and std."""
    return transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )


class _Names:
    """Strings in a tensor: loader processes share its memory, where a list of a million would be sent to and held by each."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self._ends = torch.tensor([0, *itertools.accumulate(map(len, encoded))])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]  # IndexError outside, and -1 is the last
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._text[start:end].numpy().tobytes())


class Images(Dataset[tuple[Tensor, int, int]]):
    """The images of a split: (image, label, index).

    An image that is missing or cannot be read comes as zeros, which is the mean colour, with the label IGNORE: the losses
    leave it out, while batches keep their size and ranks their step. It is marked in shared memory, so that workers that
    are processes are counted too: ``unreadable()``.

    Args:
        folder: what paths are relative to.
        samples: (path, label).
        transform: of a PIL image, to a tensor of one shape.
        cache: a folder that keeps every image once read as a JPEG of ``cache_pixels`` squared, and is read first. It is
            compressed once more (quality 95), so pixels differ slightly from those without a cache. None keeps nothing.
        cache_pixels: the side of a cached image; the train transform's resize.
    """

    def __init__(
        self,
        folder: Path | str,
        samples: list[Sample],
        transform: Callable[[Image.Image], Tensor],
        *,
        cache: Path | str | None = None,
        cache_pixels: int = 256,
    ) -> None:
        if not samples:
            raise ValueError("no samples")
        self.folder = Path(folder)
        self.paths = _Names([path for path, _ in samples])
        self.labels = torch.tensor([label for _, label in samples])
        self.transform = transform
        # Each size has its own folder, so that images of one size are not used for another.
        self.cache = Path(cache) / f"{cache_pixels}px" if cache is not None else None
        self.cache_pixels = cache_pixels
        self._unreadable = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()
        self._shape: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def unreadable(self) -> list[str]:
        """The paths that could not be read so far, in the list's order."""
        return [self.paths[index] for index in self._unreadable.nonzero()[:, 0].tolist()]

    def _blank(self) -> Tensor:
        if self._shape is None:
            # A grey image through the same transform has the shape; the transform's random numbers are put back.
            state = torch.get_rng_state()
            self._shape = self.transform(Image.new("RGB", (self.cache_pixels, self.cache_pixels))).shape
            torch.set_rng_state(state)
        return torch.zeros(self._shape)

    def _cached(self, index: int) -> Path:
        assert self.cache is not None
        return self.cache / f"{self.paths[index]}.jpg"

    def _open(self, index: int) -> Image.Image:
        if self.cache is not None and self._cached(index).is_file():
            try:
                with Image.open(self._cached(index)) as cached:
                    return cached.convert("RGB")
            except (OSError, SyntaxError, ValueError):
                pass  # made again from the original
        with Image.open(self.folder / self.paths[index]) as original:
            image = original.convert("RGB")
        if self.cache is not None:
            image = image.resize((self.cache_pixels, self.cache_pixels), Image.Resampling.BILINEAR)
            # What is read later is what is returned now: the first epoch sees the pixels of the others.
            packed = _jpeg(image, quality=95)
            write_atomic(self._cached(index), packed, sync=False)  # one of a million, and made again if it is damaged
            with Image.open(io.BytesIO(packed)) as again:
                image = again.convert("RGB")
        return image

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        try:
            image = self._open(index)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            self._unreadable[index] = 1
            return self._blank(), IGNORE, index
        return self.transform(image), int(self.labels[index]), index


def _jpeg(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


# ----------------------------------------------------------------------------------------------------------- synthetic


def _picture(label: int, pixels: int, generator: np.random.Generator) -> Image.Image:
    """Stripes in the class's hue, and in its direction, at a random phase, under noise: a small net learns them."""
    colour = np.array(colorsys.hsv_to_rgb(label / len(CLASSES), 0.8, 0.9))
    y, x = np.mgrid[0:pixels, 0:pixels] / pixels
    angle = np.pi * label / len(CLASSES)
    wave = np.sin(2 * np.pi * (4 * (x * np.cos(angle) + y * np.sin(angle)) + generator.random()))
    values = colour * (0.75 + 0.25 * wave[..., None]) + 0.05 * generator.standard_normal((pixels, pixels, 3))
    return Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))


def write_synthetic(
    folder: Path | str,
    layout: Layout,
    num_images: int,
    seed: int,
    *,
    noise: float = 0.3,
    pixels: int = 64,
    broken_lines: int = 0,
    broken_images: int = 0,
) -> Lists:
    """Write a small set in Clothing1M's format: 14 classes that differ in hue and in the direction of stripes.

    Args:
        folder: is made; images go below its ``images``, names have a comma as the published ones do.
        layout: of the lists.
        num_images: for training; validation and test get a quarter each, at least one a class.
        seed: of pictures, order and noise.
        noise: share of training labels that are wrong, symmetric.
        pixels: side of an image.
        broken_lines: lines without a label (a path without one, in the keys layout) added to the training list.
        broken_images: training images, the last ones of the list, that are cut short.

    Returns:
        What ``read_lists`` reads of it: broken lines are left out, broken images are not.

    Raises:
        ValueError: an unknown layout, or fewer images than classes or than broken ones.
    """
    if layout not in ("annotations", "keys"):
        raise ValueError(f"unknown layout {layout!r}: expected annotations or keys")
    if num_images < len(CLASSES) or not 0 <= broken_images < num_images:
        raise ValueError(f"expected at least {len(CLASSES)} images, more than broken ones, got {num_images} and {broken_images}")
    folder = Path(folder)
    generator = np.random.default_rng(seed)
    held_out = max(len(CLASSES), num_images // 4)
    clean, given = {}, {}
    for part, (split, count) in enumerate({"train": num_images, "valid": held_out, "test": held_out}.items()):
        labels = permutation(count, 3 * seed + part) % len(CLASSES)
        names = [f"images/{part}/{index % 10}0/{part}{index:06d},{generator.integers(10**9)}.jpg" for index in range(count)]
        for index, (name, label) in enumerate(zip(names, labels.tolist(), strict=True)):
            content = _jpeg(_picture(label, pixels, generator), quality=90)
            if split == "train" and index >= count - broken_images:
                content = content[: len(content) // 2]
            write_atomic(folder / name, content)
        clean[split] = list(zip(names, labels.tolist(), strict=True))
        noisy = corrupt(labels, symmetric(len(CLASSES), noise), seed) if split == "train" else labels
        given[split] = list(zip(names, noisy.tolist(), strict=True))
    stray = [f"images/0/00/stray{index},0.jpg" for index in range(broken_lines)]

    def text(lines: list[str]) -> str:
        return "".join(f"{line}\n" for line in lines)

    def pairs(samples: list[Sample]) -> list[str]:
        return [f"{name} {label}" for name, label in samples]

    place = folder / "annotations" if layout == "annotations" else folder
    if layout == "annotations":
        for split, name in ANNOTATIONS.items():
            write_atomic(place / name, text(pairs(given[split]) + (stray if split == "train" else [])))
    else:
        for split, (name, _) in KEYS.items():
            write_atomic(place / name, text([path for path, _ in given[split]] + (stray if split == "train" else [])))
        write_atomic(place / KEYS["train"][1], text(pairs(given["train"])))
        write_atomic(place / KEYS["test"][1], text(pairs(clean["valid"] + clean["test"])))
    return read_lists(folder)
