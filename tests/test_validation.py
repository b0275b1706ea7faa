"""Bad input: each kind raises the error F.cross_entropy would, and the message says what was given and expected."""

# Most arguments here are wrong on purpose.
# mypy: disable-error-code="arg-type, call-arg, attr-defined"

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ldmi_fast
from ldmi_fast import DMILoss, JointState, diagnose, dmi_loss, explain, joint_matrix, linear_dmi_loss
from ldmi_fast.checks import raise_for_values
from tests.support.problems import gradient_of, problem

LOGITS = torch.zeros(6, 3)
LABELS = torch.arange(6) % 3
SOFT = torch.full((6, 3), 1 / 3)
WEIGHTS = torch.ones(6)

# shapes of a segmentation mask and of the tokens of a transformer
MASKS = torch.zeros(2, 3, 4, 5)
TOKENS = torch.zeros(2, 7, 3)
BINARY = ("one class", "torch.cat([torch.zeros_like(z), z], 1)")

Call = Callable[[], Any]


class Output:
    """A model's output, as in transformers."""

    logits = LOGITS


class Subclass(torch.Tensor):
    """A tensor subclass, as other libraries define."""


def nested(layout: torch.layout = torch.strided) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=layout)


def labels_for(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def case(name: str, call: Call, error: type[Exception], *parts: str) -> Any:
    return pytest.param(call, error, parts, id=name)


def labels(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# name, call, error, texts in the message: what was given, and what is expected.
BAD: list[Any] = [
    # logits
    case("logits-list", lambda: dmi_loss([[0.0, 1.0]], LABELS), TypeError, "logits", "tensor", "list"),
    case("logits-none", lambda: dmi_loss(None, LABELS), TypeError, "logits", "tensor", "NoneType"),
    case("logits-model-output", lambda: dmi_loss(Output(), LABELS), TypeError, "logits", "tensor", "Output", ".logits"),
    case("logits-dict", lambda: dmi_loss({"logits": LOGITS}, LABELS), TypeError, "logits", "tensor", "dict", '"logits"'),
    case("logits-tuple", lambda: dmi_loss((LOGITS, LOGITS), LABELS), TypeError, "logits", "tensor", "tuple", "the one of its tensors"),
    case("logits-numpy", lambda: dmi_loss(LOGITS.numpy(), LABELS), TypeError, "logits", "ndarray", "torch.as_tensor"),
    case("logits-nested", lambda: dmi_loss(nested(), LABELS), TypeError, "logits", "nested", "unbind", "pad"),
    case("logits-nested-vectors", lambda: dmi_loss(torch.nested.nested_tensor([LOGITS[0]]), LABELS), TypeError, "logits", "nested"),
    case("module-logits-nested", lambda: DMILoss(3)(nested(), LABELS), TypeError, "logits", "nested"),
    case("hidden-nested", lambda: linear_dmi_loss(nested(), torch.zeros(3, 3), LABELS), TypeError, "hidden", "nested"),
    case("weight-matrix-nested", lambda: linear_dmi_loss(LOGITS, nested(), LABELS), TypeError, "weight", "nested"),
    case("batch-size-float", lambda: DMILoss.recommended(3, 6.0), TypeError, "batch_size", "int", "float"),
    case("chunk-size-bool", lambda: linear_dmi_loss(LOGITS, LOGITS, LABELS, chunk_size=True), TypeError, "chunk_size", "int", "bool"),
    case("logits-jagged", lambda: dmi_loss(nested(torch.jagged), LABELS), TypeError, "logits", "nested", "jagged", "unbind"),
    case("logits-integer", lambda: dmi_loss(LOGITS.long(), LABELS), TypeError, "logits", "float32", "int64"),
    case("logits-bool", lambda: dmi_loss(LOGITS.bool(), LABELS), TypeError, "logits", "float32", "bool"),
    case("logits-complex", lambda: dmi_loss(LOGITS.cfloat(), LABELS), TypeError, "logits", "float32", "complex64"),
    case("logits-float8", lambda: dmi_loss(LOGITS.to(torch.float8_e5m2), LABELS), TypeError, "logits", "float8_e5m2"),
    case("logits-sparse", lambda: dmi_loss(LOGITS.to_sparse(), LABELS), TypeError, "logits", "dense", "sparse"),
    case("logits-scalar", lambda: dmi_loss(torch.tensor(1.0), labels(0)), ValueError, "logits", "(N, C)", "()"),
    case(
        "logits-vector-of-a-binary-model",
        lambda: dmi_loss(LOGITS[:, 0], WEIGHTS),
        ValueError,
        "(N, C)",
        "(6,)",
        "torch.stack([torch.zeros_like(z), z], 1)",
    ),
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
    case("target-none", lambda: dmi_loss(LOGITS, None), TypeError, "target must be an integer", "NoneType", "'labels'"),
    case("target-nested", lambda: dmi_loss(LOGITS, nested()), TypeError, "target", "nested", "unbind"),
    case("target-jagged", lambda: dmi_loss(LOGITS, nested(torch.jagged)), TypeError, "target", "nested", "unbind"),
    case("target-bool", lambda: dmi_loss(LOGITS, LABELS.bool()), TypeError, "target", "integer", "bool", ".long()"),
    case("target-one-hot-bool", lambda: dmi_loss(LOGITS, SOFT.bool()), TypeError, "target", "integer", "bool", ".float()"),
    case("target-complex", lambda: dmi_loss(LOGITS, SOFT.cfloat()), TypeError, "target", "floating", "complex64"),
    case("target-sparse", lambda: dmi_loss(LOGITS, SOFT.to_sparse()), TypeError, "target", "dense", "sparse"),
    case("target-too-short", lambda: dmi_loss(LOGITS, LABELS[:5]), ValueError, "target", "(6,)", "(5,)", "(6, 3)"),
    case("target-column", lambda: dmi_loss(LOGITS, LABELS[:, None]), ValueError, "target", "(6,)", "(6, 1)", "target.squeeze(1)"),
    case(
        "target-one-hot-integers",
        lambda: dmi_loss(LOGITS, SOFT.long()),
        ValueError,
        "target",
        "(6,)",
        "(6, 3)",
        "target.argmax(1)",
        "target.float()",
    ),
    case(
        "target-mask-with-a-channel", lambda: dmi_loss(MASKS, labels_for((2, 1, 4, 5))), ValueError, "(2, 4, 5)", "target.squeeze(1)"
    ),
    case("target-mask-with-a-last-channel", lambda: dmi_loss(MASKS, labels_for((2, 4, 5, 1))), ValueError, "target.squeeze(-1)"),
    case("target-of-tokens", lambda: dmi_loss(TOKENS, labels_for((2, 7))), ValueError, "(2, 3)", "(2, 7)", "logits.movedim(-1, 1)"),
    case(
        "soft-of-tokens",
        lambda: dmi_loss(TOKENS.movedim(-1, 1), torch.zeros(2, 7, 3)),
        ValueError,
        "(2, 3, 7)",
        "(2, 7, 3)",
        "movedim(-1, 1)",
    ),
    case(
        "float-labels-of-tokens",
        lambda: dmi_loss(TOKENS, torch.zeros(2, 7)),
        ValueError,
        "logits.movedim(-1, 1)",
        "target.long()",
    ),
    case(
        "float-mask-with-a-channel",
        lambda: dmi_loss(MASKS, torch.zeros(2, 1, 4, 5)),
        ValueError,
        "target.long().squeeze(1)",
    ),
    case("one-logit-float-column", lambda: dmi_loss(LOGITS[:, :1], WEIGHTS[:, None]), ValueError, *BINARY, "target.long().squeeze(1)"),
    case("one-logit-float-labels", lambda: dmi_loss(LOGITS[:, :1], WEIGHTS), ValueError, *BINARY, "target.long()"),
    case(
        "one-logit-float-mask",
        lambda: dmi_loss(MASKS[:, :1], torch.zeros(2, 1, 4, 5)),
        ValueError,
        *BINARY,
        "target.long().squeeze(1)",
    ),
    case("one-logit-module", lambda: DMILoss()(LOGITS[:, :1], WEIGHTS[:, None]), ValueError, *BINARY),
    case("one-logit-integers", lambda: dmi_loss(LOGITS[:, :1], LABELS % 2), IndexError, "target 1", "0 <= target < 1", BINARY[1]),
    case(
        "one-probability",
        lambda: dmi_loss(LOGITS[:, :1].sigmoid(), WEIGHTS[:, None], input="probs"),
        ValueError,
        "one class",
        "torch.cat([1 - p, p], 1)",
    ),
    case("target-scalar", lambda: dmi_loss(LOGITS, torch.tensor(0)), ValueError, "target", "(6,)", "()"),
    case(
        "target-wrong-extra-dimension",
        lambda: dmi_loss(torch.zeros(2, 3, 4, 5), torch.zeros(2, 5, 4, dtype=torch.int64)),
        ValueError,
        "target",
        "(2, 4, 5)",
        "(2, 5, 4)",
    ),
    case("soft-labels-as-floats", lambda: dmi_loss(LOGITS, LABELS.float()), ValueError, "(6, 3)", "(6,)", "target.long()"),
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
    case("weight-nested", lambda: dmi_loss(LOGITS, LABELS, sample_weight=nested()), TypeError, "sample_weight", "nested"),
    case(
        "weight-that-is-an-index",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=torch.arange(6)),
        TypeError,
        "sample_weight",
        "third item",
        "index",
        "leave it out",
    ),
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
        "weight[target]",
    ),
    case(
        "weight-column",
        lambda: dmi_loss(LOGITS, LABELS, sample_weight=WEIGHTS[:, None]),
        ValueError,
        "sample_weight",
        "(6,)",
        "(6, 1)",
        "sample_weight.squeeze(1)",
    ),
    case(
        "weight-one-an-image",
        lambda: dmi_loss(MASKS, labels_for((2, 4, 5)), sample_weight=torch.ones(2)),
        ValueError,
        "(2, 4, 5)",
        "sample_weight.view(-1, 1, 1).expand(2, 4, 5)",
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
    case(
        "label-smoothing",
        lambda: dmi_loss(LOGITS, LABELS, label_smoothing=0.1),
        TypeError,
        "label_smoothing",
        "pass the hard labels",
        "stays absent",
    ),
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
    case("module-num-classes-bool", lambda: DMILoss(True), TypeError, "num_classes", "int", "bool"),
    case("module-num-classes-reduction", lambda: DMILoss("mean"), TypeError, "num_classes", "'mean'", "no reduction"),
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
    # An IndexError is not a ValueError, so callers can distinguish labels out of range from wrong shapes.
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
    """NaN in the logits comes from the model: the result is a NaN loss, not an exception."""
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


def test_one_class_is_a_constant_loss() -> None:
    """Integer labels of one class: every row of the joint is its weight."""
    logits = torch.randn(6, 1).requires_grad_()
    loss = dmi_loss(logits, labels_for((6,)))
    loss.backward()
    assert loss == 0
    assert not gradient_of(logits).any()


@pytest.mark.parametrize("which", ["logits", "target", "sample_weight"])
def test_values_of_subclasses_are_looked_at(engine: str, device: torch.device, which: str) -> None:
    if device.type != "cpu":
        pytest.skip("reading labels would synchronise: the loss is NaN there")
    batch = problem(40, 5, weighted=True)
    tensors = {"logits": batch.logits, "target": batch.target + 9, "sample_weight": batch.weight}
    tensors[which] = tensors[which].as_subclass(Subclass)
    with pytest.raises(IndexError, match=r"target 1[0-9] of sample 1 is out of range"):
        dmi_loss(tensors["logits"], tensors["target"], sample_weight=tensors["sample_weight"], engine=engine)
    tensors["target"] = batch.target
    tensors["sample_weight"] = tensors["sample_weight"] - 9
    with pytest.raises(ValueError, match="sample_weight must be finite and >= 0, got -"):
        dmi_loss(tensors["logits"], tensors["target"], sample_weight=tensors["sample_weight"], engine=engine)


def test_negative_soft_targets_are_named() -> None:
    hot = torch.nn.functional.one_hot(LABELS, 3).double()
    with pytest.raises(ValueError, match=r"soft targets must be probabilities.*got -1 for class 0 of sample 0.*3 such of 3 classes"):
        raise_for_values(-hot, None, 3, -100)
    with pytest.raises(ValueError, match="soft targets must be probabilities"):
        dmi_loss(LOGITS, -hot)
    one = hot.clone()
    one[:, 1] *= -1
    for call in (dmi_loss, DMILoss(3), JointState(3).update, diagnose):
        with pytest.raises(ValueError, match="got -1 for class 1"):
            call(torch.randn(6, 3), one)
    # one entry below 0 that the others of its class outweigh, and a row that does not count
    raise_for_values(hot + torch.tensor([0.01, 0.0, -0.01]), None, 3, -100)
    hot[4] = -7
    raise_for_values(hot, torch.tensor([1.0, 1, 1, 1, 0, 1]), 3, -100)
    with pytest.raises(ValueError, match=r"got -7 for class 0 of sample 4"):
        raise_for_values(hot, None, 3, -100)


def test_distributed_tensors_are_named() -> None:
    """In a separate process: the mesh needs a process group, and the package must not import torch.distributed.tensor to ask."""
    code = """
import sys, torch, ldmi_fast
assert "torch.distributed.tensor" not in sys.modules
x, y = torch.randn(6, 3), torch.arange(6) % 3
ldmi_fast.dmi_loss(x, y)
assert "torch.distributed.tensor" not in sys.modules
import torch.distributed as dist
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
mesh = init_device_mesh("cpu", (1,))
for placement in (Shard(0), Replicate(), Shard(1)):
    dx = DTensor.from_local(x, mesh, [placement])
    dy = DTensor.from_local(y, mesh, [Replicate()])
    dw = DTensor.from_local(torch.ones(6), mesh, [Replicate()])
    for args, kwargs, name in (
        ((dx, y), {}, "logits"), ((dx, dy), {}, "logits"), ((x, dy), {}, "target"), ((x, y), {"sample_weight": dw}, "sample_weight"),
    ):
        for function in (ldmi_fast.dmi_loss, ldmi_fast.joint_matrix, ldmi_fast.diagnose, ldmi_fast.explain):
            try:
                function(*args, **kwargs)
            except TypeError as error:
                assert name in str(error) and "DTensor" in str(error), error
                assert "to_local()" in str(error) and "group=" in str(error) and "full_tensor()" in str(error), error
            else:
                raise AssertionError((function, name, placement))
dw = DTensor.from_local(torch.randn(3, 3), mesh, [Replicate()])
for args, name in (((x, dw, y), "weight"), ((dx, torch.randn(3, 3), y), "hidden")):
    try:
        ldmi_fast.linear_dmi_loss(*args)
    except TypeError as error:
        assert f"{name} must be a plain tensor, got DTensor" in str(error), error
    else:
        raise AssertionError(name)
try:
    ldmi_fast.JointState(3).update(dx, dy)
except TypeError as error:
    assert "to_local()" in str(error)
else:
    raise AssertionError("JointState")
dist.destroy_process_group()
print("all named")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "all named" in done.stdout, done.stderr[-2000:]


def test_public_names_are_documented() -> None:
    for name in ldmi_fast.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(ldmi_fast, name)), name
