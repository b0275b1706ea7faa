"""Which engine runs, what ``explain`` says about it, and that the plan's regimes agree where one ends and the next begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldmi_fast import Plan, dmi_loss, explain, few_rows, joint_matrix, ops
from ldmi_fast.engines import choose, composite, native
from ldmi_fast.options import ENGINE_VARIABLE, ENGINES, Options
from tests.support.compare import DERIVATIVE, REORDERED
from tests.support.problems import problem

COMPILED: Any = ops.compiled
needs_compiled = pytest.mark.skipif(ops.compiled is None, reason=ops.why_not_compiled)


class Recorder(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(function: Callable[[], Any]) -> list[str]:
    with Recorder() as recorder:
        function()
    return recorder.names


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)


@pytest.fixture
def no_compiled(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the compiled kernels appear not to load; returns the reason."""
    monkeypatch.setattr(ops, "compiled", None)
    monkeypatch.setattr(ops, "why_not_compiled", "a reason made up for this test")
    monkeypatch.setattr(native, "is_fused", lambda logits, target: False)  # its limits come from the compiled module
    return ops.why_not_compiled


# --- choosing ---------------------------------------------------------------------------------------------------------------------


@needs_compiled
def test_the_compiled_engine_is_the_default_on_the_cpu() -> None:
    logits = torch.randn(8, 3)
    assert choose.choose(logits, Options()) is native
    assert choose.choose_name(logits.device, Options()) == "cpu"
    assert choose.choose_name(torch.device("meta"), Options()) == "composite"


def test_available_names_every_engine() -> None:
    found = choose.available()
    assert tuple(found) == ENGINES
    assert found["composite"] == ""
    assert (found["cpu"] == "") == (ops.compiled is not None)
    assert "the logits are on meta" in choose.available("meta")["cpu"] or ops.compiled is None


def test_without_compiled_kernels(no_compiled: str) -> None:
    batch = problem(20, 4)
    assert choose.choose(batch.logits, Options()) is composite
    names = operators(lambda: dmi_loss(batch.logits, batch.target))
    assert not any(name.startswith("ldmi_fast") for name in names)
    plan = explain(batch.logits, batch.target)
    assert plan.engine == "composite"
    assert no_compiled in plan.reason
    with pytest.raises(RuntimeError, match="engine 'cpu' was asked for and cannot run: a reason made up"):
        dmi_loss(batch.logits, batch.target, engine="cpu")


def test_without_compiled_kernels_by_variable(no_compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = problem(20, 4)
    monkeypatch.setenv(ENGINE_VARIABLE, "cpu")
    for function in (dmi_loss, joint_matrix, explain):
        with pytest.raises(RuntimeError, match="engine 'cpu' was asked for and cannot run: a reason made up"):
            function(batch.logits, batch.target)


@needs_compiled
def test_a_forced_engine_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"engine 'cpu' .* cannot run: it has kernels for the CPU, and the logits are on meta"):
        explain(torch.zeros(4, 3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta"), engine="cpu")


@needs_compiled
@pytest.mark.parametrize("rows", [20, 100_000], ids=["small", "large"])
@pytest.mark.parametrize("how", ["argument", "variable"])
def test_forcing(how: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forced engine is the one that runs: the ops of the compiled engine appear, or do not."""
    batch = problem(rows, 3)

    def ran(name: str) -> bool:
        if how == "variable":
            monkeypatch.setenv(ENGINE_VARIABLE, name)
        engine = name if how == "argument" else None
        plan = explain(batch.logits, batch.target, engine=engine)
        assert plan.engine == name
        assert f"forced by {'engine=' if how == 'argument' else ENGINE_VARIABLE}" in plan.reason
        logits = batch.leaf()
        return any("ldmi_fast" in op for op in operators(lambda: dmi_loss(logits, batch.target, engine=engine).backward()))

    assert ran("cpu")
    assert not ran("composite")


@needs_compiled
def test_the_argument_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = problem(20, 3)
    monkeypatch.setenv(ENGINE_VARIABLE, "composite")
    assert explain(batch.logits, batch.target, engine="cpu").engine == "cpu"


@needs_compiled
def test_an_empty_variable_forces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = problem(20, 3)
    monkeypatch.setenv(ENGINE_VARIABLE, "")
    assert explain(batch.logits, batch.target).engine == "cpu"
    assert any("ldmi_fast" in op for op in operators(lambda: dmi_loss(batch.logits, batch.target)))


@pytest.mark.parametrize("small", [True, False])
def test_an_unknown_variable(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = problem(20 if small else 100_000, 3)
    monkeypatch.setenv(ENGINE_VARIABLE, "fast")
    for function in (dmi_loss, joint_matrix, explain):
        with pytest.raises(ValueError, match=rf"{ENGINE_VARIABLE} must be one of .*'composite'.*, got 'fast'"):
            function(batch.logits, batch.target)


# --- explaining -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [None, "composite"])
@pytest.mark.parametrize("soft", [False, True])
def test_explain_runs_nothing(engine: str | None, soft: bool) -> None:
    """No operator, however large the problem: these tensors are one element, expanded to 10^12."""
    logits = torch.zeros(1).expand(10**9, 1000)
    target = torch.zeros(1).expand(10**9, 1000) if soft else torch.zeros(1, dtype=torch.int64).expand(10**9)
    plans: list[Plan] = []
    assert operators(lambda: plans.append(explain(logits, target, engine=engine))) == []
    assert plans[0].workspace_bytes > 0
    assert plans[0].engine in str(plans[0])


@needs_compiled
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=["float16", "float32", "float64"])
@pytest.mark.parametrize(("rows", "classes"), [(64, 10), (100_000, 10), (100, 150), (3000, 150)])
def test_explain_reports_what_runs(rows: int, classes: int, dtype: torch.dtype, soft: bool) -> None:
    """The ops that run are those of the plan."""
    batch = problem(rows, classes, soft=soft, dtype=dtype)
    logits = batch.leaf()
    plan = explain(logits, batch.target)
    ran = {op.split(".")[1] for op in operators(lambda: dmi_loss(logits, batch.target).backward()) if "ldmi_fast" in op}
    if len(plan.kernels) == 1:
        assert plan.kernels[0].startswith("fused")
        assert ran == {"fused"}
    else:
        assert [kernel.split(" ")[0] for kernel in plan.kernels] == ["joint", "logdet_inverse", "logits_grad"]
        assert ran == {"loss_forward", "logits_grad"}


@needs_compiled
@pytest.mark.parametrize("engine", ["cpu", "composite"])
@pytest.mark.parametrize("rows", [64, 100_000], ids=["small", "large"])
def test_explain_over_ranks(rows: int, engine: str) -> None:
    """The sums are reduced between joint and logdet_inverse, even where a single process would use one call."""
    batch = problem(rows, 10)
    plan = explain(batch.logits, batch.target, group="world", engine=engine)
    names = [kernel.split(" ")[0] for kernel in plan.kernels]
    assert names[:3] == ["joint", "all_reduce", "logdet_inverse"]
    assert names[3:] == {"cpu": ["logits_grad"], "composite": ["combine", "autograd"]}[engine]
    assert "ranks" in plan.regime
    assert not plan.reason.endswith("; ")
    with pytest.raises(ValueError, match=r"group must be .*'world'.*, got 'wurld'"):
        explain(batch.logits, batch.target, group="wurld")
    with pytest.raises(TypeError, match=r"group must be .*, got int: 3"):
        explain(batch.logits, batch.target, group=3)


@needs_compiled
@pytest.mark.parametrize("rows", [64, 100_000], ids=["small", "large"])
def test_explain_where_weights_learn(rows: int) -> None:
    """Weights that get a gradient need the sums between two ops; without grad mode they are ordinary weights."""
    batch = problem(rows, 10, weighted=True)
    weight = batch.weight.clone().requires_grad_()
    plan = explain(batch.logits, batch.target, sample_weight=weight)
    ran = [
        op.split(".")[1]
        for op in operators(lambda: dmi_loss(batch.leaf(), batch.target, sample_weight=weight).backward())
        if "ldmi_fast" in op
    ]
    assert [kernel.split(" ")[0] for kernel in plan.kernels] == ran == ["joint", "logdet_inverse", "logits_grad"]
    with torch.no_grad():
        assert explain(batch.logits, batch.target, sample_weight=weight) == explain(
            batch.logits, batch.target, sample_weight=batch.sample_weight
        )


# --- the regimes of the plan ------------------------------------------------------------------------------------------------------


def kernels(rows: int, classes: int, labels: int | None = None, soft: bool = False, value_bytes: int = 4) -> tuple[str, ...]:
    plan = COMPILED.plan(rows, classes, labels or classes, soft, value_bytes, False)
    assert plan["reason"]
    assert plan["workspace_bytes"] > 0
    return tuple(plan["kernels"])


def last_before(changes: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in low..high for which ``changes`` does not hold; it must for all larger ones."""
    assert not changes(low)
    assert changes(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if changes(middle) else (middle, high)
    return low


def assert_engines_agree(rows: int, classes: int, soft: bool = False) -> None:
    """Loss and gradient of both engines agree in fp64, whatever the plan is."""
    batch = problem(rows, classes, soft=soft, weighted=True, dtype=torch.float64)
    found: list[tuple[Tensor, Tensor]] = []
    for engine in ("cpu", "composite"):
        logits = batch.leaf()
        loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine=engine, cross_entropy_weight=0.5)
        found.append((loss, torch.autograd.grad(loss, logits)[0]))
    (loss, grad), (want, want_grad) = found
    torch.testing.assert_close(loss, want, rtol=REORDERED, atol=REORDERED)
    torch.testing.assert_close(grad, want_grad, rtol=DERIVATIVE, atol=DERIVATIVE * want_grad.abs().max().item())


@needs_compiled
@pytest.mark.parametrize("classes", [3, 10, 50])
def test_plan_fused_by_elements(classes: int) -> None:
    elements, _ = COMPILED.fused_limits()
    last = elements // classes
    assert kernels(last, classes)[0].startswith("fused")
    assert [kernel.split(" ")[0] for kernel in kernels(last + 1, classes)] == ["joint", "logdet_inverse", "logits_grad"]
    for rows in (last, last + 1):
        assert_engines_agree(rows, classes)


@needs_compiled
def test_plan_fused_by_rows_per_class() -> None:
    """Few rows for their classes are fused, however many elements they have."""
    elements, rows_per_class = COMPILED.fused_limits()
    classes = next(c for c in range(2, 10**4) if rows_per_class * c * c > elements)
    last = rows_per_class * classes
    assert kernels(last, classes)[0].startswith("fused")
    assert not kernels(last + 1, classes)[0].startswith("fused")


@needs_compiled
def test_plan_factor() -> None:
    """Elimination on one thread for few classes, on all for more."""
    rows = 10**6

    def shared(classes: int) -> bool:
        return "all threads" in kernels(rows, classes)[1]

    last = last_before(shared, 1, 5000)
    assert "one thread" in kernels(rows, last)[1]
    for classes in (last, last + 1):
        assert_engines_agree(6 * classes, classes)
        assert_engines_agree(6 * classes, classes, soft=True)


@needs_compiled
@pytest.mark.parametrize("op", ["joint", "logits_grad"])
def test_plan_order(op: str) -> None:
    """Rows in their own order for few classes, in the order of their labels above; each op has its limit."""
    rows, at = 10**6, ("joint", "factor", "logits_grad").index(op)

    def by_label(classes: int) -> bool:
        return kernels(rows, classes)[at] == f"{op} (label order)"

    last = last_before(by_label, 1, 5000)
    assert kernels(rows, last)[at] == f"{op} (natural order)"
    elements, _ = COMPILED.fused_limits()
    for classes in (last, last + 1):
        staged = max(elements // classes, 2 * classes) + 300
        assert not kernels(staged, classes)[0].startswith("fused")
        assert_engines_agree(staged, classes)


@needs_compiled
@pytest.mark.parametrize("classes", [10, 60])
def test_plan_soft_blocks(classes: int) -> None:
    """Soft targets are processed one block of rows at a time; a block that is not full gives the same."""

    def regime(rows: int) -> str:
        return COMPILED.plan(rows, classes, classes, True, 8, False)["regime"]

    assert kernels(100, classes, soft=True)[0] == "joint (soft targets)"
    block = int(regime(10**7).removeprefix("soft targets, ").removesuffix(" rows at a time"))
    assert regime(block) == regime(10**7)
    for rows in (block, block + 1):
        assert_engines_agree(rows, classes, soft=True)


@needs_compiled
def test_plan_is_bounded() -> None:
    """Scratch memory stays small compared with the gradient, at every size."""
    for rows in (1, 100, 10**4, 10**6, 10**8):
        for classes in (1, 10, 128, 129, 1000, 10**4):
            for soft in (False, True):
                for value_bytes in (2, 4, 8):
                    plan = COMPILED.plan(rows, classes, classes, soft, value_bytes, False)
                    allowed = 0.05 * rows * classes * value_bytes + 1.05 * (16 * classes * classes + 16 * rows) + 4 * 2**20
                    assert plan["workspace_bytes"] <= allowed, (rows, classes, soft, value_bytes, plan)


def test_few_rows_are_explained(engine: str, device: torch.device) -> None:
    """The plan is that of the path that runs: N^3 for the determinant, not C^3."""
    for rows, classes, few in ((48, 9000, True), (128, 512, True), (129, 512, False), (48, 500, False)):
        logits, target = torch.zeros(rows, classes, device=device), torch.arange(rows, device=device)
        plan = explain(logits, target, engine=engine)
        assert (plan.regime == "few rows") == few, plan
        assert few == few_rows.applies(rows, classes, target.is_floating_point())
        if few:
            assert plan.kernels[0] == "slots of the labels that occur"
            assert plan.workspace_bytes < 4 * 8 * rows * classes
