"""Every method of the comparison against its formula, written sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bench.experiments.paper.methods import (
    COMPARED,
    METHODS,
    Exact,
    Forward,
    Generalised,
    LatentNoise,
    Method,
    Published,
    Recommended,
    Setting,
    estimated_transition,
)
from tests.support import oracle

N, C = 240, 3


@pytest.fixture
def batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, C)
    y = torch.arange(N) % C
    x = torch.randn(N, 4)
    x[torch.arange(N), y] += 2.0
    return model, x, y


def setting(x: Tensor, y: Tensor, transition: Tensor | None = None) -> Setting:
    return Setting(x, y, C, 24, transition)


def probs(model: nn.Module, x: Tensor) -> list[list[float]]:
    return model(x).double().softmax(1).tolist()


def test_cross_entropy(batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    model, x, y = batch
    expected = -sum(math.log(p[label]) for p, label in zip(probs(model, x), y.tolist(), strict=True)) / N
    assert Method().loss(model(x), y, torch.arange(N)).item() == pytest.approx(expected, rel=1e-5)


def test_forward_correction(batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    model, x, y = batch
    T = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.6, 0.4], [0.3, 0.0, 0.7]], dtype=torch.float64)
    method = Forward(oracle=True)
    method.start(model, setting(x, y, T))
    rows = T.tolist()
    expected = 0.0
    for p, label in zip(probs(model, x), y.tolist(), strict=True):
        expected -= math.log(sum(p[i] * rows[i][label] for i in range(C))) / N
    assert method.loss(model(x), y, torch.arange(N)).item() == pytest.approx(expected, rel=1e-5)


def test_forward_correction_with_the_truth_needs_one(batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    model, x, y = batch
    with pytest.raises(ValueError, match="fw-true needs the transition matrix"):
        Forward(oracle=True).start(model, setting(x, y))


def test_transition_estimated_from_anchor_points() -> None:
    p = torch.rand(101, C, generator=torch.Generator().manual_seed(1)).softmax(1)
    found = estimated_transition(p)
    for i in range(C):
        ordered = sorted(range(101), key=lambda n: p[n, i].item())
        torch.testing.assert_close(found[i], p[ordered[97]].double(), rtol=1e-6, atol=1e-6)


def test_transition_is_found_where_predictions_follow_the_noise() -> None:
    # a network that has learned the noisy labels predicts T's row wherever the true class is certain
    T = torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.0, 0.3, 0.7]], dtype=torch.float64)
    truth = torch.arange(300) % C
    torch.testing.assert_close(estimated_transition(T[truth]), T)


def test_transition_percentile_is_checked() -> None:
    with pytest.raises(ValueError, match=r"percentile must be in 0\.\.100, got 101"):
        estimated_transition(torch.ones(2, 2), 101)


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_generalised_cross_entropy(batch: tuple[nn.Module, Tensor, Tensor], q: float) -> None:
    model, x, y = batch
    expected = sum((1 - p[label] ** q) / q for p, label in zip(probs(model, x), y.tolist(), strict=True)) / N
    assert Generalised(q).loss(model(x), y, torch.arange(N)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_published_form(batch: tuple[nn.Module, Tensor, Tensor], normalize: bool) -> None:
    model, x, y = batch
    U = [[0.0] * C for _ in range(C)]
    for p, label in zip(probs(model, x), y.tolist(), strict=True):
        for j in range(C):
            U[label][j] += p[j] / (N if normalize else 1)
    det = torch.linalg.det(torch.tensor(U, dtype=torch.float64)).abs().item()
    assert Published(normalize).loss(model(x), y, torch.arange(N)).item() == pytest.approx(-math.log(det + 0.001), rel=1e-5)


def test_exact_is_the_loss_of_the_batch(batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    model, x, y = batch
    expected = oracle.dmi(model(x).detach().double().numpy(), y.numpy()).loss
    assert Exact().loss(model(x), y, torch.arange(N)).item() == pytest.approx(float(expected), rel=1e-5)


def test_recommended_is_calibrated_on_the_training_set(batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    model, x, y = batch
    method = Recommended()
    method.start(model, setting(x, y))
    whole = Exact().loss(model(x), y, torch.arange(N)).item()
    one = model(x[:1]).expand(6, C)  # six times the same sample: its own determinant is 0
    assert method.loss(one, y[:6], torch.arange(6)).item() == pytest.approx(whole, abs=0.3)
    assert Exact().loss(one, y[:6], torch.arange(6)).item() == math.inf


def counted(z: Tensor, noisy: Tensor) -> Tensor:
    counts = torch.zeros(C, C, dtype=torch.long)
    for true, label in zip(z.tolist(), noisy.tolist(), strict=True):
        counts[true, label] += 1
    return counts


def test_latent_labels_keep_their_counts(batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    model, x, y = batch
    method = LatentNoise()
    method.start(model, setting(x, y))
    before = method.z.clone()
    for index in torch.randperm(N).split(24):
        method.loss(model(x[index]), y[index], index)
        torch.testing.assert_close(method.counts, counted(method.z, y))
    assert (method.z != before).any()


def test_latent_labels_are_drawn_from_their_posterior(batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    """4000 draws of one sample: within 5 standard deviations of p_z (counts without it + 1) / (their row sum + 3)."""
    model, x, y = batch
    method = LatentNoise()
    method.start(model, setting(x, y))
    index = torch.tensor([7])
    p = probs(model, x[index])[0]
    without = counted(torch.cat([method.z[:7], method.z[8:]]), torch.cat([y[:7], y[8:]])).tolist()
    weight = [p[z] * (without[z][y[7]] + 1) / (sum(without[z]) + C) for z in range(C)]
    draws = torch.zeros(C)
    logits = model(x[index]).detach()
    for _ in range(4000):
        method.loss(logits, y[index], index)
        draws[method.z[7]] += 1
    for z in range(C):
        share = weight[z] / sum(weight)
        assert abs(draws[z].item() - 4000 * share) <= 5 * math.sqrt(4000 * share * (1 - share)) + 1


def test_latent_loss_is_cross_entropy_of_the_draw(batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    model, x, y = batch
    method = LatentNoise()
    method.start(model, setting(x, y))
    index = torch.arange(24)
    loss = method.loss(model(x[index]), y[index], index).item()
    expected = -sum(math.log(p[z]) for p, z in zip(probs(model, x[index]), method.z[index].tolist(), strict=True)) / 24
    assert loss == pytest.approx(expected, rel=1e-5)


def test_latent_validation_loss_has_no_side_effect(batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    model, x, y = batch
    method = LatentNoise()
    method.start(model, setting(x, y))
    z, counts = method.z.clone(), method.counts.clone()
    phi = ((counts.double() + 1) / (counts.double() + 1).sum(1, keepdim=True)).tolist()
    expected = 0.0
    for p, label in zip(probs(model, x), y.tolist(), strict=True):
        expected -= math.log(sum(p[i] * phi[i][label] for i in range(C))) / N
    assert method.valid_loss(model(x), y).item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(method.z, z)
    assert torch.equal(method.counts, counts)


def test_latent_draw_survives_impossible_rows() -> None:
    method = LatentNoise()
    x = torch.eye(C)
    model = nn.Linear(C, C)
    method.start(model, setting(x, torch.arange(C)))
    logits = torch.full((C, C), -1e30)
    logits[torch.arange(C), torch.arange(C)] = 1e30
    assert math.isfinite(method.valid_loss(logits, torch.arange(C)).item())
    assert not math.isnan(method.loss(logits, torch.arange(C), torch.arange(C)).item())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_gradients_and_picks_epochs_without_changing(name: str, batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    model, x, y = batch
    method = METHODS[name]()
    method.start(model, setting(x, y, torch.eye(C, dtype=torch.float64)))
    first = method.valid_loss(model(x), y).item()
    assert math.isfinite(first)
    assert method.valid_loss(model(x), y).item() == first
    method.loss(model(x[:24]), y[:24], torch.arange(24)).backward()
    assert model.weight.grad is not None
    assert model.weight.grad.abs().sum() > 0


def test_the_compared_are_methods() -> None:
    assert set(COMPARED) <= set(METHODS)
