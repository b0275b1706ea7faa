"""Which classes logdet_inverse counts as present, in every engine: those with at least 1e-12 of the weight. Weights at either end of
the range of a double must not overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmi_fast import dmi_loss
from ldmi_fast.presence import present_classes
from tests.support.compare import DERIVATIVE, EXACT, REORDERED
from tests.support.factoring import factor
from tests.support.problems import gradient_of, problem

#: On both sides of the edges between the algorithms for few classes and for many
CLASSES = [2, 5, 17, 33, 70, 130]


def rates(classes: int) -> Tensor:
    R = torch.rand(classes, classes, generator=torch.Generator().manual_seed(classes), dtype=torch.float64)
    R += classes**0.5 * torch.eye(classes, dtype=torch.float64)
    return R / R.sum(-1, keepdim=True)


def expected(R: Tensor, n: Tensor, present: Tensor) -> tuple[float, Tensor]:
    """log|det S| and V of the classes that are present, from NumPy's functions of the submatrix of R."""
    part = R[present][:, present]
    V = torch.zeros_like(R)
    V[present.nonzero(), present.nonzero().T] = torch.linalg.inv(part).T / n[present].unsqueeze(-1)
    return torch.linalg.slogdet(part)[1].item() + n[present].log().sum().item(), V


def check(engine: str, device: torch.device, R: Tensor, n: Tensor, present: Tensor) -> None:
    level, V = expected(R, n, present)
    found, sign, kept, inverse = factor(engine, device, R * n.unsqueeze(-1), n)
    assert kept.item() == present.sum()
    assert found.item() == pytest.approx(level, rel=REORDERED, abs=REORDERED)
    assert sign.item() == torch.linalg.slogdet(R[present][:, present])[0]
    torch.testing.assert_close(inverse, V, rtol=DERIVATIVE, atol=DERIVATIVE * V.abs().max().item())
    strict = factor(engine, device, R * n.unsqueeze(-1), n, "strict")
    if present.all():
        assert strict[0].item() == pytest.approx(level, rel=REORDERED, abs=REORDERED)
    else:
        assert strict[0].item() == -math.inf
        assert not strict[3].any()


@pytest.mark.parametrize("share", [1e-11, 1e-13, 1e-200, 1e-310, 5e-324])
@pytest.mark.parametrize("classes", CLASSES)
def test_a_small_share(engine: str, device: torch.device, classes: int, share: float) -> None:
    """Above a share of 1e-12 a class is present; below, down to the smallest number, the result is that without it."""
    n = torch.full((classes,), 3.0, dtype=torch.float64)
    rare = [0, classes - 1] if classes > 5 else [0]
    n[rare] = share * 3.0 * classes
    present = torch.ones(classes, dtype=torch.bool)
    present[rare] = share > 1e-12
    R = rates(classes)
    if share < 1e-300:
        # entries that small are rounded to 0: their values must not matter
        R[~present] = 0.25
    check(engine, device, R, n, present)


@pytest.mark.parametrize("size", [1e305, 1e-300])
@pytest.mark.parametrize("classes", CLASSES)
def test_weights_of_any_size(engine: str, device: torch.device, classes: int, size: float) -> None:
    n = size * torch.linspace(1, 2, classes, dtype=torch.float64)
    n[1] *= 1e-13
    present = torch.ones(classes, dtype=torch.bool)
    present[1] = False
    check(engine, device, rates(classes), n, present)


@pytest.mark.parametrize("classes", CLASSES)
def test_weights_below_the_smallest_normal_number(engine: str, device: torch.device, classes: int) -> None:
    """1 / n would overflow. The determinant is still right, to the digits that such numbers have."""
    n = 1e-310 * torch.linspace(1, 2, classes, dtype=torch.float64)
    S = rates(classes) * n.unsqueeze(-1)
    level = torch.linalg.slogdet(S * 1e300 * 1e10)[1].item() - classes * math.log(1e10) - classes * math.log(1e300)
    found, sign, kept, _ = factor(engine, device, S, n)
    assert kept.item() == classes
    assert sign.item() == 1
    assert found.item() == pytest.approx(level, rel=REORDERED)


@pytest.mark.parametrize("classes", CLASSES)
def test_what_is_representable_is_right(engine: str, device: torch.device, classes: int) -> None:
    """If 1 / n is too large for a double but V is not; and if V is too large, its zeros are still zeros."""
    place = torch.eye(classes, dtype=torch.float64).roll(1, 0)
    for weight, scale in ((2e-309, 4.0), (1e-312, 2.0**14), (1e-312, 1.0)):
        n = torch.full((classes,), weight, dtype=torch.float64)
        found, _, kept, V = factor(engine, device, scale * weight * place, n)
        assert kept == classes
        assert found.item() == pytest.approx(classes * (math.log(weight) + math.log(scale)), rel=REORDERED)
        torch.testing.assert_close(V, torch.where(place > 0, 1 / (scale * n), 0.0), rtol=EXACT, atol=0)


@pytest.mark.parametrize("classes", CLASSES)
def test_what_is_not_finite(engine: str, device: torch.device, classes: int) -> None:
    """Also in a class that is absent: such data are broken, not small."""
    R = rates(classes)
    for at, value in ((0, math.nan), (0, math.inf), (1, math.nan)):
        n = torch.full((classes,), 3.0, dtype=torch.float64)
        n[0] = 1e-20
        S = R * n.unsqueeze(-1)
        (S[at] if at == 0 else n)[classes - 1] = value
        found, sign, kept, V = factor(engine, device, S, n)
        assert kept == present_classes(n).sum()
        assert found.isnan()
        assert sign.isnan()
        assert V.isnan().all()


def test_a_batch_of_matrices(engine: str, device: torch.device) -> None:
    """Each matrix has its own weights."""
    R = torch.stack([rates(6)] * 3)
    n = torch.ones(3, 6, dtype=torch.float64)
    n[1, 2] = 1e-13
    n[2] = 1e-100
    n[2, 4] = 1e-111
    found, _, kept, V = factor(engine, device, R * n.unsqueeze(-1), n)
    assert kept.tolist() == [6, 5, 6]
    for i in range(3):
        level, inverse = expected(R[i], n[i], n[i] > 1e-12 * n[i].sum())
        assert found[i].item() == pytest.approx(level, rel=REORDERED)
        torch.testing.assert_close(V[i], inverse, rtol=DERIVATIVE, atol=DERIVATIVE * inverse.abs().max().item())


@pytest.mark.parametrize("share", [1e-15, 1e-310])
@pytest.mark.parametrize("kind", ["hard", "soft", "probs"])
@pytest.mark.parametrize(("rows", "classes"), [(40, 4), (120, 33), (150, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_that_hardly_weigh_anything(
    engine: str, device: torch.device, rows: int, classes: int, kind: str, share: float, dtype: torch.dtype
) -> None:
    """The loss is that without them, and their gradient is zero."""
    batch = problem(rows, classes, dtype=dtype).to(device=device)
    logits = batch.logits.softmax(-1) if kind == "probs" else batch.logits
    target = torch.nn.functional.one_hot(batch.target, classes).to(dtype) if kind == "soft" else batch.target
    gone = batch.target % 3 == 0
    weight = torch.ones(rows, dtype=torch.float64, device=device).masked_fill(gone, share)
    options: dict[str, Any] = {"input": "probs" if kind == "probs" else "logits", "engine": engine}

    def value_and_gradient(rows: Tensor | slice, weight: Tensor | None, **more: Any) -> tuple[Tensor, Tensor]:
        leaf = logits[rows].detach().requires_grad_()
        loss = dmi_loss(leaf, target[rows], sample_weight=weight, **options, **more)
        loss.backward()
        return loss.detach(), gradient_of(leaf)

    loss, grad = value_and_gradient(slice(None), weight)
    want, want_grad = value_and_gradient(~gone, None)
    tolerance = 1e-4 if dtype == torch.float32 else DERIVATIVE
    torch.testing.assert_close(loss, want, rtol=tolerance, atol=tolerance)
    assert not grad[gone].any()
    torch.testing.assert_close(grad[~gone], want_grad, rtol=0, atol=10 * tolerance * float(want_grad.abs().max()))
    loss, grad = value_and_gradient(slice(None), weight, absent="strict")
    assert loss == torch.inf
    assert not grad.any()
