"""The demo: noise, data and its sources, a training stage, and a complete run on the digits."""

from __future__ import annotations

import gzip
import json
import math
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import ldmi_fast
from bench.experiments.demo import sources
from bench.experiments.demo.__main__ import DIGITS, main, train
from bench.experiments.demo.cost import loss_cost
from bench.experiments.demo.data import DataSet, load, read_digits, read_fashion, read_idx
from bench.experiments.demo.model import digits_mlp, fashion_cnn
from bench.experiments.demo.noise import KINDS, TWO_CLASS, corrupt, noise_matrix
from bench.experiments.demo.report import confusion
from bench.experiments.demo.train import Check, Stage, batches, run_stage

# ---------------------------------------------------------------------------------------------------------------- noise


def classes_of(kind: str) -> int:
    return 2 if kind in TWO_CLASS else 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_noise_matrix_rows_are_distributions(kind: str, r: float) -> None:
    matrix = noise_matrix(kind, r, classes_of(kind))
    assert matrix.shape == (classes_of(kind),) * 2
    assert matrix.min() >= 0
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64))
    assert torch.equal(matrix, torch.eye(len(matrix), dtype=torch.float64)) == (r == 0)


def test_noise_matrices_are_the_published_ones() -> None:
    expected = {
        "1": [[0.7, 0.3], [0.3, 0.7]],
        "2": [[0.4, 0.6], [0.0, 1.0]],
        "3": [[1.0, 0.0], [0.6, 0.4]],
        "pair": [[0.4, 0.6, 0.0], [0.0, 0.4, 0.6], [0.6, 0.0, 0.4]],
        "symmetric": [[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]],
    }
    for kind, rows in expected.items():
        torch.testing.assert_close(noise_matrix(kind, 0.6, len(rows)), torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("4", 0.5, 2), r"unknown noise '4': expected one of 1, 2, 3, pair, symmetric"),
        (("2", 1.5, 2), r"must be in 0..1, got 1.5"),
        (("2", math.nan, 2), r"must be in 0..1, got nan"),
        (("pair", 0.5, 1), r"at least 2 classes, got 1"),
        (("3", 0.5, 10), r"noise '3' is for 2 classes, got 10: use pair or symmetric"),
    ],
)
def test_noise_matrix_refuses(arguments: tuple[str, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_matrix(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_corruption_follows_the_matrix(kind: str) -> None:
    matrix = noise_matrix(kind, 0.35, classes_of(kind))
    n = 40_000
    labels = torch.arange(n) % len(matrix)
    noisy = corrupt(labels, matrix, torch.Generator().manual_seed(1))
    found = torch.stack([torch.bincount(noisy[labels == i], minlength=len(matrix)) for i in range(len(matrix))]).double()
    found /= found.sum(1, keepdim=True)
    # five standard deviations of a frequency; where T is 0 or 1 nothing varies
    tolerance = 5 * (matrix * (1 - matrix) * len(matrix) / n).sqrt()
    assert ((found - matrix).abs() <= tolerance + 1e-12).all(), found


def test_corruption_is_seeded() -> None:
    labels, matrix = torch.arange(500) % 10, noise_matrix("symmetric", 0.5, 10)
    first, again, other = (corrupt(labels, matrix, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_corruption_refuses() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"must be \(C, C\), got \(2, 3\)"):
        corrupt(torch.tensor([0]), torch.ones(2, 3), generator)
    with pytest.raises(ValueError, match="rows of a transition matrix are distributions"):
        corrupt(torch.tensor([0]), torch.tensor([[0.5, 0.4], [0.0, 1.0]]), generator)
    with pytest.raises(IndexError, match=r"labels must be in 0..1, got 0..2"):
        corrupt(torch.tensor([0, 2]), torch.eye(2), generator)


# ----------------------------------------------------------------------------------------------------------------- data


def idx_bytes(values: Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.numpy().tobytes()


def write_fashion(folder: Path, packed: bool = True) -> Path:
    """Files in Fashion-MNIST's format: 600 + 120 images, darker for class 8 than for the others."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 600), ("t10k", 120)):
        labels = (torch.arange(n) % 10).to(torch.uint8)
        noise = torch.randint(60, (n, 28, 28), generator=torch.Generator().manual_seed(n))
        images = (noise + 150 * (labels == 8)[:, None, None]).to(torch.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(values)
            name = f"{part}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
            else:
                (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_is_read(tmp_path: Path, packed: bool) -> None:
    found = load(str(write_fashion(tmp_path, packed)), print)
    assert [len(part) for part in (found.train, found.valid, found.test)] == [500, 100, 120]
    assert found.train.x.shape == (500, 1, 28, 28)
    assert found.train.x.dtype == torch.float32
    assert torch.equal(found.train.clean, (torch.arange(500) % 10 != 8).long())
    assert found.train.x[8].mean() > found.train.x[7].mean() + 1
    assert found.classes == ("bag", "rest")


def test_fashion_is_found_where_torchvision_puts_it(tmp_path: Path) -> None:
    write_fashion(tmp_path / "FashionMNIST" / "raw", packed=False)
    assert len(load(str(tmp_path), print).test) == 120


def test_only_training_and_validation_labels_are_corrupted() -> None:
    clean = read_digits()
    noisy = clean.corrupted(noise_matrix("pair", 0.4, 10), seed=0)
    for part, expected in ((noisy.train, 0.4), (noisy.valid, 0.4), (noisy.test, 0.0)):
        wrong = (part.given != part.clean).double().mean().item()
        assert wrong == pytest.approx(expected, abs=0.12 if expected else 0)
    assert torch.equal(noisy.train.clean, clean.train.clean)
    assert [len(part) for part in (noisy.train, noisy.valid, noisy.test)] == [1100, 300, 397]


def test_a_folder_that_is_not_there_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data .*nowhere: there is no folder .*expected a folder with Fashion-MNIST"):
        load(str(tmp_path / "nowhere"), print)
    (write_fashion(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"lacks t10k-labels-idx1-ubyte\.gz;"):
        load(str(tmp_path), print)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "not an idx file of bytes, it starts with 00 00 0d 01"),
        (idx_bytes(torch.zeros(3, 2, dtype=torch.uint8))[:-1], r"17 bytes, but 18 expected for shape \(3, 2\)"),
    ],
)
def test_a_file_that_is_not_idx(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda packed: b"<html>" + packed])
def test_a_file_that_is_damaged(tmp_path: Path, damage) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(damage(gzip.compress(idx_bytes(torch.arange(200, dtype=torch.uint8)))))
    with pytest.raises(ValueError, match=r"file\.gz: cannot be read \("):
        read_idx(path)


def test_images_and_labels_that_do_not_fit(tmp_path: Path) -> None:
    short = idx_bytes(torch.zeros(599, dtype=torch.uint8))
    (write_fashion(tmp_path) / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(short))
    with pytest.raises(ValueError, match=r"got \(600, 28, 28\), \(599,\)"):
        read_fashion(tmp_path)


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no data, no torchvision and only those commands that a test puts into the returned folder."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", Path("/nonexistent/datasets/fashion-mnist"))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    return commands


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def found_in(said: list[str] | None = None) -> DataSet:
    return load(None, (said if said is not None else []).append)


def test_digits_are_the_last_resort_and_said_aloud(bare: Path) -> None:
    said: list[str] = []
    found = found_in(said)
    assert found.name == "scikit-learn's digits"
    assert "CANNOT BE HAD" in said[-1]
    for name, reason in zip(("Debian", "cache", "torchvision", "apt-get"), found.skipped, strict=True):
        assert name in reason
    assert "torchvision is not installed" in found.skipped[2]
    assert "there is no apt-get" in found.skipped[3]


def test_the_debian_folder_comes_first(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", write_fashion(tmp_path / "debian"))
    write_fashion(sources.cache_folder())
    found = found_in()
    assert found.source == "the Debian package dataset-fashion-mnist"
    assert found.skipped == ()


def test_a_damaged_cache_is_passed_over(bare: Path) -> None:
    path = write_fashion(sources.cache_folder()) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    found = found_in()
    assert "digits" in found.name
    assert "train-images-idx3-ubyte.gz: cannot be read" in found.skipped[1]


def test_apt_get_fills_the_cache(bare: Path, tmp_path: Path) -> None:
    whole = write_fashion(tmp_path / "whole")
    inside = sources.DEBIAN_FOLDER.relative_to("/")
    command(bare, "apt-get", "touch package.deb")
    command(bare, "dpkg", f'[ "$1" = -x ] && mkdir -p "$3/{inside}" && cp {whole}/* "$3/{inside}"')
    assert found_in().source == "apt-get download dataset-fashion-mnist"
    cache = sources.cache_folder()
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{name}.gz" for name in sources.FILES)
    assert found_in().source == "the user cache"


def test_a_download_cut_short_leaves_nothing(bare: Path, tmp_path: Path) -> None:
    whole = write_fashion(tmp_path / "whole")
    (whole / "t10k-labels-idx1-ubyte.gz").unlink()
    inside = sources.DEBIAN_FOLDER.relative_to("/")
    command(bare, "apt-get", "touch package.deb")
    command(bare, "dpkg", f'mkdir -p "$3/{inside}" && cp {whole}/* "$3/{inside}"')
    assert "lacks t10k-labels" in found_in().skipped[3]
    assert list(sources.cache_folder().iterdir()) == []


def test_what_apt_get_says_is_passed_on(bare: Path) -> None:
    command(bare, "apt-get", "echo 'E: Unable to locate package dataset-fashion-mnist' >&2; exit 100")
    command(bare, "dpkg", "exit 1")
    assert found_in().skipped[3].endswith("E: Unable to locate package dataset-fashion-mnist")


def test_a_download_that_hangs_is_given_up(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DOWNLOAD_SECONDS", 0.3)
    command(bare, "apt-get", "exec sleep 60")
    command(bare, "dpkg", "exit 1")
    start = time.monotonic()
    assert found_in().skipped[3].endswith("gave up after 0.3 s")
    assert time.monotonic() - start < 10


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RuntimeError, match="pip install scikit-learn"):
        read_digits()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return read_digits()


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(64, 10)


def stage_on(digits: DataSet, loss=nn.functional.cross_entropy, **options) -> Stage:
    settings = {"epochs": 2, "lr": 1e-2, "batch_size": 100, "seed": 5, **options}
    return run_stage("a stage", linear(), loss, digits, **settings)


def test_a_stage_learns_and_repeats(digits: DataSet) -> None:
    first, again = stage_on(digits, checks_per_epoch=2), stage_on(digits, checks_per_epoch=2)
    assert first.checks == again.checks
    assert [check.epoch for check in first.checks] == pytest.approx([6 / 11, 1, 17 / 11, 2])
    assert first.last > 70
    assert first.last_epoch_mean == pytest.approx((first.checks[2].test_accuracy + first.checks[3].test_accuracy) / 2)
    assert first.last == pytest.approx(100 * (first.test_predictions == digits.test.clean).double().mean().item())


def test_the_checkpoint_is_chosen_by_its_validation_loss() -> None:
    checks = [Check(1, 1.0, 0.5, 30.0), Check(2, 0.9, 0.2, 20.0), Check(3, 0.8, math.inf, 90.0)]
    assert Stage("a stage", 3, checks).selected == 20.0


def test_both_second_stages_start_alike_and_see_the_same_batches(digits: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldmi_fast, "DMILoss", lambda: nn.functional.cross_entropy)
    recipe = replace(DIGITS, epochs_ce=2, epochs_dmi=3, batch_dmi=DIGITS.batch_ce)
    warm_up, continued, dmi = train(digits, digits_mlp, recipe, 0, Console(quiet=True))
    assert continued.checks == dmi.checks
    assert continued.checks[0] != warm_up.checks[0]


def test_batches_are_full_and_a_permutation() -> None:
    torch.manual_seed(0)
    parts = list(batches(103, 20))
    assert [len(part) for part in parts] == [20] * 5
    assert len(torch.cat(parts).unique()) == 100
    assert [sorted(part.tolist()) for part in batches(3, 20)] == [[0, 1, 2]]


def test_singular_batches_are_counted(digits: DataSet) -> None:
    stage = stage_on(digits, lambda logits, labels: logits.sum() * 0 + math.inf)
    assert stage.singular_batches == 22
    assert stage.checks[-1].train_loss == math.inf


def test_a_nan_loss_stops_the_run(digits: DataSet) -> None:
    with pytest.raises(RuntimeError, match=r"a stage: the loss is NaN in epoch 1, batch 1"):
        stage_on(digits, lambda logits, labels: logits.sum() * math.nan)


def test_the_cnn_is_the_papers() -> None:
    model = fashion_cnn(2)
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 16 * 26 + 32 * (16 * 25 + 1) + 2 * (512 + 1)


def test_the_cost_of_the_loss_is_timed() -> None:
    threads = torch.get_num_threads()
    cost = loss_cost(32, 3, seconds=0.05)
    assert torch.get_num_threads() == threads
    assert cost.dmi_us > 0
    assert cost.cross_entropy_us > 0
    assert f"batch 32 x 3 classes: dmi_loss {cost.dmi_us:.0f} us ({cost.engine} engine)" in str(cost)


def test_confusion() -> None:
    found = confusion(torch.tensor([0, 0, 0, 0, 2]), torch.tensor([0, 0, 0, 1, 2]), 3)
    assert found.tolist() == [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on the digits, with what it printed next to the results."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--data", "digits", "--epochs-ce", "12", "--epochs-dmi", "50", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch, (folder / "printed").open("w") as stream:
        patch.setattr("sys.stdout", stream)
        patch.setenv("COLUMNS", "100")
        assert main(arguments) == 0
    return folder


def test_the_demo_leaves_its_files_and_nothing_else(demo: Path) -> None:
    assert sorted(path.name for path in (demo / "out").iterdir()) == ["curves.png", "results.json"]
    image = matplotlib.image.imread(demo / "out" / "curves.png")
    assert image.shape[0] > 600
    assert image.shape[1] > 1200
    colours = {tuple(pixel) for pixel in (image[::3, ::3, :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {(31, 111, 235), (217, 130, 43)} <= colours  # both curves are there


def test_the_demo_writes_its_numbers(demo: Path) -> None:
    result = json.loads((demo / "out" / "results.json").read_text())
    assert set(result) == {*("data", "noise", "settings", "constant_guess", "stages", "loss_cost", "seconds", "environment")}
    assert result["data"]["classes"] == [str(digit) for digit in range(10)]
    assert [result["data"][part] for part in ("train", "valid", "test")] == [1100, 300, 397]
    assert result["noise"]["kind"] == "pair"
    assert torch.tensor(result["noise"]["matrix"]).shape == (10, 10)
    assert result["noise"]["wrong_train_labels_percent"] == pytest.approx(40, abs=8)
    assert result["settings"]["epochs_dmi"] == 50
    assert [(stage["name"], stage["epochs"], len(stage["checks"])) for stage in result["stages"]] == [
        ("cross entropy", 12, 12),
        ("cross entropy, continued", 50, 50),
        ("L_DMI", 50, 50),
    ]
    for stage in result["stages"]:
        assert stage["last"] == stage["checks"][-1]["test_accuracy"]
        assert set(stage["checks"][0]) == {"epoch", "train_loss", "valid_loss", "test_accuracy"}
    assert result["loss_cost"]["batch_size"] == 1100
    assert {"ldmi_fast", "torch", "python"} <= set(result["environment"])


def test_the_demo_prints_its_table(demo: Path) -> None:
    printed = (demo / "printed").read_text()
    result = json.loads((demo / "out" / "results.json").read_text())
    for stage in result["stages"]:
        row = next(line for line in printed.splitlines() if line.startswith(f"│ {stage['name']} "))
        assert [cell.strip() for cell in row.strip("│").split("│")][1:] == [
            str(stage["epochs"]),
            *(f"{stage[key]:.1f}%" for key in ("last", "last_epoch_mean", "selected")),
        ]
    assert "The loss of one step, forward and backward, batch 1100 x 10 classes: dmi_loss" in printed
    assert "Always answering the commonest class:" in printed


def test_the_demo_makes_its_point(demo: Path) -> None:
    _, continued, dmi = json.loads((demo / "out" / "results.json").read_text())["stages"]
    assert dmi["last"] > continued["last"] + 5
    assert dmi["selected"] > continued["selected"] + 5


def test_the_demo_on_images(tmp_path: Path) -> None:
    folder = write_fashion(tmp_path / "data")
    arguments = ["--data", str(folder), "--quick", "--noise", "1", "--r", "0.2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["noise"] == {
        "kind": "1",
        "r": 0.2,
        "matrix": [[0.9, 0.1], [0.1, 0.9]],
        "wrong_train_labels_percent": pytest.approx(10, abs=6),
    }
    assert result["settings"]["quick"]
    assert [stage["epochs"] for stage in result["stages"]] == [1, 1, 1]
    assert result["data"]["source"] == str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nonexistent"], "error: --data /nonexistent: there is no folder"),
        (["--out", __file__], f"error: [Errno 17] File exists: '{__file__}'"),
        (["--data", "digits", "--noise", "3"], "error: noise '3' is for 2 classes, got 10: use pair or symmetric"),
    ],
)
def test_what_cannot_work_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "1.5"], "--r 1.5: expected 0..1"),
        (["--epochs-dmi", "0"], "--epochs-dmi 0: expected more than 0"),
        (["--lr-ce", "nan"], "--lr-ce nan: expected more than 0"),
        (["--noise", "4"], "invalid choice: '4'"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
