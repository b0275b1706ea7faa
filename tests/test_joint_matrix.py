"""joint_matrix: values, derivatives, edge cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ldmi_fast import dmi_loss, joint_matrix
from tests.support.compare import DERIVATIVE, EXACT, REORDERED, loss_dtype
from tests.support.problems import as_array, gradient_of, problem

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    ("n", "classes"),
    [
        pytest.param(50, 1, id="one-class"),
        pytest.param(203, 14, id="small"),
        pytest.param(2000, 70, id="large"),
        pytest.param(20, 70, id="fewer-samples-than-classes"),
    ],
)
def test_joint_matrix_values(engine: str, device: torch.device, n: int, classes: int, soft: bool, dtype: torch.dtype) -> None:
    if soft and classes == 1:
        pytest.skip("soft targets of one class are refused")
    batch = problem(n, classes, soft=soft, weighted=True, dtype=dtype)
    here = batch.to(device=device)
    exact = batch.answer().joint
    total = batch.weight.double().sum().item()
    allowed: dict[str, Any] = {"rtol": 2e-6 if loss_dtype(dtype) == torch.float32 else REORDERED, "atol": 0}
    joint = joint_matrix(here.logits, here.target, sample_weight=here.sample_weight, engine=engine)
    assert joint.shape == (classes, classes)
    assert joint.dtype == loss_dtype(dtype)
    assert joint.device.type == device.type
    np.testing.assert_allclose(as_array(joint), exact / total, **allowed)
    if not soft:  # soft targets of half precision do not quite sum to 1
        assert joint.double().sum().item() == pytest.approx(1, rel=1e-6)
    counts = joint_matrix(here.logits, here.target, sample_weight=here.sample_weight, normalize=False, engine=engine)
    np.testing.assert_allclose(as_array(counts), exact, **allowed)


def test_joint_matrix_rows_are_labels(engine: str, device: torch.device) -> None:
    logits = torch.tensor([[0.0, -math.inf, -math.inf]], device=device)
    joint = joint_matrix(logits, torch.tensor([2], device=device), engine=engine)
    expected = torch.zeros(3, 3)
    expected[2, 0] = 1
    assert torch.equal(joint.cpu(), expected)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param({}, {}, id="hard"),
        pytest.param({"weighted": True, "absent": (1,)}, {"normalize": False}, id="absent-counts"),
        pytest.param({"soft": True, "weighted": True}, {}, id="soft"),
        pytest.param({}, {"input": "probs", "ignore_index": 2}, id="probs-ignore"),
    ],
)
def test_joint_matrix_derivatives(engine: str, device: torch.device, build: dict[str, Any], options: dict[str, Any]) -> None:
    batch = problem(8, 3, dtype=torch.float64, **build).to(device=device)
    inputs = [(batch.logits.softmax(1) if options.get("input") == "probs" else batch.logits).requires_grad_()]
    if batch.target.is_floating_point():
        inputs.append(batch.target.requires_grad_())

    def joint(logits: Tensor, target: Tensor = batch.target) -> Tensor:
        return joint_matrix(logits, target, sample_weight=batch.sample_weight, engine=engine, **options)

    assert gradcheck(joint, tuple(inputs))
    assert gradgradcheck(joint, tuple(inputs), fast_mode=True)


def test_a_loss_of_ones_own_on_the_joint_matrix(engine: str, device: torch.device) -> None:
    """-log|det U| written with torch gives the value and gradient of dmi_loss."""
    batch = problem(100, 6, weighted=True, dtype=torch.float64).to(device=device)
    results = []
    for build in (
        lambda z: -torch.linalg.slogdet(joint_matrix(z, batch.target, sample_weight=batch.sample_weight, engine=engine))[1],
        lambda z: dmi_loss(z, batch.target, sample_weight=batch.sample_weight, engine=engine),
    ):
        logits = batch.leaf()
        loss = build(logits)
        loss.backward()
        results.append((loss.item(), gradient_of(logits)))
    assert results[0][0] == pytest.approx(results[1][0], rel=REORDERED)
    assert torch.allclose(results[0][1], results[1][1], rtol=DERIVATIVE, atol=EXACT)


def test_joint_matrix_edge_cases(engine: str, device: torch.device) -> None:
    batch = problem(40, 5, weighted=True).to(device=device)
    assert not joint_matrix(batch.logits[:0], batch.target[:0], engine=engine).any()
    ignored = torch.full_like(batch.target, -100)
    logits = torch.full_like(batch.logits, float("nan")).requires_grad_()
    nothing = joint_matrix(logits, ignored, engine=engine)
    nothing.sum().backward()
    assert not nothing.any()
    assert logits.grad is not None
    assert not logits.grad.any()
    poisoned = batch.logits.clone()
    poisoned[1] = float("nan")
    assert joint_matrix(poisoned, batch.target, sample_weight=batch.sample_weight, engine=engine).isnan().any()
