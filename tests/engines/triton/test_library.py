"""More classes than one program factors: torch's LU in the memory of S and of V. It has no kernel, so it runs here, also compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from ldmi_fast.engines import composite
from ldmi_fast.engines.triton.logdet_inverse import _by_lu
from tests.support.compare import DERIVATIVE

ROOT = Path(__file__).resolve().parents[3]
Solve = Callable[[Tensor, Tensor, str], tuple[Tensor, ...]]


@torch.library.triton_op("ldmi_fast_test::by_library", mutates_args=())
def as_op(S: Tensor, n: Tensor, absent: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _by_lu(S.clone(), n, absent)


def compiled() -> Solve:
    """As torch.compile sees it inside the engine's ops."""
    torch.compiler.reset()
    solve: Solve = torch.compile(lambda S, n, absent: torch.ops.ldmi_fast_test.by_library(S, n, absent), fullgraph=True)
    return solve


def problems(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Matrices of all classes, with absent ones, singular, not finite, and empty; pivots are off the diagonal."""
    classes = shape[-1]
    generator = torch.Generator().manual_seed(classes)
    S = 0.1 * torch.rand(shape, generator=generator, dtype=torch.float64)
    S += torch.eye(classes, dtype=torch.float64)[torch.randperm(classes, generator=generator)]
    n = S.sum(-1)
    absent, equal, non_finite = S.clone(), S.clone(), S.clone()
    absent[..., 5, :] = 0
    equal[..., 3, :] = equal[..., 4, :]
    non_finite[..., 3, 9] = torch.nan
    return [(S, n), (absent, absent.sum(-1)), (equal, n), (non_finite, n), (0 * S, 0 * n)]


@pytest.mark.parametrize("solve", [lambda: _by_lu, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", [(70, 70), (3, 65, 65)], ids=str)
def test_the_definition(shape: tuple[int, ...], solve: Callable[[], Solve]) -> None:
    ours = solve()
    for S, n in problems(shape):
        for absent in ("present", "strict"):
            for got, want in zip(ours(S.clone(), n, absent), composite.logdet_inverse(S, n, absent), strict=True):
                torch.testing.assert_close(got, want, rtol=DERIVATIVE, atol=DERIVATIVE, equal_nan=True)


PEAK = """
import ctypes, gc, sys
from pathlib import Path
import torch
from bench.memory import PR_SET_THP_DISABLE, status_bytes
from ldmi_fast.engines.triton.logdet_inverse import _by_lu
libc, classes = ctypes.CDLL(None), int(sys.argv[1])
libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
make = lambda c: torch.eye(c, dtype=torch.float64).add_(torch.rand(c, c, dtype=torch.float64), alpha=0.1 / c)
# Once at this size: the LAPACK library keeps its buffers, which are not the operation's own.
_by_lu(make(classes), torch.ones(classes, dtype=torch.float64), "present")
S, n = make(classes), torch.ones(classes, dtype=torch.float64)
gc.collect()
libc.malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status_bytes("VmRSS")
result = _by_lu(S, n, "present")
print(status_bytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured through /proc/self/clear_refs")
def test_one_more_matrix_is_all_the_memory() -> None:
    classes = 1500
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PEAK, str(classes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.2 * 8 * classes**2 + 2**21
