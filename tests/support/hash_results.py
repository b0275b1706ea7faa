"""``python -m tests.support.hash_results [engine ...]``: one line per engine, case and option, with a hash of the bits of the results.

A change that only moves code leaves every line as it is: run it before and after, and compare the two outputs. It takes a minute.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("LDMI_FAST_VERIFY", "0")

import torch
from torch import Tensor

from ldmi_fast import DMILoss, JointState, dmi_loss, joint_matrix, linear_dmi_loss
from tests.support.problems import Problem, problem

SMALL = [(37, 2), (128, 2), (256, 14), (300, 33), (500, 64)]
LARGE = [(40, 100), (700, 100), (5000, 10), (20000, 14), (48, 600), (1200, 300)]
OPTIONS: list[dict[str, Any]] = [{}, {"eps": 1e-3}, {"absent": "strict"}, {"normalize": False}, {"cross_entropy_weight": 0.5}]


def digest(tensors: tuple[Tensor, ...]) -> str:
    """A hash of dtypes, shapes and bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def of_loss(batch: Problem, engine: str, **options: Any) -> tuple[Tensor, ...]:
    logits = batch.leaf()
    loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine=engine, **options)
    return (loss, *torch.autograd.grad(loss, logits))


def of_weights(batch: Problem, engine: str) -> tuple[Tensor, ...]:
    logits, weight = batch.leaf(), torch.ones(len(batch.logits)) if batch.sample_weight is None else batch.sample_weight.clone()
    return torch.autograd.grad(dmi_loss(logits, batch.target, sample_weight=weight.requires_grad_(), engine=engine), (logits, weight))


def of_joint(batch: Problem, engine: str) -> tuple[Tensor, ...]:
    logits = batch.leaf()
    joint = joint_matrix(logits, batch.target, sample_weight=batch.sample_weight, engine=engine)
    return (joint, *torch.autograd.grad(joint.square().sum(), logits))


def of_average(batch: Problem, engine: str) -> tuple[Tensor, ...]:
    criterion, logits = DMILoss(batch.logits.shape[1], momentum=0.9, engine=engine), batch.leaf()
    grads = [torch.autograd.grad(criterion(logits, batch.target, batch.sample_weight), logits)[0] for _ in range(2)]
    return (*grads, criterion.average_joint)


def of_state(batch: Problem, engine: str) -> tuple[Tensor, ...]:
    state, logits, weight = JointState(batch.logits.shape[1], engine=engine), batch.leaf(), batch.sample_weight
    for part in range(2):
        state.update(logits[part::2], batch.target[part::2], None if weight is None else weight[part::2])
    solution = state.solve()
    loss = state.loss(logits[::2], batch.target[::2], None if weight is None else weight[::2])
    return (*vars(solution).values(), *torch.autograd.grad(loss, logits))


def of_linear(batch: Problem, engine: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(batch.logits), 8, generator=generator, requires_grad=True)
    weight = torch.randn(batch.logits.shape[1], 8, generator=generator, requires_grad=True)
    loss = linear_dmi_loss(hidden, weight, batch.target, sample_weight=batch.sample_weight, engine=engine)
    return torch.autograd.grad(loss, (hidden, weight))


def of_second_derivative(batch: Problem, engine: str) -> tuple[Tensor, ...]:
    logits = batch.leaf()
    loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine=engine)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), logits)


OTHERS: list[tuple[Callable[[Problem, str], tuple[Tensor, ...]], int, int]] = [
    # what, up to how many elements, and up to how many with the interpreter
    (of_weights, 10**9, 10**9),
    (of_joint, 10**9, 10**9),
    (of_average, 10**9, 10**9),
    (of_state, 10**6, 10**6),
    (of_linear, 10**9, 10**4),
    (of_second_derivative, 10**4, 10**4),
]


def lines(engine: str) -> Iterator[str]:
    """The lines of one engine."""
    interpreted = engine == "triton"
    dtypes = [torch.float32, torch.float64, torch.bfloat16, *([] if interpreted else [torch.float16])]
    for (n, classes), soft, weighted in itertools.product(SMALL if interpreted else SMALL + LARGE, [False, True], [False, True]):
        for dtype in dtypes:
            batch = problem(n, classes, soft=soft, weighted=weighted, dtype=dtype)
            for options in OPTIONS if (n, classes) in SMALL[2:4] and dtype == torch.float32 else [{}]:
                yield f"{engine} {n} {classes} {dtype} {soft=} {weighted=} {options} {digest(of_loss(batch, engine, **options))}"
        batch = problem(n, classes, soft=soft, weighted=weighted)
        for what, most, most_interpreted in OTHERS:
            if n * classes <= (most_interpreted if interpreted else most):
                yield f"{engine} {n} {classes} {what.__name__} {soft=} {weighted=} {digest(what(batch, engine))}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for engine in sys.argv[1:] or ["cpu", "composite", "triton"]:
        for line in lines(engine):
            print(line)
