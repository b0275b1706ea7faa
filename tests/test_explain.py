"""explain: the plan of a call, without running it."""

from __future__ import annotations

import pytest
import torch

from ldmi_fast import Plan, explain


@pytest.mark.parametrize(
    ("n", "classes"),
    [
        pytest.param(0, 14, id="empty"),
        pytest.param(256, 14, id="small"),
        pytest.param(65536, 100, id="large"),
        pytest.param(4096, 1000, id="many-classes"),
    ],
)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_plans(engine: str, device: torch.device, n: int, classes: int, soft: bool) -> None:
    logits = torch.zeros(n, classes, device=device)
    target = torch.zeros(n, classes, device=device) if soft else torch.zeros(n, dtype=torch.int64, device=device)
    plan = explain(logits, target, engine=engine)
    assert isinstance(plan, Plan)
    assert plan.engine == engine
    assert isinstance(plan.kernels, tuple)
    assert plan.kernels
    assert all(isinstance(name, str) for name in plan.kernels)
    assert isinstance(plan.regime, str)
    assert plan.regime
    assert isinstance(plan.workspace_bytes, int)
    assert plan.workspace_bytes >= 0
    assert "engine=" in plan.reason
    text = str(plan)
    for part in (plan.engine, plan.kernels[0], plan.regime, plan.reason, f"{plan.workspace_bytes:,}"):
        assert part in text


def test_plan_without_a_forced_engine() -> None:
    plan = explain(torch.zeros(256, 14), torch.zeros(256, dtype=torch.int64))
    assert "forced" not in plan.reason
    assert plan.reason
    elsewhere = explain(torch.zeros(256, 14, device="meta"), torch.zeros(256, dtype=torch.int64, device="meta"))
    assert elsewhere.engine == "composite"
    assert "meta" in elsewhere.reason


def test_explain_reads_no_values() -> None:
    """It runs nothing: labels out of range, and tensors that have no storage, are fine."""
    assert explain(torch.zeros(4, 3), torch.full((4,), 99)).engine
    assert explain(torch.zeros(4, 3, device="meta"), torch.zeros(4, 3, device="meta")).engine == "composite"
