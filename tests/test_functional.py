"""dmi_loss: values and gradients against the oracle, over shapes, dtypes, options, memory layouts and edge cases."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from ldmi_fast import dmi_loss
from tests.support import oracle
from tests.support.compare import Result, assert_matches, run
from tests.support.problems import Problem, gradient_of, problem

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
INF, NAN = math.inf, math.nan

SHAPES = [
    pytest.param(0, 14, id="empty-batch"),
    pytest.param(1, 1, id="one-sample-one-class"),
    pytest.param(255, 1, id="one-class"),
    pytest.param(1, 2, id="one-sample-of-two-classes"),
    pytest.param(128, 2, id="binary"),
    pytest.param(257, 3, id="three-classes"),
    pytest.param(257, 7, id="just-under-8-lanes"),
    pytest.param(255, 8, id="8-lanes-exactly"),
    pytest.param(256, 9, id="just-over-8-lanes"),
    pytest.param(9, 10, id="one-sample-short-of-C"),
    pytest.param(10, 10, id="one-sample-per-class"),
    pytest.param(256, 10, id="cifar10-batch"),
    pytest.param(256, 14, id="clothing1m-batch"),
    pytest.param(32, 14, id="clothing1m-batch-over-8-devices"),
    pytest.param(65536, 14, id="many-rows-few-classes"),
    pytest.param(257, 16, id="16-lanes-exactly"),
    pytest.param(255, 17, id="just-over-16-lanes"),
    pytest.param(300, 31, id="just-under-a-warp-of-classes"),
    pytest.param(300, 32, id="a-warp-of-classes"),
    pytest.param(301, 33, id="just-over-a-warp-of-classes"),
    pytest.param(400, 63, id="just-under-64-classes"),
    pytest.param(400, 64, id="64-classes"),
    pytest.param(401, 65, id="just-over-64-classes"),
    pytest.param(1024, 100, id="cifar100-batch"),
    pytest.param(64, 100, id="fewer-samples-than-classes"),
    pytest.param(777, 128, id="power-of-two-classes"),
    pytest.param(777, 129, id="just-over-a-power-of-two"),
    pytest.param(2000, 257, id="hundreds-of-classes"),
    pytest.param(2500, 1000, id="imagenet-classes"),
]


@cache
def shaped(n: int, classes: int, dtype: torch.dtype) -> tuple[Problem, oracle.Answer]:
    batch = problem(n, classes, dtype=dtype)
    return batch, batch.answer()


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_value_and_gradient_at_every_shape(engine: str, device: torch.device, n: int, classes: int) -> None:
    batch, answer = shaped(n, classes, torch.float32)
    assert_matches(run(batch.to(device=device), engine), answer, torch.float32)


OPTIONS: list[Any] = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"weighted": True}, {}, id="weighted"),
    pytest.param({"soft": True}, {}, id="soft"),
    pytest.param({"soft": True, "weighted": True}, {}, id="soft-weighted"),
    pytest.param({}, {"normalize": False}, id="counts"),
    pytest.param({"weighted": True}, {"normalize": False, "eps": 1e-3}, id="published-on-weighted-counts"),
    pytest.param({}, {"eps": 1e-3}, id="eps-far-above-the-determinant"),
    pytest.param({}, {"normalize": False, "eps": 1e-3}, id="eps-far-below-the-determinant"),
    pytest.param({}, {"eps": 1e-19}, id="eps-near-the-determinant"),
    pytest.param({}, {"cross_entropy_weight": 0.5}, id="ce"),
    pytest.param({"weighted": True}, {"cross_entropy_weight": 3.0, "normalize": False}, id="weighted-counts-ce"),
    pytest.param({"soft": True, "weighted": True}, {"cross_entropy_weight": 0.5, "eps": 1e-3}, id="soft-weighted-ce-eps"),
    pytest.param({"absent": (0, 5, 13)}, {}, id="absent-classes"),
    pytest.param({"absent": (2,), "soft": True}, {"cross_entropy_weight": 1.0}, id="absent-class-soft-ce"),
    pytest.param({"absent": (2,), "soft": True}, {"absent": "strict"}, id="absent-class-soft-strict"),
    pytest.param({"absent": (0,)}, {"absent": "strict", "cross_entropy_weight": 1.0}, id="absent-class-strict-ce"),
    pytest.param({}, {"absent": "strict"}, id="strict-with-all-present"),
    pytest.param({}, {"ignore_index": 3}, id="ignore-a-class"),
    pytest.param({"weighted": True}, {"ignore_index": 0, "cross_entropy_weight": 0.5}, id="ignore-a-class-weighted-ce"),
    pytest.param({}, {"ignore_index": 10**12}, id="ignore-index-that-never-occurs"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("input", ["logits", "probs"])
@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_every_option(
    engine: str, device: torch.device, build: dict[str, Any], options: dict[str, Any], input: str, dtype: torch.dtype
) -> None:
    batch = problem(203, 14, dtype=dtype, **build)
    if input == "probs":
        # Not quite normalised, as a product of experts might be: the loss takes them as they are.
        batch = Problem(0.9 * batch.logits.softmax(1), batch.target, batch.sample_weight)
    answer = batch.answer(input=input, **options)
    assert_matches(run(batch.to(device=device), engine, input=input, **options), answer, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("build", [{}, {"soft": True, "weighted": True}], ids=["hard", "soft-weighted"])
def test_every_float_dtype(engine: str, device: torch.device, dtype: torch.dtype, build: dict[str, Any]) -> None:
    batch = problem(150, 10, dtype=dtype, **build)
    for options in ({"cross_entropy_weight": 0.5}, {"eps": 1e-3, "normalize": False}):
        assert_matches(run(batch.to(device=device), engine, **options), batch.answer(**options), dtype)


@pytest.mark.parametrize("logits_dtype", FLOATS)
@pytest.mark.parametrize("target_dtype", FLOATS)
def test_soft_targets_and_weights_of_another_dtype(
    engine: str, device: torch.device, logits_dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    plain = problem(90, 5, soft=True, weighted=True, dtype=logits_dtype)
    assert plain.sample_weight is not None
    batch = Problem(plain.logits, plain.target.to(target_dtype), plain.sample_weight.to(target_dtype))
    result = run(batch.to(device=device).with_target(batch.target.to(device)), engine)
    assert result.target_grad is not None
    assert result.target_grad.dtype == target_dtype
    assert_matches(result, batch.answer(), logits_dtype)


@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED)
def test_every_integer_dtype(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    batch = problem(150, 10)
    ignored = -100 if dtype in SIGNED else 7
    labels = batch.target.clone()
    labels[::9] = ignored
    batch = batch.with_target(labels)
    answer = batch.answer(ignore_index=ignored)
    result = run(batch.with_target(labels.to(dtype)).to(device=device), engine, ignore_index=ignored)
    assert_matches(result, answer, torch.float32)


@pytest.mark.parametrize(("dtype", "label"), [(torch.uint8, 156), (torch.int16, 156), (torch.uint16, 156), (torch.uint64, 156)])
def test_minus_100_is_not_label_156(engine: str, device: torch.device, dtype: torch.dtype, label: int) -> None:
    """-100 wraps to 156 in 8 bits: comparing in the dtype of the target would drop a class."""
    batch = problem(480, 160)
    assert (batch.target == label).any()
    result = run(batch.with_target(batch.target.to(dtype)).to(device=device), engine)
    assert_matches(result, batch.answer(), torch.float32)


def _strided(kind: str, tensor: Tensor) -> Tensor:
    """The same values in another memory layout, with NaN or a label out of range in the gaps."""
    filler = NAN if tensor.is_floating_point() else 10**6
    if kind == "transposed":
        return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.repeat_interleave(1)
    if kind == "every-other":
        wide = tensor.new_full(tuple(2 * size + 1 for size in tensor.shape), filler)
        view = wide[(slice(1, None, 2),) * tensor.dim()]
    elif kind == "slice":
        wide = tensor.new_full(tuple(size + 5 for size in tensor.shape), filler)
        view = wide[tuple(slice(3, 3 + size) for size in tensor.shape)]
    else:
        raise ValueError(kind)
    return view.copy_(tensor)


@pytest.mark.parametrize("kind", ["transposed", "every-other", "slice"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_memory_layouts(engine: str, device: torch.device, kind: str, soft: bool) -> None:
    batch = problem(67, 9, soft=soft, weighted=True)
    assert batch.sample_weight is not None
    answer = batch.answer(cross_entropy_weight=0.5)
    here = batch.to(device=device)
    assert here.sample_weight is not None
    logits = _strided(kind, here.logits).detach().requires_grad_()
    target = _strided(kind, here.target)
    weight = _strided(kind, here.sample_weight)
    assert not logits.is_contiguous()
    loss = dmi_loss(logits, target, sample_weight=weight, cross_entropy_weight=0.5, engine=engine)
    (grad,) = torch.autograd.grad(loss, logits)
    assert_matches(Result(loss, grad, None), answer, torch.float32)


def test_expanded_rows_and_weights(engine: str, device: torch.device) -> None:
    """Stride 0: the same rows four times, one weight for all."""
    small = problem(40, 6).to(device=device)
    logits = small.leaf()
    weight = torch.full((), 0.5, device=device).expand(40, 4)
    loss = dmi_loss(
        logits.unsqueeze(-1).expand(40, 6, 4),
        small.target.unsqueeze(-1).expand(40, 4),
        sample_weight=weight,
        engine=engine,
    )
    loss.backward()
    assert_matches(Result(loss.detach(), gradient_of(logits), None), small.answer(), torch.float32)


def test_negated_views(engine: str, device: torch.device) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the opposite sign."""
    batch = problem(67, 9).to(device=device)
    logits = torch.complex(torch.zeros_like(batch.logits), -batch.logits).conj().imag
    assert logits.is_neg()
    assert torch.equal(logits, batch.logits)
    logits = logits.detach().requires_grad_()
    loss = dmi_loss(logits, batch.target, engine=engine)
    (grad,) = torch.autograd.grad(loss, logits)
    assert_matches(Result(loss.detach(), grad, None), batch.answer(), torch.float32)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_extra_dimensions(engine: str, device: torch.device, soft: bool, layout: torch.memory_format) -> None:
    """Segmentation: logits (N, C, H, W), one label or one distribution per pixel."""
    flat = problem(2 * 5 * 7, 6, soft=soft, weighted=True)
    assert flat.sample_weight is not None
    logits = flat.logits.view(2, 5, 7, 6).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    target = flat.target.view(2, 5, 7, 6).permute(0, 3, 1, 2) if soft else flat.target.view(2, 5, 7)
    batch = Problem(logits, target, flat.sample_weight.view(2, 5, 7))
    answer = batch.answer(cross_entropy_weight=0.5)
    assert answer.loss == flat.answer(cross_entropy_weight=0.5).loss
    assert_matches(run(batch.to(device=device), engine, cross_entropy_weight=0.5), answer, torch.float32)


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 4, 0), (0, 4, 0, 2)])
def test_extra_dimensions_of_size_zero(engine: str, device: torch.device, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, device=device, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    loss = dmi_loss(logits, target, eps=1e-3, cross_entropy_weight=1.0, engine=engine)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.shape == shape


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("n", [64, 2000], ids=["small", "large"])
def test_no_argument_is_written_to(engine: str, device: torch.device, soft: bool, n: int) -> None:
    batch = problem(n, 12, soft=soft, weighted=True).to(device=device)
    logits = batch.leaf()
    tensors = [logits, batch.target, batch.sample_weight]
    before = [t.detach().clone() for t in tensors if t is not None]
    versions = [t._version for t in tensors if t is not None]
    dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, cross_entropy_weight=1.0, engine=engine).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, [t for t in tensors if t is not None], strict=True))
    assert versions == [t._version for t in tensors if t is not None]


def labels14(n: int = 203) -> Problem:
    return problem(n, 14, weighted=True)


def _all_equal() -> Problem:
    return Problem(torch.full((203, 14), 0.7), labels14().target)


def _same_row_everywhere(weighted: bool) -> Problem:
    """A collapsed model: every sample gets the same prediction, whose entries are not round numbers."""
    batch = labels14()
    logits = batch.logits[:1].expand(203, 14).contiguous()
    return Problem(logits, batch.target, batch.sample_weight if weighted else None)


def _twins() -> Problem:
    """Classes 3 and 8 get the same predictions, in another order."""
    labels = torch.arange(210) % 14
    logits = problem(210, 14).logits
    logits[labels == 8] = logits[labels == 3].flip(0)
    return Problem(logits, labels)


def _ignored_garbage() -> Problem:
    """Rows that do not count, by label or by weight, hold NaN and infinities."""
    batch = labels14()
    assert batch.sample_weight is not None
    logits, target = batch.logits.clone(), batch.target.clone()
    target[::5] = -100
    idle = (target == -100) | (batch.sample_weight == 0)
    logits[idle] = torch.tensor([NAN, INF, -INF] * 5)[:14]
    return Problem(logits, target, batch.sample_weight)


def _with_row(*values: float) -> Problem:
    batch = labels14()
    logits = batch.logits.clone()
    logits[1] = torch.tensor((values * 14)[:14])
    return Problem(logits, batch.target, batch.sample_weight)


def _nan_target() -> Problem:
    batch = problem(203, 14, soft=True, weighted=True)
    target = batch.target.clone()
    target[1, 3] = NAN
    target[7, 2] = NAN  # a row of weight 0: that one does not count
    return Problem(batch.logits, target, batch.sample_weight)


def _minus_infinity(where: str) -> Problem:
    batch = labels14()
    logits = batch.logits.clone()
    rows = torch.arange(1, 203, 3)
    if where == "elsewhere":
        logits[rows, (batch.target[rows] + 1) % 14] = -INF
    elif where == "label":
        logits[rows, batch.target[rows]] = -INF
    else:
        logits[:, 4] = -INF
    return Problem(logits, batch.target, batch.sample_weight)


def _huge() -> Problem:
    batch = labels14()
    logits = torch.where(torch.randn(203, 14, generator=torch.Generator().manual_seed(3)) > 0, 1e4, -1e4)
    logits[torch.arange(203), batch.target] = 1e4
    return Problem(logits, batch.target, batch.sample_weight)


def _one_hot_predictions() -> Problem:
    batch = labels14()
    logits = torch.full((203, 14), -1e4)
    predicted = torch.where(torch.arange(203) % 3 == 0, (batch.target + 1) % 14, batch.target)
    logits[torch.arange(203), predicted] = 1e4
    return Problem(logits, batch.target, batch.sample_weight)


def _soft_zero_where_p_is_zero() -> Problem:
    """A zero in the target meets a prediction of exactly zero: 0 * log 0 is 0."""
    batch = problem(203, 14, soft=True)
    logits, target = batch.logits.clone(), batch.target.clone()
    column = (target.argmax(1) + 3) % 14
    rows = torch.arange(203)
    logits[rows, column] = -INF
    target[rows, column] = 0
    return Problem(logits, target / target.sum(1, keepdim=True))


EDGES: dict[str, tuple[Problem, dict[str, Any], float | None]] = {
    # name: batch, options, loss where it is known in advance
    "empty": (Problem(torch.zeros(0, 14), torch.zeros(0, dtype=torch.int64)), {}, 0.0),
    "empty-eps": (Problem(torch.zeros(0, 14), torch.zeros(0, dtype=torch.int64)), {"eps": 1e-3}, 0.0),
    "empty-strict-ce": (
        Problem(torch.zeros(0, 14), torch.zeros(0, dtype=torch.int64)),
        {"absent": "strict", "cross_entropy_weight": 1.0},
        0.0,
    ),
    "empty-soft": (Problem(torch.zeros(0, 14), torch.zeros(0, 14)), {"eps": 1e-3}, 0.0),
    "all-ignored": (Problem(torch.full((9, 14), NAN), torch.full((9,), -100)), {"cross_entropy_weight": 1.0}, 0.0),
    "all-ignored-eps-strict": (
        Problem(torch.full((9, 14), INF), torch.full((9,), 3)),
        {"ignore_index": 3, "eps": 1e-3, "absent": "strict", "normalize": False},
        0.0,
    ),
    "all-weights-zero": (
        Problem(torch.full((9, 14), NAN), torch.arange(9), torch.zeros(9)),
        {"eps": 1e-3, "cross_entropy_weight": 1.0},
        0.0,
    ),
    "all-weights-zero-soft": (Problem(torch.full((9, 14), NAN), torch.full((9, 14), NAN), torch.zeros(9)), {}, 0.0),
    "all-equal": (_all_equal(), {}, INF),
    "all-equal-counts": (_all_equal(), {"normalize": False}, INF),
    "all-equal-eps": (_all_equal(), {"eps": 1e-3}, -math.log(1e-3)),
    "all-equal-ce": (_all_equal(), {"cross_entropy_weight": 0.5}, INF),
    "all-equal-eps-ce": (_all_equal(), {"eps": 1e-3, "cross_entropy_weight": 0.5}, None),
    "collapsed": (_same_row_everywhere(False), {}, INF),
    "collapsed-weighted": (_same_row_everywhere(True), {"eps": 1e-3}, -math.log(1e-3)),
    "collapsed-soft": (
        Problem(_same_row_everywhere(False).logits, problem(203, 14, soft=True).target),
        {"cross_entropy_weight": 0.5},
        INF,
    ),
    "collapsed-probs": (
        Problem(_same_row_everywhere(True).logits.softmax(1), labels14().target, labels14().sample_weight),
        {"input": "probs"},
        INF,
    ),
    "twins": (_twins(), {}, INF),
    "fewer-samples-than-classes": (problem(8, 14), {}, None),
    "fewer-samples-than-classes-strict": (problem(8, 14), {"absent": "strict"}, INF),
    "fewer-samples-than-classes-soft": (problem(8, 14, soft=True), {}, INF),
    "fewer-samples-than-classes-soft-weighted": (
        problem(13, 14, soft=True, weighted=True),
        {"eps": 1e-3, "cross_entropy_weight": 0.5},
        None,
    ),
    "strict-absent-eps": (problem(203, 14, absent=(6,)), {"absent": "strict", "eps": 1e-3}, -math.log(1e-3)),
    "strict-absent-ce": (problem(203, 14, absent=(6,)), {"absent": "strict", "cross_entropy_weight": 0.5}, INF),
    "one-class-present": (problem(50, 14, absent=tuple(range(13))), {}, None),
    "one-class-present-counts-ce": (
        problem(50, 14, absent=tuple(range(1, 14))),
        {"normalize": False, "cross_entropy_weight": 0.5},
        None,
    ),
    "one-class-present-strict-ce": (
        problem(50, 14, absent=tuple(range(1, 14))),
        {"absent": "strict", "cross_entropy_weight": 0.5},
        INF,
    ),
    "ignored-garbage": (_ignored_garbage(), {}, None),
    "ignored-garbage-ce-eps": (_ignored_garbage(), {"cross_entropy_weight": 0.5, "eps": 1e-3}, None),
    "nan-in-a-used-row": (_with_row(0.0, NAN, 1.0), {}, NAN),
    "nan-in-a-used-row-eps": (_with_row(0.0, NAN, 1.0), {"eps": 1e-3}, NAN),
    "nan-in-a-used-row-ce": (_with_row(0.0, NAN, 1.0), {"cross_entropy_weight": 0.5}, NAN),
    "nan-in-a-used-row-strict": (
        Problem(_with_row(NAN).logits, torch.arange(203) % 13),
        {"absent": "strict", "eps": 1e-3},
        NAN,
    ),
    "nan-in-a-used-row-soft": (
        Problem(_with_row(0.0, NAN, 1.0).logits, problem(203, 14, soft=True).target),
        {"cross_entropy_weight": 0.5},
        NAN,
    ),
    "nan-in-a-soft-target": (_nan_target(), {}, NAN),
    "nan-in-a-soft-target-eps-ce": (_nan_target(), {"eps": 1e-3, "cross_entropy_weight": 0.5}, NAN),
    "plus-infinity-in-a-used-row": (_with_row(0.0, INF, 1.0), {}, NAN),
    "plus-and-minus-infinity": (_with_row(INF, -INF), {"eps": 1e-3}, NAN),
    "no-finite-logit-in-a-used-row": (_with_row(-INF), {"cross_entropy_weight": 0.5}, NAN),
    "minus-infinity-elsewhere": (_minus_infinity("elsewhere"), {}, None),
    "minus-infinity-elsewhere-ce": (_minus_infinity("elsewhere"), {"cross_entropy_weight": 0.5}, None),
    "minus-infinity-at-the-label": (_minus_infinity("label"), {}, None),
    "minus-infinity-at-the-label-ce": (_minus_infinity("label"), {"cross_entropy_weight": 0.5}, INF),
    "minus-infinity-column": (_minus_infinity("column"), {}, INF),
    "minus-infinity-column-eps": (_minus_infinity("column"), {"eps": 1e-3}, -math.log(1e-3)),
    "soft-zero-where-p-is-zero": (_soft_zero_where_p_is_zero(), {"cross_entropy_weight": 0.5}, None),
    "plus-minus-1e4": (_huge(), {}, None),
    "plus-minus-1e4-ce": (_huge(), {"cross_entropy_weight": 0.5, "eps": 1e-3}, None),
    "one-hot-predictions": (_one_hot_predictions(), {}, None),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EDGES)
def test_edge_cases(engine: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    batch, options, expected = EDGES[name]
    batch = batch.to(dtype)
    answer = batch.answer(**options)
    if expected is not None:
        assert answer.loss == pytest.approx(expected, nan_ok=True), "the oracle itself"
    assert_matches(run(batch.to(device=device), engine, **options), answer, dtype)


def test_probabilities_that_are_nan_or_zero(engine: str, device: torch.device) -> None:
    probs = labels14().logits.softmax(1)
    labels = labels14().target
    poisoned = probs.clone()
    poisoned[3, 5] = NAN
    for options in ({}, {"eps": 1e-3}, {"cross_entropy_weight": 1.0}):
        batch = Problem(poisoned, labels)
        answer = batch.answer(input="probs", **options)
        assert math.isnan(answer.loss)
        assert_matches(run(batch.to(device=device), engine, input="probs", **options), answer, torch.float32)
    zero = probs.clone()
    zero[torch.arange(203), labels] = 0
    batch = Problem(zero, labels)
    assert_matches(run(batch.to(device=device), engine, input="probs"), batch.answer(input="probs"), torch.float32)
    with_ce = run(batch.to(device=device), engine, input="probs", cross_entropy_weight=1.0)
    assert with_ce.loss.item() == INF


@st.composite
def batches(draw: st.DrawFn) -> tuple[Problem, dict[str, Any]]:
    """Any combination of shape, dtype, options, layout and rows that do not count."""
    soft = draw(st.booleans())
    n, classes = draw(st.integers(0, 70)), draw(st.integers(2 if soft else 1, 40))  # soft targets of one class are refused
    dtype = draw(st.sampled_from(FLOATS))
    absent = draw(st.sets(st.integers(0, classes - 1), max_size=classes - 1))
    batch = problem(
        n,
        classes,
        seed=draw(st.integers(0, 99)),
        soft=soft,
        weighted=draw(st.booleans()),
        absent=tuple(absent),
        dtype=dtype,
    )
    options: dict[str, Any] = {
        "eps": draw(st.sampled_from([0.0, 1e-12, 1e-3])),
        "normalize": draw(st.booleans()),
        "absent": draw(st.sampled_from(["present", "strict"])),
        "cross_entropy_weight": draw(st.sampled_from([0.0, 0.5])),
    }
    logits, target = batch.logits.clone(), batch.target.clone()
    idle = torch.zeros(n, dtype=torch.bool)
    if not soft:
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, classes]))
        target[:: draw(st.integers(2, 9))] = options["ignore_index"]
        idle |= target == options["ignore_index"]
    if batch.sample_weight is not None:
        idle |= batch.sample_weight == 0
    if draw(st.booleans()):
        logits[idle] = NAN
    if draw(st.booleans()):
        logits = logits.t().contiguous().t()
    return Problem(logits, target, batch.sample_weight), options


@hypothesis.settings(
    max_examples=60,
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(drawn=batches())
def test_any_combination(engine: str, device: torch.device, drawn: tuple[Problem, dict[str, Any]]) -> None:
    batch, options = drawn
    answer = batch.answer(**options)
    # A batch of few rows and many classes can be nearly singular by chance: then rounding decides, not the options.
    hypothesis.assume(not math.isfinite(answer.cond) or answer.cond < 1e6)
    assert_matches(run(batch.to(device=device), engine, **options), answer, batch.logits.dtype)
