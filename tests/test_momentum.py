"""The moving-average joint: DMILoss(momentum=m)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldmi_fast import DMILoss, dmi_loss, joint_matrix
from tests.support.compare import DERIVATIVE, REORDERED, SECOND_DERIVATIVE, assert_gradient, loss_dtype
from tests.support.problems import Problem, as_array, gradient_of, problem

STATE = ("average_joint", "average_counts", "average_weight", "average_steps")


def several(count: int, n: int = 60, classes: int = 6, **build: Any) -> list[Problem]:
    return [problem(n, classes, seed=seed, dtype=torch.float64, **build) for seed in range(count)]


def mean_of(criterion: DMILoss) -> tuple[Tensor, Tensor]:
    """B and the class shares of a criterion that has an average."""
    assert criterion.average is not None
    return criterion.average.mean()


class Definition:
    """The average and the loss straight from the formulas, in numpy, with the class counts and W of the oracle."""

    def __init__(self, momentum: float) -> None:
        self.m, self.t = momentum, 0
        self.A: Any = 0.0
        self.a: Any = 0.0

    def step(self, batch: Problem, *, eps: float = 0.0, normalize: bool = True, ce: float = 0.0, **options: Any) -> tuple[float, Any]:
        answer = batch.answer(**options)
        weight = np.ones(len(batch.logits)) if batch.sample_weight is None else as_array(batch.sample_weight).astype(np.float64)
        target = as_array(batch.target)
        soft = target.dtype.kind == "f"
        if not soft:
            weight = np.where(target == options.get("ignore_index", -100), 0, weight)
        W = weight.sum()
        self.A = self.m * self.A + (1 - self.m) * answer.joint / W
        self.a = self.m * self.a + (1 - self.m) * answer.counts / W
        self.t += 1
        B, share = self.A / (1 - self.m**self.t), self.a / (1 - self.m**self.t)
        there = np.ix_(share > 0, share > 0)
        V = np.zeros_like(B)
        V[there] = np.linalg.inv(B[there]).T
        level = np.linalg.slogdet(B[there])[1] + (0 if normalize else (share > 0).sum() * np.log(W))
        p = np.exp(as_array(batch.logits) - np.logaddexp.reduce(as_array(batch.logits), axis=1, keepdims=True))
        rows = target @ V if soft else V[np.where(weight > 0, target, 0)]
        if eps:
            loss, factor = -np.logaddexp(level, np.log(eps)), 1 / (1 + np.exp(np.log(eps) - level))
        else:
            loss, factor = -level, 1.0
        grad = -factor * (weight / W)[:, None] * p * (rows - (p * rows).sum(1, keepdims=True))
        if ce:
            chosen = target if soft else np.eye(B.shape[0])[np.where(weight > 0, target, 0)]
            loss += ce * -(weight[:, None] * chosen * np.log(p)).sum() / W
            grad += ce * (weight / W)[:, None] * (p * chosen.sum(1, keepdims=True) - chosen)
        return loss, grad


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param({}, {}, id="hard"),
        pytest.param({"weighted": True}, {"normalize": False, "ce": 0.3}, id="weighted-counts-ce"),
        pytest.param({"soft": True, "weighted": True}, {"eps": 1e-5, "ce": 0.3}, id="soft-eps-ce"),
        pytest.param({"weighted": True}, {"ignore_index": 1}, id="ignore"),
        pytest.param({"n": 700, "classes": 70}, {"normalize": False, "eps": 1e-2}, id="in-stages"),
    ],
)
def test_is_the_definition(engine: str, device: torch.device, momentum: float, build: dict[str, Any], options: dict[str, Any]) -> None:
    definition = Definition(momentum)
    batches = several(4, **build)
    given = {"cross_entropy_weight" if name == "ce" else name: value for name, value in options.items()}
    criterion = DMILoss(batches[0].logits.shape[1], momentum=momentum, engine=engine, **given).to(device)
    for step, batch in enumerate(batches, 1):
        loss, grad = definition.step(batch, **options)
        here = batch.to(device=device)
        logits = here.leaf()
        ours = criterion(logits, here.target, here.sample_weight)
        ours.backward()
        assert ours.item() == pytest.approx(loss, rel=REORDERED)
        assert logits.grad is not None
        assert_gradient("gradient", logits.grad, grad, DERIVATIVE)
        assert criterion.average_steps.item() == step


def test_momentum_zero_is_the_batch_alone(engine: str, device: torch.device) -> None:
    criterion = DMILoss(6, momentum=0.0, engine=engine).to(device)
    for batch in several(3):
        here = batch.to(torch.float32, device)
        assert criterion(here.logits, here.target).item() == pytest.approx(dmi_loss(here.logits, here.target).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
    batch = problem(60, 6).to(dtype, device)
    logits = batch.leaf()
    loss = criterion(logits, batch.target)
    loss.backward()
    assert loss.dtype == loss_dtype(dtype)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert criterion.average_joint.dtype == torch.float64


def test_fewer_samples_than_classes(engine: str, device: torch.device) -> None:
    """40 classes, 16 samples per batch: soon every class is in the average, and the determinant is that of all classes."""
    criterion = DMILoss(40, momentum=0.95, engine=engine).to(device)
    whole = problem(16 * 30, 40, dtype=torch.float64)
    for part in range(30):
        rows = slice(16 * part, 16 * (part + 1))
        logits = whole.logits[rows].to(device).requires_grad_()
        loss = criterion(logits, whole.target[rows].to(device))
        loss.backward()
    B, counts = mean_of(criterion)
    assert (counts > 0).all()
    assert loss.item() == pytest.approx(-torch.linalg.slogdet(B)[1].item(), rel=REORDERED)
    assert logits.grad is not None
    assert logits.grad.abs().sum(1).all()


def test_classes_that_were_never_seen_are_left_out(engine: str, device: torch.device) -> None:
    criterion = DMILoss(6, momentum=0.5, engine=engine).to(device)
    for batch in several(3, absent=(2,)):
        here = batch.to(device=device)
        loss = criterion(here.logits, here.target)
    B = mean_of(criterion)[0].cpu()
    kept = [0, 1, 3, 4, 5]
    assert loss.item() == pytest.approx(-torch.linalg.slogdet(B[kept][:, kept])[1].item(), rel=REORDERED)
    strict = DMILoss(6, momentum=0.5, absent="strict", engine=engine).to(device)
    assert strict(here.logits, here.target).item() == torch.inf


def test_what_does_not_enter_the_average(engine: str, device: torch.device) -> None:
    """An evaluation, an empty batch, one that is ignored, and one with NaN; and which loss each of them has."""
    criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
    first, second = (batch.to(device=device) for batch in several(2))
    assert criterion(first.logits[:0], first.target[:0]).item() == 0
    criterion(first.logits, first.target)
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()
    assert torch.equal(criterion(second.logits, second.target), dmi_loss(second.logits, second.target, engine=engine))
    criterion.train()
    assert criterion(second.logits[:0], second.target[:0]).item() == 0
    logits = second.leaf()
    ignored = criterion(logits, torch.full_like(second.target, -100))
    ignored.backward()
    assert ignored.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    broken = second.logits.clone()
    broken[3, 1] = float("nan")
    assert criterion(broken, second.target).isnan()
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert criterion(second.logits, second.target).isfinite()
    assert criterion.average_steps.item() == 2


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_nothing_enters_where_no_gradient_can_be_asked_for(engine: str, device: torch.device, off: Any) -> None:
    """An evaluation loop that puts the model into eval mode but not the criterion: the loss is that of the batch alone."""
    criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
    first, second = (batch.to(device=device) for batch in several(2))
    criterion(first.leaf(), first.target)
    before = copy.deepcopy(criterion.state_dict())
    expected = dmi_loss(second.logits, second.target, engine=engine)
    with off():
        assert torch.equal(criterion(second.logits, second.target), expected)
        assert torch.equal(criterion(second.leaf(), second.target), expected)
        outputs = second.leaf() * 1.0
        # activation checkpointing does not make it training
        assert torch.equal(checkpoint(lambda z: criterion(z, second.target), outputs, use_reentrant=True), expected)
    if outputs.is_inference():  # the loss of outputs that were computed there
        assert torch.equal(criterion(outputs, second.target), expected)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name
    criterion(second.leaf(), second.target)
    assert criterion.average_steps.item() == 2


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_nothing_enters_a_compiled_evaluation(engine: str, device: torch.device, off: Any) -> None:
    torch._dynamo.reset()
    criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    batch = problem(60, 6).to(device=device)
    compiled(batch.leaf(), batch.target)
    other = problem(60, 6, seed=5).to(device=device)
    with off():
        torch.testing.assert_close(compiled(other.logits, other.target), dmi_loss(other.logits, other.target, engine=engine))
    assert criterion.average_steps.item() == 1


def test_a_class_that_leaves_the_data(engine: str, device: torch.device) -> None:
    """Its share decays; below 1e-12 of the weight it is absent, and the loss is that of the remaining classes."""
    criterion = DMILoss(5, momentum=0.5, engine=engine).to(device)
    batch = problem(100, 5, dtype=torch.float64).to(device=device)
    criterion(batch.logits, batch.target)
    left = batch.target != 4
    logits = batch.logits[left].requires_grad_()
    target = batch.target[left]
    alone = dmi_loss(logits, target, engine=engine)
    (expected,) = torch.autograd.grad(alone, logits)
    rising = []
    for step in range(1, 46):
        loss = criterion(logits, target)
        if step in (30, 35):
            rising.append(loss.item())
    # 0.2 * 2^-45 of the weight is below 1e-12; until then each step costs log 2
    assert rising[1] - rising[0] == pytest.approx(5 * np.log(2), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(alone.item(), rel=REORDERED)
    torch.testing.assert_close(grad, expected, rtol=DERIVATIVE, atol=DERIVATIVE)
    report = criterion.diagnose(logits, target)
    assert report.average is not None
    assert report.average.kept == 4
    assert report.average.log_abs_det == pytest.approx(-alone.item(), rel=REORDERED)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_an_average_from_long_ago(engine: str, device: torch.device, momentum: float) -> None:
    """The weight of a class is subnormal, as after a hundred thousand steps: the loss is that of the other classes."""
    criterion = DMILoss(5, momentum=momentum, engine=engine).to(device)
    batch = problem(100, 5, dtype=torch.float64).to(device=device)
    left = batch.target != 4
    criterion.calibrate([(batch.logits, batch.target)], lambda x: x)
    for tiny in (1e-300, 1e-310, 5e-324):
        criterion.calibrate([(batch.logits[left], batch.target[left])], lambda x: x)
        criterion.average_joint[4] = tiny
        criterion.average_counts[4] = 5 * tiny
        logits = batch.logits[left].requires_grad_()
        loss = criterion(logits, batch.target[left])
        (grad,) = torch.autograd.grad(loss, logits)
        expected = dmi_loss(logits, batch.target[left], engine=engine)
        assert loss.item() == pytest.approx(expected.item(), rel=REORDERED)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0], rtol=DERIVATIVE, atol=DERIVATIVE)


@pytest.mark.parametrize("mode", ["reentrant", "hooks"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_activation_checkpointing(engine: str, device: torch.device, mode: str, compiled: bool) -> None:
    """The forward that the backward repeats does not enter the average again, and has the same gradient."""
    plain, checkpointed = (DMILoss(6, momentum=0.9, engine=engine).to(device) for _ in range(2))
    loss_of = torch.compile(checkpointed, backend="aot_eager", fullgraph=True) if compiled else checkpointed
    torch._dynamo.reset()
    for batch in several(3):
        here = batch.to(device=device)
        ours, theirs = here.leaf(), here.leaf()
        loss = checkpoint(lambda z, y=here.target: loss_of(z, y), ours, use_reentrant=mode == "reentrant")
        loss.backward()
        expected = plain(theirs, here.target)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)
        for name in STATE:
            torch.testing.assert_close(getattr(checkpointed, name), getattr(plain, name))


def test_checkpointed_model_and_loss_together(device: torch.device) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 6)).to(device)
    criterion = DMILoss(6, momentum=0.9).to(device)
    features, target = torch.randn(80, 5, device=device), torch.arange(80, device=device) % 6
    grads = []
    for use in (False, True):
        criterion.reset()
        model.zero_grad()
        torch.manual_seed(1)
        for _ in range(3):

            def head(x: Tensor) -> Tensor:
                return criterion(model(x), target)

            (checkpoint(head, features, use_reentrant=False) if use else head(features)).backward()
        grads.append([gradient_of(parameter).clone() for parameter in model.parameters()])
        assert criterion.average_steps.item() == 3
    for plain, repeated in zip(*grads, strict=True):
        torch.testing.assert_close(plain, repeated)


def test_second_derivative(engine: str, device: torch.device) -> None:
    """That of the formula with its stop_gradient: -log|det(B + U - constant)|."""
    criterion = DMILoss(4, momentum=0.8, cross_entropy_weight=0.2, eps=1e-4, engine=engine).to(device)
    first, second = (batch.to(device=device) for batch in several(2, n=20, classes=4, weighted=True))
    criterion(first.logits, first.target, first.sample_weight)

    def penalty(loss: Tensor, logits: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), logits)[0]

    logits = second.leaf()
    ours = penalty(criterion(logits, second.target, second.sample_weight), logits)
    logits = second.leaf()
    U = joint_matrix(logits, second.target, sample_weight=second.weight.double(), engine="composite")
    B = mean_of(criterion)[0]
    ce = torch.nn.functional.cross_entropy(logits, second.target, reduction="none") * second.weight.double()
    loss = -(torch.linalg.det(B + U - U.detach()).abs() + 1e-4).log() + 0.2 * ce.sum() / second.weight.double().sum()
    expected = penalty(loss, logits)
    assert (expected - ours).abs().max() < SECOND_DERIVATIVE * expected.abs().max()


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph(engine: str, device: torch.device, backend: str) -> None:
    plain, inside = (DMILoss(6, momentum=0.9, cross_entropy_weight=0.1, engine=engine).to(device) for _ in range(2))
    step = torch.compile(lambda z, y, w: inside(z, y, w), fullgraph=True, backend=backend)
    batches = several(3, weighted=True)
    batches.append(batches[0].with_target(torch.full_like(batches[0].target, -100)))
    for batch in batches:
        here = batch.to(device=device)
        ours, theirs = here.leaf(), here.leaf()
        loss, expected = step(ours, here.target, here.sample_weight), plain(theirs, here.target, here.sample_weight)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)
        for name in STATE:
            torch.testing.assert_close(getattr(inside, name), getattr(plain, name))


def test_transforms_are_refused_in_training() -> None:
    criterion, batch = DMILoss(6, momentum=0.9), problem(60, 6)
    with pytest.raises(RuntimeError, match=r"cannot update its average inside a torch\.func transform.*criterion\.eval\(\)"):
        torch.func.grad(criterion)(batch.logits, batch.target)
    criterion.eval()
    assert torch.func.grad(criterion)(batch.logits, batch.target).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, r"momentum must be >= 0 and < 1 .*got 1\.0"),
        ({"momentum": -0.1}, ValueError, "momentum must be >= 0"),
        ({"momentum": float("nan")}, ValueError, "momentum must be >= 0"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a float.*got str"),
        ({"momentum": True}, TypeError, "momentum must be a float.*got bool"),
        ({"momentum": 0.9, "num_classes": None}, ValueError, "momentum needs num_classes"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DMILoss(**{"num_classes": 6, **arguments})


def test_bad_use() -> None:
    criterion = DMILoss(6, momentum=0.9)
    with pytest.raises(ValueError, match="for 6 classes"):
        criterion(torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(IndexError, match="target 6 of sample 0"):
        criterion(torch.zeros(4, 6), torch.full((4,), 6))
    with pytest.raises(ValueError, match=r"average of this DMILoss is on cpu, the logits on meta: call criterion\.to\('meta'\)"):
        criterion(torch.zeros(4, 6, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta"))
    assert criterion.average_steps.item() == 0
    with pytest.raises(RuntimeError, match=r"reset\(\) is about the moving average, and this DMILoss has none"):
        DMILoss(6).reset()
    assert repr(criterion) == "DMILoss(6, momentum=0.9)"
