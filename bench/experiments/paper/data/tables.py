"""Letter and scikit-learn's digits: rows of features, standardised with the training rows' statistics."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from torch import Tensor

from bench.experiments.demo.data import read_digits
from bench.experiments.paper.data.dataset import DataSet, Seeds, Transition, first, noisy_split, resolve, standardised, three_way
from bench.experiments.paper.data.sources import LETTER, read

LETTER_ROWS, LETTER_FEATURES = 20_000, 16


def _table(
    name: str,
    classes: tuple[str, ...],
    x: Tensor,
    y: Tensor,
    sizes: tuple[int, int],
    source: str,
    problems: dict[str, int],
    seeds: Seeds,
    transition: Transition,
    limit: int | None,
) -> DataSet:
    T = resolve(transition, len(classes))
    parts = [first(part, limit) for part in three_way(len(y), sizes, seeds.split)]
    x_train, x_valid, x_test = standardised(*(x[part] for part in parts))
    y_train, y_valid, y_test = (y[part] for part in parts)
    return DataSet(
        name,
        classes,
        noisy_split(x_train, y_train, T, seeds.train),
        noisy_split(x_valid, y_valid, T, seeds.valid),
        noisy_split(x_test, y_test, None, 0),
        "table",
        source,
        problems=problems,
    )


def load_digits(name: str, folder: Path | str | None, seeds: Seeds, transition: Transition, limit: int | None) -> DataSet:
    """scikit-learn's digits, 1,797 of 64 pixels: 1,100 / 300 / 397."""
    if folder is not None:
        raise ValueError(f"digits: they are inside scikit-learn and take no folder, got {folder}")
    digits = read_digits()
    x, y = (torch.cat([getattr(part, key) for part in (digits.train, digits.valid, digits.test)]) for key in ("x", "clean"))
    return _table(name, digits.classes, x, y, (300, 397), digits.source, {}, seeds, transition, limit)


def parse_letter(content: bytes) -> tuple[Tensor, Tensor, dict[str, int]]:
    """x (N, 16), fp32, labels (N,) with A = 0, and a count of malformed lines, from KEEL's letter.dat.

    Lines are 16 integers and a letter, with commas; those that start with @ are the format's header.
    """
    rows, labels, malformed = [], [], 0
    for line in content.decode("utf-8", "replace").splitlines():
        if not line.strip() or line.startswith("@"):
            continue
        *values, letter = (part.strip() for part in line.split(","))
        if len(values) == LETTER_FEATURES and len(letter) == 1 and letter in string.ascii_uppercase:
            try:
                rows.append([float(int(value)) for value in values])
            except ValueError:
                malformed += 1
                continue
            labels.append(ord(letter) - ord("A"))
        else:
            malformed += 1
    problems = {"malformed lines": malformed} if malformed else {}
    return torch.tensor(rows).view(-1, LETTER_FEATURES), torch.tensor(labels, dtype=torch.int64), problems


def _check_letter(content: bytes) -> None:
    count = len(parse_letter(content)[1])
    if count != LETTER_ROWS:
        raise ValueError(f"expected {LETTER_ROWS:,} rows, got {count:,}")


def load_letter(name: str, folder: Path | str | None, seeds: Seeds, transition: Transition, limit: int | None) -> DataSet:
    """Letter: 20,000 rows of 16 features, 26 classes: 14,000 / 2,000 / 4,000; a file of another size in those shares."""
    content, source = read(LETTER, folder, _check_letter)
    x, y, problems = parse_letter(content)
    if len(y) < 20:
        raise ValueError(f"Letter: {source} has {len(y)} rows; expected lines of {LETTER_FEATURES} integers and a letter")
    if len(y) < LETTER_ROWS:
        problems[f"rows missing of the published {LETTER_ROWS:,}"] = LETTER_ROWS - len(y)
    sizes = len(y) // 10, len(y) // 5
    return _table(name, tuple(string.ascii_uppercase), x, y, sizes, source, problems, seeds, transition, limit)
