"""The compiled engine as a whole: the same bits on every number of threads, instruction sets, and what it reports about itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ldmi_fast
from ldmi_fast import dmi_loss, ops
from tests.support.compare import DERIVATIVE
from tests.support.problems import gradient_of, problem

ROOT = Path(__file__).resolve().parents[2]

OPS = torch.ops.ldmi_fast

COMPILED: Any = ops.compiled
pytestmark = pytest.mark.skipif(ops.compiled is None, reason=ops.why_not_compiled)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A new Python on the same sources, with other environment variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LDMI_FAST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- threads ----------------------------------------------------------------------------------------------------------------------

SHAPES = [
    pytest.param(300, 10, False, torch.float32, id="fused"),
    pytest.param(25_000, 10, False, torch.float32, id="fused-several-tasks"),
    pytest.param(60_000, 10, False, torch.bfloat16, id="staged-half"),
    pytest.param(60_000, 10, False, torch.float64, id="staged-double"),
    pytest.param(3000, 130, False, torch.float64, id="joint-by-label"),
    pytest.param(2000, 300, False, torch.float32, id="both-by-label"),
    pytest.param(2000, 300, False, torch.float64, id="both-by-label-double"),
    pytest.param(250, 200, False, torch.float64, id="fused-elimination-in-parallel"),
    pytest.param(6000, 40, True, torch.float32, id="soft"),
    pytest.param(2000, 260, True, torch.float64, id="soft-elimination-in-parallel"),
]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "classes", "soft", "dtype"), SHAPES)
def test_every_number_of_threads_gives_the_same_bits(rows: int, classes: int, soft: bool, dtype: torch.dtype) -> None:
    batch = problem(rows, classes, soft=soft, weighted=True, dtype=dtype)
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        logits = batch.leaf()
        loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, cross_entropy_weight=0.5, engine="cpu")
        loss.backward()
        results.append((count, loss, gradient_of(logits)))
    _, first_loss, first_grad = results[0]
    for count, loss, grad in results[1:]:
        assert torch.equal(loss, first_loss), f"the loss differs with {count} threads"
        assert torch.equal(grad, first_grad), f"the gradient differs with {count} threads"


@pytest.mark.parametrize(("rows", "classes", "soft", "dtype"), SHAPES)
def test_the_loss_alone_has_the_same_bits(rows: int, classes: int, soft: bool, dtype: torch.dtype) -> None:
    """If no gradient will follow, there is no inverse, and the determinant is the same."""
    batch = problem(rows, classes, soft=soft, weighted=True, dtype=dtype)
    loss = dmi_loss(batch.leaf(), batch.target, sample_weight=batch.sample_weight, engine="cpu")
    alone = dmi_loss(batch.logits, batch.target, sample_weight=batch.sample_weight, engine="cpu")
    assert loss.requires_grad
    assert not alone.requires_grad
    assert torch.equal(loss, alone)
    with torch.no_grad():
        assert torch.equal(loss, dmi_loss(batch.leaf(), batch.target, sample_weight=batch.sample_weight, engine="cpu"))


def test_no_inverse_where_no_gradient_is_asked_for() -> None:
    batch = problem(40, 5)
    loss, lse, V, scale, ce_scale = OPS.loss_forward(
        batch.logits, batch.target, None, -100, "present", 0.0, True, 0.0, "logits", False
    )
    wanted = OPS.loss_forward(batch.logits, batch.target, None, -100, "present", 0.0, True, 0.0, "logits", True)
    assert V.shape == (0, 0)
    assert wanted[2].shape == (5, 5)
    for a, b in zip((loss, lse, scale, ce_scale), (*wanted[:2], *wanted[3:]), strict=True):
        assert torch.equal(a, b)


# --- half precision ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [500, 100_000])
def test_loss_scaling_reaches_small_gradients(rows: int) -> None:
    """fp16 training multiplies the loss so that small gradients survive fp16: they must not be rounded to fp16 before that."""
    batch = problem(rows, 2, dtype=torch.float16)
    scale = 65536.0
    logits = batch.leaf()
    (scale * dmi_loss(logits, batch.target, engine="cpu")).backward()
    exact = batch.to(torch.float64).leaf()
    (scale * dmi_loss(exact, batch.target, engine="composite")).backward()
    wanted = gradient_of(exact)
    assert wanted.abs().max() < 60_000, "the scale fits"
    error = (gradient_of(logits).double() - wanted).abs().max() / wanted.abs().max()
    assert error <= 2.0**-11 + 1e-5


# --- instruction sets -------------------------------------------------------------------------------------------------------------

LOSSES = """
import sys, torch
from ldmi_fast import dmi_loss, ops
from tests.support.problems import problem
results = []
for rows, classes, soft in [(300, 10, False), (60_000, 10, False), (900, 33, True), (700, 150, False)]:
    for dtype in (torch.float32, torch.float64):
        batch = problem(rows, classes, soft=soft, weighted=True, dtype=dtype)
        logits = batch.leaf()
        loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine="cpu")
        loss.backward()
        results.append((loss.detach(), logits.grad))
torch.save((ops.compiled.build_info()["isa"], results), sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """LDMI_FAST_ISA chooses the instruction set, and the choice changes only roundings."""
    results = {}
    for isa in ("baseline", "avx2", "avx512"):
        file = tmp_path / isa
        done = run("-c", LOSSES, str(file), LDMI_FAST_ISA=isa)
        if isa != "baseline" and done.returncode != 0:
            assert f"LDMI_FAST_ISA={isa}" in done.stderr  # this processor lacks it, or its architecture has no such set
            continue
        assert done.returncode == 0, done.stderr
        chosen, results[isa] = torch.load(file)
        assert chosen == isa
    default = COMPILED.build_info()["isa"]
    assert default in results or os.environ.get("LDMI_FAST_ISA")
    if len(results) == 1:
        pytest.skip("this processor has only the baseline")
    baseline = results.pop("baseline")
    for isa, others in results.items():
        for (loss, grad), (base_loss, base_grad) in zip(others, baseline, strict=True):
            rtol = 1e-5 if loss.dtype == torch.float32 else DERIVATIVE
            torch.testing.assert_close(loss, base_loss, rtol=rtol, atol=rtol, msg=isa)
            torch.testing.assert_close(grad, base_grad, rtol=10 * rtol, atol=rtol * base_grad.abs().max().item(), msg=isa)


def test_an_unknown_instruction_set() -> None:
    done = run("-c", "import torch, ldmi_fast; ldmi_fast.dmi_loss(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))", LDMI_FAST_ISA="mmx")
    assert done.returncode == 1, "an error, not a crash"
    message = done.stderr.strip().splitlines()[-1]
    assert "RuntimeError" in message
    assert "LDMI_FAST_ISA=mmx: expected one of" in message
    assert "baseline" in message


# --- what it says about itself ----------------------------------------------------------------------------------------------------


def test_build_info() -> None:
    info = COMPILED.build_info()
    assert set(info) == {"version", "compiler", "torch", "cuda", "cuda_archs", "isa"}
    assert info["version"] == ldmi_fast.__version__
    assert info["isa"] in ("baseline", "avx2", "avx512")
    assert all(isinstance(value, str) and value for value in info.values())


def test_python_m() -> None:
    done = run("-m", "ldmi_fast")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"ldmi_fast {ldmi_fast.__version__} ")
    assert torch.__version__ in lines[0]
    for name in ("cpu", "composite"):
        (line,) = (line for line in lines if line.startswith(f"engine {name} "))
        assert "runs" in line
        assert line.endswith("ok")
    assert any("isa" in line for line in lines)
    assert not done.stderr


def test_python_m_with_what_this_machine_lacks() -> None:
    """An engine that cannot run is named with the reason, and the exit status is not 0."""
    done = run("-m", "ldmi_fast", LDMI_FAST_ISA="mmx")
    assert done.returncode == 1
    assert "LDMI_FAST_ISA=mmx: expected one of" in done.stdout
    assert "Traceback" not in done.stderr


def test_op_arguments_that_cannot_work() -> None:
    """The ops raise an error for arguments that they cannot compute. In a separate process, because a crash would end this one."""
    script = """
import torch, ldmi_fast
OPS = torch.ops.ldmi_fast
x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
f64 = torch.float64
lse, V, one = torch.zeros(6), torch.zeros(3, 3, dtype=f64), torch.ones((), dtype=f64)
calls = {
    "no labels": lambda: OPS.joint(x, y, None, 0, -100, "logits"),
    "fewer than no labels": lambda: OPS.joint(x, y, None, -1, -100, "logits"),
    "no classes": lambda: OPS.joint(x[:, :0], y, None, 3, -100, "logits"),
    "logits of 1 dimension": lambda: OPS.joint(x[0], y, None, 3, -100, "logits"),
    "integer logits": lambda: OPS.joint(x.long(), y, None, 3, -100, "logits"),
    "too few labels": lambda: OPS.joint(x, y[:4], None, 3, -100, "logits"),
    "labels of no dimension": lambda: OPS.joint(x, y[0], None, 3, -100, "logits"),
    "boolean labels": lambda: OPS.joint(x, y > 0, None, 3, -100, "logits"),
    "integer soft targets": lambda: OPS.joint(x, torch.zeros(6, 3, dtype=torch.int64), None, 3, -100, "logits"),
    "soft targets of more labels": lambda: OPS.joint(x, torch.rand(6, 5), None, 3, -100, "logits"),
    "integer weights": lambda: OPS.joint(x, y, torch.ones(6, dtype=torch.int64), 3, -100, "logits"),
    "weights of 2 dimensions": lambda: OPS.joint(x, y, torch.ones(6, 1), 3, -100, "logits"),
    "input": lambda: OPS.joint(x, y, None, 3, -100, "logit"),
    "fp32 S": lambda: OPS.logdet_inverse(V.float(), V[0], "present"),
    "S not square": lambda: OPS.logdet_inverse(V[:2], V[0], "present"),
    "n too short": lambda: OPS.logdet_inverse(V, V[0, :2], "present"),
    "absent": lambda: OPS.logdet_inverse(V, V[0], "gone"),
    "lse too short": lambda: OPS.logits_grad(x, y, None, lse[:2], V, one, one, -100, "logits"),
    "lse of another dtype": lambda: OPS.logits_grad(x, y, None, lse.double(), V, one, one, -100, "logits"),
    "V of other classes": lambda: OPS.logits_grad(x, y, None, lse, torch.zeros(3, 4, dtype=f64), one, one, -100, "logits"),
    "V of no labels": lambda: OPS.logits_grad(x, y, None, lse, V[:0], one, one, -100, "logits"),
    "empty scale": lambda: OPS.logits_grad(x, y, None, lse, V, one.view(1)[:0], one, -100, "logits"),
    "empty ce_scale": lambda: OPS.logits_grad(x, y, None, lse, V, one, one.view(1)[:0], -100, "logits"),
    "soft cross entropy of fewer labels": lambda: OPS.logits_grad(x, torch.rand(6, 2), None, lse, V[:2], one, one, -100, "logits"),
    "fp32 scale": lambda: OPS.logits_grad(x, y, None, lse, V, one.float(), one, -100, "logits"),
    "soft targets for fused": lambda: OPS.fused(x, torch.rand(6, 3), None, -100, "present", 0.0, True, 0.0, "logits"),
}
for name, call in calls.items():
    print(name, flush=True)
    try:
        call()
    except RuntimeError as error:
        assert "ldmi_fast: " in str(error), (name, error)
        continue
    raise SystemExit(f"{name}: accepted")
print("all refused")
"""
    done = run("-c", script)
    assert done.returncode == 0, f"after: {done.stdout.splitlines()[-1]}\n{done.stderr}"
    assert done.stdout.endswith("all refused\n")
