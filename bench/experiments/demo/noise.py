"""Label noise: transition matrices and the labels they corrupt."""

from __future__ import annotations

import torch
from torch import Tensor

TWO_CLASS = ("1", "2", "3")
ANY_CLASS = ("pair", "symmetric")
KINDS = TWO_CLASS + ANY_CLASS


def noise_matrix(kind: str, r: float, num_classes: int) -> Tensor:
    """The transition matrix T of a kind of label noise, T[i, j] = P(noisy = j | true = i).

    Args:
        kind: the paper's noises for two classes are ``"1"``: [[1-r/2, r/2], [r/2, 1-r/2]], ``"2"``: [[1-r, r], [0, 1]]
            and ``"3"``: [[1, 0], [r, 1-r]]; for any number of classes there are ``"pair"``: class i becomes i + 1 (the
            last one becomes 0) with probability r, and ``"symmetric"``: with probability r any of the other classes.
        r: amount of noise, 0..1.
        num_classes: C.

    Returns:
        (C, C), fp64, rows sum to 1.

    Raises:
        ValueError: an unknown kind, a kind that is not for this many classes, r outside 0..1, or fewer than 2 classes.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown noise {kind!r}: expected one of {', '.join(KINDS)}")
    if not 0.0 <= r <= 1.0:
        raise ValueError(f"noise amount r must be in 0..1, got {r}")
    if num_classes < 2:
        raise ValueError(f"label noise needs at least 2 classes, got {num_classes}")
    if kind in TWO_CLASS and num_classes != 2:
        raise ValueError(f"noise {kind!r} is for 2 classes, got {num_classes}: use {' or '.join(ANY_CLASS)}")
    identity = torch.eye(num_classes, dtype=torch.float64)
    if kind == "1":
        rows = [[1 - r / 2, r / 2], [r / 2, 1 - r / 2]]
    elif kind == "2":
        rows = [[1 - r, r], [0.0, 1.0]]
    elif kind == "3":
        rows = [[1.0, 0.0], [r, 1 - r]]
    elif kind == "pair":
        return (1 - r) * identity + r * identity.roll(1, dims=1)
    else:
        return (1 - r) * identity + r / (num_classes - 1) * (1 - identity)
    return torch.tensor(rows, dtype=torch.float64)


def corrupt(labels: Tensor, matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a noisy label for every true one.

    Args:
        labels: (N,), integers in 0..C-1.
        matrix: (C, C), floating, T[i, j] = P(noisy = j | true = i).
        generator: the source of randomness; the same seed gives the same labels.

    Returns:
        (N,), int64.

    Raises:
        ValueError: the matrix is not square, has a negative entry, or a row that does not sum to 1.
        IndexError: a label outside 0..C-1.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"transition matrix must be (C, C), got {tuple(matrix.shape)}")
    off = (matrix.sum(dim=1) - 1).abs().max().item()
    if matrix.min().item() < 0 or off > 1e-6:
        raise ValueError(f"rows of a transition matrix are distributions: got {matrix.tolist()}")
    if labels.numel() and not 0 <= labels.min().item() <= labels.max().item() < len(matrix):
        raise IndexError(f"labels must be in 0..{len(matrix) - 1}, got {labels.min().item()}..{labels.max().item()}")
    if not labels.numel():
        return labels.long()
    return torch.multinomial(matrix[labels.long()], 1, generator=generator)[:, 0]
