"""ldmi_fast.metrics.DMI: the score of a stream of batches."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install .[integrations]")

import torchmetrics

from ldmi_fast import dmi_loss, metrics
from ldmi_fast.metrics import DMI
from tests.support.compare import EXACT, REORDERED
from tests.support.problems import problem


@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param({}, {}, id="hard"),
        pytest.param({"weighted": True, "absent": (2,)}, {"ignore_index": 1}, id="weighted-ignore-absent"),
        pytest.param({"soft": True}, {"input": "probs"}, id="soft-probs"),
        pytest.param({"absent": (2,)}, {"absent": "strict"}, id="strict"),
    ],
)
def test_is_minus_the_loss_of_everything(build: dict[str, Any], options: dict[str, Any]) -> None:
    batch = problem(200, 6, dtype=torch.float64, **build)
    logits = batch.logits.softmax(1) if options.get("input") == "probs" else batch.logits
    metric = DMI(6, **options)
    for rows in (slice(0, 10), slice(10, 10), slice(10, 200)):
        metric.update(logits[rows], batch.target[rows], None if batch.sample_weight is None else batch.sample_weight[rows])
    expected = -dmi_loss(logits, batch.target, sample_weight=batch.sample_weight, **options)
    torch.testing.assert_close(metric.compute(), expected)


def test_is_a_metric() -> None:
    """forward, reset, clones, pickles, states, half, collections."""
    batch = problem(100, 5)
    metric = DMI(5)
    assert metric(batch.logits, batch.target).item() == pytest.approx(-dmi_loss(batch.logits, batch.target).item(), rel=1e-6)
    metric.update(batch.logits, batch.target)
    value = metric.compute()
    metric.persistent(True)
    fresh = DMI(5)
    fresh.load_state_dict(metric.state_dict(), strict=False)
    twins = [copy.deepcopy(metric), metric.clone(), pickle.loads(pickle.dumps(metric)), metric.half()]
    assert all(torch.equal(twin.compute(), value) for twin in twins)
    assert metric.joint.dtype == torch.float64
    metric.reset()
    assert metric.total == 0
    both = torchmetrics.MetricCollection([DMI(5), torchmetrics.classification.MulticlassAccuracy(5)])
    assert both(batch.logits, batch.target)["DMI"].item() == pytest.approx(value.item(), rel=1e-6)


def test_permuted_predictions_score_the_same_and_the_sign_tells_of_odd_ones() -> None:
    batch = problem(100, 5, dtype=torch.float64)
    right, swapped = DMI(5), DMI(5)
    right.update(batch.logits, batch.target)
    swapped.update(batch.logits[:, [1, 0, 2, 3, 4]], batch.target)
    torch.testing.assert_close(right.compute(), swapped.compute())
    assert (right.sign.item(), swapped.sign.item()) == (1, -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("convert", ["to", "parent", "set_dtype", "type", "half", "to-device-and-dtype"])
def test_keeps_its_precision(dtype: torch.dtype, convert: str) -> None:
    """To whatever dtype it or the module that holds it is converted, before, between and after updates."""
    batch = problem(640, 10)
    expected = DMI(10)
    expected.update(batch.logits, batch.target)
    metric = DMI(10)
    parent = torch.nn.Module()
    parent.metric = metric

    def converted() -> None:
        named = {torch.float16: parent.half, torch.bfloat16: parent.bfloat16, torch.float32: parent.float}
        actions: dict[str, Any] = {
            "to": lambda: metric.to(dtype),
            "parent": lambda: parent.to(dtype),
            "set_dtype": lambda: metric.set_dtype(dtype),
            "type": lambda: parent.type(dtype),
            "half": named[dtype],
            "to-device-and-dtype": lambda: parent.to("cpu", dtype),
        }
        actions[convert]()
        assert {state.dtype for state in (metric.joint, metric.counts, metric.total)} == {torch.float64}

    converted()
    metric.update(batch.logits[:100], batch.target[:100])
    converted()
    metric.update(batch.logits[100:], batch.target[100:])
    torch.testing.assert_close(metric.compute(), expected.compute(), rtol=EXACT, atol=0)
    converted()
    assert metric.compute().dtype == torch.float64  # the stored value
    torch.testing.assert_close(metric.compute(), expected.compute(), rtol=EXACT, atol=0)
    metric.reset()
    metric.update(batch.logits, batch.target)
    assert torch.equal(metric.compute(), expected.compute())


def test_on_a_device_without_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state follows the device; "meta" stands for one here."""
    monkeypatch.setattr(metrics, "accumulator", lambda device: torch.float32 if device.type == "meta" else torch.float64)
    metric = DMI(4)
    metric.update(torch.randn(20, 4), torch.arange(20) % 4)
    metric.compute()
    refused: list[Tensor] = []
    to = Tensor.to

    def no_fp64(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = to(tensor, *args, **kwargs)
        if result.is_meta and result.dtype == torch.float64:
            refused.append(tensor)
        return result

    monkeypatch.setattr(Tensor, "to", no_fp64)
    metric.to("meta")
    assert not refused
    assert [getattr(metric, name).dtype for name in ("joint", "counts", "total")] == [torch.float32] * 3
    assert metric.compute().is_meta
    metric.reset()
    assert metric.joint.dtype == torch.float32
    with torch.device("meta"):
        assert DMI(4).joint.dtype == torch.float32
    torch.nn.ModuleList([metric]).to_empty(device="cpu")
    assert metric.joint.dtype == torch.float64
    assert not metric.joint.any()


def test_a_state_that_was_loaded_in_half_precision() -> None:
    batch = problem(64, 4)
    metric, fresh = DMI(4), DMI(4)
    metric.update(batch.logits, batch.target)
    metric.persistent(True)
    fresh.persistent(True)
    fresh.load_state_dict({name: state.half() for name, state in metric.state_dict().items()})
    assert fresh._solve()[0].item() == pytest.approx(metric.compute().item(), abs=0.05)
    fresh.update(batch.logits, batch.target)
    assert fresh.joint.dtype == torch.float64


def test_inference_mode() -> None:
    batch = problem(60, 4)
    expected = DMI(4)
    expected.update(batch.logits, batch.target)
    metric = DMI(4)
    metric.update(batch.logits, batch.target)
    with torch.inference_mode():
        metric.compute()
        metric.reset()
        metric.update(batch.logits[:20], batch.target[:20])
    metric.update(batch.logits[20:40], batch.target[20:40])
    with torch.inference_mode():
        metric.update(batch.logits[40:], batch.target[40:])
    torch.testing.assert_close(metric.compute(), expected.compute(), rtol=EXACT, atol=0)
    with torch.inference_mode():
        metric.reset()
    metric.update(batch.logits, batch.target)
    assert torch.equal(metric.compute(), expected.compute())


def test_weights_that_require_a_gradient() -> None:
    batch = problem(60, 4, weighted=True)
    assert batch.sample_weight is not None
    metric, expected = DMI(4), DMI(4)
    expected.update(batch.logits, batch.target, batch.sample_weight)
    metric.update(batch.leaf(), batch.target, batch.sample_weight.clone().requires_grad_())
    assert not metric.joint.requires_grad
    assert torch.equal(metric.compute(), expected.compute())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_probabilities_in_place_of_logits_are_noticed(dtype: torch.dtype) -> None:
    batch = problem(200, 6)
    probs = batch.logits.softmax(1).to(dtype)
    target = batch.target.clone()
    target[0] = -100
    probs[0] = 7  # a row that does not count
    with pytest.warns(UserWarning, match=r'pass DMI\(6, input="probs"\)'):
        DMI(6).update(probs, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = DMI(6, input="probs")
        right.update(probs[:0], target[:0])
        right.update(probs, target)
        logits = DMI(6)
        logits.update(batch.logits.to(dtype), target)
        one = DMI(1)
        one.update(torch.ones(5, 1), torch.zeros(5, dtype=torch.int64))
    assert right.compute().item() == pytest.approx(logits.compute().item(), rel=0.02)


def test_logits_in_place_of_probabilities_are_an_error() -> None:
    batch = problem(200, 6)
    metric = DMI(6, input="probs")
    for rows in (batch.logits, batch.logits.sigmoid()):
        with pytest.raises(ValueError, match=r'DMI\(input="probs"\) takes rows of probabilities.*sums from .* leave out input'):
            metric.update(rows, batch.target)
        assert not metric.joint.any()
    metric.update(batch.logits.softmax(1), batch.target)


def test_looks_at_the_first_batch_alone() -> None:
    """``forward`` resets at every step, and still must not check every step."""
    batch = problem(60, 4)
    metric = DMI(4)
    metric(batch.logits, batch.target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric(batch.logits.softmax(1), batch.target)


def test_the_sign_after_compute_is_that_of_the_score() -> None:
    """Over processes: here a second one whose predictions are permuted, with three times the samples."""
    batch = problem(90, 5)
    other = DMI(5)
    other.update(batch.logits[:, [1, 0, 2, 3, 4]].repeat(3, 1), batch.target.repeat(3))
    theirs = {tuple(state.shape): state for state in (other.joint, other.counts, other.total)}
    metric = DMI(5, dist_sync_fn=lambda state, group: [state, theirs[tuple(state.shape)]], distributed_available_fn=lambda: True)
    metric.update(batch.logits, batch.target)
    assert metric.sign == 1
    both = DMI(5)
    both.update(torch.cat((batch.logits, batch.logits[:, [1, 0, 2, 3, 4]].repeat(3, 1))), batch.target.repeat(4))
    torch.testing.assert_close(metric.compute(), both.compute(), rtol=REORDERED, atol=0)
    assert metric.sign == both.sign == -1
    metric.update(batch.logits, batch.target)
    assert metric.sign == 1
    copied = pickle.loads(pickle.dumps(both))
    assert copied.sign == -1


def test_plot() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    batch = problem(60, 4)
    metric = DMI(4)
    values = [metric(batch.logits, batch.target) for _ in range(3)]
    figure, axis = metric.plot()
    assert axis.get_title() or figure is not None
    _, axis = metric.plot(values)
    assert list(axis.lines[0].get_ydata()) == pytest.approx([value.item() for value in values])


def test_bad_input() -> None:
    batch = problem(20, 5)
    metric = DMI(5)
    with pytest.raises(ValueError, match="for 5 classes, got logits with 6"):
        metric.update(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(IndexError, match="target 5 of sample 0"):
        metric.update(batch.logits, torch.full_like(batch.target, 5))
    assert not metric.joint.any()
    with pytest.raises(ValueError, match="at least 1"):
        DMI(0)
    unusable: list[Any] = [{"logits": batch.logits}, None, [1.0]]
    for wrong in unusable:
        with pytest.raises(TypeError, match="logits must be a floating point tensor, got"):
            metric.update(wrong, batch.target)
        with pytest.raises(TypeError, match="target must be an integer"):
            metric.update(batch.logits, wrong)
        if wrong is not None:
            with pytest.raises(TypeError, match="sample_weight must be a floating point tensor, got"):
                metric.update(batch.logits, batch.target, wrong)
    with pytest.raises(ValueError, match="soft targets must be probabilities"):
        metric.update(batch.logits, -torch.nn.functional.one_hot(batch.target, 5).float())
    assert not metric.joint.any()


def test_numbers_of_numpy() -> None:
    metric = DMI(np.int64(5), ignore_index=np.int16(-1))  # type: ignore[arg-type]
    assert type(metric.num_classes) is int
    assert metric.joint.shape == (5, 5)


def test_a_broken_torchmetrics_is_not_called_missing(tmp_path: Path) -> None:
    package = tmp_path / "torchmetrics"
    package.mkdir()
    (package / "__init__.py").write_text("import a_module_that_is_not_there\n")
    done = subprocess.run(
        [sys.executable, "-c", "import ldmi_fast.metrics"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert "No module named 'a_module_that_is_not_there'" in last
    assert "is installed" in last
    assert "pip install" not in last


def test_without_torchmetrics_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['torchmetrics'] = None; import ldmi_fast.metrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "ImportError: ldmi_fast.metrics needs torchmetrics: pip install torchmetrics" in done.stderr
