"""The gradient of sample weights: learning to reweight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ldmi_fast import DMILoss, JointState, diagnose, dmi_loss, explain, few_rows, joint_matrix, linear_dmi_loss
from tests.support.compare import DERIVATIVE, assert_gradient, budget
from tests.support.problems import Problem, problem

OPTIONS = [{}, {"eps": 1e-6}, {"normalize": False}, {"cross_entropy_weight": 0.5}, {"absent": "strict"}]


def by_weight(batch: Problem, loss_of: Any) -> Tensor:
    assert batch.sample_weight is not None
    weight = batch.weight.detach().clone().requires_grad_()
    return torch.autograd.grad(loss_of(weight), weight)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(80, 6), (5000, 12)], ids=str)
def test_is_the_definition(
    engine: str, device: torch.device, size: tuple[int, int], options: dict[str, Any], soft: bool, dtype: torch.dtype
) -> None:
    batch = problem(*size, soft=soft, weighted=True, dtype=torch.float64).to(dtype)
    if options == {"absent": "strict"}:  # singular: no gradient
        batch = problem(*size, soft=soft, weighted=True, absent=(1,), dtype=torch.float64).to(dtype)
    batch = Problem(batch.logits, batch.target, batch.weight.clamp(min=0.01))  # the oracle has none for rows of weight 0
    answer = batch.answer(**options)
    here = batch.to(device=device)
    ours = by_weight(here, lambda w: dmi_loss(here.logits, here.target, sample_weight=w, engine=engine, **options))
    assert ours.dtype == here.weight.dtype
    # terms of the size of <p, V[y]> cancel against k / W
    assert_gradient("weight gradient", ours, answer.weight_grad, 20 * budget(answer, dtype))


@pytest.mark.parametrize("options", [{}, {"cross_entropy_weight": 0.5}], ids=str)
def test_a_weight_of_zero_has_a_derivative(engine: str, device: torch.device, options: dict[str, Any]) -> None:
    """Learning to reweight starts there. Rows that hold no numbers, or are ignored, have no derivative."""
    batch = problem(60, 4, dtype=torch.float64).to(device=device)
    weight = torch.ones(60, dtype=torch.float64, device=device)
    weight[:8] = 0
    target = batch.target.clone()
    target[2] = -100
    logits = batch.logits.clone()
    logits[3] = torch.nan
    logits[4, 1] = torch.inf
    logits[5] = -torch.inf
    logits[6, (int(target[6]) + 1) % 4] = -torch.inf  # an impossible class: a probability of 0 is a number

    def loss(w: Tensor) -> Tensor:
        return dmi_loss(logits, target, sample_weight=w, engine=engine, **options)

    found = by_weight(Problem(logits, target, weight), loss)
    for row in (2, 3, 4, 5):
        assert found[row] == 0
    for row in (0, 1, 6, 7, 8):
        step = 1e-6
        up, down = (
            weight.clone().index_add_(0, torch.tensor([row], device=device), torch.tensor([by], device=device).double())
            for by in (step, 0.0 if weight[row] == 0 else -step)
        )
        slope = (loss(up) - loss(down)) / (step if weight[row] == 0 else 2 * step)
        assert found[row].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-7)


def test_gradcheck(engine: str, device: torch.device) -> None:
    batch = problem(14, 3, dtype=torch.float64).to(device=device)
    weight = (0.5 + torch.rand(14, dtype=torch.float64, device=device)).requires_grad_()
    logits = batch.leaf()
    soft = torch.softmax(2 * torch.randn(14, 3, dtype=torch.float64, device=device), -1).requires_grad_()
    for target in (batch.target, soft):
        for options in ({}, {"cross_entropy_weight": 0.5, "eps": 1e-3}):

            def loss(z: Tensor, t: Tensor, w: Tensor, options: dict[str, Any] = options) -> Tensor:
                return dmi_loss(z, t, sample_weight=w, engine=engine, **options)

            assert gradcheck(loss, (logits, target, weight))
            assert gradgradcheck(loss, (logits, target, weight))


@pytest.mark.parametrize("options", [{}, {"cross_entropy_weight": 0.5}, {"normalize": False}], ids=str)
def test_other_forms_agree(engine: str, device: torch.device, options: dict[str, Any]) -> None:
    batch = problem(90, 5, weighted=True, dtype=torch.float64).to(device=device)
    expected = by_weight(batch, lambda w: dmi_loss(batch.logits, batch.target, sample_weight=w, engine="composite", **options))
    assert expected.any()

    def same(found: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=DERIVATIVE, atol=DERIVATIVE)

    same(by_weight(batch, lambda w: dmi_loss(batch.logits, batch.target, sample_weight=w, engine=engine, **options)))
    same(by_weight(batch, lambda w: DMILoss(5, engine=engine, **options)(batch.logits, batch.target, w)))
    if "normalize" not in options:
        criterion = DMILoss(5, momentum=0.0, engine=engine, **options).to(device)
        same(by_weight(batch, lambda w: criterion(batch.logits, batch.target, w)))
    eye = torch.eye(5, dtype=torch.float64, device=device)
    for chunk in (None, 17, 3):
        same(
            by_weight(
                batch,
                lambda w, chunk=chunk: linear_dmi_loss(
                    batch.logits, eye, batch.target, sample_weight=w, engine=engine, chunk_size=chunk, **options
                ),
            )
        )
    values = batch.weight.detach()
    same(torch.func.grad(lambda w: dmi_loss(batch.logits, batch.target, sample_weight=w, engine=engine, **options))(values))


@pytest.mark.parametrize("absent", ["present", "strict"])
def test_fewer_samples_than_classes(engine: str, device: torch.device, absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = Problem(
        torch.randn(12, 30, generator=generator, dtype=torch.float64),
        torch.randint(0, 30, (12,), generator=generator),
        (torch.rand(12, generator=generator, dtype=torch.float64) > 0.3).double(),
    ).to(device=device)

    def gradient() -> Tensor:
        return by_weight(
            batch,
            lambda w: dmi_loss(batch.logits, batch.target, sample_weight=w, engine=engine, absent=absent, cross_entropy_weight=0.3),
        )

    expected = gradient()
    monkeypatch.setattr(few_rows, "_LEAST_CLASSES", 2)
    monkeypatch.setattr(few_rows, "_CLASSES_PER_ROW", 1)
    torch.testing.assert_close(gradient(), expected, rtol=DERIVATIVE, atol=DERIVATIVE)


def test_joint_matrix(engine: str, device: torch.device) -> None:
    batch = problem(20, 3, weighted=True, dtype=torch.float64).to(device=device)
    upstream = torch.randn(3, 3, dtype=torch.float64, device=device)
    for normalize in (True, False):
        found = by_weight(
            batch,
            lambda w, normalize=normalize: (
                upstream * joint_matrix(batch.logits, batch.target, sample_weight=w, normalize=normalize, engine=engine)
            ).sum(),
        )
        S_grad = (upstream[batch.target] * batch.logits.softmax(-1)).sum(-1)
        W = batch.weight.sum()
        U = joint_matrix(batch.logits, batch.target, sample_weight=batch.sample_weight)
        expected = (S_grad - (upstream * U).sum()) / W if normalize else S_grad
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_where_no_gradient_is_wanted_none_is_kept(engine: str, device: torch.device) -> None:
    batch = problem(40, 4, weighted=True).to(device=device)
    weight = batch.weight.clone().requires_grad_()
    plain = dmi_loss(batch.logits, batch.target, sample_weight=batch.sample_weight, engine=engine)
    with torch.no_grad():
        assert torch.equal(dmi_loss(batch.logits, batch.target, sample_weight=weight, engine=engine), plain)
    state = JointState(4, engine=engine)
    state.update(batch.logits, batch.target, weight)
    assert not state.solve().loss.requires_grad
    assert diagnose(batch.logits, batch.target, sample_weight=weight, engine=engine).loss == pytest.approx(plain.item())
    assert explain(batch.logits, batch.target, sample_weight=weight, engine=engine).engine == engine


def test_learning_to_reweight_finds_the_wrong_labels(engine: str, device: torch.device) -> None:
    """One step of learning to reweight: descent on the loss of clean data raises the weights of right labels above the others."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 3, (600,), generator=generator)
    inputs = F.one_hot(clean, 3).double() * 2 + torch.randn(600, 3, generator=generator, dtype=torch.float64)
    noisy = torch.where(torch.rand(600, generator=generator) < 0.3, (clean + 1) % 3, clean)
    inputs, clean, noisy = (part.to(device) for part in (inputs, clean, noisy))
    layer = torch.eye(3, dtype=torch.float64, device=device).mul(0.3).requires_grad_()
    weight = torch.full((500,), 1.0, dtype=torch.float64, device=device, requires_grad=True)
    loss = dmi_loss(inputs[:500] @ layer, noisy[:500], sample_weight=weight, engine=engine)
    (step,) = torch.autograd.grad(loss, layer, create_graph=True)
    outer = dmi_loss(inputs[500:] @ (layer - 0.1 * step), clean[500:], engine=engine)
    (found,) = torch.autograd.grad(outer, weight)
    right = noisy[:500] == clean[:500]
    assert found[right].mean() < found[~right].mean()
