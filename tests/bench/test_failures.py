"""The failure table: what it says of the published formula happens, and does not happen to ours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.experiments import failures
from bench.kernels.measure import num_threads


@pytest.fixture(scope="module")
def table() -> dict[str, failures.Failure]:
    names = ("underflow", "overflow", "overflow 100", "missing", "700")
    with num_threads(1):
        return {name: case() for name, case in zip(names, failures.CASES, strict=True)}


def test_underflow_leaves_the_published_loss_at_its_constant(table: dict[str, failures.Failure]) -> None:
    row = table["underflow"]
    assert 0 < abs(row.determinant) < 1e-15
    assert row.published.loss == pytest.approx(6.9078, abs=1e-4)
    assert 0 < row.published.gradient < 1e-12
    assert row.ours.gradient > 1e-3
    assert "published 6.9078 -> 6.9078" in row.remark


@pytest.mark.parametrize("name", ["overflow", "overflow 100"])
def test_overflow_gives_minus_infinity_and_nan(table: dict[str, failures.Failure], name: str) -> None:
    row = table[name]
    assert math.isinf(row.determinant)
    assert row.published.loss == -math.inf
    assert math.isnan(row.published.gradient)
    assert math.isfinite(row.ours.loss)
    assert 0 < row.ours.gradient < math.inf
    assert "100% of the weights are NaN" in row.remark


@pytest.mark.parametrize("name", ["missing", "700"])
def test_absent_class_gives_no_gradient(table: dict[str, failures.Failure], name: str) -> None:
    row = table[name]
    assert row.determinant == 0
    assert row.published.loss == pytest.approx(6.9078, abs=1e-4)
    assert row.published.gradient == 0
    assert math.isfinite(row.ours.loss)
    assert 1e-2 < row.ours.gradient < math.inf


def test_markdown_has_a_row_a_case(table: dict[str, failures.Failure]) -> None:
    text = failures.markdown(list(table.values()))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(table) + 2
    assert "loss -inf, gradient NaN" in text
    assert "two synchronisations per step" in text.replace("\n", " ")


def test_table_is_written_to_a_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    table: dict[str, failures.Failure],
) -> None:
    monkeypatch.setattr(failures, "CASES", (lambda: table["700"],))
    path = tmp_path / "failures.md"
    assert failures.main(["--markdown", str(path)]) == 0
    assert path.read_text() == capsys.readouterr().out
