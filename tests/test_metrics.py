"""ldmi_fast.metrics.DMI: the score of a stream of batches."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install .[integrations]")

import torchmetrics

from ldmi_fast import dmi_loss
from ldmi_fast.metrics import DMI
from tests.problems import problem


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


def test_without_torchmetrics_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['torchmetrics'] = None; import ldmi_fast.metrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "ImportError: ldmi_fast.metrics needs torchmetrics: pip install torchmetrics" in done.stderr
