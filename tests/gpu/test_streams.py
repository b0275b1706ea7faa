"""CUDA graphs, streams and devices: kernels run on the current stream and device, and the host never waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from bench.gpu.clocks import capture_graph, count_nodes
from ldmi_fast import DMILoss, dmi_loss
from tests.support.compare import Result, assert_matches, run
from tests.support.problems import Problem, problem

SHAPES = [
    pytest.param(256, 14, id="small"),
    pytest.param(20000, 14, id="many-rows"),
    pytest.param(3000, 100, id="one-block-factor"),
    pytest.param(2000, 300, id="many-classes"),
]


@contextmanager
def sync_is_an_error() -> Iterator[None]:
    """torch raises an error at any call that makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stepper(batch: Problem, engine: str) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """Logits to write to, and a function that runs forward and backward on them."""
    logits = batch.leaf()

    def step() -> tuple[Tensor, Tensor]:
        loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, cross_entropy_weight=0.5, engine=engine)
        (grad,) = torch.autograd.grad(loss, logits)
        return loss.detach(), grad

    return logits, step


@pytest.mark.parametrize(("n", "classes"), SHAPES)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_graph_replays_with_other_inputs(engine: str, device: torch.device, n: int, classes: int, soft: bool) -> None:
    """Captured once, forward and backward; then logits, labels and weights change, and each replay has their gradient."""
    batches = [problem(n, classes, seed=seed, soft=soft, weighted=True) for seed in range(4)]
    static = batches[0].to(device=device)
    logits, step = stepper(static, engine)
    kept: list[tuple[Tensor, Tensor]] = []
    graph = capture_graph(lambda: kept.append(step()))
    loss, grad = kept[-1]
    assert static.sample_weight is not None
    for batch in [*batches[1:], batches[0]]:
        here = batch.to(device=device)
        assert here.sample_weight is not None
        with torch.no_grad():
            logits.copy_(here.logits)
        static.target.copy_(here.target)
        static.sample_weight.copy_(here.sample_weight)
        graph.replay()
        answer = batch.answer(cross_entropy_weight=0.5)
        assert_matches(Result(loss.clone(), grad.clone(), None), answer, torch.float32)
    first = loss.clone(), grad.clone()
    for _ in range(20):
        graph.replay()
    assert torch.equal(loss, first[0])
    assert torch.equal(grad, first[1])


def test_graph_of_a_training_step(engine: str, device: torch.device) -> None:
    """Model, loss, backward and optimizer in one graph, as a user would capture them: the loss falls."""
    torch.manual_seed(0)
    target = torch.arange(512, device=device) % 5
    features = torch.nn.functional.one_hot(target, 5) + 0.3 * torch.randn(512, 5, device=device)
    model = torch.nn.Linear(5, 5, device=device)
    with torch.no_grad():
        model.weight.copy_(0.5 * torch.eye(5))
    criterion = DMILoss(5, engine=engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), foreach=True)
    seen: list[Tensor] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss = criterion(model(features), target)
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())

    graph = capture_graph(step)
    graph.replay()
    before = seen[-1].item()
    for _ in range(50):
        graph.replay()
    assert seen[-1].item() < before - 0.1


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_nothing_waits_for_the_gpu(engine: str, device: torch.device, n: int, classes: int) -> None:
    batch = problem(n, classes, weighted=True)
    here = batch.to(device=device)
    _, step = stepper(here, engine)
    step()
    torch.cuda.synchronize()
    with sync_is_an_error():
        loss, grad = step()
        with torch.no_grad():
            dmi_loss(here.logits, here.target, engine=engine)
    assert_matches(Result(loss, grad, None), batch.answer(cross_entropy_weight=0.5), torch.float32)


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_two_streams_at_once(engine: str, device: torch.device, n: int, classes: int) -> None:
    """Two problems at the same time, many times: streams share no workspace, counter or flag."""
    batches = [problem(n, classes, seed=seed).to(device=device) for seed in (1, 2)]
    steps = [stepper(batch, engine)[1] for batch in batches]
    expected = [step() for step in steps]
    streams = [torch.cuda.Stream(device) for _ in batches]
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(25):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[index].append(steps[index]())
    torch.cuda.synchronize()
    for index in range(2):
        for loss, grad in found[index]:
            assert torch.equal(loss, expected[index][0])
            assert torch.equal(grad, expected[index][1])


def test_the_current_stream_is_the_one_that_is_used(engine: str, device: torch.device) -> None:
    """Inputs that are still being written on a side stream: a kernel on another stream would read them too early."""
    batch = problem(20000, 14)
    here = batch.to(device=device)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        logits = torch.full_like(here.logits, float("nan"))
        torch.cuda._sleep(50_000_000)  # some 25 ms, and only then the logits
        logits.copy_(here.logits)
        loss = dmi_loss(logits.requires_grad_(), here.target, engine=engine)
        (grad,) = torch.autograd.grad(loss, logits)
    stream.synchronize()
    assert_matches(Result(loss.detach(), grad, None), batch.answer(), torch.float32)


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_bitwise_the_same_next_to_other_work(engine: str, device: torch.device, n: int, classes: int) -> None:
    """The bits are the same whatever else the GPU does and in whatever order blocks run."""
    batch = problem(n, classes, weighted=True).to(device=device)
    _, step = stepper(batch, engine)
    loss, grad = step()
    other = torch.cuda.Stream(device)
    square = torch.randn(1024, 1024, device=device)
    other.wait_stream(torch.cuda.current_stream())
    for count in range(30):
        with torch.cuda.stream(other):
            for _ in range(count % 4):
                square = torch.tanh(square @ square)
        again = step()
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], grad)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_another_device_than_the_current_one(engine: str, device: torch.device, n: int, classes: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    elsewhere = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    batch = problem(n, classes, weighted=True)
    result = run(batch.to(device=elsewhere), engine)
    assert result.grad.device == elsewhere
    assert torch.cuda.current_device() == device.index
    assert_matches(result, batch.answer(), torch.float32)
    with torch.cuda.device(elsewhere):
        assert_matches(run(batch.to(device=device), engine), batch.answer(), torch.float32)


def test_arguments_on_two_devices_are_named(engine: str, device: torch.device) -> None:
    batch = problem(20, 3)
    with pytest.raises(ValueError, match=r"target is on cpu, logits on cuda"):
        dmi_loss(batch.logits.to(device), batch.target, engine=engine)
    with pytest.raises(ValueError, match=r"sample_weight is on cpu, logits on cuda"):
        dmi_loss(batch.logits.to(device), batch.target.to(device), sample_weight=torch.ones(20), engine=engine)


def test_small_problems_take_one_launch_each_way(engine: str, device: torch.device) -> None:
    """Clothing1M's batch: the forward leaves the gradient, the backward scales it."""
    if engine != "cuda":
        pytest.skip(f"guaranteed for the engine cuda, this is {engine}")
    batch = problem(256, 14).to(device=device)
    logits, upstream = batch.leaf(), torch.ones((), device=device)

    def forward() -> Tensor:
        return dmi_loss(logits, batch.target, engine=engine)

    assert count_nodes(forward) == (1, 0)
    assert count_nodes(lambda: torch.autograd.grad(forward(), logits, upstream)) == (2, 0)
