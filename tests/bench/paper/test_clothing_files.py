"""Clothing1M: the lists in both layouts, the images, and the synthetic set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", reason="Clothing1M's transforms are torchvision's")
from PIL import Image
from torch.utils.data import DataLoader

from bench.experiments.paper.data import MissingData, clothing1m
from bench.experiments.paper.data.clothing1m import (
    CLASSES,
    IGNORE,
    Images,
    eval_transform,
    read_lists,
    train_transform,
    write_synthetic,
)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)


ONE = "images/0/00/1278541879,867148000.jpg"
TWO = "images/0/01/a name, with spaces.jpg"


def test_annotations_layout(tmp_path: Path) -> None:
    write(
        tmp_path / "annotations",
        noisy_train=f"{ONE} 13\n{TWO} 0\n{ONE} 12\nimages/0/02/1,2.jpg\n\nimages/x.jpg 14\nimages/x.jpg -1\n../x.jpg 3\n/etc/x 3\n",
        clean_val=f"{ONE} 5\n",
        clean_test=f"{TWO} 6\r\n",
    )
    lists = read_lists(tmp_path)
    assert lists.layout == "annotations"
    assert lists.splits == {"train": [(ONE, 13), (TWO, 0)], "valid": [(ONE, 5)], "test": [(TWO, 6)]}
    assert lists.problems == {
        "noisy_train.txt: lines without a label": 2,
        "noisy_train.txt: duplicate lines": 1,
        "noisy_train.txt: labels outside 0..13": 1,
        "noisy_train.txt: paths that leave the folder": 2,
    }


@pytest.mark.parametrize("below", ["", "annotations"])
def test_keys_layout(tmp_path: Path, below: str) -> None:
    write(
        tmp_path / below,
        noisy_train_key_list=f"{ONE}\n{TWO}\n{ONE}\nimages/nobody.jpg\n",
        clean_train_key_list=f"{TWO}\n",
        clean_val_key_list="v.jpg\n",
        clean_test_key_list="t,1.jpg\n",
        noisy_label_kv=f"{TWO} 4\n{ONE} 2\nbroken\n",
        clean_label_kv=f"v.jpg 1\nt,1.jpg 3\n{TWO} 9\nt,1.jpg 4\n",
    )
    lists = read_lists(tmp_path)
    assert lists.layout == "keys"
    # Labels from the right file, in the key list's order.
    assert lists.splits == {
        "train": [(ONE, 2), (TWO, 4)],
        "valid": [("v.jpg", 1)],
        "test": [("t,1.jpg", 3)],
        "clean_train": [(TWO, 9)],
    }
    assert lists.problems == {
        "clean_label_kv.txt: duplicate lines": 1,
        "noisy_label_kv.txt: lines without a label": 1,
        "noisy_train_key_list.txt: duplicate lines": 1,
        "noisy_train_key_list.txt: paths without a label in noisy_label_kv.txt": 1,
    }


def test_missing_lists_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"there is no folder .*nowhere"):
        read_lists(tmp_path / "nowhere")
    write(tmp_path / "annotations", noisy_train="a 1\n", clean_val="a 1\n")
    with pytest.raises(
        MissingData, match=r"lacks clean_test.txt or clean_label_kv.txt, .*noisy_train_key_list.txt; expected the lists"
    ):
        read_lists(tmp_path)
    write(tmp_path / "annotations", clean_test="no label here\n")
    with pytest.raises(ValueError, match=r"lists no usable image for test .*lines without a label"):
        read_lists(tmp_path)


@pytest.mark.parametrize("layout", ["annotations", "keys"])
def test_synthetic_set(tmp_path: Path, layout: clothing1m.Layout) -> None:
    lists = write_synthetic(tmp_path / "a", layout, 280, 3, noise=0.4, pixels=16, broken_lines=2)
    assert lists.layout == layout
    assert {split: len(samples) for split, samples in lists.splits.items()} == {"train": 280, "valid": 70, "test": 70}
    assert list(lists.problems.values()) == [2]
    # Labels tell the pictures' hue: right for all of test, for 60% of train (within 3 standard deviations, 0.09).
    agreement = {}
    for split, samples in lists.splits.items():
        hues = []
        for path, _ in samples:
            with Image.open(tmp_path / "a" / path) as image:
                hues.append(image.resize((1, 1), Image.Resampling.BOX).convert("HSV").getpixel((0, 0))[0] / 256 * len(CLASSES))
        agreement[split] = sum(round(hue) % len(CLASSES) == label for hue, (_, label) in zip(hues, samples, strict=True)) / len(
            samples
        )
    assert agreement["valid"] == agreement["test"] == 1.0
    assert agreement["train"] == pytest.approx(0.6, abs=0.09)
    again = write_synthetic(tmp_path / "b", layout, 280, 3, noise=0.4, pixels=16, broken_lines=2)
    assert again.splits == lists.splits
    first = lists.splits["train"][0][0]
    assert (tmp_path / "a" / first).read_bytes() == (tmp_path / "b" / first).read_bytes()


def test_synthetic_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown layout 'csv': expected annotations or keys"):
        write_synthetic(tmp_path, "csv", 20, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at least 14 images"):
        write_synthetic(tmp_path, "keys", 13, 0)


def test_unreadable_images_are_ignored_and_reported(tmp_path: Path) -> None:
    lists = write_synthetic(tmp_path, "annotations", 20, 0, pixels=40, broken_images=2)
    samples = [("images/none.jpg", 3), *lists.splits["train"]]  # missing, and the first: the shape is still known
    images = Images(tmp_path, samples, eval_transform(24))
    # In worker processes, whose marks the parent must see.
    x, y, index = (torch.cat(parts) for parts in zip(*DataLoader(images, batch_size=8, num_workers=1), strict=True))
    assert x.shape == (21, 3, 24, 24)
    assert index.tolist() == list(range(21))
    bad = [0, 19, 20]
    assert images.unreadable() == [samples[i][0] for i in bad]
    for i in range(21):
        assert y[i] == (IGNORE if i in bad else samples[i][1])
        assert (x[i].abs().max() == 0) == (i in bad)


def test_reading_a_broken_image_draws_no_random_number(tmp_path: Path) -> None:
    images = Images(tmp_path, [("none.jpg", 0)], train_transform(24, 32))
    state = torch.get_rng_state()
    assert images[0][0].shape == (3, 24, 24)
    assert torch.equal(torch.get_rng_state(), state)


def test_cache_holds_resized_images_and_is_read(tmp_path: Path) -> None:
    lists = write_synthetic(tmp_path, "annotations", 14, 0, pixels=64)
    samples = lists.splits["train"][:3]
    direct = Images(tmp_path, samples, eval_transform(32))
    cached = Images(tmp_path, samples, eval_transform(32), cache=tmp_path / "cache", cache_pixels=32)
    first = [cached[i][0] for i in range(3)]
    files = [tmp_path / "cache" / "32px" / f"{path}.jpg" for path, _ in samples]
    for file in files:
        with Image.open(file) as image:
            assert image.size == (32, 32)
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 3  # no temporary file is left
    for i in range(3):
        assert (first[i] - direct[i][0]).abs().mean() < 0.1
    for path, _ in samples:
        (tmp_path / path).unlink()
    assert all(torch.equal(cached[i][0], first[i]) for i in range(3))
    # A damaged cache file without an original is an unreadable image, not an error or a wrong picture.
    files[1].write_bytes(b"junk")
    assert cached[1][1] == IGNORE
    assert cached.unreadable() == [samples[1][0]]


def test_transforms_normalise(tmp_path: Path) -> None:
    white = Image.new("RGB", (50, 70), "white")
    expected = [(1 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    for transform in (train_transform(), eval_transform()):
        x = transform(white)
        assert x.shape == (3, 224, 224)
        assert x.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


def test_indices_and_names_as_in_a_list(tmp_path: Path) -> None:
    """A name of several bytes per letter; -1 is the last image; an index outside is an error, not an image that cannot be read."""
    names = ["a.jpg", "größer, 衣.jpg", "b.jpg"]
    for shade, name in enumerate(names):
        Image.new("RGB", (24, 24), (80 * shade,) * 3).save(tmp_path / name)
    images = Images(tmp_path, [(name, label) for label, name in enumerate(names)], eval_transform(24))
    assert [images.paths[index] for index in range(3)] == names
    assert torch.equal(images[-1][0], images[2][0])
    with pytest.raises(IndexError):
        images[3]
    assert images.unreadable() == []
