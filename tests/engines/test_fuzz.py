"""Generated batches through the public function: the compiled engine against the composite one, values, gradients and errors."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from ldmi_fast import dmi_loss, joint_matrix, ops
from ldmi_fast.checks import flatten
from ldmi_fast.engines import composite
from ldmi_fast.sums import total_weight
from tests.support.compare import DERIVATIVE, EPSILON, loss_dtype
from tests.support.problems import gradient_of

pytestmark = pytest.mark.skipif(ops.compiled is None, reason=ops.why_not_compiled)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
LAYOUTS = ["contiguous", "channels last", "padded", "strided", "expanded"]

#: The same batches in every run, so that a suite that passed passes again; LDMI_FUZZ=5000 draws that many new ones.
EXAMPLES = int(os.environ.get("LDMI_FUZZ", "0"))
FUZZ = hypothesis.settings(
    max_examples=EXAMPLES or 200,
    derandomize=EXAMPLES == 0,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Batch:
    """The arguments of dmi_loss."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    options: dict[str, Any]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of ``tensor`` (of its first sample only, when expanded) with other strides."""
    if tensor.dim() == 0 or layout == "contiguous":
        return tensor
    if layout == "channels last":  # with two dimensions: the transpose
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "padded":
        return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    if layout == "strided":
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    return tensor[:1].expand(tensor.shape)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    pick = lambda values: draw(st.sampled_from(values))  # noqa: E731
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    classes = draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33, 64, 65, 70])))
    extra = pick([(), (), (), (1,), (3,), (2, 2)])
    n = draw(st.one_of(st.integers(0, 8), st.integers(9, 60), st.just(200)))
    shape, sample_shape = (n, classes, *extra), (n, *extra)
    dtype = pick(FLOATS)
    probs = draw(st.booleans()) and draw(st.booleans())
    scale = pick([0.0, 0.3, 1.0, 5.0, 30.0])
    shift = pick([0.0, 0.0, 0.0, 500.0, -500.0])
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64) + shift

    labels = torch.randint(0, draw(st.integers(1, classes)), sample_shape, generator=generator)
    signal = pick([0.0, 2.0, 2.0, 6.0])
    if n:
        logits.scatter_add_(1, labels.unsqueeze(1), torch.full((n, 1, *extra), signal, dtype=torch.float64))
    wild = pick([None, None, None, None, "-inf", "nan", "inf", "row"])
    if wild is not None and logits.numel():
        at = int(torch.randint(0, n, (), generator=generator))
        if wild == "row":
            logits[at] = -math.inf
        else:
            logits[at, int(torch.randint(0, classes, (), generator=generator))] = float(wild)
    if probs:
        logits = logits.softmax(1)
    logits = laid_out(logits.to(dtype), pick(LAYOUTS))

    ignore_index = pick([-100, -100, 0, 1, 200])
    if draw(st.booleans()):
        label_dtype = pick(INTEGERS)
        info = torch.iinfo(label_dtype)
        values = labels.flatten().tolist()
        for i in range(len(values)):
            chance = float(torch.rand((), generator=generator))
            if chance < 0.15 and info.min <= ignore_index <= info.max:
                values[i] = ignore_index
        if values and draw(st.integers(0, 9)) == 0:
            values[-1] = pick([classes, -1, info.max, info.min])
            values[-1] = min(max(values[-1], info.min), info.max)
        target = torch.tensor(values, dtype=label_dtype).reshape(sample_shape)
    else:
        ignore_index = -100
        target = torch.rand(shape, generator=generator) ** 3
        target.scatter_add_(1, labels.unsqueeze(1), torch.ones(n, 1, *extra))
        target = (target / target.sum(1, keepdim=True)).to(pick(FLOATS))
    target = laid_out(target, pick(LAYOUTS))

    weight = None
    if draw(st.booleans()):
        weight = torch.rand(sample_shape, generator=generator) + 0.1
        weight[torch.rand(sample_shape, generator=generator) < pick([0.0, 0.3, 1.0])] = 0
        if weight.numel() and draw(st.integers(0, 9)) == 0:
            weight.view(-1)[0] = pick([-1.0, math.nan, math.inf])
        weight = laid_out(weight.to(pick(FLOATS)), pick(LAYOUTS))
    options = {
        "ignore_index": ignore_index,
        "absent": pick(["present", "present", "strict"]),
        "eps": pick([0.0, 0.0, 1e-3, 1e-12]),
        "normalize": draw(st.booleans()),
        "cross_entropy_weight": pick([0.0, 0.0, 0.7]),
        "input": "probs" if probs else "logits",
    }
    return Batch(logits, target, weight, options)


def evaluate(batch: Batch, engine: str) -> tuple[Tensor, Tensor, Tensor | None] | Exception:
    """The loss and its gradients, or the exception that was raised."""
    logits = batch.logits.detach().requires_grad_()
    target = batch.target.detach().requires_grad_() if batch.target.is_floating_point() else batch.target
    try:
        loss = dmi_loss(logits, target, sample_weight=batch.weight, engine=engine, **batch.options)
    except Exception as error:
        return error
    loss.backward()
    return loss.detach(), gradient_of(logits), target.grad


@dataclass(frozen=True)
class Budget:
    """The largest difference of two right answers."""

    loss: float
    grad: float
    target_grad: float


def budget(batch: Batch) -> Budget | None:
    """From the joint in fp64: the rounding of the softmax times the factor by which the inverse magnifies it.

    Returns:
        None if the joint is too near to singular to compare.
    """
    options = batch.options
    x, y, w = flatten(batch.logits, batch.target, batch.weight)
    classes = x.shape[1]
    unit = EPSILON[loss_dtype(x.dtype)]
    S, n, _, _ = composite.joint(x.double(), y, w, classes, options["ignore_index"], options["input"])
    present = n > 0
    if not present.any() or (options["absent"] == "strict" and not present.all()):
        magnified, largest, lightest = 0.0, 0.0, 1.0
    else:
        R = (S / n.unsqueeze(-1))[present][:, present]
        singular_values = torch.linalg.svdvals(R)
        if singular_values[-1] == 0:
            return None
        condition = float(singular_values[0] / singular_values[-1])
        finite = x.double()[torch.isfinite(x)]
        spread = float(finite.max() - finite.min()) if finite.numel() and options["input"] == "logits" else 1.0
        magnified = condition * unit * (min(spread, 100.0) + classes + 8)
        if magnified > 1e-2:
            return None
        lightest = float(n[present].min())
        largest = 1 / (float(singular_values[-1]) * lightest)
    # an ignored row may weigh anything
    heaviest = 1.0 if w is None or not len(w) else float(w.double().nan_to_num(0, 0, 0).max())
    total = max(float(total_weight(y, w, n)), lightest)
    ce = options["cross_entropy_weight"] * heaviest / total
    if options["input"] == "probs":  # d(-log p)/dp = -1/p
        ce /= float(x.double()[x > 0].min()) if (x > 0).any() else 1.0
    return Budget(
        loss=10 * classes * magnified + 1e3 * unit,
        grad=(10 * magnified + 100 * unit) * heaviest * largest + 100 * unit * ce,
        target_grad=(10 * magnified + 100 * unit) * heaviest * largest + 1e3 * unit * ce,
    )


def assert_close(name: str, got: Tensor, want: Tensor, allowed: float) -> None:
    assert got.dtype == want.dtype
    info = torch.finfo(got.dtype)
    got, want = got.double(), want.double()
    # each engine rounds to the dtype that is stored, and either may be just past the largest number
    slack = 2 * info.eps * want.abs() + 2 * info.smallest_normal * info.eps
    at_the_end = (got.abs() >= info.max * (1 - 2 * info.eps)) & (want.abs() >= info.max * (1 - 2 * info.eps))
    same = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= slack + allowed)
    wrong = ~(same | (at_the_end & (got.sign() == want.sign())))
    assert not wrong.any(), f"{name}: {got[wrong]}, composite {want[wrong]}, allowed {allowed:.2e}"


@FUZZ
@hypothesis.given(batches())
def test_engines_agree(batch: Batch) -> None:
    ours, theirs = evaluate(batch, "cpu"), evaluate(batch, "composite")
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert type(ours) is type(theirs), f"{ours!r}, composite {theirs!r}"
        assert str(ours) == str(theirs)
        assert isinstance(ours, (IndexError, ValueError)), repr(ours)
        hypothesis.event(f"both raise {type(ours).__name__}")
        return
    loss, grad, target_grad = ours
    want, want_grad, want_target_grad = theirs
    if want.isnan() or loss.isnan():
        assert want.isnan()
        assert loss.isnan()
        hypothesis.event("NaN")
        return
    allowed = budget(batch)
    hypothesis.event("too near to singular" if allowed is None else "compared" if want.isfinite() else "infinite")
    if allowed is None:
        assert not grad.isnan().any(), "a gradient that is not zero may be anything, but not NaN"
        return
    assert_close("loss", loss, want, allowed.loss * max(1.0, abs(float(want))) if want.isfinite() else 0.0)
    assert_close("gradient", grad, want_grad, allowed.grad)
    if target_grad is not None and want_target_grad is not None:
        assert_close("gradient of the targets", target_grad, want_target_grad, allowed.target_grad)


@hypothesis.settings(FUZZ, max_examples=100)
@hypothesis.given(batches())
def test_joint_matrices_agree(batch: Batch) -> None:
    options = {name: batch.options[name] for name in ("ignore_index", "normalize", "input")}
    found: list[Tensor | Exception] = []
    for engine in ("cpu", "composite"):
        try:
            found.append(joint_matrix(batch.logits, batch.target, sample_weight=batch.weight, engine=engine, **options))
        except Exception as error:
            found.append(error)
    ours, theirs = found
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert type(ours) is type(theirs), f"{ours!r}, composite {theirs!r}"
        assert str(ours) == str(theirs)
        return
    single = batch.logits.dtype != torch.float64
    assert_close("joint", ours, theirs, (1e-4 if single else DERIVATIVE) * float(theirs.nan_to_num(0, 0, 0).abs().max()))
