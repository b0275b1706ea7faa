"""linear_dmi_loss: the loss of the layer's logits, and its gradients, without the logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from ldmi_fast import dmi_loss, linear_dmi_loss
from tests.support.compare import DERIVATIVE
from tests.support.problems import Problem, problem

OPTIONS: list[Any] = [
    pytest.param({}, {}, id="hard"),
    pytest.param({"weighted": True}, {"ignore_index": 1, "cross_entropy_weight": 0.5}, id="weighted-ignore-ce"),
    pytest.param({"soft": True, "weighted": True}, {"eps": 1e-6, "cross_entropy_weight": 0.5}, id="soft-eps-ce"),
    pytest.param({"absent": (2,)}, {"normalize": False}, id="absent-counts"),
    pytest.param({"soft": True}, {"absent": "strict"}, id="soft-strict"),
]
#: How the rows are cut: not at all; into a few chunks with a remainder; into chunks smaller than the number of classes.
CHUNKS = [pytest.param(None, id="one-chunk"), pytest.param(37, id="chunks"), pytest.param(5, id="small-chunks")]


def layer(batch: Problem, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and bias whose logits have some signal."""
    generator = torch.Generator().manual_seed(1)
    classes = batch.logits.shape[1]
    weight = torch.randn(classes, 2 * classes, generator=generator, dtype=torch.float64) / classes**0.5
    hidden = batch.logits @ torch.linalg.pinv(weight).T
    bias = 0.3 * torch.randn(classes, generator=generator, dtype=torch.float64)
    return tuple(part.to(device, dtype).requires_grad_() for part in (hidden, weight, bias))  # type: ignore[return-value]


def results(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_is_the_loss_of_the_logits(
    engine: str, device: torch.device, build: dict[str, Any], options: dict[str, Any], with_bias: bool, chunk: int | None
) -> None:
    batch = problem(100, 7, dtype=torch.float64, **build).to(device=device)
    hidden, weight, bias = layer(problem(100, 7, dtype=torch.float64, **build), device)
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    target = batch.target
    if target.is_floating_point():
        target = target.clone().requires_grad_()
        leaves.append(target)
    arguments = {"sample_weight": batch.sample_weight, "engine": engine, **options}
    shift = bias if with_bias else None
    ours = results(linear_dmi_loss(hidden, weight, target, shift, chunk_size=chunk, **arguments), *leaves)
    theirs = results(dmi_loss(F.linear(hidden, weight, shift), target, **arguments), *leaves)
    for name, got, expected in zip(("loss", "hidden", "weight", "bias or target", "target"), ours, theirs, strict=False):
        torch.testing.assert_close(got, expected, rtol=DERIVATIVE, atol=DERIVATIVE, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_half_and_single_precision(engine: str, device: torch.device, dtype: torch.dtype, chunk: int | None) -> None:
    """As close to the exact gradients as the materialised path in the same dtype, up to one rounding."""
    batch = problem(300, 7, dtype=torch.float64)
    hidden, weight, bias = layer(batch, device, dtype)
    target = batch.target.to(device)
    ours = results(linear_dmi_loss(hidden, weight, target, bias, chunk_size=chunk, engine=engine), hidden, weight, bias)
    eager = results(dmi_loss(F.linear(hidden, weight, bias), target, engine=engine), hidden, weight, bias)
    wide = [part.detach().double().requires_grad_() for part in (hidden, weight, bias)]
    exact = results(dmi_loss(F.linear(*wide), target), *wide)
    assert ours[0].dtype == torch.float32
    for got, other, true, like in zip(ours[1:], eager[1:], exact[1:], (hidden, weight, bias), strict=True):
        assert got.dtype == like.dtype == dtype
        allowed = (other.double() - true).abs().max() + 4 * torch.finfo(dtype).eps * true.abs().max()
        assert (got.double() - true).abs().max() <= allowed


def test_autocast(engine: str, device: torch.device) -> None:
    batch = problem(300, 7, dtype=torch.float64)
    hidden, weight, bias = layer(batch, device, torch.float32)
    target = batch.target.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        ours = linear_dmi_loss(hidden, weight, target, bias, chunk_size=64, engine=engine)
        theirs = dmi_loss(F.linear(hidden, weight, bias), target, engine=engine)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    for got, expected in zip(results(ours, hidden, weight, bias), results(theirs, hidden, weight, bias), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=2.0**-6 * expected.abs().max().item())


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > 8:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("classes", [30, 400])
def test_the_logits_are_never_there(engine: str, device: torch.device, classes: int) -> None:
    """No tensor is N x C, nor larger than a chunk of logits, S, hidden or weight."""
    generator = torch.Generator().manual_seed(0)
    n, width, chunk = 5000, 16, 128
    hidden = torch.randn(n, width, generator=generator).to(device).requires_grad_()
    weight = torch.randn(classes, width, generator=generator).to(device).requires_grad_()
    target = (torch.arange(n) % classes).to(device)
    with _Largest() as largest:
        linear_dmi_loss(hidden, weight, target, chunk_size=chunk, cross_entropy_weight=0.1, engine=engine).backward()
    assert 0 < largest.elements <= max(chunk * classes, classes * classes, n * width)
    with _Largest() as largest:
        dmi_loss(F.linear(hidden, weight), target, engine=engine).backward()
    assert largest.elements == n * classes


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_only_what_is_asked_for(device: torch.device, which: int) -> None:
    batch = problem(60, 5, soft=True, dtype=torch.float64)
    leaves = [*(part.detach() for part in layer(batch, device)), batch.target.to(device)]
    leaves[which].requires_grad_()
    hidden, weight, bias, target = leaves
    ours = results(linear_dmi_loss(hidden, weight, target, bias, chunk_size=20, cross_entropy_weight=0.2), leaves[which])
    theirs = results(dmi_loss(F.linear(hidden, weight, bias), target, cross_entropy_weight=0.2), leaves[which])
    torch.testing.assert_close(ours, theirs, rtol=DERIVATIVE, atol=DERIVATIVE)


def test_more_dimensions(device: torch.device) -> None:
    """(batch, sequence, D), as in a language model: the classes are last in every argument."""
    batch = problem(60, 5, weighted=True, dtype=torch.float64)
    hidden, weight, bias = layer(batch, device)
    assert batch.sample_weight is not None
    target, mass = batch.target.to(device), batch.sample_weight.to(device)
    deep = linear_dmi_loss(hidden.view(4, 15, -1), weight, target.view(4, 15), bias, sample_weight=mass.view(4, 15), chunk_size=7)
    torch.testing.assert_close(deep, linear_dmi_loss(hidden, weight, target, bias, sample_weight=mass))
    soft = F.one_hot(target, 5).double()
    deep = linear_dmi_loss(hidden.view(4, 15, -1), weight, soft.view(4, 15, 5), bias)
    torch.testing.assert_close(deep, linear_dmi_loss(hidden, weight, target, bias))


@pytest.mark.parametrize("chunk", [None, 4, 2])
def test_derivatives(device: torch.device, chunk: int | None) -> None:
    batch = problem(9, 3, weighted=True, dtype=torch.float64)
    leaves = layer(batch, device)
    mass = batch.sample_weight.to(device) if batch.sample_weight is not None else None

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_dmi_loss(
            hidden, weight, batch.target.to(device), bias, sample_weight=mass, cross_entropy_weight=0.3, chunk_size=chunk
        )

    assert gradcheck(loss, leaves, atol=1e-6)
    assert gradgradcheck(loss, leaves, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("kind", ["empty", "ignored", "singular", "nan"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_edge_cases(engine: str, device: torch.device, kind: str, chunk: int | None) -> None:
    batch = problem(40, 5, dtype=torch.float64)
    hidden, weight, _ = layer(batch, device)
    target = batch.target.to(device)
    if kind == "empty":
        hidden, target = hidden[:0], target[:0]
    elif kind == "ignored":
        target = torch.full_like(target, -100)
    elif kind == "singular":
        weight = torch.zeros_like(weight).requires_grad_()
    else:
        hidden = torch.where(torch.arange(40, device=device).unsqueeze(1) == 3, torch.nan, hidden.detach()).requires_grad_()
    loss = linear_dmi_loss(hidden, weight, target, chunk_size=chunk, engine=engine)
    expected = dmi_loss(F.linear(hidden, weight), target, engine=engine)
    assert torch.equal(loss, expected) or (loss.isnan() and expected.isnan())
    for got, other in zip(results(loss, hidden, weight)[1:], results(expected, hidden, weight)[1:], strict=True):
        torch.testing.assert_close(got, other, equal_nan=True)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("chunk", [40, 4])
@pytest.mark.usefixtures("_fresh_compiler")
def test_one_graph(engine: str, device: torch.device, chunk: int) -> None:
    batch = problem(100, 7, weighted=True, dtype=torch.float64)
    leaves = layer(batch, device)
    target = batch.target.to(device)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_dmi_loss(hidden, weight, target, bias, chunk_size=chunk, engine=engine)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(results(compiled(*leaves), *leaves), results(loss(*leaves), *leaves))


def test_transforms(device: torch.device) -> None:
    batch = problem(60, 5, dtype=torch.float64)
    hidden, weight, bias = layer(batch, device)
    target = batch.target.to(device)
    gradient = torch.func.grad(lambda w: linear_dmi_loss(hidden.detach(), w, target, bias.detach(), chunk_size=7))(weight.detach())
    torch.testing.assert_close(gradient, results(linear_dmi_loss(hidden, weight, target, bias), weight)[1])


def good() -> dict[str, Any]:
    return {"hidden": torch.randn(6, 4), "weight": torch.randn(3, 4), "target": torch.arange(6) % 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(6, 5)}, ValueError, r"got \(6, 5\) and \(3, 4\)"),
        ({"weight": torch.randn(4)}, ValueError, r"weight \(C, D\)"),
        ({"hidden": [1.0]}, TypeError, "hidden must be a floating point tensor, got list"),
        ({"hidden": torch.ones(6, 4, dtype=torch.int64)}, TypeError, "hidden must be float16.*got torch.int64"),
        ({"hidden": torch.randn(6, 4).half()}, TypeError, "hidden and weight must have one dtype"),
        ({"bias": torch.randn(4)}, ValueError, r"bias must have shape \(C,\) = \(3,\), got \(4,\)"),
        ({"bias": torch.randn(3, device="meta")}, ValueError, "bias is on meta, hidden on cpu"),
        ({"target": torch.arange(5) % 3}, ValueError, r"target must have shape \(6,\) for hidden of shape \(6, 4\), got \(5,\)"),
        ({"target": torch.rand(6, 4)}, ValueError, r"target must have shape \(6, 3\)"),
        ({"target": torch.full((6,), 3)}, IndexError, "target 3 of sample 0 is out of range"),
        ({"sample_weight": torch.ones(5)}, ValueError, r"one weight per sample, shape \(6,\), got \(5,\)"),
        ({"sample_weight": -torch.ones(6)}, ValueError, "sample_weight must be finite and >= 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1 row, got 0"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size must be an int"),
        ({"input": "probs"}, TypeError, "unexpected keyword argument 'input'"),
        ({"reduction": "none"}, TypeError, "one number for the whole batch"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_dmi_loss(**{**good(), **change})


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("how", ["ignored", "weight", "soft"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_rows_that_do_not_count_may_hold_anything(
    engine: str, device: torch.device, chunk: int | None, how: str, value: float
) -> None:
    """Padding holds NaN after attention that masks a whole row."""
    batch = problem(40, 5, soft=how == "soft", dtype=torch.float64).to(device=device)
    hidden, weight, bias = layer(problem(40, 5, dtype=torch.float64), device)
    broken = hidden.detach().clone()
    broken[:3] = value
    broken.requires_grad_()
    target = batch.target.clone()
    sample_weight = None
    if how == "ignored":
        target[:3] = -100
    else:
        sample_weight = torch.ones(40, dtype=torch.float64, device=device)
        sample_weight[:3] = 0
    options: dict[str, Any] = {"engine": engine, "chunk_size": chunk, "cross_entropy_weight": 0.3}
    square = lambda parts: torch.stack([part.square().sum() for part in parts]).sum()  # noqa: E731
    for order in (1, 2):
        ours = linear_dmi_loss(broken, weight, target, bias, sample_weight=sample_weight, **options)
        theirs = linear_dmi_loss(hidden[3:], weight, batch.target[3:], bias, **options)
        got = torch.autograd.grad(ours, (broken, weight, bias), create_graph=order == 2)
        expected = torch.autograd.grad(theirs, (hidden, weight, bias), create_graph=order == 2)
        if order == 2:
            got = torch.autograd.grad(square(got[1:]), (broken, weight, bias))
            expected = torch.autograd.grad(square(expected[1:]), (hidden, weight, bias))
        assert not got[0][:3].any()
        for mine, other in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=DERIVATIVE, atol=DERIVATIVE)
    functional = torch.func.grad(lambda w: linear_dmi_loss(broken, w, target, bias, sample_weight=sample_weight, **options))
    (expected_weight,) = torch.autograd.grad(linear_dmi_loss(hidden[3:], weight, batch.target[3:], bias, **options), weight)
    torch.testing.assert_close(functional(weight.detach()), expected_weight, rtol=DERIVATIVE, atol=DERIVATIVE)


def test_meta_tensors(engine: str) -> None:
    hidden, weight = torch.empty(20, 4, device="meta"), torch.empty(6, 4, device="meta")
    loss = linear_dmi_loss(hidden, weight, torch.empty(20, dtype=torch.int64, device="meta"))
    assert loss.is_meta
    assert loss.shape == ()


def test_a_layer_without_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"C and D at least 1, got \(3, 0\)"):
        linear_dmi_loss(torch.zeros(5, 0), torch.zeros(3, 0), torch.zeros(5, dtype=torch.int64))
