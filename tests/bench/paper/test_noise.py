"""Transition matrices, corruption and estimation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.experiments.paper import noise

MATRICES = {
    "binary 1": lambda r: noise.binary(1, r),
    "binary 2": lambda r: noise.binary(2, r),
    "binary 3": lambda r: noise.binary(3, r),
    "symmetric": lambda r: noise.symmetric(5, r),
    "pair": lambda r: noise.pair(5, r),
    "cifar10_paper": noise.cifar10_paper,
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("r", [0.0, 0.3, 0.9, 1.0])
def test_rows_are_distributions(name: str, r: float) -> None:
    T = MATRICES[name](r)
    assert T.dtype == torch.float64
    assert torch.equal(noise.check_transition(T), T)
    assert torch.equal(T, torch.eye(len(T), dtype=torch.float64)) == (r == 0)


def test_matrices_are_the_published_ones() -> None:
    expected = {
        "binary 1": [[0.7, 0.3], [0.3, 0.7]],
        "binary 2": [[0.4, 0.6], [0.0, 1.0]],
        "binary 3": [[1.0, 0.0], [0.6, 0.4]],
    }
    for name, rows in expected.items():
        torch.testing.assert_close(MATRICES[name](0.6), torch.tensor(rows, dtype=torch.float64))
    T = noise.cifar10_paper(0.4)
    moved = [(i, j, round(T[i, j].item(), 12)) for i in range(10) for j in range(10) if i != j and T[i, j] > 0]
    assert moved == [(2, 0, 0.4), (3, 5, 0.4), (4, 7, 0.4), (9, 1, 0.4)]
    assert noise.symmetric(5, 0.4)[1].tolist() == pytest.approx([0.1, 0.6, 0.1, 0.1, 0.1])
    assert noise.pair(3, 0.4)[2].tolist() == pytest.approx([0.4, 0.0, 0.6])


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("r", [-0.1, 1.1, math.nan])
def test_r_outside_its_range(name: str, r: float) -> None:
    with pytest.raises(ValueError, match=r"must be in 0..1, got"):
        MATRICES[name](r)


def test_unknown_kinds() -> None:
    with pytest.raises(ValueError, match="unknown noise for two classes 4: expected 1, 2 or 3"):
        noise.binary(4, 0.5)
    with pytest.raises(ValueError, match="unknown level of CIFAR-10N 'best': expected one of aggregate, random1"):
        noise.cifar10n("best")


@pytest.mark.parametrize(
    ("level", "rate", "log_abs_det"),
    [  # computed from the published file with NumPy
        ("aggregate", 9.01, -0.96862),
        ("random1", 17.23, -1.95545),
        ("random2", 18.12, -2.06752),
        ("random3", 17.64, -2.00552),
        ("worst", 40.21, -5.74168),
    ],
)
def test_cifar10n_is_the_published_noise(level: str, rate: float, log_abs_det: float) -> None:
    T = noise.check_transition(noise.cifar10n(level), 10)
    assert all(sum(row) == 5000 for row in noise.CIFAR10N_COUNTS[level])
    assert 100 * (1 - T.diagonal().mean().item()) == pytest.approx(rate, abs=0.006)
    assert torch.linalg.slogdet(T).logabsdet.item() == pytest.approx(log_abs_det, abs=1e-5)


def human_labels(path: Path, **arrays: np.ndarray) -> Path:
    """A file as published: a dict of NumPy arrays."""
    torch.save(arrays, path)
    return path


def test_cifar100n_from_its_file(tmp_path: Path) -> None:
    clean = np.arange(1000) % 100
    noisy = np.where(np.arange(1000) < 300, (clean + 7) % 100, clean)
    T = noise.cifar100n(human_labels(tmp_path / "CIFAR-100_human.pt", clean_label=clean, noisy_label=noisy))
    expected = 0.7 * np.eye(100) + 0.3 * np.roll(np.eye(100), 7, axis=1)
    torch.testing.assert_close(T, torch.from_numpy(expected))


def test_cifar100n_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*none.pt: expected CIFAR-100_human.pt"):
        noise.cifar100n(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="expected a dict with clean_label and noisy_label, found clean_label"):
        noise.cifar100n(human_labels(tmp_path / "half.pt", clean_label=np.arange(100)))
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk.pt: cannot be read"):
        noise.cifar100n(tmp_path / "junk.pt")


def test_estimate_counts() -> None:
    clean, noisy = torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 1, 2, 2])
    expected = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(noise.estimate(clean, noisy, 3), expected)
    with pytest.raises(ValueError, match="no true label is of class 3"):
        noise.estimate(clean, noisy, 4)
    with pytest.raises(IndexError, match=r"labels must be in 0..1, got 0..2"):
        noise.estimate(clean, noisy, 2)
    with pytest.raises(ValueError, match=r"must both be \(N,\), got \(7,\) and \(6,\)"):
        noise.estimate(clean, noisy[:6], 3)


@pytest.mark.parametrize("T", [noise.binary(3, 0.8), noise.cifar10n("worst"), noise.pair(5, 0.4)], ids=["binary", "worst", "pair"])
def test_corruption_follows_the_matrix(T: Tensor) -> None:
    clean = torch.arange(20_000 * len(T)) % len(T)
    noisy = noise.corrupt(clean, T, seed=3)
    assert noisy.dtype == torch.int64
    found = noise.estimate(clean, noisy, len(T))
    # Five standard deviations of a share of 20,000.
    assert (found - T).abs().max() <= 5 * 0.5 / math.sqrt(20_000)
    assert (found[T == 0] == 0).all()


def test_corruption_is_seeded_and_touches_nothing() -> None:
    clean = torch.arange(1000) % 10
    before = clean.clone()
    state = torch.get_rng_state()
    first, again, other = (noise.corrupt(clean, noise.symmetric(10, 0.5), seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(clean, before)
    assert torch.equal(torch.get_rng_state(), state)
    # These numbers are written down: they are the same on every machine and in every run.
    assert noise.corrupt(torch.zeros(12, dtype=torch.int32), noise.binary(1, 1.0), 0).tolist() == EXPECTED_SEED_0


EXPECTED_SEED_0 = [1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0]


def test_corruption_never_draws_an_impossible_class() -> None:
    T = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1 / 3, 0.0, 2 / 3]], dtype=torch.float64)
    clean = torch.arange(30_000) % 3
    noisy = noise.corrupt(clean, T, 0)
    assert (noisy[clean == 0] == 1).all()
    assert (noisy[clean == 1] == 0).all()
    assert (noisy[clean == 2] != 1).all()
    assert noise.corrupt(clean[:0], T, 0).shape == (0,)


@pytest.mark.parametrize(
    ("labels", "T", "error", "message"),
    [
        (torch.tensor([0, 2]), noise.binary(1, 0.5), IndexError, r"labels must be in 0..1, got 0..2"),
        (torch.tensor([-1]), noise.binary(1, 0.5), IndexError, r"labels must be in 0..1, got -1..-1"),
        (torch.tensor([0.0]), noise.binary(1, 0.5), TypeError, r"labels must be integers, got torch.float32"),
        (torch.tensor([[0]]), noise.binary(1, 0.5), ValueError, r"labels must be \(N,\), got \(1, 1\)"),
        (torch.tensor([0]), torch.eye(2)[:1], ValueError, r"must be \(C, C\), got \(1, 2\)"),
        (torch.tensor([0]), torch.eye(2).long(), TypeError, r"floating-point tensor, got torch.int64"),
        (torch.tensor([0]), [[1.0]], TypeError, r"floating-point tensor, got list"),
        (torch.tensor([0]), torch.full((2, 2), math.nan), ValueError, r"must be finite, got nan"),
        (torch.tensor([0]), torch.tensor([[1.5, -0.5], [0.0, 1.0]]), ValueError, r"must not be negative, got -0.5"),
        (torch.tensor([0]), torch.tensor([[0.5, 0.4], [0.0, 1.0]]), ValueError, r"row 0 sums to 0.9"),
        (torch.tensor([0]), noise.binary(3, 0.5).T, ValueError, r"cleanlab's convention\? use from_cleanlab"),
    ],
)
def test_corruption_refuses(labels: Tensor, T: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noise.corrupt(labels, T, 0)


def test_cleanlab_has_the_transpose() -> None:
    T = noise.cifar10n("worst")
    matrix = noise.to_cleanlab(T)
    torch.testing.assert_close(matrix.sum(dim=0), torch.ones(10, dtype=torch.float64))
    assert matrix[1, 9] == T[9, 1] != T[1, 9]
    assert torch.equal(noise.from_cleanlab(matrix), T)
    assert torch.equal(noise.from_cleanlab(cast("Any", matrix.numpy())), T)
    with pytest.raises(ValueError, match="transpose of cleanlab's noise matrix is none: rows of a transition matrix"):
        noise.from_cleanlab(T)
