"""The plan of the Triton engine at the edge of every regime. It needs neither triton nor a GPU."""

from __future__ import annotations

import pytest

from ldmi_fast.engines.triton import plan


def test_fused() -> None:
    last = plan.FUSED_ELEMENTS // 14
    assert plan.is_fused(last, 14, False, 4)
    assert not plan.is_fused(last + 1, 14, False, 4)
    assert not plan.is_fused(10, plan.FUSED_CLASSES + 1, False, 4)
    assert not plan.is_fused(10, 14, True, 4), "soft targets"
    assert not plan.is_fused(10, 14, False, 2), "half precision: the loss scale must come in before the rounding"
    assert not plan.is_fused(10, 14, False, 8)


def test_joint_regimes() -> None:
    assert plan.joint(1000, plan.TILE_CLASSES, plan.TILE_CLASSES, False, 4, 32).regime == "tile"
    assert plan.joint(1000, plan.TILE_CLASSES + 1, plan.TILE_CLASSES + 1, False, 4, 32).regime == "label"
    assert plan.joint(1000, plan.TILE_CLASSES + 1, plan.TILE_CLASSES + 1, True, 4, 32).regime == "soft"
    assert plan.joint(1000, 10, plan.TILE_CLASSES + 1, False, 4, 32).regime == "label", "several problems in one"
    for value_bytes, longest in ((2, 4096), (4, 4096), (8, 2048)):
        assert not plan.joint(1000, longest, longest, False, value_bytes, 1).long
        assert plan.joint(1000, longest + 1, longest + 1, False, value_bytes, 1).long


@pytest.mark.parametrize("block_rows", [16, 32, 128])
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 64, 65, 2048, 65536, 65537, 10**6, 10**9])
@pytest.mark.parametrize("classes", [1, 14, 64, 65, 1000, 5000])
def test_every_row_is_in_one_program(rows: int, classes: int, block_rows: int) -> None:
    how = plan.joint(rows, classes, classes, False, 4, block_rows)
    assert how.programs >= 1
    assert how.programs <= plan.PROGRAMS
    assert how.programs * how.rows >= rows
    if how.regime == "tile":
        assert how.rows % block_rows == 0


def test_logits_grad_regimes() -> None:
    assert plan.logits_grad(1000, 128, 128, False, 4).table is False
    assert plan.logits_grad(1000, 129, 129, False, 4).table is True
    assert plan.logits_grad(1000, 64, 64, True, 4).regime == "rows"
    assert plan.logits_grad(1000, 65, 65, True, 4).regime == "soft"
    assert plan.logits_grad(10**5, 2896, 2896, False, 4).ordered is False
    assert plan.logits_grad(10**5, 2897, 2897, False, 4).ordered is True
    assert plan.logits_grad(5000, 2897, 2897, False, 4).ordered is False, "too few rows share a row of V"
    assert plan.logits_grad(1000, 4096, 4096, False, 4).regime == "rows"
    assert plan.logits_grad(1000, 4097, 4097, False, 4).regime == "long"


def test_keys_of_16_bits_hold_all_labels_and_two_more() -> None:
    assert plan.key_bytes(2**15 - 3) == 2
    assert plan.key_bytes(2**15 - 2) == 4


def test_widths() -> None:
    assert [plan.power_of_two(n) for n in (1, 2, 3, 4, 5, 1000, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 1024, 2048]
    assert [plan.tile_width(n) for n in (1, 16, 17, 64)] == [16, 16, 32, 64]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("value_bytes", [2, 4, 8])
@pytest.mark.parametrize("classes", [2, 14, 64, 65, 1000, 5000, 10**4])
def test_scratch_memory_is_bounded(classes: int, value_bytes: int, soft: bool) -> None:
    """Small compared with the gradient, the C x C matrices, and a few numbers per row."""
    for rows in (1, 100, 10**4, 10**6):
        found = plan.explain(rows, classes, soft, value_bytes, 32)
        blocks = 3 * plan.SOFT_BLOCK_BYTES if soft else 0
        allowed = 0.05 * rows * classes * value_bytes + 40 * classes**2 + 48 * rows + 5 * 2**20 + blocks
        assert found.workspace_bytes <= allowed, (rows, found)
        assert found.reason
        assert len(found.kernels) in (1, 3)
