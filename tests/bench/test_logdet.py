"""The benchmark of log|det| and inverse: its peers agree, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import logdet


@pytest.mark.parametrize("size", [logdet.Size(7), logdet.Size(40), logdet.Size(5, 3)], ids=str)
def test_all_ways_to_an_inverse_are_the_same(size: logdet.Size) -> None:
    S, n = logdet.joint_like(size, torch.device("cpu"))
    V = torch.linalg.inv(S).mT
    torch.testing.assert_close(torch.ops.ldmi_fast.logdet_inverse(S, n, "present")[3], V, rtol=1e-10, atol=0)
    for name, call in logdet.stock(S).items():
        loose = name.endswith("32")
        torch.testing.assert_close(call(), V.float() if loose else V, rtol=1e-3 if loose else 1e-10, atol=1e-6 if loose else 0)


def test_the_factorisation_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert logdet.main(["--sizes", "10", "3x20", "--seconds", "0.05", "--out", str(out)]) == 0
    one, many = json.loads(out.read_text())["rows"]
    assert (one["classes"], one["count"], many["classes"], many["count"]) == (10, 1, 20, 3)
    assert set(one["ours_over"]) == {f"{way}-float{bits}" for way in ("slogdet", "inv", "lu") for bits in (32, 64)}
    assert "| 3x20 |" in out.with_suffix(".md").read_text()
    assert "(found.png)" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
    for wrong in ("0", "3x", "axb", "1x2x3"):
        with pytest.raises(SystemExit):
            logdet.main(["--sizes", wrong])
