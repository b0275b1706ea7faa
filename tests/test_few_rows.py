"""Batches of many classes with fewer samples than classes: their cost depends on the classes that occur."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldmi_fast import dmi_loss, few_rows, linear_dmi_loss
from tests.support.compare import DERIVATIVE, SECOND_DERIVATIVE, assert_matches, run
from tests.support.problems import Problem


@pytest.fixture(autouse=True)
def _from_few_classes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_LEAST_CLASSES", 8)
    monkeypatch.setattr(few_rows, "_CLASSES_PER_ROW", 1)


def batch(n: int, classes: int, dtype: torch.dtype = torch.float64, weighted: bool = False, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), target] += 3
    weight = None
    if weighted:
        weight = 0.25 + torch.rand(n, generator=generator)
        weight[::5] = 0
    return Problem(logits, target, weight).to(dtype)


OPTIONS = [
    {},
    {"eps": 1e-12},
    {"normalize": False},
    {"cross_entropy_weight": 0.4},
    {"absent": "strict"},
    {"absent": "strict", "cross_entropy_weight": 0.4},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("n", "classes"), [(1, 8), (7, 8), (20, 60), (60, 61), (48, 300)])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_is_the_definition(
    engine: str, device: torch.device, n: int, classes: int, options: dict[str, Any], dtype: torch.dtype, weighted: bool
) -> None:
    here = batch(n, classes, dtype, weighted).to(device=device)
    assert few_rows.applies(n, classes, here.target.is_floating_point())
    assert_matches(run(here, engine, **options), here.answer(**options), dtype)


@pytest.mark.parametrize("ignore_index", [-100, 255, 3])
def test_rows_that_do_not_count(engine: str, device: torch.device, ignore_index: int) -> None:
    here = batch(30, 40).to(device=device)
    target = here.target.clone()
    target[[0, 4, 29]] = ignore_index
    logits = here.logits.clone()
    logits[target == ignore_index] = torch.nan
    here = Problem(logits, target)
    options = {"ignore_index": ignore_index, "cross_entropy_weight": 0.2}
    assert_matches(run(here, engine, **options), here.answer(**options), torch.float64)


def test_probabilities(engine: str, device: torch.device) -> None:
    here = batch(30, 40).to(device=device)
    here = Problem(here.logits.softmax(-1), here.target)
    options: dict[str, Any] = {"input": "probs", "cross_entropy_weight": 0.2}
    assert_matches(run(here, engine, **options), here.answer(**options), torch.float64)


def test_nothing_counts(engine: str, device: torch.device) -> None:
    logits = torch.randn(5, 20, device=device, requires_grad=True)
    for rows, target in ((0, torch.zeros(0, dtype=torch.int64)), (5, torch.full((5,), -100))):
        loss = dmi_loss(logits[:rows], target.to(device), engine=engine)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_bad_values(engine: str, device: torch.device) -> None:
    here = batch(5, 20).to(device=device)
    broken = here.logits.clone()
    broken[2, 3] = torch.nan
    assert dmi_loss(broken, here.target, engine=engine).isnan()
    for bad in (20, -1, 2**40):
        target = here.target.clone()
        target[1] = bad
        if device.type == "cpu":
            with pytest.raises(IndexError, match=f"target {bad} of sample 1 is out of range: expected 0 <= target < 20"):
                dmi_loss(here.logits, target, engine=engine)
        else:
            assert dmi_loss(here.logits, target, engine=engine).isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    here = batch(10, 50).to(device=device)
    expected = dmi_loss(here.logits, here.target, engine=engine)
    assert torch.equal(dmi_loss(here.logits, here.target.to(dtype), engine=engine), expected)


def test_derivatives_of_the_gradient(engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    here = batch(6, 9).to(device=device)

    def second() -> Tensor:
        logits = here.leaf()
        loss = dmi_loss(logits, here.target, engine=engine, cross_entropy_weight=0.1)
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad((first**2).sum(), logits)[0]

    ours = second()
    monkeypatch.setattr(few_rows, "_LEAST_CLASSES", 1000)
    torch.testing.assert_close(ours, second(), rtol=SECOND_DERIVATIVE, atol=DERIVATIVE)


def test_transforms(engine: str, device: torch.device) -> None:
    """torch.func, for one batch and for several with different labels."""
    batches = [batch(6, 9, seed=seed).to(device=device) for seed in range(3)]
    logits, target = torch.stack([b.logits for b in batches]), torch.stack([b.target for b in batches])

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return dmi_loss(z, y, engine=engine, cross_entropy_weight=0.1)

    gradients = torch.func.vmap(torch.func.grad(loss))(logits, target)
    for b, found in zip(batches, gradients, strict=True):
        leaf = b.leaf()
        torch.testing.assert_close(found, torch.autograd.grad(loss(leaf, b.target), leaf)[0], rtol=DERIVATIVE, atol=DERIVATIVE)
    first = batches[0]
    hessian = torch.func.hessian(lambda z: loss(z, first.target))(first.logits)
    expected = torch.autograd.functional.hessian(lambda z: loss(z, first.target), first.logits)
    torch.testing.assert_close(hessian, expected, rtol=SECOND_DERIVATIVE, atol=SECOND_DERIVATIVE)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(engine: str, device: torch.device, dynamic: bool) -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda z, y: dmi_loss(z, y, engine=engine), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (5, 7):
        here = batch(n, 20).to(device=device)
        logits = here.leaf()
        loss = step(logits, here.target)
        expected = dmi_loss(logits, here.target, engine=engine)
        torch.testing.assert_close(loss, expected)
        for got, want in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True):
            torch.testing.assert_close(got, want, rtol=DERIVATIVE, atol=DERIVATIVE)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("options", [{}, {"absent": "strict"}, {"cross_entropy_weight": 0.3}], ids=str)
def test_linear(engine: str, device: torch.device, chunk: int | None, options: dict[str, Any]) -> None:
    here = batch(12, 30, weighted=True).to(device=device)
    weight = torch.randn(30, 8, dtype=torch.float64, device=device, requires_grad=True)
    hidden = torch.randn(12, 8, dtype=torch.float64, device=device, requires_grad=True)
    common = {"sample_weight": here.sample_weight, "engine": engine, **options}
    ours = linear_dmi_loss(hidden, weight, here.target, chunk_size=chunk, **common)
    theirs = dmi_loss(F.linear(hidden, weight), here.target, **common)
    torch.testing.assert_close(ours, theirs)
    for got, expected in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True):
        torch.testing.assert_close(got, expected, rtol=DERIVATIVE, atol=DERIVATIVE)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as mode:
        yield mode


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_nothing_is_larger_than_the_logits(engine: str, device: torch.device, linear: bool) -> None:
    here = batch(48, 9000, torch.float32).to(device=device)
    logits = here.leaf()
    with largest() as seen:
        if linear:
            weight = torch.randn(9000, 4, device=device, requires_grad=True)
            linear_dmi_loss(logits[:, :4], weight, here.target, engine=engine).backward()
        else:
            dmi_loss(logits, here.target, engine=engine, cross_entropy_weight=0.1).backward()
    assert seen.elements == 48 * 9000
