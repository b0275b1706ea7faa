"""The code of the soak, on any machine: a seed gives the same problem again, and a wrong engine is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu import soak

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_seed_is_a_problem() -> None:
    for seed in range(20):
        one, other = soak.problem(seed), soak.problem(seed)
        assert torch.equal(one.logits.nan_to_num(7.0), other.logits.nan_to_num(7.0))
        assert torch.equal(one.target, other.target)
        assert one.options == other.options


def test_problems_are_of_every_kind() -> None:
    problems = [soak.problem(seed) for seed in range(300)]
    assert {p.logits.dtype for p in problems} == set(soak.FLOATS)
    assert {p.target.dtype for p in problems} >= set(soak.INTEGERS) | set(soak.FLOATS)
    assert any(not p.logits.is_contiguous() for p in problems)
    assert any(p.logits.shape[0] == 0 for p in problems)
    assert any(p.logits.dim() == 3 for p in problems)
    assert {p.options["absent"] for p in problems} == {"present", "strict"}
    assert any(p.weight is not None for p in problems)


def test_the_engine_here_passes() -> None:
    engine = soak.default_engine(torch.device(DEVICE))
    chunk = soak.run_chunk(range(40), engine, DEVICE)
    assert chunk.failures == []
    assert chunk.kinds["compared"] >= 20


def test_a_wrong_engine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is wrong by one part in a hundred in one row."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            grad = grad.clone()
            grad[:1] *= 1.01
            return grad

    right = soak.dmi_loss

    def wrong(logits: Tensor, target: Tensor, *, engine: str, **options: Any) -> Tensor:
        return right(logits if engine == "composite" else Wrong.apply(logits), target, engine="composite", **options)

    monkeypatch.setattr(soak, "dmi_loss", wrong)
    chunk = soak.run_chunk(range(40), "wrong", "cpu")
    assert len(chunk.failures) >= 10
    assert "gradient" in chunk.failures[0]["error"]


@pytest.mark.slow
def test_processes_and_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.json"
    assert soak.main(["--problems", "6", "--jobs", "1", "--device", "cpu", "--engine", "composite", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["done"] == 6
    assert result["failures"] == []
    assert sum(result["kinds"].values()) == 6
    assert "6 of 6 problems" in capsys.readouterr().out


def test_an_engine_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--engine", "fast", "--device", "cpu"])
    assert "cannot run on cpu" in capsys.readouterr().err
