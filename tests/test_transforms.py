"""torch.func: grad, vmap, their compositions, Jacobians and Hessians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from ldmi_fast import DMILoss, dmi_loss, joint_matrix, linear_dmi_loss
from tests.support.compare import DERIVATIVE, EXACT, REORDERED, SECOND_DERIVATIVE, Result, assert_gradient, assert_matches, budget
from tests.support.problems import Problem, as_array, problem

# As in test_autograd: problems that a compiled engine computes in one call, and in stages.
SIZES = [pytest.param(64, 5, id="one-call"), pytest.param(700, 70, id="in-stages")]
OPTIONS: list[Any] = [
    pytest.param({}, {}, id="hard"),
    pytest.param({"weighted": True}, {"ignore_index": 1, "cross_entropy_weight": 0.5}, id="weighted-ignore-ce"),
    pytest.param({"soft": True}, {"eps": 1e-3}, id="soft-eps"),
    pytest.param({"absent": (2,)}, {"normalize": False}, id="absent-counts"),
]


@pytest.mark.parametrize(("n", "classes"), SIZES)
@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_grad(engine: str, device: torch.device, n: int, classes: int, build: dict[str, Any], options: dict[str, Any]) -> None:
    batch = problem(n, classes, **build)
    here = batch.to(device=device)

    def loss(logits: Tensor) -> Tensor:
        return dmi_loss(logits, here.target, sample_weight=here.sample_weight, engine=engine, **options)

    gradient, value = grad_and_value(loss)(here.logits)
    assert_matches(Result(value, gradient, None), batch.answer(**options), torch.float32)
    (pulled,) = vjp(loss, here.logits)[1](torch.tensor(-2.0, device=device))
    assert_gradient("vjp", pulled, -2 * batch.answer(**options).grad, budget(batch.answer(**options), torch.float32))


def several(count: int, n: int = 40, classes: int = 5, **build: Any) -> list[Problem]:
    return [problem(n, classes, seed=seed, dtype=torch.float64, **build) for seed in range(count)]


def stacked(batches: list[Problem], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    weights = [batch.sample_weight for batch in batches if batch.sample_weight is not None]
    return (
        torch.stack([batch.logits for batch in batches]).to(device),
        torch.stack([batch.target for batch in batches]).to(device),
        torch.stack(weights).to(device) if weights else None,
    )


@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_vmap_and_vmap_of_grad(engine: str, device: torch.device, build: dict[str, Any], options: dict[str, Any]) -> None:
    batches = several(4, **build)
    logits, target, weight = stacked(batches, device)

    def loss(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return dmi_loss(logits, target, sample_weight=weight, engine=engine, **options)

    dims = (0, 0, None if weight is None else 0)
    values = vmap(loss, in_dims=dims)(logits, target, weight)
    grads = vmap(grad(loss), in_dims=dims)(logits, target, weight)
    assert values.shape == (4,)
    assert grads.shape == logits.shape
    for batch, value, gradient in zip(batches, values, grads, strict=True):
        assert_matches(Result(value, gradient, None), batch.answer(**options), torch.float64)


def test_vmap_over_one_argument_only(engine: str, device: torch.device) -> None:
    """Many models and one set of labels; one model and many sets of labels, or of weights."""
    batches = several(3, weighted=True)
    logits, target, weight = stacked(batches, device)
    assert weight is not None

    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return dmi_loss(logits, target, sample_weight=weight, cross_entropy_weight=0.5, engine=engine)

    for varying in range(3):
        arguments = [logits[0], target[0], weight[0]]
        arguments[varying] = (logits, target, weight)[varying]
        dims = tuple(0 if position == varying else None for position in range(3))
        values = vmap(loss, in_dims=dims)(*arguments)
        grads = vmap(grad(loss), in_dims=dims)(*arguments)
        for index in range(3):
            one = [logits[0], target[0], weight[0]]
            one[varying] = (logits, target, weight)[varying][index]
            batch = Problem(one[0], one[1], one[2])
            answer = batch.answer(cross_entropy_weight=0.5)
            assert_matches(Result(values[index], grads[index], None), answer, torch.float64)


def test_vmap_over_the_last_dimension_and_twice(engine: str, device: torch.device) -> None:
    batches = several(6)
    logits, target, _ = stacked(batches, device)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return dmi_loss(logits, target, engine=engine)

    expected = torch.tensor([batch.answer().loss for batch in batches], dtype=torch.float64, device=device)
    last = vmap(loss, in_dims=(-1, -1))(logits.movedim(0, -1), target.movedim(0, -1))
    twice = vmap(vmap(loss))(logits.view(2, 3, 40, 5), target.view(2, 3, 40)).flatten()
    chunked = vmap(loss, chunk_size=4)(logits, target)
    for values in (last, twice, chunked):
        assert torch.allclose(values, expected, rtol=REORDERED, atol=0)


def test_vmap_of_batches_in_different_states(engine: str, device: torch.device) -> None:
    """In one call: an ordinary batch, one that lacks classes, one that is ignored, a singular one, and one with NaN."""
    plain, lacking, ignored, singular, poisoned = several(5)
    lacking = lacking.with_target(lacking.target % 3)
    ignored = ignored.with_target(torch.full_like(ignored.target, -100))
    singular = Problem(torch.zeros_like(singular.logits), singular.target)
    logits = poisoned.logits.clone()
    logits[3, 2] = float("nan")
    poisoned = Problem(logits, poisoned.target)
    batches = [plain, lacking, ignored, singular, poisoned]
    logits, target, _ = stacked(batches, device)
    for options in ({}, {"eps": 1e-3, "cross_entropy_weight": 0.5}, {"absent": "strict"}):

        def loss(logits: Tensor, target: Tensor, options: dict[str, Any] = options) -> Tensor:
            return dmi_loss(logits, target, engine=engine, **options)

        values, grads = vmap(loss)(logits, target), vmap(grad(loss))(logits, target)
        for batch, value, gradient in zip(batches, values, grads, strict=True):
            assert_matches(Result(value, gradient, None), batch.answer(**options), torch.float64)


def test_vmap_of_soft_targets_and_their_gradient(engine: str, device: torch.device) -> None:
    batches = several(3, soft=True)
    logits, target, _ = stacked(batches, device)
    grads = vmap(grad(lambda z, t: dmi_loss(z, t, engine=engine), argnums=(0, 1)))(logits, target)
    values = vmap(lambda z, t: dmi_loss(z, t, engine=engine))(logits, target)
    for index, batch in enumerate(batches):
        assert_matches(Result(values[index], grads[0][index], grads[1][index]), batch.answer(), torch.float64)


def test_a_bad_label_under_vmap_poisons_its_own_batch_only(engine: str, device: torch.device) -> None:
    """Values cannot be read under a transform, so the result is a NaN loss instead of an IndexError."""
    logits, target, _ = stacked(several(3), device)
    target[1, 4] = 5
    values = vmap(lambda z, t: dmi_loss(z, t, engine=engine))(logits, target)
    assert values.isnan().tolist() == [False, True, False]


def test_ensemble_of_models(engine: str, device: torch.device) -> None:
    """The main use of vmap: the gradients of several models' parameters at once."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(7, 4, dtype=torch.float64).to(device) for _ in range(3)]
    features = torch.randn(60, 7, dtype=torch.float64).to(device)
    target = (torch.arange(60) % 4).to(device)
    criterion = DMILoss(4, engine=engine)
    params, buffers = stack_module_state(models)

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return criterion(functional_call(models[0], (params, buffers), (features,)), target)

    grads = vmap(grad(loss))(params, buffers)
    for index, model in enumerate(models):
        expected = torch.autograd.grad(criterion(model(features), target), list(model.parameters()))
        for name, exact in zip(("weight", "bias"), expected, strict=True):
            assert torch.allclose(grads[name][index], exact, rtol=DERIVATIVE, atol=DERIVATIVE), name


@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param({}, {}, id="hard"),
        pytest.param({"weighted": True, "absent": (1,)}, {"cross_entropy_weight": 0.5}, id="absent-ce"),
        pytest.param({"soft": True}, {"eps": 1e-2}, id="soft-eps"),
    ],
)
def test_second_order(engine: str, device: torch.device, build: dict[str, Any], options: dict[str, Any]) -> None:
    """Every order of forward and reverse mode, against differences of the oracle's gradient.

    torch.linalg.slogdet is silently wrong where forward mode comes first (pytorch/pytorch#196697).
    """
    batch = problem(12, 3, dtype=torch.float64, **build)
    here = batch.to(device=device)

    def loss(logits: Tensor) -> Tensor:
        return dmi_loss(logits, here.target, sample_weight=here.sample_weight, engine=engine, **options)

    direction = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-5
    slopes = [
        Problem(batch.logits + sign * h * direction, batch.target, batch.sample_weight).answer(**options).grad for sign in (1, -1)
    ]
    exact = (slopes[0] - slopes[1]) / (2 * h)
    direction = direction.to(device)
    products = {
        "grad of grad": grad(lambda z: (grad(loss)(z) * direction).sum())(here.logits),
        "hessian": torch.tensordot(hessian(loss)(here.logits), direction, 2),
        "jacrev of jacrev": torch.tensordot(jacrev(jacrev(loss))(here.logits), direction, 2),
        "jacfwd of jacfwd": torch.tensordot(jacfwd(jacfwd(loss))(here.logits), direction, 2),
        "jacrev of jacfwd": torch.tensordot(jacrev(jacfwd(loss))(here.logits), direction, 2),
        "jvp of grad": jvp(grad(loss), (here.logits,), (direction,))[1],
    }
    for name, product in products.items():
        assert_gradient(name, product, exact, 1e-8)  # the differences are good to that
    slope = jvp(loss, (here.logits,), (direction,))[1]
    answer = batch.answer(**options)
    assert slope.item() == pytest.approx((answer.grad * as_array(direction)).sum(), rel=DERIVATIVE)
    assert_gradient("jacfwd", jacfwd(loss)(here.logits), answer.grad, DERIVATIVE)


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_vmap_of_jacobians_and_hessians(engine: str, device: torch.device, outer: Any, inner: Any) -> None:
    """As above: torch.linalg.slogdet gives every batch but the first a wrong answer in forward mode."""
    batches = several(3, n=10, classes=3)
    logits, target, _ = stacked(batches, device)

    def loss(target: Tensor) -> Any:
        return lambda logits: dmi_loss(logits, target, engine=engine)

    first = vmap(lambda z, y: inner(loss(y))(z))(logits, target)
    second = vmap(lambda z, y: outer(inner(loss(y)))(z))(logits, target)
    for index, batch in enumerate(batches):
        assert_gradient("Jacobian", first[index], batch.answer().grad, DERIVATIVE)
        alone = jacrev(jacrev(loss(target[index])))(logits[index])
        assert_gradient("Hessian", second[index], as_array(alone), SECOND_DERIVATIVE)


def test_backward_through_a_transform(engine: str, device: torch.device) -> None:
    """torch.func inside, ordinary autograd outside: a gradient penalty on parameters."""
    batch = problem(30, 4, dtype=torch.float64).to(device=device)
    scale = torch.ones((), dtype=torch.float64, device=device, requires_grad=True)
    inner = grad(lambda z: dmi_loss(z, batch.target, engine=engine))
    penalty = inner(batch.logits * scale).square().sum()
    (through,) = torch.autograd.grad(penalty, scale)
    h = 1e-5
    values = [(inner(batch.logits * (1 + sign * h)).square().sum()).item() for sign in (1, -1)]
    assert through.item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-7)  # a difference


def test_joint_matrix_under_transforms(engine: str, device: torch.device) -> None:
    batches = several(3, weighted=True)
    logits, target, weight = stacked(batches, device)

    def joint(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return joint_matrix(logits, target, sample_weight=weight, engine=engine)

    assert weight is not None
    together = vmap(joint)(logits, target, weight)
    for index in range(3):
        assert torch.allclose(together[index], joint(logits[index], target[index], weight[index]), rtol=REORDERED, atol=0)
    jacobian = jacrev(joint)(logits[0], target[0], weight[0])
    forward = jacfwd(joint)(logits[0], target[0], weight[0])
    assert jacobian.shape == (5, 5, 40, 5)
    assert torch.allclose(jacobian, forward, rtol=DERIVATIVE, atol=EXACT)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacrev], ids=lambda f: f.__name__)
def test_a_group_is_refused_by_name(transform: Any) -> None:
    batch = problem(20, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms .* do not go through the all-reduce of group"):
        transform(lambda z: dmi_loss(z, batch.target, group="world"))(batch.logits)
    weight = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms .* do not go through the all-reduce of group"):
        transform(lambda w: linear_dmi_loss(batch.logits, w, batch.target, group="world"))(weight)
