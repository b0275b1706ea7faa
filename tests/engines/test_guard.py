"""Kernels are checked at their first use: a right one is always accepted, a wrong or refused one is replaced for the whole process.

There is no device here that refuses a launch or computes wrongly, so failures are injected into the CPU engine, which is guarded here.
"""

from __future__ import annotations

import math
import os
import random
import re
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmi_fast import DMILoss, JointState, dmi_loss, explain, linear_dmi_loss, ops
from ldmi_fast.engines import choose, composite, guard, native, verify
from ldmi_fast.engines.triton import engine as triton
from ldmi_fast.engines.triton.engine import INTERPRET_VARIABLE
from ldmi_fast.options import ENGINE_VARIABLE, Options
from tests.conftest import PLACES
from tests.support.problems import Problem, problem

pytestmark = pytest.mark.skipif(ops.compiled is None, reason=ops.why_not_compiled)


class Engine(ModuleType):
    """The CPU engine, which counts its calls and may be broken."""

    def __init__(self) -> None:
        super().__init__("engine")
        self.calls = dict.fromkeys(guard.OPS, 0)
        self.is_fused, self.can_run = native.is_fused, native.can_run
        for op in guard.OPS:
            setattr(self, op, self._counted(op, getattr(native, op)))

    def _counted(self, op: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            self.calls[op] += 1
            return function(*args)

        return call

    def break_op(self, op: str, change: Any) -> None:
        """``change(args, result) -> result``; it may raise."""
        right = getattr(self, op)
        setattr(self, op, lambda *args: change(args, right(*args)))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    found = Engine()
    guard.forget()
    monkeypatch.setattr(guard, "GUARDED", frozenset({"cpu"}))
    monkeypatch.setitem(choose._MODULES, "cpu", found)
    monkeypatch.delenv(guard.VARIABLE, raising=False)
    yield found
    guard.forget()


def loss_and_gradient(batch: Problem, **options: Any) -> tuple[Tensor, Tensor]:
    logits = batch.leaf()
    loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine="cpu", **options)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def expected(batch: Problem) -> tuple[Tensor, Tensor]:
    logits = batch.leaf()
    loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine="composite")
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def assert_right(batch: Problem) -> None:
    for got, want in zip(loss_and_gradient(batch), expected(batch), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


SMALL, STAGED = problem(128, 6), problem(60_000, 6)
assert native.is_fused(SMALL.logits, SMALL.target)
assert not native.is_fused(STAGED.logits, STAGED.target)


def drop_a_row(args: Any, result: Any) -> Any:
    S, n, lse, ce = result
    row = torch.zeros_like(S)
    row[args[1][0]] = args[0][0].double().softmax(-1)
    return S - row, n, lse, ce


def shift_a_column(args: Any, result: Any) -> Any:
    """The rows of S still sum to n."""
    S, n, lse, ce = result
    S = S.clone()
    S[0, 1] += 1e-3 * n[0]
    S[0, 2] -= 1e-3 * n[0]
    return S, n, lse, ce


def scale_a_row(args: Any, result: Tensor) -> Tensor:
    result = result.clone()
    result[len(result) // 2] *= 1.01
    return result


def refuse(words: str) -> Any:
    def change(args: Any, result: Any) -> Any:
        raise RuntimeError(words)

    return change


FAULTS = [
    pytest.param("joint", drop_a_row, STAGED, "S 1 against", id="a-row-is-missing"),
    pytest.param("joint", shift_a_column, STAGED, "the columns of S", id="columns"),
    pytest.param("joint", lambda a, r: (r[0], r[1] + 1, *r[2:]), STAGED, "the class weights", id="class-weights"),
    pytest.param("logdet_inverse", lambda a, r: (*r[:3], r[3] * 1.0001), STAGED, "the residual", id="inverse"),
    pytest.param("logdet_inverse", lambda a, r: (r[0] + 1e-6, *r[1:]), STAGED, "log.det S", id="determinant"),
    pytest.param("logdet_inverse", lambda a, r: (r[0], -r[1], *r[2:]), STAGED, "the sign", id="sign"),
    pytest.param("logits_grad", scale_a_row, STAGED, "rows of the gradient", id="a-row-of-the-gradient"),
    pytest.param("loss_forward", lambda a, r: (r[0] + 1e-2, *r[1:]), STAGED, "the loss", id="loss"),
    pytest.param("loss_forward", lambda a, r: (*r[:2], r[2].mT, *r[3:]), STAGED, "V", id="inverse-of-the-loss"),
    pytest.param("fused", lambda a, r: (r[0], scale_a_row(a, r[1])), SMALL, "rows of the gradient", id="fused-gradient"),
    pytest.param("fused", lambda a, r: (r[0] * 1.01, r[1]), SMALL, "the loss", id="fused-loss"),
    pytest.param("fused", lambda a, r: (r[0] * math.nan, r[1]), SMALL, "the loss", id="fused-nan"),
    pytest.param("fused", refuse("CUDA error: too many blocks in cooperative launch"), SMALL, "too many blocks", id="cooperative"),
    pytest.param("logdet_inverse", refuse("cluster launch failed: misconfigured"), STAGED, "cluster launch", id="cluster"),
    pytest.param("joint", refuse("no kernel image is available"), STAGED, "no kernel image", id="no-kernel-image"),
]


@pytest.mark.parametrize(("op", "fault", "batch", "words"), FAULTS)
def test_a_fault_is_found_reported_once_and_remembered(engine: Engine, op: str, fault: Any, batch: Problem, words: str) -> None:
    engine.break_op(op, fault)
    if op in ("joint", "logdet_inverse"):  # reached when the op before is refused, or through stages
        engine.break_op("loss_forward", refuse("cooperative launch"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_right(batch)
        reports = [str(warning.message) for warning in caught if "does not use a kernel" in str(warning.message)]
        assert len([text for text in reports if re.search(words, text)]) == 1, reports
        assert all("report" in text and "python -m ldmi_fast" in text and "LDMI_FAST_VERIFY=0" in text for text in reports)
        before = dict(engine.calls)
        assert_right(batch)
        assert len([w for w in caught if "does not use a kernel" in str(w.message)]) == len(reports)
    assert engine.calls[op] == before[op]  # not even tried again
    assert words.replace(".", "") in " ".join(path.refused for path in guard.refusals("cpu", torch.device("cpu"))).replace("|", "")


def test_the_other_paths_go_on(engine: Engine) -> None:
    """A failure at one shape does not affect the kernels of another."""
    engine.break_op("fused", refuse("cluster launch"))
    with pytest.warns(UserWarning, match="does not use a kernel"):
        assert_right(SMALL)
    assert engine.calls["loss_forward"] > 0
    assert engine.calls["logits_grad"] > 0


def test_a_launch_may_be_refused_later(engine: Engine) -> None:
    assert_right(SMALL)
    engine.break_op("fused", refuse("CUDA error: too many blocks in cooperative launch"))
    guard.guarded("cpu", engine)._raw["fused"] = engine.fused
    with pytest.warns(UserWarning, match="too many blocks"):
        assert_right(SMALL)


def test_the_forms_that_go_in_stages(engine: Engine) -> None:
    """A moving average, two passes, and the loss with a linear layer are guarded as well."""
    engine.break_op("joint", drop_a_row)
    batch = STAGED
    want, want_grad = expected(batch)
    criterion = DMILoss(6, momentum=0.9, engine="cpu")
    logits = batch.leaf()
    with pytest.warns(UserWarning, match="S 1 against"):
        loss = criterion(logits, batch.target)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], want_grad, rtol=1e-4, atol=1e-8)
    state = JointState(6, engine="cpu")
    state.update(batch.logits, batch.target)
    torch.testing.assert_close(state.solve().loss.float(), want)
    torch.testing.assert_close(linear_dmi_loss(batch.logits, torch.eye(6), batch.target, engine="cpu"), want)


def test_what_is_right_is_checked_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[str] = []
    for name in ("joint", "logdet_inverse", "logits_grad", "loss_forward", "fused"):
        right = getattr(verify, name)

        def check(*args: Any, name: str = name, right: Any = right) -> Any:
            checks.append(name)
            return right(*args)

        monkeypatch.setattr(verify, name, check)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert_right(STAGED)
            assert_right(problem(60_001, 6))  # another shape of the same kernels
    assert checks.count("loss_forward") == 1
    assert checks.count("joint") <= 1


def test_an_engine_for_gpus_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is chosen by default, without a query of the device at every step. The tensor here claims to be on a GPU."""
    logits: Any = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda:0"))
    monkeypatch.setattr(native, "runs_on", lambda device: True)
    monkeypatch.setattr(choose, "choose_name", lambda *args: pytest.fail("asked"))
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)
    monkeypatch.delenv(guard.VARIABLE, raising=False)
    found = choose.choose(logits, Options())
    assert isinstance(found, guard.Guarded)
    assert found.engine is native
    monkeypatch.setenv(guard.VARIABLE, "0")
    assert choose.choose(logits, Options()) is native


def test_it_can_be_turned_off(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.break_op("fused", lambda args, result: (result[0] + 1, result[1]))
    monkeypatch.setenv(guard.VARIABLE, "0")
    assert loss_and_gradient(SMALL)[0].item() == pytest.approx(expected(SMALL)[0].item() + 1)
    monkeypatch.setenv(guard.VARIABLE, "yes")
    with pytest.raises(ValueError, match="LDMI_FAST_VERIFY must be 0 or 1, got 'yes'"):
        loss_and_gradient(SMALL)


def test_errors_of_the_caller_stay_errors(engine: Engine) -> None:
    for words in ("CUDA out of memory. Tried to allocate", "ldmi_fast: logits must be a matrix"):
        broken = Engine()
        broken.break_op("fused", refuse(words))
        with pytest.raises(RuntimeError, match=words[:10]):
            guard.Guarded("cpu", broken).fused(SMALL.logits, SMALL.target, None, -100, "present", 0.0, True, 0.0, "logits")
    assert not guard.refused


def test_a_device_that_is_lost_is_named(engine: Engine) -> None:
    engine.break_op("fused", refuse("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match=r"illegal memory access.*nothing can run on this device in this process any more"):
        loss_and_gradient(SMALL)


def test_nothing_is_checked_while_a_graph_is_traced(engine: Engine) -> None:
    engine.break_op("fused", lambda args, result: (result[0] + 1, result[1]))
    engine.break_op("loss_forward", lambda args, result: (result[0] + 1, *result[1:]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, y: dmi_loss(z, y, engine="cpu"), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(SMALL.logits, SMALL.target)
    assert not guard.refused
    torch.func.grad(lambda z: dmi_loss(z, SMALL.target, engine="cpu"))(SMALL.logits)
    assert not guard.refused


def test_explain_reports_what_is_not_used(engine: Engine) -> None:
    engine.break_op("fused", refuse("cluster launch"))
    with pytest.warns(UserWarning, match="does not use a kernel"):
        assert_right(SMALL)
    assert "not used after a check: fused" in explain(SMALL.logits, SMALL.target, engine="cpu").reason


def hard(seed: int) -> tuple[Any, ...]:
    """Hard arguments of loss_forward: dtypes, scales, weights, ignored rows, NaN, singular, empty."""
    draw = random.Random(seed)
    C = draw.choice([1, 2, 3, 5, 10, 17, 33, 64])
    N = draw.choice([0, 1, 2, C, 3 * C, 10 * C])
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    soft, probs = draw.random() < 0.3, draw.random() < 0.25
    absent = tuple(range(C - 1)) if draw.random() < 0.05 else (0,) if C > 2 and draw.random() < 0.2 else ()
    signal = draw.choice([None, 0.0, 1.0, 10.0])
    batch = problem(N, C, seed=seed, soft=soft, weighted=draw.random() < 0.4, absent=absent, dtype=dtype, signal=signal)
    x, y, w = batch.logits * draw.choice([1, 1, 1, 5, 100]) + draw.choice([0, 0, 0, 50, -1000]), batch.target, batch.sample_weight
    if draw.random() < 0.2 and N:
        x[draw.randrange(N)] = draw.choice([math.nan, math.inf, -math.inf])
    if draw.random() < 0.2 and N:
        x[draw.randrange(N), draw.randrange(C)] = -math.inf
    if not soft and draw.random() < 0.3 and N:
        y = y.clone()
        y[::3] = -100
    if w is not None:
        w = w * draw.choice([1, 1, 1e-20, 1e20])
    if draw.random() < 0.1:
        x = torch.zeros_like(x)
    if probs:
        x = x.float().softmax(-1).to(dtype)
    eps, normalize, ce = draw.choice([0.0, 0.0, 1e-3]), draw.random() < 0.7, draw.choice([0.0, 0.0, 0.5])
    absent_option = draw.choice(["present", "present", "strict"])
    return x, y, w, -100, absent_option, eps, normalize, ce, "probs" if probs else "logits", True


INTERPRETED = os.environ.get(INTERPRET_VARIABLE) == "1"


@pytest.mark.parametrize("name", ["triton"] if INTERPRETED else ["cpu", "composite"])
def test_a_right_engine_is_never_refused(name: str) -> None:
    """Deviations stay below a third of the limit, and many inputs show a deviation."""
    module = {"cpu": native, "composite": composite, "triton": triton}[name]
    reported = dict.fromkeys(guard.OPS, 0)
    seeds = 30 if INTERPRETED else 300

    def note(op: str, found: verify.Finding | None, seed: int) -> None:
        if found is not None:
            reported[op] += 1
            assert found.error < 1 / 3, (op, found, seed)

    for seed in range(seeds):
        args = hard(seed)
        x, y, w, ignored, absent, *_, input, _ = args
        C, scale = x.shape[1], 1.0 if seed % 3 else 65536.0
        joint = (x, y, w, C, ignored, input)
        sums = module.joint(*joint)
        note("joint", verify.joint(joint, sums), seed)
        factored = (sums[0], sums[1], absent)
        note("logdet_inverse", verify.logdet_inverse(factored, module.logdet_inverse(*factored)), seed)
        forward = module.loss_forward(*args)
        note("loss_forward", verify.loss_forward(args, forward, module.joint, module.logdet_inverse), seed)
        backward = (x, y, w, forward[1], forward[2], forward[3] * scale, forward[4], ignored, input)
        note("logits_grad", verify.logits_grad(backward, module.logits_grad(*backward)), seed)
        if module is not composite and module.is_fused(x, y):
            note("fused", verify.fused(args[:9], module.fused(*args[:9]), module.joint, module.logdet_inverse), seed)
    assert all(reported[op] > seeds // 5 for op in ("joint", "logdet_inverse", "loss_forward", "logits_grad")), reported


@pytest.mark.parametrize("place", [place for place in PLACES if place[0] != "composite"], ids="-".join)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("rows", "classes"), [(40, 5), (100, 40)] if INTERPRETED else [(40, 5), (5000, 20), (300, 40), (600, 70)])
def test_what_runs_here_is_believed(
    place: tuple[str, str], rows: int, classes: int, soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every engine that can run, on every device: its first results are checked, found right, and stay as they were."""
    name, device = place
    guard.forget()
    monkeypatch.setattr(guard, "GUARDED", frozenset({name}))
    batch = problem(rows, classes, soft=soft, weighted=True).to(device=device)
    if soft:  # nearer to labels, so that the matrix is far enough from singular for the checks to be conclusive
        one_hot = torch.nn.functional.one_hot(batch.target.argmax(-1), classes)
        batch = batch.with_target((0.1 * batch.target + 0.9 * one_hot).to(batch.target.dtype))

    def run() -> tuple[Tensor, Tensor]:
        logits = batch.leaf()
        loss = dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine=name)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    monkeypatch.setenv(guard.VARIABLE, "0")
    plain = run()
    monkeypatch.delenv(guard.VARIABLE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ldmi_fast does not use")
        first, later = run(), run()
    for results in (first, later):
        torch.testing.assert_close(results, plain, rtol=0, atol=0)
    paths = list(guard.guarded(name, choose.engine_module(name)).paths.values())
    assert paths
    assert all(path.right and not path.refused for path in paths), paths
    guard.forget()


def test_the_program_checks_every_path(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    from ldmi_fast import __main__ as program

    assert program._check_paths("cpu", torch.device("cpu"))
    printed = capsys.readouterr().out
    for op in guard.OPS:
        assert re.search(rf"^  {op} \(.*\): ok in \d+ forms?, at most", printed, re.MULTILINE), op
    engine.break_op("logdet_inverse", lambda args, result: (*result[:3], result[3] * 1.001))
    engine.break_op("fused", refuse("cluster launch failed\nmore"))
    assert not program._check_paths("cpu", torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "WRONG: the residual of S V^T = I is off by" in printed
    assert re.search(r"^  fused .*: REFUSED: cluster launch failed$", printed, re.MULTILINE)
