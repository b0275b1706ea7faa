"""The functions that the ranks run in the distributed tests. Each runs on every rank, and returns what the test compares."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from ldmi_fast import DMILoss, JointState, RNGReplay, diagnose, distributed, dmi_loss, dmi_score, linear_dmi_loss
from tests.support.problems import Problem, gradient_of, problem


def part(batch: Problem, cuts: list[int], rank: int) -> Problem:
    """A rank's rows: from one cut to the next."""
    bounds = [0, *cuts, len(batch.logits)]
    rows = slice(bounds[rank], bounds[rank + 1])
    weight = None if batch.sample_weight is None else batch.sample_weight[rows]
    return Problem(batch.logits[rows], batch.target[rows], weight)


def cuts(size: int, n: int) -> list[int]:
    """Uneven parts; the second of three and the third of four are empty."""
    return {1: [], 2: [n // 5], 3: [n // 5, n // 5], 4: [n // 10, n // 2, n // 2]}[size]


def loss_and_gradient(
    group: Any, build: dict[str, Any], options: dict[str, Any], how: str = "eager"
) -> tuple[Tensor, Tensor, Tensor | None]:
    rank, size = group.rank(), group.size()
    whole = problem(**build)
    mine = part(whole, cuts(size, len(whole.logits)), rank)
    logits = mine.leaf()
    target = mine.target.clone().requires_grad_() if mine.target.is_floating_point() else mine.target

    def step(logits: Tensor, target: Tensor) -> Tensor:
        return dmi_loss(logits, target, sample_weight=mine.sample_weight, group=group, **options)

    if how == "compiled":
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    loss = step(logits, target)
    loss.backward()
    return loss.detach(), gradient_of(logits), target.grad


def gradient_of_weights(group: Any, options: dict[str, Any]) -> list[Tensor]:
    """The gradient of the sample weights of this rank's rows, of dmi_loss and of linear_dmi_loss."""
    whole = problem(100, 6, weighted=True, dtype=torch.float64)
    mine = part(whole, cuts(group.size(), 100), group.rank())
    weight = mine.weight.clone().requires_grad_()
    eye = torch.eye(6, dtype=torch.float64)
    losses = [
        dmi_loss(mine.logits, mine.target, sample_weight=weight, group=group, **options),
        linear_dmi_loss(mine.logits, eye, mine.target, sample_weight=weight, group=group, **options),
    ]
    return [torch.autograd.grad(loss, weight)[0] for loss in losses]


def smoothed(group: Any) -> list[Tensor]:
    """The gradient for smoothed labels where a rank has samples of one class alone, and no rank has any of the last class."""
    whole = problem(60, 4, absent=(3,), dtype=torch.float64)
    order = whole.target.argsort()
    mine = part(Problem(whole.logits[order], whole.target[order]), cuts(group.size(), 60), group.rank())
    gradients = []
    for target in (mine.target, nn.functional.one_hot(mine.target, 4).double() * 0.9 + 0.025):
        logits = mine.leaf()
        gradients.append(torch.autograd.grad(dmi_loss(logits, target, group=group), logits)[0])
    return gradients


def named_groups(group: Any) -> list[float]:
    """The default group by name, as an object and as a mesh."""
    mine = part(problem(100, 5), cuts(4, 100), group.rank())
    mesh = DeviceMesh("cpu", list(range(4)))
    losses = [dmi_loss(mine.logits, mine.target, group=which) for which in ("world", dist.group.WORLD, mesh)]
    losses += [DMILoss(5, group=which)(mine.logits, mine.target) for which in ("world", mesh)]
    return [loss.item() for loss in losses]


def gradient_penalty(group: Any, build: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The gradient of the sum over ranks of |dloss/dz|^2, and a first backward afterwards through the same graph."""
    whole = problem(**build)
    mine = part(whole, cuts(group.size(), len(whole.logits)), group.rank())
    logits = mine.leaf()
    loss = dmi_loss(logits, mine.target, sample_weight=mine.sample_weight, group=group, **options)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    (grad / group.size()).square().sum().backward()
    return gradient_of(logits)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).double()


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    target = torch.arange(60) % 5
    target[torch.rand(60, generator=generator) < 0.1] = -100
    features = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    features[torch.arange(60), target.clamp(min=0)] += 2
    return features, target[torch.randperm(60, generator=generator)] if step < 0 else target


def train(group: Any, wrap: str, momentum: float | None) -> dict[str, Any]:
    """Three steps of SGD; ``wrap``: how the ranks share the work. Without a group: one process on the whole batches."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    model: Any = network()
    if wrap == "ddp":
        model = DistributedDataParallel(model, process_group=group)
    elif wrap == "ddp-with-criterion":  # the average's buffers are then broadcast by DDP
        pass
    elif wrap == "fsdp2":
        mesh = DeviceMesh("cpu", list(range(size)))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    criterion = DMILoss(5, momentum=momentum, cross_entropy_weight=0.3, group=group)
    if wrap == "ddp-with-criterion":
        both = DistributedDataParallel(_WithLoss(model, criterion), process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for step in range(3):
        x, y = data(step)
        bounds = [0, *cuts(size, len(x)), len(x)]
        rows = slice(bounds[rank], bounds[rank + 1])
        optimizer.zero_grad()
        loss = both(x[rows], y[rows]) if wrap == "ddp-with-criterion" else criterion(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {"losses": losses, "parameters": [p.detach().clone() for p in full], "state": criterion.state_dict()}


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module, criterion: DMILoss) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.criterion: DMILoss = criterion

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.model(x), y)


def cast_by_fsdp(group: Any, dtype: torch.dtype | None) -> tuple[list[float], torch.dtype]:
    """The losses of a criterion with an average inside FSDP1, which casts buffers; ``dtype`` None: no FSDP."""
    inner = _WithLoss(network(), DMILoss(5, momentum=0.995))
    x, y = data(0)
    inner.criterion.calibrate([(x, y)], inner.model)
    model: nn.Module = inner
    if dtype is not None:
        model = FullyShardedDataParallel(
            inner, process_group=group, device_id=torch.device("cpu"), mixed_precision=MixedPrecision(buffer_dtype=dtype)
        )
    losses = []
    for step in range(4):
        x, y = data(step)
        loss = model(x, y)
        loss.backward()
        losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            model(x, y)
        model.train()
    return losses, inner.criterion.average_joint.dtype


def go_on(group: Any, state: dict[str, Tensor]) -> float:
    """The next loss of a module with a state that a run of another number of processes saved."""
    criterion = DMILoss(5, momentum=0.8, cross_entropy_weight=0.3, group=group)
    criterion.load_state_dict(state)
    x, y = data(7)
    bounds = [0, *cuts(group.size(), len(x)), len(x)]
    rows = slice(bounds[group.rank()], bounds[group.rank() + 1])
    return criterion(network()(x[rows]), y[rows]).item()


def joint_state(group: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Two micro-batches per rank, two passes, DDP with dropout."""
    rank, size = group.rank(), group.size()
    model = DistributedDataParallel(network(), process_group=group)
    x, y = data(0)
    bounds = [0, *cuts(size, len(x)), len(x)]
    rows = slice(bounds[rank], bounds[rank + 1])
    micro = list(zip(x[rows].chunk(2), y[rows].chunk(2), strict=True))
    state, replay = JointState(5, **options), RNGReplay()
    for xs, ys in micro:
        with torch.no_grad(), replay.record():
            state.update(model(xs), ys)
    solution = state.all_reduce(group).solve()
    total = 0.0
    for i, (xs, ys) in enumerate(micro):
        model.require_backward_grad_sync = i == len(micro) - 1
        with replay.play():
            loss = state.loss(model(xs), ys)
        loss.backward()
        total += loss.item()
    summed = torch.tensor(total)
    dist.all_reduce(summed, group=group)
    grads = [gradient_of(p).clone() for p in model.parameters()]
    return {"loss": solution.loss, "grads": grads, "sum": summed.item() / size, "repr": repr(state)}


def passes_over_data(group: Any) -> dict[str, Any]:
    """calibrate and dmi_score, each rank with its part of the data."""
    rank, size = group.rank(), group.size()
    x, y = data(0)
    mine = [(x[rank::size], y[rank::size])]
    criterion = DMILoss(5, momentum=0.9, group=group)
    criterion.calibrate(mine, network())
    score = dmi_score(network(), mine, 5, group=group)
    report = diagnose(network()(mine[0][0]), mine[0][1], group=group)
    assert criterion.average is not None
    return {"joint": criterion.average.mean()[0], "score": score.log_abs_det.item(), "report": report.log_abs_det}


def error_of(function: Any) -> str:
    try:
        value = function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"no error: {value}"


def mismatch(group: Any, kind: str) -> list[str]:
    """The error on each rank if their settings differ, and the loss afterwards with equal settings."""
    rank = group.rank()
    batch = problem(30, 4 + rank if kind == "classes" else 4)
    # settings that these ranks have not yet agreed on
    weight = {"classes": 0.11, "eps": 0.12, "absent": 0.13, "momentum": 0.14, "state": 0.15}[kind]
    options: dict[str, Any] = {"group": group, "cross_entropy_weight": weight}
    if kind == "eps" and rank == 1:
        options["eps"] = 1e-3
    if kind == "absent" and rank == 1:
        options["absent"] = "strict"
    if kind == "momentum":
        criterion = DMILoss(4, momentum=0.9 if rank else None, **options)
        first = error_of(lambda: criterion(batch.logits, batch.target))
    elif kind == "state":
        state = JointState(4 + rank, cross_entropy_weight=weight)
        first = error_of(lambda: state.all_reduce(group))
    else:
        first = error_of(lambda: dmi_loss(batch.logits, batch.target, **options))
    fine = problem(30, 4)
    return [first, error_of(lambda: dmi_loss(fine.logits, fine.target, group=group).isfinite().item())]


def out_of_step(group: Any) -> float:
    """Both ranks have called both losses before; then each calls a different one."""
    batch = problem(30, 4)
    for eps in (0.0, 1e-3):
        assert dmi_loss(batch.logits, batch.target, eps=eps, group=group).isfinite()
    return dmi_loss(batch.logits, batch.target, eps=1e-3 if group.rank() else 0.0, group=group).item()


def bad_label(group: Any) -> str:
    batch = problem(30, 4)
    target = batch.target.clone()
    if group.rank() == 1:
        target[3] = 4
    return error_of(lambda: dmi_loss(batch.logits, target, group=group).item())


def one_rank_raises(group: Any, when: str) -> tuple[str, float]:
    """Rank 1 never comes to the all-reduce (its batch is bad, or its program failed); rank 0 must not wait forever."""
    batch = problem(30, 4)
    if when == "later":
        assert dmi_loss(batch.logits, batch.target, group=group).isfinite()
    start = time.perf_counter()
    target = batch.target if group.rank() == 0 else batch.target[:7]
    return error_of(lambda: dmi_loss(batch.logits, target, group=group)), time.perf_counter() - start


def counts_collectives(group: Any) -> int:
    """The collectives of a training step after the ranks have agreed on the settings."""
    batch = problem(30, 4)
    distributed.agree(4, DMILoss(group=group).options, torch.device("cpu"))
    with CommDebugMode() as counter:
        dmi_loss(batch.leaf(), batch.target, group=group).backward()
    return counter.get_total_counts()


def linear(group: Any, options: dict[str, Any]) -> list[Tensor]:
    """linear_dmi_loss with a part of the rows on each rank."""
    whole = problem(90, 5, weighted=True, dtype=torch.float64)
    mine = part(whole, cuts(group.size(), 90), group.rank())
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    hidden = mine.leaf()
    loss = linear_dmi_loss(hidden, weight, mine.target, sample_weight=mine.sample_weight, chunk_size=20, group=group, **options)
    loss.backward()
    return [loss.detach(), gradient_of(hidden), gradient_of(weight)]


def metric(group: Any) -> float:
    from ldmi_fast.metrics import DMI

    whole = problem(90, 5)
    mine = part(whole, cuts(group.size(), 90), group.rank())
    score = DMI(5, process_group=group)
    score.update(mine.logits, mine.target)
    return score.compute().item()
