"""torch.compile on a GPU: Inductor's kernels around ours, and CUDA graphs with mode="reduce-overhead"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ldmi_fast import dmi_loss
from tests.support.compare import Result, assert_matches
from tests.support.problems import problem


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(
    ("n", "classes", "build"),
    [
        pytest.param(256, 14, {}, id="small"),
        pytest.param(256, 14, {"weighted": True, "dtype": torch.bfloat16}, id="small-weighted-bf16"),
        pytest.param(3000, 100, {}, id="one-block-factor"),
        pytest.param(600, 30, {"soft": True}, id="soft"),
    ],
)
def test_inputs_change_from_step_to_step(
    engine: str, device: torch.device, n: int, classes: int, build: dict[str, Any], mode: str
) -> None:
    """One graph; CUDA graphs are recorded in some steps, and each step still has the gradient of its own batch."""

    def loss(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        # Something for Inductor to do on both sides of the op.
        return 2 * dmi_loss(logits * 1.0, target, sample_weight=weight, engine=engine)

    step = torch.compile(loss, fullgraph=True, dynamic=False, mode=mode)
    for seed in range(6):
        batch = problem(n, classes, seed=seed, **build)
        here = batch.to(device=device)
        logits = here.leaf()
        torch.compiler.cudagraph_mark_step_begin()
        value = step(logits, here.target, here.sample_weight)
        value.backward()
        assert logits.grad is not None
        result = Result(value.detach().clone() / 2, logits.grad.clone() / 2, None)
        assert_matches(result, batch.answer(), batch.logits.dtype)
    if mode == "reduce-overhead":
        assert counters["inductor"]["cudagraph_skips"] == 0
