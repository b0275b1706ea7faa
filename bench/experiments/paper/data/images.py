"""Fashion-MNIST, CIFAR-10 and Dogs vs Cats, in their published file formats."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.experiments.demo.data import BAG, MEAN, STD, read_idx
from bench.experiments.demo.sources import FILES, SourceUnavailable, existing, require_files
from bench.experiments.demo.sources import sources as fashion_sources
from bench.experiments.paper.data.dataset import DataSet, Seeds, Split, Transition, first, noisy_split, permutation, resolve, three_way
from bench.experiments.paper.data.sources import MissingData, from_environment, require_folder

FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR10_BYTES = 3 * 32 * 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PETS = ("cat", "dog")
PETS_PIXELS = 150


# ------------------------------------------------------------------------------------------------------- Fashion-MNIST


def _fashion_arrays(folder: Path) -> tuple[Tensor, ...]:
    images, labels, test_images, test_labels = (read_idx(existing(folder, name)) for name in FILES)
    for x, y in ((images, labels), (test_images, test_labels)):
        if x.ndim != 3 or x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or not len(y):
            raise ValueError(f"{folder}: expected (N, 28, 28) images and (N,) labels, got {tuple(x.shape)}, {tuple(y.shape)}")
        if y.max().item() > 9:
            raise ValueError(f"{folder}: labels must be in 0..9, got {y.max().item()}")
    return images, labels.long(), test_images, test_labels.long()


def _find_fashion(folder: Path | str | None) -> tuple[tuple[Tensor, ...], str]:
    help_text = "expected a folder with Fashion-MNIST's four idx files; Debian: apt-get install dataset-fashion-mnist"
    given = Path(folder) if folder is not None else from_environment("fashion-mnist")
    if given is not None:
        try:
            return _fashion_arrays(require_files(given)), str(given)
        except SourceUnavailable as error:
            raise MissingData(f"Fashion-MNIST: {error}; {help_text}") from None
    tried = []
    for name, find in fashion_sources():
        try:
            return _fashion_arrays(find()), name
        except (SourceUnavailable, ValueError) as error:
            tried.append(f"{name}: {error}")
    raise MissingData(f"Fashion-MNIST is not available ({'; '.join(tried)}); {help_text}")


def load_fashion(
    name: str, folder: Path | str | None, seeds: Seeds, transition: Transition, limit: int | None, *, binary: bool
) -> DataSet:
    """Fashion-MNIST: 50,000 to train on and 10,000 noisy ones to validate with, drawn with the seed; 10,000 clean ones.

    Args:
        name: of the set.
        folder: with the four files; None searches.
        seeds: for the split and the noise.
        transition: the noise.
        limit: at most this many samples a split.
        binary: the paper's two classes, 0 is bag and 1 the rest; else all ten.
    """
    (images, labels, test_images, test_labels), source = _find_fashion(folder)
    if binary:
        labels, test_labels = (labels != BAG).long(), (test_labels != BAG).long()
    classes = ("bag", "rest") if binary else FASHION_CLASSES
    T = resolve(transition, len(classes))
    order = permutation(len(labels), seeds.split)
    cut = len(labels) - len(labels) // 6
    train, valid, test = (first(part, limit) for part in (order[:cut], order[cut:], torch.arange(len(test_labels))))

    def pixels(part: Tensor) -> Tensor:
        return ((part.float() / 255 - MEAN) / STD).unsqueeze(1)

    return DataSet(
        name,
        classes,
        noisy_split(pixels(images[train]), labels[train], T, seeds.train),
        noisy_split(pixels(images[valid]), labels[valid], T, seeds.valid),
        noisy_split(pixels(test_images[test]), test_labels[test], None, 0),
        "image",
        source,
        problems=_fewer({"training images": (len(labels), 60_000), "test images": (len(test_labels), 10_000)}),
    )


def _fewer(counts: dict[str, tuple[int, int]]) -> dict[str, int]:
    """How many samples a folder has too few, of those published."""
    return {
        f"{what} missing of the published {published:,}": published - found
        for what, (found, published) in counts.items()
        if found < published
    }


# ------------------------------------------------------------------------------------------------------------ CIFAR-10


class _ArraysOnly(pickle.Unpickler):
    """Unpickling runs what a file says: only what NumPy's arrays need is let through."""

    def find_class(self, module: str, name: str) -> object:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not what an image batch holds")


def _python_batch(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="bytes").load()
        x, y = np.asarray(content[b"data"]), np.asarray(content[b"labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
        raise ValueError(f"{path}: not a batch of CIFAR-10's python version ({type(error).__name__}: {error})") from None
    if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != CIFAR10_BYTES or y.shape != x.shape[:1]:
        raise ValueError(f"{path}: expected data (N, {CIFAR10_BYTES}) of bytes and N labels, got {x.shape} {x.dtype} and {y.shape}")
    return torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64))


def _binary_batch(path: Path) -> tuple[Tensor, Tensor]:
    content = path.read_bytes()
    if not content or len(content) % (1 + CIFAR10_BYTES):
        raise ValueError(f"{path}: {len(content)} bytes, expected a multiple of {1 + CIFAR10_BYTES}: cut short?")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + CIFAR10_BYTES)
    return rows[:, 1:], rows[:, 0].long()


def _cifar10_batches(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    names = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]
    expected = "data_batch_1 .. data_batch_5 and test_batch, of the python version or with .bin"
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for suffix, reader in (("", _python_batch), (".bin", _binary_batch)):
            present = [(place / f"{name}{suffix}").is_file() for name in names]
            if all(present):
                batches = {name: reader(place / f"{name}{suffix}") for name in names}
                for name, (_, y) in batches.items():
                    if not 0 <= y.min().item() <= y.max().item() <= 9:
                        raise ValueError(f"{place / name}: labels must be in 0..9, got {y.min().item()}..{y.max().item()}")
                return batches
            if any(present):
                missing = ", ".join(f"{name}{suffix}" for name, there in zip(names, present, strict=True) if not there)
                raise MissingData(f"CIFAR-10: {place} lacks {missing}; expected {expected}")
    raise MissingData(f"CIFAR-10: {folder} has no batches; expected {expected} (unpack cifar-10-python.tar.gz there)")


def load_cifar10(name: str, folder: Path | str | None, seeds: Seeds, transition: Transition, limit: int | None) -> DataSet:
    """CIFAR-10: four batches to train on, the fifth is the noisy validation set as in the paper, the test batch is clean."""
    where = require_folder("CIFAR-10", "cifar-10", folder, "a folder with CIFAR-10's batches (python or binary version)")
    batches = _cifar10_batches(where)
    T = resolve(transition, 10)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))

    def split(names: list[str], T: Tensor | None, seed: int) -> Split:
        y = first(torch.cat([batches[key][1] for key in names]), limit)
        x = first(torch.cat([batches[key][0] for key in names]), limit)
        return noisy_split((x.view(-1, 3, 32, 32).float() / 255 - mean) / std, y, T, seed)

    return DataSet(
        name,
        CIFAR10_CLASSES,
        split([f"data_batch_{index}" for index in range(1, 5)], T, seeds.train),
        split(["data_batch_5"], T, seeds.valid),
        split(["test_batch"], None, 0),
        "image",
        str(where),
        problems=_fewer({f"images of {key}": (len(y), 10_000) for key, (_, y) in batches.items()}),
    )


# --------------------------------------------------------------------------------------------------------- Dogs vs Cats


def _decode(path: Path, pixels: int) -> Tensor | None:
    """(3, pixels, pixels), uint8; None if PIL cannot read it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            array = np.asarray(image.convert("RGB").resize((pixels, pixels), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def load_dogs_cats(name: str, folder: Path | str | None, seeds: Seeds, transition: Transition, limit: int | None) -> DataSet:
    """Dogs vs Cats: train/cat.0.jpg, train/dog.0.jpg ... A tenth is the test set, the same in every run, a tenth of the rest
    (by count of all) is for validation: 20,000 / 2,500 / 2,500 of the 25,000 published. 150 x 150 pixels, ImageNet's mean and std.

    All is decoded into memory: 270 kB per image, 6.8 GB for the complete set. An image that cannot be read is left out of its
    split and counted.
    """
    where = require_folder("Dogs vs Cats", "dogs-vs-cats", folder, "a folder with train/cat.0.jpg, train/dog.0.jpg and so on")
    place = where / "train" if (where / "train").is_dir() else where
    problems: Counter[str] = Counter()
    found: list[tuple[int, int, Path]] = []
    for path in place.iterdir():
        match = re.fullmatch(r"(cat|dog)\.(\d+)\.jpg", path.name)
        if match is None:
            problems["files whose name is not like cat.0.jpg"] += 1
        else:
            found.append((PETS.index(match[1]), int(match[2]), path))
    found.sort()
    if {label for label, _, _ in found} != {0, 1} or len(found) < 10:
        raise MissingData(f"Dogs vs Cats: {place} has {len(found)} images; expected train/cat.0.jpg, train/dog.0.jpg and so on")
    T = resolve(transition, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    tenth = len(found) // 10

    def split(indices: Tensor, T: Tensor | None, seed: int) -> Split:
        images, labels = [], []
        for index in first(indices, limit).tolist():
            label, _, path = found[index]
            image = _decode(path, PETS_PIXELS)
            if image is None:
                problems["images that cannot be read"] += 1
                continue
            images.append((image.float() / 255 - mean) / std)
            labels.append(label)
        if not images:
            raise ValueError(f"Dogs vs Cats: none of a split's images in {place} can be read")
        return noisy_split(torch.stack(images), torch.tensor(labels), T, seed)

    train, valid, test = three_way(len(found), (tenth, tenth), seeds.split)
    splits = split(train, T, seeds.train), split(valid, T, seeds.valid), split(test, None, 0)
    problems.update(_fewer({"images": (len(found), 25_000)}))
    return DataSet(name, PETS, *splits, "image", str(where), problems=dict(problems))
