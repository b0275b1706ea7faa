"""Which machine uses the Triton engine and why another does not; and that code that does not use it does not load triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ldmi_fast import dmi_loss, explain
from ldmi_fast.engines import choose
from ldmi_fast.engines.triton import engine
from ldmi_fast.options import ENGINE_VARIABLE, Options
from tests.support.problems import problem

ROOT = Path(__file__).resolve().parents[3]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)
    monkeypatch.delenv(engine.INTERPRET_VARIABLE, raising=False)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "INSTALLED", False)


@needs_triton
def test_a_gpu_without_compiled_kernels_gets_it() -> None:
    assert engine.can_run(CUDA) == ""
    assert choose.choose_name(CUDA, Options()) == "triton"
    assert choose.choose_name(CPU, Options()) != "triton"


def test_without_triton_a_gpu_gets_composite(no_triton: None) -> None:
    assert engine.can_run(CUDA) == "triton is not installed"
    assert choose.choose_name(CUDA, Options()) == "composite"
    with pytest.raises(RuntimeError, match="engine 'triton' was asked for and cannot run: triton is not installed"):
        choose.choose_name(CUDA, Options(engine="triton"))


@needs_triton
@pytest.mark.parametrize("how", ["argument", "variable"])
def test_forced_on_the_cpu_it_says_why_not(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = problem(20, 3)
    if how == "variable":
        monkeypatch.setenv(ENGINE_VARIABLE, "triton")
    given: dict[str, Any] = {"engine": "triton"} if how == "argument" else {}
    for function in (dmi_loss, explain):
        with pytest.raises(RuntimeError, match=r"engine 'triton' was asked for and cannot run: .*on the CPU \(TRITON_INTERPRET=1"):
            function(batch.logits, batch.target, **given)


@needs_triton
def test_other_devices_and_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the logits are on meta" in engine.can_run(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, runs in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = engine.can_run(CUDA)
        assert (reason == "") == runs
        assert runs or "an old GPU" in reason


@needs_triton
def test_interpreted_it_can_be_forced_but_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine.INTERPRET_VARIABLE, "1")
    assert engine.can_run(CPU) == ""
    assert choose.choose_name(CPU, Options()) != "triton"
    assert choose.choose_name(CPU, Options(engine="triton")) == "triton"


@needs_triton
@pytest.mark.parametrize(
    ("rows", "classes", "soft", "dtype", "kernels"),
    [
        (256, 14, False, torch.float32, ("fused (joint, logdet_inverse (Gauss-Jordan), logits_grad)",)),
        (256, 14, False, torch.float16, ("joint (one-hot product)", "logdet_inverse (Gauss-Jordan)", "logits_grad (whole rows)")),
        (4096, 14, True, torch.float32, ("joint (product in registers)", "logdet_inverse (Gauss-Jordan)", "logits_grad (whole rows)")),
        (65536, 1000, False, torch.float32, ("joint (label order)", "logdet_inverse (library LU)", "logits_grad (whole rows)")),
        (65536, 3000, False, torch.float32, ("joint (label order)", "logdet_inverse (library LU)", "logits_grad (label order)")),
        (4096, 5000, False, torch.float32, ("joint (label order)", "logdet_inverse (library LU)", "logits_grad (long rows)")),
        (4096, 100, True, torch.float32, ("joint (library product)", "logdet_inverse (library LU)", "logits_grad (library product)")),
    ],
)
def test_explain_on_a_gpu(rows: int, classes: int, soft: bool, dtype: torch.dtype, kernels: tuple[str, ...]) -> None:
    with FakeTensorMode():
        logits = torch.empty(rows, classes, dtype=dtype, device="cuda")
        target = torch.empty(rows, classes, device="cuda") if soft else torch.empty(rows, dtype=torch.int64, device="cuda")
        plan = explain(logits, target)
    assert plan.engine == "triton"
    assert plan.kernels == kernels
    assert "no compiled ones" in plan.reason


def test_importing_and_using_other_engines_does_not_load_triton() -> None:
    code = """
import sys, torch, ldmi_fast
logits = torch.randn(300, 5, requires_grad=True)
target = torch.arange(300) % 5
ldmi_fast.dmi_loss(logits, target).backward()
ldmi_fast.explain(logits, target)
ldmi_fast.diagnose(logits, target)
from ldmi_fast.engines.choose import available
available("cuda")
loaded = [name for name in sys.modules if name == "triton" or name.startswith("ldmi_fast.engines.triton.ops")]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120)


def test_the_package_works_where_triton_cannot_be_imported(tmp_path: Path) -> None:
    code = """
import sys, torch, importlib.util
sys.modules["triton"] = None  # import triton raises
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import ldmi_fast
from ldmi_fast.engines.triton import engine
assert engine.can_run(torch.device("cuda")) == "triton is not installed"
ldmi_fast.dmi_loss(torch.randn(300, 5), torch.arange(300) % 5)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120)


# --- what torch.compile sees, on tensors that claim to be on a GPU ----------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(("rows", "classes"), [(300, 14), (3000, 14), (300, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_have_fake_kernels_and_a_graph_that_shows_the_launches(rows: int, classes: int, dtype: torch.dtype) -> None:
    """One op at dispatch; the kernels themselves after functionalisation, as in torch.compile."""
    with FakeTensorMode():
        logits = torch.empty(rows, classes, dtype=dtype, device="cuda")
        target = torch.empty(rows, dtype=torch.int64, device="cuda")
        options = (-100, "present", 0.0, True, 0.0, "logits")
        loss, grad = engine.fused(logits, target, None, *options)
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        assert (grad.shape, grad.dtype, grad.device.type) == (logits.shape, dtype, "cuda")
        loss, lse, V, scale, ce_scale = engine.loss_forward(logits, target, None, *options, True)
        assert (lse.shape, V.shape, V.dtype) == ((rows,), (classes, classes), torch.float64)
        given = engine.logits_grad(logits, target, None, lse, V, scale, ce_scale, -100, "logits")
        assert (given.shape, given.dtype) == (logits.shape, dtype)

    def call(x: torch.Tensor, y: torch.Tensor) -> Any:
        return engine.loss_forward(x, y, None, *options, True)

    with FakeTensorMode():
        arguments = torch.empty(rows, classes, dtype=dtype, device="cuda"), torch.empty(rows, dtype=torch.int64, device="cuda")
        whole = make_fx(call)(*arguments)
        opened = make_fx(torch.func.functionalize(call))(*arguments)
    assert "ldmi_fast_triton.loss_forward" in whole.code
    assert "triton_kernel_wrapper" in opened.code or "ldmi_fast_triton.loss_forward" in opened.code
