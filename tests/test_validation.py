"""Bad input: each kind raises the error F.cross_entropy would, and the message says what was given and expected."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ldmi_fast
from ldmi_fast import DMILoss, diagnose, dmi_loss, explain, joint_matrix
from tests.problems import problem

LOGITS = torch.zeros(6, 3)
LABELS = torch.arange(6) % 3
SOFT = torch.full((6, 3), 1 / 3)
WEIGHTS = torch.ones(6)

Call = Callable[[], Any]


def case(name: str, call: Call, error: type[Exception], *parts: str) -> Any:
    return pytest.param(call, error, parts, id=name)


def labels(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# name, call, error, what the message must hold: what was given, and what is expected.
BAD: list[Any] = [
    # logits
    case("logits-list", lambda: dmi_loss([[0.0, 1.0]], LABELS), TypeError, "logits", "tensor", "list"),
    case("logits-none", lambda: dmi_loss(None, LABELS), TypeError, "logits", "tensor", "NoneType"),
    case("logits-integer", lambda: dmi_loss(LOGITS.long(), LABELS), TypeError, "logits", "float32", "int64"),
    case("logits-bool", lambda: dmi_loss(LOGITS.bool(), LABELS), TypeError, "logits", "float32", "bool"),
    case("logits-complex", lambda: dmi_loss(LOGITS.cfloat(), LABELS), TypeError, "logits", "float32", "complex64"),
    case("logits-float8", lambda: dmi_loss(LOGITS.to(torch.float8_e5m2), LABELS), TypeError, "logits", "float8_e5m2"),
    case("logits-sparse", lambda: dmi_loss(LOGITS.to_sparse(), LABELS), TypeError, "logits", "dense", "sparse"),
    case("logits-scalar", lambda: dmi_loss(torch.tensor(1.0), labels(0)), ValueError, "logits", "(N, C)", "()"),
    case("logits-vector", lambda: dmi_loss(torch.zeros(3), labels(0)), ValueError, "logits", "(N, C)", "(3,)"),
    case(
        "logits-no-classes",
        lambda: dmi_loss(torch.zeros(6, 0), LABELS),
        ValueError,
        "at least one class",
        "(6, 0)",
    ),
    # target
    case("target-list", lambda: dmi_loss(LOGITS, [0, 1]), TypeError, "target", "tensor", "list"),
    case("target-bool", lambda: dmi_loss(LOGITS, LABELS.bool()), TypeError, "target", "integer", "bool"),
    case("target-complex", lambda: dmi_loss(LOGITS, SOFT.cfloat()), TypeError, "target", "floating", "complex64"),
    case("target-sparse", lambda: dmi_loss(LOGITS, SOFT.to_sparse()), TypeError, "target", "dense", "sparse"),
    case("target-too-short", lambda: dmi_loss(LOGITS, LABELS[:5]), ValueError, "target", "(6,)", "(5,)", "(6, 3)"),
    case("target-column", lambda: dmi_loss(LOGITS, LABELS[:, None]), ValueError, "target", "(6,)", "(6, 1)"),
    case("target-one-hot-integers", lambda: dmi_loss(LOGITS, SOFT.long()), ValueError, "target", "(6,)", "(6, 3)"),
    case("target-scalar", lambda: dmi_loss(LOGITS, torch.tensor(0)), ValueError, "target", "(6,)", "()"),
    case(
        "target-wrong-extra-dimension",
        lambda: dmi_loss(torch.zeros(2, 3, 4, 5), torch.zeros(2, 5, 4, dtype=torch.int64)),
        ValueError,
        "target",
        "(2, 4, 5)",
        "(2, 5, 4)",
    ),
    case("soft-labels-as-floats", lambda: dmi_loss(LOGITS, LABELS.float()), ValueError, "target", "(6, 3)", "(6,)"),
    case(
        "soft-wrong-class-count",
        lambda: dmi_loss(LOGITS, torch.full((6, 4), 0.25)),
        ValueError,
        "target",
        "(6, 3)",
        "(6, 4)",
    ),
    case(
        "soft-with-ignore-index",
        lambda: dmi_loss(LOGITS, SOFT, ignore_index=1),
        ValueError,
        "ignore_index=1",
        "float32",
    ),
    case("target-on-another-device", lambda: dmi_loss(LOGITS, LABELS.to("meta")), ValueError, "target", "meta", "cpu"),
    case("label-too-large", lambda: dmi_loss(LOGITS, labels(0, 1, 2, 3, 0, 1)), IndexError, "target 3", "0 <= target < 3"),
    case(
        "label-negative",
        lambda: dmi_loss(LOGITS, labels(0, 1, 2, -1, 0, 1)),
        IndexError,
        "target -1",
        "0 <= target < 3",
    ),
    case(
        "label-of-another-ignore-index",
        lambda: dmi_loss(LOGITS, labels(0, 1, 2, -100, 0, 1), ignore_index=-1),
        IndexError,
        "target -100",
        "ignore_index = -1",
    ),
    case(
        "label-uint8-255",
        lambda: dmi_loss(LOGITS, labels(0, 1, 255, 2, 0, 1, dtype=torch.uint8)),
        IndexError,
        "target 255",
        "sample 2",
    ),
    case(
        "label-huge",
        lambda: dmi_loss(LOGITS, labels(0, 1, 2, 2**62, 0, 1)),
        IndexError,
        str(2**62),
    ),
    case(
        "label-that-wraps-in-32-bits",
        lambda: dmi_loss(LOGITS, labels(0, 1, 2, 2**32, 0, 1)),
        IndexError,
        str(2**32),
    ),
    case(
        "label-soft-batch-of-one-row-too-large",
        lambda: dmi_loss(torch.zeros(1, 3), labels(7), eps=1e-3, absent="strict"),
        IndexError,
        "target 7",
    ),
    # sample_weight
    case("weight-list", lambda: dmi_loss(LOGITS, LABELS, sample_weight=[1] * 6), TypeError, "sample_weight", "list"),
    case(
        "weight-integer",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=LABELS),
        TypeError,
        "sample_weight",
        "float32",
        "int64",
    ),
    case(
        "weight-one-a-class",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=torch.ones(3)),
        ValueError,
        "sample_weight",
        "(6,)",
        "(3,)",
    ),
    case(
        "weight-column",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=WEIGHTS[:, None]),
        ValueError,
        "sample_weight",
        "(6,)",
        "(6, 1)",
    ),
    case(
        "weight-on-another-device",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=WEIGHTS.to("meta")),
        ValueError,
        "sample_weight",
        "meta",
        "cpu",
    ),
    case(
        "weight-requires-grad",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=WEIGHTS.clone().requires_grad_()),
        ValueError,
        "sample_weight",
        "gradient",
        "detach",
    ),
    case(
        "weight-negative",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=torch.tensor([1, 1, -0.5, 1, 1, 1])),
        ValueError,
        "sample_weight",
        ">= 0",
        "-0.5",
        "sample 2",
    ),
    case(
        "weight-nan",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=torch.tensor([1, 1, 1, 1, float("nan"), 1])),
        ValueError,
        "sample_weight",
        "finite",
        "nan",
        "sample 4",
    ),
    case(
        "weight-infinite",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=torch.tensor([1, float("inf"), 1, 1, 1, 1])),
        ValueError,
        "sample_weight",
        "finite",
        "inf",
        "sample 1",
    ),
    case(
        "weight-infinite-soft",
        lambda: dmi_loss(LOGITS, SOFT, sample_weight=torch.tensor([1, float("inf"), 1, 1, 1, 1])),
        ValueError,
        "sample_weight",
        "finite",
        "inf",
    ),
    # options
    case(
        "absent-misspelt",
        lambda: dmi_loss(LOGITS, LABELS, absent="presnt"),
        ValueError,
        "absent",
        "'presnt'",
        "'strict'",
        "did you mean 'present'",
    ),
    case("absent-bool", lambda: dmi_loss(LOGITS, LABELS, absent=True), TypeError, "absent", "bool"),
    case(
        "input-misspelt",
        lambda: dmi_loss(LOGITS, LABELS, input="prob"),
        ValueError,
        "input",
        "'prob'",
        "'logits'",
        "did you mean 'probs'",
    ),
    case("input-tensor", lambda: dmi_loss(LOGITS, LABELS, input=LOGITS), TypeError, "input", "Tensor"),
    case(
        "engine-misspelt",
        lambda: dmi_loss(LOGITS, LABELS, engine="composit"),
        ValueError,
        "engine",
        "'composit'",
        "did you mean 'composite'",
    ),
    case("engine-number", lambda: dmi_loss(LOGITS, LABELS, engine=1), TypeError, "engine", "int"),
    case("eps-negative", lambda: dmi_loss(LOGITS, LABELS, eps=-1e-3), ValueError, "eps", ">= 0", "-0.001"),
    case("eps-nan", lambda: dmi_loss(LOGITS, LABELS, eps=float("nan")), ValueError, "eps", "finite", "nan"),
    case("eps-infinite", lambda: dmi_loss(LOGITS, LABELS, eps=float("inf")), ValueError, "eps", "finite", "inf"),
    case("eps-string", lambda: dmi_loss(LOGITS, LABELS, eps="1e-3"), TypeError, "eps", "float", "str"),
    case("eps-tensor", lambda: dmi_loss(LOGITS, LABELS, eps=torch.tensor(1e-3)), TypeError, "eps", "float", "Tensor"),
    case(
        "ce-weight-negative",
        lambda: dmi_loss(LOGITS, LABELS, cross_entropy_weight=-1),
        ValueError,
        "cross_entropy_weight",
        ">= 0",
        "-1",
    ),
    case(
        "ce-weight-nan",
        lambda: dmi_loss(LOGITS, LABELS, cross_entropy_weight=float("nan")),
        ValueError,
        "cross_entropy_weight",
        "nan",
    ),
    case("normalize-number", lambda: dmi_loss(LOGITS, LABELS, normalize=1), TypeError, "normalize", "bool", "int"),
    case(
        "ignore-index-float",
        lambda: dmi_loss(LOGITS, LABELS, ignore_index=-100.0),
        TypeError,
        "ignore_index",
        "int",
        "float",
    ),
    case(
        "ignore-index-none",
        lambda: dmi_loss(LOGITS, LABELS, ignore_index=None),
        TypeError,
        "ignore_index",
        "int",
        "NoneType",
    ),
    case(
        "ignore-index-beyond-64-bits",
        lambda: dmi_loss(LOGITS, LABELS, ignore_index=2**63),
        ValueError,
        "ignore_index",
        "64 bits",
        str(2**63),
    ),
    # keywords that F.cross_entropy takes
    case(
        "class-weights",
        lambda: dmi_loss(LOGITS, LABELS, weight=torch.ones(3)),
        TypeError,
        "weight",
        "gradient",
        "sample_weight",
    ),
    case(
        "reduction-none",
        lambda: dmi_loss(LOGITS, LABELS, reduction="none"),
        TypeError,
        "reduction",
        "one number",
        "batch",
    ),
    case("reduction-mean", lambda: dmi_loss(LOGITS, LABELS, reduction="mean"), TypeError, "reduction", "one number"),
    case("size-average", lambda: dmi_loss(LOGITS, LABELS, size_average=True), TypeError, "size_average"),
    case("label-smoothing", lambda: dmi_loss(LOGITS, LABELS, label_smoothing=0.1), TypeError, "label_smoothing"),
    case(
        "keyword-misspelt",
        lambda: dmi_loss(LOGITS, LABELS, ignore_idx=0),
        TypeError,
        "'ignore_idx'",
        "did you mean 'ignore_index'",
    ),
    case("keyword-unknown", lambda: dmi_loss(LOGITS, LABELS, zzz=0), TypeError, "'zzz'", "cross_entropy_weight"),
    case("too-many-positional", lambda: dmi_loss(LOGITS, LABELS, WEIGHTS), TypeError, "positional"),
    # the module
    case("module-class-weights", lambda: DMILoss(weight=torch.ones(3)), TypeError, "DMILoss", "weight", "sample_weight"),
    case("module-reduction", lambda: DMILoss(reduction="sum"), TypeError, "DMILoss", "reduction"),
    case("module-num-classes-zero", lambda: DMILoss(0), ValueError, "num_classes", "at least 1", "0"),
    case("module-num-classes-float", lambda: DMILoss(3.0), TypeError, "num_classes", "int", "float"),
    case("module-num-classes-tensor", lambda: DMILoss(WEIGHTS), TypeError, "num_classes", "int", "Tensor"),
    case("module-classes-mismatch", lambda: DMILoss(14)(LOGITS, LABELS), ValueError, "14 classes", "(6, 3)"),
    case("module-eps", lambda: DMILoss(3, eps=-1.0), ValueError, "eps", ">= 0", "-1.0"),
    case("module-absent", lambda: DMILoss(3, absent="none"), ValueError, "absent", "'none'", "'present'"),
]


@pytest.mark.parametrize(("call", "error", "parts"), BAD)
def test_bad_input_is_named(call: Call, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    # A class of its own: an IndexError is no ValueError, so callers can tell labels out of range from wrong shapes.
    assert type(caught.value) is error


@pytest.mark.parametrize("function", [joint_matrix, diagnose, explain], ids=lambda f: f.__name__)
def test_the_other_functions_check_the_same(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"logits must be .*int64"):
        function(LOGITS.long(), LABELS)
    with pytest.raises(ValueError, match=re.escape("(5,)")):
        function(LOGITS, LABELS[:5])
    with pytest.raises(ValueError, match="did you mean 'probs'"):
        function(LOGITS, LABELS, input="prob")
    with pytest.raises(TypeError, match=f"{function.__name__}.*weight"):
        function(LOGITS, LABELS, weight=torch.ones(3))
    with pytest.raises(ValueError, match="composite"):
        function(LOGITS, LABELS, engine="gpu")


@pytest.mark.parametrize("function", [joint_matrix, diagnose], ids=lambda f: f.__name__)
def test_the_other_functions_check_labels_and_weights(function: Callable[..., Any]) -> None:
    with pytest.raises(IndexError, match=r"target 3 .*0 <= target < 3"):
        function(LOGITS, torch.tensor([0, 1, 2, 3, 0, 1]))
    with pytest.raises(ValueError, match="sample_weight must be finite and >= 0, got -1"):
        function(LOGITS, LABELS, sample_weight=-WEIGHTS)


@pytest.mark.parametrize("n", [6, 5000], ids=["small", "large"])
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_labels_out_of_range_at_every_engine(engine: str, device: torch.device, n: int, where: int) -> None:
    if device.type != "cpu":
        pytest.skip("reading labels would synchronise: the loss is NaN there")
    batch = problem(n, 3)
    for bad in (3, -1, 2**31, -(2**40)):
        labels = batch.target.clone()
        labels[where] = bad
        for options in ({}, {"eps": 1e-3, "absent": "strict"}, {"cross_entropy_weight": 1.0}, {"input": "probs"}):
            with pytest.raises(IndexError, match=f"target {bad} .*0 <= target < 3"):
                dmi_loss(batch.logits.softmax(1), labels, engine=engine, **options)
    assert dmi_loss(batch.logits, batch.target, engine=engine).isfinite()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_bad_weights_at_every_engine(engine: str, device: torch.device, soft: bool) -> None:
    if device.type != "cpu":
        pytest.skip("reading weights would synchronise: the loss is NaN there")
    batch = problem(300, 3, soft=soft)
    for bad in (-1e-3, float("nan"), float("inf"), -float("inf")):
        weight = torch.ones(300)
        weight[17] = bad
        for options in ({}, {"eps": 1e-3}, {"normalize": False, "cross_entropy_weight": 1.0}):
            with pytest.raises(ValueError, match=r"sample_weight must be finite and >= 0.*sample 17"):
                dmi_loss(batch.logits, batch.target, sample_weight=weight, engine=engine, **options)


def test_a_label_out_of_range_in_a_row_that_does_not_count_is_fine(engine: str, device: torch.device) -> None:
    batch = problem(50, 3, weighted=True).to(device=device)
    assert batch.sample_weight is not None
    labels = torch.where(batch.sample_weight == 0, 77, batch.target)
    expected = dmi_loss(batch.logits, batch.target, sample_weight=batch.sample_weight, engine=engine)
    assert torch.equal(dmi_loss(batch.logits, labels, sample_weight=batch.sample_weight, engine=engine), expected)


def test_a_nan_in_the_logits_is_no_error(engine: str, device: torch.device) -> None:
    """NaN out of a good batch of labels is the model's doing: it comes back as a NaN loss, not as an exception."""
    batch = problem(50, 3, weighted=True).to(device=device)
    logits = batch.logits.clone()
    logits[1] = float("nan")
    assert dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, engine=engine).isnan()


def test_a_forced_engine_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"engine 'cpu' was asked for and cannot run: .+"):
        dmi_loss(LOGITS.to("meta"), LABELS.to("meta"), engine="cpu")
    monkeypatch.setenv("LDMI_FAST_ENGINE", "cpu")
    with pytest.raises(RuntimeError, match=r"engine 'cpu' was asked for and cannot run: .+"):
        dmi_loss(LOGITS.to("meta"), LABELS.to("meta"))
    monkeypatch.setenv("LDMI_FAST_ENGINE", "fast")
    with pytest.raises(ValueError, match=r"LDMI_FAST_ENGINE must be one of .*'composite'.*'fast'"):
        dmi_loss(LOGITS, LABELS)


def test_the_environment_forces_an_engine_and_the_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMI_FAST_ENGINE", "composite")
    assert explain(LOGITS, LABELS).engine == "composite"
    monkeypatch.setenv("LDMI_FAST_ENGINE", "fast")
    assert explain(LOGITS, LABELS, engine="composite").engine == "composite"


def test_numbers_of_any_plain_kind_are_taken() -> None:
    """An int is a fine eps."""
    assert dmi_loss(LOGITS, LABELS, eps=1, cross_entropy_weight=0).item() == pytest.approx(0.0, abs=1e-6)


def test_requires_grad_of_weights_that_need_none() -> None:
    with torch.no_grad():
        weight = (WEIGHTS.clone().requires_grad_() * 2).detach()
    assert dmi_loss(torch.randn(6, 3), LABELS, sample_weight=weight).isfinite()


def test_public_names_are_documented() -> None:
    for name in ldmi_fast.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(ldmi_fast, name)), name
