"""Derivatives in eager mode: first, second, through checkpointing and autocast, and never silently wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ldmi_fast import DMILoss, dmi_loss
from tests.support.compare import DERIVATIVE, EXACT, Result, assert_gradient, assert_matches, budget, run
from tests.support.problems import Problem, as_array, problem

# Two sizes, one for each path of a compiled engine: all in one call, or in stages.
SIZES = [pytest.param(64, 5, id="one-call"), pytest.param(700, 70, id="in-stages")]

CHECKS: list[Any] = [
    pytest.param({}, {}, id="hard"),
    pytest.param({"weighted": True}, {"normalize": False}, id="weighted-counts"),
    pytest.param({"weighted": True}, {"ignore_index": 1, "cross_entropy_weight": 0.7}, id="ignore-ce"),
    pytest.param({"absent": (2,)}, {}, id="absent"),
    pytest.param({"absent": (0,)}, {"cross_entropy_weight": 0.7, "eps": 1e-3}, id="absent-ce-eps"),
    pytest.param({"absent": (0,)}, {"absent": "strict", "cross_entropy_weight": 0.7, "eps": 0.5}, id="strict-ce"),
    pytest.param({}, {"eps": 1e-2}, id="eps"),
    pytest.param({"soft": True}, {}, id="soft"),
    pytest.param({"soft": True, "weighted": True}, {"eps": 1e-2, "cross_entropy_weight": 0.7}, id="soft-eps-ce"),
    pytest.param({}, {"input": "probs"}, id="probs"),
    pytest.param({"weighted": True}, {"input": "probs", "cross_entropy_weight": 0.7}, id="probs-ce"),
    pytest.param({"soft": True}, {"input": "probs", "cross_entropy_weight": 0.7, "eps": 1e-2}, id="probs-soft-ce-eps"),
]


def function(build: dict[str, Any], options: dict[str, Any], engine: str, device: torch.device) -> tuple[Any, Any]:
    """The loss as a function of everything that can have a gradient, and where to take it."""
    batch = problem(9, 3, dtype=torch.float64, **build).to(device=device)
    logits = batch.logits.softmax(1) * 0.9 if options.get("input") == "probs" else batch.logits
    inputs = [logits.clone().requires_grad_()]
    if batch.target.is_floating_point():
        inputs.append(batch.target.clone().requires_grad_())

    def loss(logits: Tensor, target: Tensor = batch.target) -> Tensor:
        return dmi_loss(logits, target, sample_weight=batch.sample_weight, engine=engine, **options)

    return loss, tuple(inputs)


@pytest.mark.parametrize(("build", "options"), CHECKS)
def test_gradcheck(engine: str, device: torch.device, build: dict[str, Any], options: dict[str, Any]) -> None:
    loss, inputs = function(build, options, engine, device)
    assert gradcheck(loss, inputs, atol=1e-6)


@pytest.mark.parametrize(("build", "options"), CHECKS)
def test_gradgradcheck(engine: str, device: torch.device, build: dict[str, Any], options: dict[str, Any]) -> None:
    loss, inputs = function(build, options, engine, device)
    assert gradgradcheck(loss, inputs, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize(("n", "classes"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param({"weighted": True}, {"cross_entropy_weight": 0.5}, id="hard-weighted-ce"),
        pytest.param({"soft": True}, {"eps": None}, id="soft-eps"),
    ],
)
def test_second_derivative_is_the_difference_of_gradients(
    engine: str,
    device: torch.device,
    n: int,
    classes: int,
    dtype: torch.dtype,
    build: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """A gradient penalty: the Hessian times a vector, against differences of the oracle's gradient."""
    batch = problem(n, classes, dtype=dtype, **build)
    if "eps" in options:  # eps as large as the determinant, so that both terms of the second derivative count
        options = {"eps": math.exp(batch.answer().log_abs_det)}
    direction = torch.randn(n, classes, generator=torch.Generator().manual_seed(9), dtype=dtype)
    here = batch.to(device=device)
    logits = here.leaf()
    loss = dmi_loss(logits, here.target, sample_weight=here.sample_weight, engine=engine, **options)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert_matches(Result(loss.detach(), grad.detach(), None), batch.answer(**options), dtype)
    assert grad.requires_grad
    (product,) = torch.autograd.grad((grad * direction.to(device)).sum(), logits)

    h = 1e-4
    slopes = []
    for sign in (1, -1):
        moved = Problem(batch.logits.double() + sign * h * direction.double(), batch.target, batch.sample_weight)
        slopes.append(moved.answer(**options).grad)
    answer = batch.answer(**options)
    exact = (slopes[0] - slopes[1]) / (2 * h)
    # Differences are good to about h^2; the product of two inverses doubles the effect of the condition number.
    assert_gradient("Hessian product", product, exact, budget(answer, dtype) * 8 + 1e-6)


@pytest.mark.parametrize(("n", "classes"), SIZES)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_two_backwards_through_one_graph(engine: str, device: torch.device, n: int, classes: int, soft: bool) -> None:
    """A backward that scales a saved buffer in place would get the second gradient wrong."""
    batch = problem(n, classes, soft=soft, weighted=True).to(device=device)
    logits = batch.leaf()
    loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, cross_entropy_weight=0.5, engine=engine)
    grads = [torch.autograd.grad(loss, logits, torch.tensor(scale, device=device), retain_graph=True)[0] for scale in (2.0, -8.0, 2.0)]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], -4 * grads[0])
    torch.autograd.grad(loss, logits)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize(("n", "classes"), SIZES)
def test_backward_after_a_differentiable_backward(engine: str, device: torch.device, n: int, classes: int) -> None:
    """With create_graph, then without, then with it again: the gradient is the same each time."""
    batch = problem(n, classes).to(device=device)
    logits = batch.leaf()
    loss = dmi_loss(logits, batch.target, engine=engine)
    allowed = budget(batch.answer(), torch.float32)
    expected = batch.answer().grad
    for create in (True, False, True):
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True, create_graph=create)
        assert grad.requires_grad == create
        assert_gradient("gradient", grad.detach(), expected, allowed)


@pytest.mark.parametrize(("n", "classes"), SIZES)
def test_stride_zero_upstream_gradient(engine: str, device: torch.device, n: int, classes: int) -> None:
    batch = problem(n, classes).to(device=device)
    logits = batch.leaf()
    dmi_loss(logits, batch.target, engine=engine).expand(4, 2).sum().backward()
    assert logits.grad is not None
    assert_gradient("gradient", logits.grad, 8 * batch.answer().grad, budget(batch.answer(), torch.float32))


def test_logits_that_are_not_leaves(engine: str, device: torch.device) -> None:
    batch = problem(64, 5).to(device=device)
    leaf = batch.leaf()
    logits = leaf * 2 - leaf
    (dmi_loss(logits, batch.target, engine=engine) + logits.square().sum() * 0).backward()
    assert leaf.grad is not None
    assert_gradient("gradient", leaf.grad, batch.answer().grad, budget(batch.answer(), torch.float32))


def test_gradients_accumulate(engine: str, device: torch.device) -> None:
    batch = problem(64, 5).to(device=device)
    logits = batch.leaf()
    for _ in range(2):
        dmi_loss(logits, batch.target, engine=engine).backward()
    assert logits.grad is not None
    assert_gradient("gradient", logits.grad, 2 * batch.answer().grad, budget(batch.answer(), torch.float32))


@pytest.mark.parametrize(("n", "classes"), SIZES)
def test_no_graph_where_none_is_asked_for(engine: str, device: torch.device, n: int, classes: int) -> None:
    batch = problem(n, classes).to(device=device)
    expected = dmi_loss(batch.leaf(), batch.target, engine=engine)
    assert expected.requires_grad
    plain = dmi_loss(batch.logits, batch.target, engine=engine)
    assert not plain.requires_grad
    assert torch.equal(plain, expected)
    with torch.no_grad():
        assert not dmi_loss(batch.leaf(), batch.target, engine=engine).requires_grad
    with torch.inference_mode():
        assert torch.equal(dmi_loss(batch.logits, batch.target, engine=engine), expected)


def test_soft_targets_alone_require_a_gradient(engine: str, device: torch.device) -> None:
    """Label refinement: the model is fixed, the targets learn. Absent classes get nothing from the determinant."""
    batch = problem(90, 6, soft=True, weighted=True, absent=(3,))
    here = batch.to(device=device)
    target = here.target.clone().requires_grad_()
    loss = dmi_loss(here.logits, target, sample_weight=here.sample_weight, engine=engine)
    loss.backward()
    answer = batch.answer()
    assert answer.target_grad is not None
    assert target.grad is not None
    assert not target.grad[:, 3].any()
    assert_gradient("target gradient", target.grad, answer.target_grad, budget(answer, torch.float32))


def test_gradient_of_targets_and_logits_together_through_one_tensor(engine: str, device: torch.device) -> None:
    """Self-training: predictions are their own soft targets."""
    batch = problem(12, 3, dtype=torch.float64).to(device=device)

    def loss(logits: Tensor) -> Tensor:
        return dmi_loss(logits, logits.softmax(1), cross_entropy_weight=0.5, engine=engine)

    assert gradcheck(loss, batch.leaf())


@pytest.mark.parametrize(("n", "classes"), SIZES)
@pytest.mark.parametrize("which", ["logits", "target", "sample_weight"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_overwriting_an_argument_before_backward_is_caught_or_harmless(
    engine: str, device: torch.device, n: int, classes: int, which: str, soft: bool
) -> None:
    batch = problem(n, classes, soft=soft, weighted=True).to(device=device)
    expected = run(batch, engine).grad
    assert batch.sample_weight is not None
    leaf = batch.leaf()
    arguments = {
        "logits": leaf * 1,
        "target": batch.target.clone(),
        "sample_weight": batch.sample_weight.clone(),
    }
    loss = dmi_loss(arguments["logits"], arguments["target"], sample_weight=arguments["sample_weight"], engine=engine)
    with torch.no_grad():
        arguments[which].zero_()
    try:
        loss.backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return
    assert engine == "composite", "a compiled engine reads its arguments again, so it must notice the change"
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("n", "classes"), SIZES)
def test_activation_checkpointing(engine: str, device: torch.device, n: int, classes: int, reentrant: bool) -> None:
    batch = problem(n, classes, weighted=True).to(device=device)
    expected = run(batch, engine)
    logits = batch.leaf()

    def head(logits: Tensor) -> Tensor:
        return dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine=engine)

    loss = checkpoint(head, logits, use_reentrant=reentrant)
    loss.backward()
    assert torch.equal(loss, expected.loss)
    assert logits.grad is not None
    assert torch.equal(logits.grad, expected.grad)


@pytest.mark.parametrize(("n", "classes"), SIZES)
def test_saved_tensors_may_live_elsewhere(engine: str, device: torch.device, n: int, classes: int) -> None:
    batch = problem(n, classes).to(device=device)
    logits = batch.leaf()
    with save_on_cpu():
        loss = dmi_loss(logits, batch.target, engine=engine)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, run(batch, engine).grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    """The loss is fp32, the same as without autocast for the same logits; parameters get gradients of their dtype."""
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(2)).to(device)
    target = (torch.arange(200) % 6).to(device)
    model = torch.nn.Linear(16, 6).to(device)
    with torch.autocast(device.type, dtype):
        logits = model(features)
        assert logits.dtype == dtype
        loss = dmi_loss(logits, target, cross_entropy_weight=0.5, engine=engine)
        inside = dmi_loss(logits.float(), target, cross_entropy_weight=0.5, engine=engine)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, dmi_loss(logits, target, cross_entropy_weight=0.5, engine=engine))
    assert torch.equal(inside, loss)
    loss.backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32
    assert model.weight.grad.isfinite().all()
    assert model.weight.grad.any()
    # The backward may itself run under autocast, and with a graph.
    leaf = logits.detach().float().requires_grad_()
    with torch.autocast(device.type, dtype):
        (grad,) = torch.autograd.grad(dmi_loss(leaf, target, engine=engine), leaf, create_graph=True)
    (plain,) = torch.autograd.grad(dmi_loss(leaf, target, engine=engine), leaf)
    answer = Problem(leaf.detach(), target).answer()
    assert_gradient("gradient", grad.detach(), as_array(plain), 2 * budget(answer, torch.float32))


@pytest.mark.parametrize("kind", ["singular", "strict", "empty"])
@pytest.mark.parametrize("ce", [0.0, 0.5])
def test_second_derivative_where_the_determinant_has_none(engine: str, device: torch.device, kind: str, ce: float) -> None:
    """A batch that the determinant cannot use gives no NaN, only the curvature of the cross entropy, or zero."""
    batch = problem(40, 5, dtype=torch.float64, absent=(1,) if kind == "strict" else ()).to(device=device)
    logits = torch.zeros_like(batch.logits) if kind == "singular" else batch.logits
    target = torch.full_like(batch.target, -100) if kind == "empty" else batch.target

    def derivatives(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        direction = torch.linspace(-1, 1, grad.numel(), dtype=grad.dtype, device=device).view_as(grad)
        (product,) = torch.autograd.grad((grad * direction).sum(), leaf, allow_unused=True, materialize_grads=True)
        return grad.detach(), product

    grad, product = derivatives(lambda z: dmi_loss(z, target, absent="strict", cross_entropy_weight=ce, engine=engine))
    scale = 0.0 if kind == "empty" else ce
    # The mean over nothing is NaN in F.cross_entropy: the sum is not, and the weight is 0 there.
    count = max(int((target >= 0).sum()), 1)
    expected = derivatives(lambda z: scale / count * torch.nn.functional.cross_entropy(z, target, reduction="sum"))
    # absolute: what is left where terms of about 0.01 cancel
    assert torch.allclose(grad, expected[0], rtol=EXACT, atol=1e-15)
    assert torch.allclose(product, expected[1], rtol=EXACT, atol=1e-15)


def test_forward_mode_is_right_or_refused(engine: str, device: torch.device) -> None:
    import torch.autograd.forward_ad as forward_ad

    batch = problem(40, 5, dtype=torch.float64).to(device=device)
    tangent = torch.randn(40, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(batch.logits, tangent.to(device))
        try:
            loss = dmi_loss(dual, batch.target, engine=engine)
        except (RuntimeError, NotImplementedError) as error:
            if "forward" not in str(error) and "jvp" not in str(error):
                raise
            return
        slope = forward_ad.unpack_dual(loss).tangent
    assert slope is not None
    assert slope.item() == pytest.approx((batch.answer().grad * as_array(tangent)).sum(), rel=DERIVATIVE)


def test_unused_rows_get_no_second_derivative_either(engine: str, device: torch.device) -> None:
    batch = problem(30, 4, dtype=torch.float64, weighted=True).to(device=device)
    assert batch.sample_weight is not None
    idle = batch.sample_weight == 0
    logits = torch.where(idle.unsqueeze(1), float("nan"), batch.logits).requires_grad_()
    loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine=engine)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    assert not grad[idle].any()
    assert not second[idle].any()
    assert second.isfinite().all()
    assert second.any()


def test_module_in_a_training_step_with_two_losses(engine: str, device: torch.device) -> None:
    """The loss and another one on the same logits: their gradients are added."""
    batch = problem(64, 5, dtype=torch.float64).to(device=device)
    logits = batch.leaf()
    ce = torch.nn.functional.cross_entropy(logits, batch.target)
    (DMILoss(5, engine=engine)(logits, batch.target) + 0.5 * ce).backward()
    together = batch.leaf()
    DMILoss(5, cross_entropy_weight=0.5, engine=engine)(together, batch.target).backward()
    assert logits.grad is not None
    assert together.grad is not None
    assert_gradient("gradient", together.grad, as_array(logits.grad), 2 * budget(batch.answer(), torch.float64))
