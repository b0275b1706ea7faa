"""What the paper proves of the loss, and what its structure implies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ldmi_fast import dmi_loss
from tests.support import oracle
from tests.support.compare import DERIVATIVE, REORDERED, assert_gradient, budget, loss_budget, relative, run
from tests.support.problems import Problem, as_array, problem

DTYPES = [torch.float32, torch.float64]


def close(ours: float, expected: float, dtype: torch.dtype, *answers: oracle.Answer) -> bool:
    """Two losses agree within the budgets of the batches that they come from."""
    return abs(ours - expected) <= sum(loss_budget(answer, dtype) for answer in answers) * max(1.0, abs(expected))


def transition(classes: int, noise: str) -> torch.Tensor:
    """A label transition matrix: row y is the distribution of the noisy label of a sample of class y."""
    generator = torch.Generator().manual_seed(11)
    eye = torch.eye(classes, dtype=torch.float64)
    if noise == "symmetric":
        return 0.5 * eye + 0.5 / classes
    if noise == "pair":
        return 0.6 * eye + 0.4 * eye.roll(1, 1)
    if noise == "to-one-class":  # the paper's class-dependent case: 80% of every other class becomes class 0
        matrix = 0.2 * eye
        matrix[:, 0] += 0.8
        return matrix
    matrix = eye + torch.rand(classes, classes, generator=generator, dtype=torch.float64)
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", ["symmetric", "pair", "to-one-class", "dense"])
@pytest.mark.parametrize("classes", [2, 10, 40])
def test_theorem_label_noise_moves_the_loss_by_a_constant_and_the_gradient_not_at_all(
    engine: str, device: torch.device, classes: int, noise: str, dtype: torch.dtype
) -> None:
    clean = problem(400, classes, weighted=True, dtype=dtype).to(device=device)
    T = transition(classes, noise).to(device)
    noisy = clean.with_target(T[clean.target])  # always fp64: T itself must not be rounded
    before, after = run(clean, engine), run(noisy, engine)
    answers = clean.answer(), noisy.answer()
    shift = -float(np.linalg.slogdet(as_array(T)).logabsdet)
    assert close(after.loss.item(), before.loss.item() + shift, dtype, *answers)
    assert relative(after.grad, as_array(before.grad)) <= sum(budget(answer, dtype) for answer in answers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["labels", "columns"])
@pytest.mark.parametrize("absent", [(), (2, 7)], ids=["all-present", "absent-classes"])
def test_a_permutation_of_labels_or_of_columns_alone_leaves_the_loss_alone(
    engine: str, device: torch.device, which: str, absent: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch = problem(300, 10, absent=absent, dtype=dtype).to(device=device)
    # Absent classes keep their column: that is what "the submatrix of the classes that have weight" is about.
    kept = torch.tensor([c for c in range(10) if c not in absent])
    order = torch.arange(10)
    order[kept] = kept.roll(3)
    order = order.to(device)
    before = run(batch, engine)
    if which == "labels":
        after = run(batch.with_target(order[batch.target]), engine)
        grad = after.grad
    else:
        after = run(Problem(batch.logits[:, order], batch.target), engine)
        grad = torch.empty_like(after.grad)
        grad[:, order] = after.grad
    answer = batch.answer()
    assert close(after.loss.item(), before.loss.item(), dtype, answer, answer)
    assert relative(grad, as_array(before.grad)) <= 2 * budget(answer, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("classes", "absent"), [(1, ()), (14, ()), (14, (0, 3, 13)), (14, tuple(range(13))), (100, ()), (100, (50,))])
def test_trace_identity(
    engine: str, device: torch.device, classes: int, absent: tuple[int, ...], soft: bool, dtype: torch.dtype
) -> None:
    """sum_i w_i <p_i, V[y_i]> = k, the number of classes kept; with input="probs" the gradient is -w_i V[y_i]."""
    if soft and classes == 1:
        pytest.skip("soft targets of one class are refused")
    batch = problem(600, classes, absent=absent, soft=soft, weighted=True, dtype=dtype).to(device=device)
    probs = Problem(batch.logits.softmax(1), batch.target, batch.sample_weight)
    grad = run(probs, engine, input="probs").grad
    trace = -(probs.logits.double() * grad.double()).sum().item()
    kept = classes - len(absent)
    assert abs(trace - kept) <= kept * budget(probs.answer(input="probs"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_every_row_sums_to_zero(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    """A constant on a row's logits changes nothing."""
    batch = problem(300, 14, weighted=True, dtype=dtype)
    grad = run(batch.to(device=device), engine, cross_entropy_weight=0.5).grad
    answer = batch.answer(cross_entropy_weight=0.5)
    assert grad.double().sum(1).abs().max().item() <= 14 * budget(answer, dtype) * np.abs(answer.grad).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_weights_cannot_change_the_gradient(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    batch = problem(300, 10, dtype=dtype)
    per_class = torch.linspace(0.1, 5, 10)
    weighted = Problem(batch.logits, batch.target, per_class[batch.target])
    plain = run(batch.to(device=device), engine, normalize=False)
    scaled = run(weighted.to(device=device), engine, normalize=False)
    answer = batch.answer(normalize=False)
    assert relative(scaled.grad, as_array(plain.grad)) <= 2 * budget(answer, dtype)
    expected = plain.loss.item() - per_class.double().log().sum().item()
    assert close(scaled.loss.item(), expected, dtype, answer, answer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_of_the_weights_cancels_when_normalised(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    batch = problem(300, 10, weighted=True, dtype=dtype)
    assert batch.sample_weight is not None
    scaled = Problem(batch.logits, batch.target, batch.sample_weight * 1024)
    options: dict[str, Any] = {"eps": 1e-12, "cross_entropy_weight": 0.5}
    one, other = run(batch.to(device=device), engine, **options), run(scaled.to(device=device), engine, **options)
    answer = batch.answer(**options)
    assert close(other.loss.item(), one.loss.item(), dtype, answer, answer)
    assert relative(other.grad, as_array(one.grad)) <= 2 * budget(answer, dtype)


def test_integer_weights_are_repetitions(engine: str, device: torch.device) -> None:
    batch = problem(120, 6, dtype=torch.float64)
    times = torch.arange(120) % 4
    weighted = Problem(batch.logits, batch.target, times.double())
    repeated = Problem(batch.logits.repeat_interleave(times, 0), batch.target.repeat_interleave(times, 0))
    for options in ({}, {"normalize": False, "cross_entropy_weight": 0.5}, {"eps": 1e-3}):
        one, other = (
            run(weighted.to(device=device), engine, **options),
            run(repeated.to(device=device), engine, **options),
        )
        assert math.isclose(one.loss.item(), other.loss.item(), rel_tol=REORDERED)


def test_one_hot_soft_targets_are_labels(engine: str, device: torch.device) -> None:
    hard = problem(200, 9, weighted=True, absent=(4,))
    soft = hard.with_target(torch.nn.functional.one_hot(hard.target, 9).float())
    for options in ({}, {"eps": 1e-3, "cross_entropy_weight": 0.5}, {"absent": "strict"}):
        one, other = run(hard.to(device=device), engine, **options), run(soft.to(device=device), engine, **options)
        answer = hard.answer(**options)
        same = one.loss.item() == other.loss.item()  # both infinite
        assert same or close(other.loss.item(), one.loss.item(), torch.float32, answer, answer)
        assert_gradient("gradient", other.grad, as_array(one.grad), 2 * budget(answer, torch.float32))


def test_probabilities_and_logits_agree(engine: str, device: torch.device) -> None:
    batch = problem(200, 9, weighted=True, dtype=torch.float64).to(device=device)
    chosen: list[dict[str, Any]] = [{}, {"eps": 1e-3}, {"cross_entropy_weight": 0.5}]
    for options in chosen:
        logits = run(batch, engine, **options)
        leaf = batch.leaf()
        loss = dmi_loss(leaf.softmax(1), batch.target, sample_weight=batch.sample_weight, input="probs", engine=engine, **options)
        loss.backward()
        assert math.isclose(loss.item(), logits.loss.item(), rel_tol=REORDERED)
        assert leaf.grad is not None
        assert relative(leaf.grad, as_array(logits.grad)) < DERIVATIVE


@pytest.mark.parametrize("classes", [2, 14])
def test_perfect_balanced_predictions_reach_the_minimum(engine: str, device: torch.device, classes: int) -> None:
    """|det U| is at most C^-C, reached by the one-hot joint of balanced classes: the loss is C log C there."""
    labels = torch.arange(classes * 20, device=device) % classes
    logits = 100 * torch.nn.functional.one_hot(labels, classes).double()
    result = run(Problem(logits, labels), engine)
    assert math.isclose(result.loss.item(), classes * math.log(classes), rel_tol=REORDERED)
    assert result.grad.abs().max().item() < DERIVATIVE
