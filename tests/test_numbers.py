"""Numbers as options: which types are accepted, and how others are refused."""

# Many arguments here are wrong on purpose.
# mypy: disable-error-code="arg-type, call-arg, attr-defined"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ldmi_fast import DMILoss, JointState, dmi_loss, linear_dmi_loss
from ldmi_fast.options import as_float, as_int, check_num_classes, make_options
from tests.support.problems import problem

LOGITS = torch.zeros(6, 3)
LABELS = torch.arange(6) % 3


def test_numbers_of_any_plain_kind_are_taken() -> None:
    """An int is a fine eps."""
    assert dmi_loss(LOGITS, LABELS, eps=1, cross_entropy_weight=0).item() == pytest.approx(0.0, abs=1e-6)


INTEGERS = [np.int8, np.uint8, np.int16, np.int64, np.uint64]


@pytest.mark.parametrize("kind", INTEGERS, ids=lambda kind: kind.__name__)
def test_integers_of_numpy(kind: Any) -> None:
    batch = problem(40, 5)
    assert dmi_loss(batch.logits, batch.target, ignore_index=kind(3)) == dmi_loss(batch.logits, batch.target, ignore_index=3)
    options = make_options("dmi_loss", {"ignore_index": kind(3), "eps": kind(1)})
    assert (options.ignore_index, options.eps) == (3, 1.0)
    assert (type(options.ignore_index), type(options.eps)) == (int, float)
    found = check_num_classes(kind(5))
    assert (found, type(found)) == (5, int)
    assert type(as_int("size", kind(5))) is int


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble], ids=lambda kind: kind.__name__)
def test_numbers_of_numpy(kind: Any) -> None:
    batch = problem(40, 5)
    value = float(kind(1e-3))
    got = dmi_loss(batch.logits, batch.target, eps=kind(1e-3), cross_entropy_weight=kind(1e-3), normalize=np.bool_(False))
    assert got == dmi_loss(batch.logits, batch.target, eps=value, cross_entropy_weight=value, normalize=False)
    criterion = DMILoss(5, eps=kind(1e-3), normalize=np.bool_(False))
    assert type(criterion.options.eps) is float
    assert criterion.options.normalize is False
    assert repr(value) in repr(criterion)
    assert type(as_float("share", kind(0.5))) is float


def test_numbers_of_numpy_in_every_entry_point() -> None:
    batch = problem(40, 5)
    criterion = DMILoss(np.int64(5), momentum=np.float32(0.9))
    assert (type(criterion.num_classes), type(criterion.momentum)) == (int, float)
    assert criterion.momentum == float(np.float32(0.9))
    assert criterion(batch.leaf(), batch.target).isfinite()
    assert DMILoss.recommended(np.int32(5), np.int64(64)).momentum == DMILoss.recommended(5, 64).momentum
    state = JointState(np.int64(5), eps=np.float32(1e-3))
    state.update(batch.logits, batch.target)
    assert type(state.num_classes) is int
    layer = torch.randn(5, 5)
    assert linear_dmi_loss(batch.logits, layer, batch.target, chunk_size=np.int64(7)) == linear_dmi_loss(
        batch.logits, layer, batch.target, chunk_size=7
    )


@pytest.mark.parametrize("value", [True, np.bool_(True), "3", 3.0, np.float64(3), torch.tensor(3), None], ids=repr)
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(TypeError, match=f"size must be an int, got {type(value).__name__}"):
        as_int("size", value)
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        dmi_loss(LOGITS, LABELS, ignore_index=value)


@pytest.mark.parametrize("value", [True, np.bool_(True), "3", 3j, np.complex64(3), torch.tensor(3.0), np.ones(1), None], ids=repr)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"share must be a float \(unit\), got {type(value).__name__}"):
        as_float("share", value, "unit")
    with pytest.raises(TypeError, match="eps must be a float"):
        dmi_loss(LOGITS, LABELS, eps=value)


def test_a_number_that_no_float_holds() -> None:
    with pytest.raises(ValueError, match="eps must be finite"):
        dmi_loss(LOGITS, LABELS, eps=10**400)
