"""The real compiler, for GPUs that this machine does not have: every launched kernel compiles, and the hot ones do not spill.

This finds errors that the interpreter cannot: types that change within a loop, operands without a layout, spilled registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from ldmi_fast.engines.triton import ops, tuning
from tests.engines.triton.compiling import TARGETS, Launch, compiled, launches_of, resources

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

#: Bytes of stack that ptxas may use where speed matters less; a spilled tile is hundreds of bytes. Hot kernels may use none.
STACK_BYTES = 96


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward_of(rows: int, classes: int, dtype: torch.dtype, soft: bool = False, weighted: bool = False, input: str = "logits") -> Any:
    target = meta(rows, classes) if soft else meta(rows, dtype=torch.int64)
    weight = meta(rows) if weighted else None
    return meta(rows, classes, dtype=dtype), target, weight, -100, "present", 1e-3, True, 0.5, input


def backward_of(rows: int, classes: int, dtype: torch.dtype, soft: bool = False, weighted: bool = False, input: str = "logits") -> Any:
    logits, target, weight, *_ = forward_of(rows, classes, dtype, soft, weighted)
    V, scalar = meta(classes, classes, dtype=F64), meta(dtype=F64)
    return logits, target, weight, meta(rows), V, scalar, scalar, -100, input


#: name: op, its arguments. Rows matter only where they decide the regime.
HOT: dict[str, tuple[Callable[..., Any], Any]] = {
    "forward-14": (ops.forward, forward_of(65536, 14, F32)),
    "forward-14-bf16": (ops.forward, forward_of(65536, 14, BF16)),
    "forward-32": (ops.forward, forward_of(65536, 32, F32)),
    "forward-64": (ops.forward, forward_of(65536, 64, F32)),
    "forward-1000": (ops.forward, forward_of(65536, 1000, F32)),
    "backward-14": (ops.gradient, backward_of(65536, 14, F32)),
    "backward-14-bf16": (ops.gradient, backward_of(65536, 14, BF16)),
    "backward-100": (ops.gradient, backward_of(65536, 100, F32)),
    "backward-1000": (ops.gradient, backward_of(65536, 1000, F32)),
    "backward-10000": (ops.gradient, backward_of(65536, 10000, F32)),
    "fused-14": (ops.loss_and_gradient, forward_of(256, 14, F32)),
}
#: The rest of the contract, on one GPU: it compiles.
OTHERS: dict[str, tuple[Callable[..., Any], Any]] = {
    "forward-14-weighted": (ops.forward, forward_of(65536, 14, F32, weighted=True)),
    "forward-14-soft-bf16": (ops.forward, forward_of(65536, 14, BF16, soft=True, weighted=True)),
    "forward-14-probs": (ops.forward, forward_of(65536, 14, F32, input="probs")),
    "forward-14-f64": (ops.forward, forward_of(65536, 14, F64)),
    "forward-64-weighted-f16": (ops.forward, forward_of(65536, 64, F16, weighted=True)),
    "forward-100-weighted-bf16": (ops.forward, forward_of(65536, 100, BF16, weighted=True)),
    "forward-10000": (ops.forward, forward_of(65536, 10000, F32)),
    "forward-10000-probs-f64": (ops.forward, forward_of(20000, 10000, F64, input="probs")),
    "backward-14-weighted-f64": (ops.gradient, backward_of(65536, 14, F64, weighted=True)),
    "backward-14-soft": (ops.gradient, backward_of(65536, 14, F32, soft=True, weighted=True)),
    "backward-64-soft-probs": (ops.gradient, backward_of(65536, 64, F32, soft=True, input="probs")),
    "backward-1000-weighted-bf16": (ops.gradient, backward_of(65536, 1000, BF16, weighted=True)),
    "backward-10000-probs": (ops.gradient, backward_of(65536, 10000, F32, input="probs")),
    "fused-32-weighted": (ops.loss_and_gradient, forward_of(256, 32, F32, weighted=True)),
}


def kernels(monkeypatch: pytest.MonkeyPatch, case: tuple[Callable[..., Any], Any]) -> list[Launch]:
    op, args = case
    launches = launches_of(monkeypatch, op, *args)
    assert launches
    return launches


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", HOT)
def test_hot_kernels_keep_to_their_registers(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in kernels(monkeypatch, HOT[name]):
        found = resources(compiled(launch, TARGETS[target]))
        assert found["stack"] == 0, (launch.name, found)
        assert found["local"] == 0, (launch.name, found)
        assert found["shared"] <= 64 * 1024, (launch.name, found)


@pytest.mark.parametrize("name", OTHERS)
def test_everything_compiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in kernels(monkeypatch, OTHERS[name]):
        found = resources(compiled(launch, TARGETS["sm_90"]))
        assert found["stack"] <= STACK_BYTES, (launch.name, found)
        assert found["shared"] <= 99 * 1024, (launch.name, found)


def test_every_configuration_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations that autotuning may choose instead of the default."""
    cases = {
        "joint-tile-16": HOT["forward-14"],
        "joint-tile-64": HOT["forward-64"],
        "joint-label": HOT["forward-1000"],
        "grad-narrow": HOT["backward-14"],
        "grad-broad": HOT["backward-1000"],
    }
    for regime, case in cases.items():
        for name, config in list(tuning.TABLE[regime].items())[1:]:
            monkeypatch.setitem(tuning.TABLE, regime, {name: config})
            for launch in kernels(monkeypatch, case):
                if launch.name in ("_tile_kernel", "_label_kernel", "_rows_kernel"):
                    assert resources(compiled(launch, TARGETS["sm_90"]))["local"] == 0


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more than 2^31 logits, and rows further apart than 2^31, the addresses in the compiled kernels are 64 bits wide."""
    rows, classes = 2**31 + 7, 3
    logits = torch.empty_strided((rows, classes), (2**32 + 16, 1), device="meta")
    args = (logits, meta(rows, dtype=torch.int64), None, -100, "present", 0.0, True, 0.0, "logits")
    for launch in launches_of(monkeypatch, ops.forward, *args):
        kernel = compiled(launch, TARGETS["sm_90"])
        if launch.name == "_tile_kernel":
            assert "i64" in kernel.asm["ttir"]
            assert launch.arguments["per_program"] * launch.grid[0] >= rows
