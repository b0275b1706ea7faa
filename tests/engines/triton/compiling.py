"""The real compiler without a GPU: the launches of an op are recorded, and compiled for a GPU that this machine does not have.

Ops run on tensors without data that claim to be on a GPU, so their launches come with the arguments they would really have.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ldmi_fast.engines.triton import fused, joint, logdet_inverse, logits_grad

OPS = (joint, logdet_inverse, logits_grad, fused)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, and its arguments by name."""

    kernel: Any
    grid: tuple[Any, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Collect the launches of the ops instead of making them."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
            def launch(*args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
                arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
                assert set(arguments) == set(self.kernel.arg_names), "a launch with missing or unknown arguments"
                launches.append(Launch(self.kernel, grid, arguments, {"num_warps": num_warps, "num_stages": num_stages}))

            return launch

    with monkeypatch.context() as patch:
        for op in OPS:
            patch.setattr(op, "wrap_triton", Recorder)
        yield launches


def launches_of(monkeypatch: pytest.MonkeyPatch, op: Callable[..., Any], *args: Any) -> list[Launch]:
    """The launches of ``op`` for tensors like these (on the meta device), as if they were on a GPU."""
    with recorded(monkeypatch) as launches, FakeTensorMode():
        op(*(on_gpu(arg) if isinstance(arg, Tensor) else arg for arg in args))
    return launches


def on_gpu(tensor: Tensor) -> Tensor:
    """A tensor without data, under FakeTensorMode, that claims to be on a GPU."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def compiled(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """The kernel, specialised as Triton would for these arguments."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert type(value) is int, (launch.name, parameter.name, value)
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """The resources of a compiled kernel: registers, stack and local memory in bytes (NVIDIA), spilled vector registers (AMD)."""
    if "cubin" in kernel.asm:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
        assert found, report
        registers, stack, local = map(int, found.groups())
        return {"registers": registers, "stack": stack, "local": local, "shared": kernel.metadata.shared}
    assembly = kernel.asm["amdgcn"]
    numbers = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_spill_count|vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    return {
        "registers": numbers["vgpr_count"],
        "stack": numbers["private_segment_fixed_size"],
        "local": numbers["vgpr_spill_count"],
        "shared": kernel.metadata.shared,
    }
