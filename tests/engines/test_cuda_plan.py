"""The plan of the CUDA engine, which is arithmetic on a shape and a device's limits and needs no GPU: every regime's edges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from ldmi_fast import ops
from ldmi_fast.engines import choose, native
from ldmi_fast.options import Options

pytestmark = pytest.mark.skipif(ops.compiled is None, reason=ops.why_not_compiled)

SM_90 = {
    "sms": 132,
    "smem_block": 227 * 1024,
    "smem_sm": 228 * 1024,
    "l2": 50 << 20,
    "capability": 90,
    "cooperative": True,
    "clusters": 16,
}
#: The limits of devices, as ``cuda_plan`` takes them.
DEVICES = {
    "sm_80": SM_90 | {"sms": 108, "smem_block": 163 * 1024, "smem_sm": 164 * 1024, "l2": 40 << 20, "capability": 80, "clusters": 0},
    "sm_89": SM_90 | {"sms": 142, "smem_block": 99 * 1024, "smem_sm": 100 * 1024, "l2": 96 << 20, "capability": 89, "clusters": 0},
    "sm_90": SM_90,
    "no clusters": SM_90 | {"clusters": 0},
    "sm_120": SM_90 | {"sms": 188, "smem_block": 99 * 1024, "smem_sm": 100 * 1024, "l2": 128 << 20, "capability": 120, "clusters": 20},
    "staged": SM_90 | {"cooperative": False},
}
#: The most classes that one block factors, and a grid: 8 columns of 2048 rows do not fit in the 99 KB of a block, but in a cluster.
ONE_BLOCK = {"sm_80": 144, "sm_89": 112, "sm_90": 170, "no clusters": 170, "sm_120": 112, "staged": 170}
GRID = {"sm_80": 2048, "sm_89": 1548, "sm_90": 4096, "no clusters": 2048, "sm_120": 4096, "staged": 170}


def plan(rows: int, classes: int, device: str = "sm_90", *, soft: bool = False, value_bytes: int = 4) -> dict[str, Any]:
    return ops.compiled.cuda_plan(rows, classes, classes, soft, value_bytes, False, DEVICES[device])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({name: value for name, value in SM_90.items() if name != "l2"}, "limits must have l2"),
        (SM_90 | {"l3": 0}, "unknown entries"),
    ],
)
def test_limits_are_named(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.compiled.cuda_plan(10, 2, 2, False, 4, False, limits)


def last_before(changes: Callable[[int], bool], low: int, high: int) -> int:
    """The largest value in low..high-1 before ``changes`` turns true, which it does once."""
    assert not changes(low)
    assert changes(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if changes(middle) else (middle, high)
    return low


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [1, 2, 14, 32, 64])
def test_one_launch_by_elements(device: str, classes: int) -> None:
    if device in ("sm_89", "sm_120") and classes == 64:
        pytest.skip("V and the matrix do not fit in its shared memory: see test_small_shared_memory")
    elements, most_classes = ops.compiled.cuda_fused_limits()
    assert classes <= most_classes
    last = elements // classes
    assert plan(last, classes, device)["kernels"] == ["fused (joint, logdet_inverse, logits_grad: one launch)"]
    assert len(plan(last + 1, classes, device)["kernels"]) == 3


def test_small_shared_memory() -> None:
    """99 KB hold V and the matrix of 64 classes with few rows only."""
    elements, _ = ops.compiled.cuda_fused_limits()
    assert len(plan(elements // 64, 64, "sm_89")["kernels"]) == 3
    assert len(plan(elements // 64, 64, "sm_90")["kernels"]) == 1


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_one_launch_by_classes(device: str) -> None:
    elements, classes = ops.compiled.cuda_fused_limits()
    rows = elements // (classes + 1)
    assert len(plan(rows, classes, device)["kernels"]) == 1
    assert len(plan(rows, classes + 1, device)["kernels"]) == 3


def test_one_launch_not_in_half_precision_nor_for_soft_targets() -> None:
    assert len(plan(256, 14, value_bytes=2)["kernels"]) == 3
    assert len(plan(256, 14, soft=True)["kernels"]) == 3


def test_clothing1m_is_one_launch_everywhere() -> None:
    for device in DEVICES:
        for value_bytes in (4, 8):
            assert len(plan(256, 14, device, value_bytes=value_bytes)["kernels"]) == 1


def test_factor() -> None:
    """A warp up to 32 classes, a block up to the size of its shared memory, a grid up to 2048 classes, or 4096 with clusters, if its
    panels fit, and the LU path above."""
    for device, most in ONE_BLOCK.items():

        def factor(classes: int, device: str = device) -> str:
            return plan(10**6, classes, device)["kernels"][1]

        def differs(words: str, classes: int) -> bool:
            return words not in factor(classes)

        assert last_before(partial(differs, "one warp"), 1, 64) == 32
        assert last_before(partial(differs, "one block"), 33, 1000) == most
        assert last_before(lambda classes: not differs("torch", classes), 33, 10000) == GRID[device]
        assert ("all multiprocessors" in factor(most + 1)) is (device != "staged")
        assert f"at most {most} classes" in plan(10**6, most + 1, device)["reason"]


@pytest.mark.parametrize("device", DEVICES)
def test_the_forward_is_one_launch_for_few_classes(device: str) -> None:
    """If the device has cooperative grids; otherwise the reason says so. Soft targets take separate launches."""

    def one_launch(classes: int) -> bool:
        return plan(10**6, classes, device)["regime"].startswith("forward in one launch")

    if device == "staged":
        assert not any(one_launch(classes) for classes in (1, 14, 16, 17))
        assert "no cooperative launch" in plan(10**6, 14, device)["reason"]
    else:
        assert last_before(lambda classes: not one_launch(classes), 1, 1000) == 16
        assert "cooperative" not in plan(10**6, 14, device)["reason"]
    assert plan(10**6, 14, device, soft=True)["regime"].startswith("staged")


@pytest.mark.parametrize(
    ("classes", "least", "columns"),
    [
        pytest.param(
            1000, 8 * 1004 * 8 + 8 * 12 * 8 + 1312 + 8 * 4, "one block eliminates panels of 8 columns", id="one block, 8 columns"
        ),
        # the update blocks process 16 columns at a time, and copy the entries of these columns in the pivot rows
        pytest.param(
            4096,
            16 * 516 * 8 + 16 * 20 * 8 + 2624 + 16 * 4,
            "a cluster of 8 blocks eliminates panels of 16 columns",
            id="a cluster, 16",
        ),
    ],
)
def test_small_shared_memory_takes_the_library(classes: int, least: int, columns: str) -> None:
    below, enough = (
        ops.compiled.cuda_plan(10**6, classes, classes, False, 4, False, SM_90 | {"smem_block": smem, "smem_sm": smem})
        for smem in (least - 1, least)
    )
    assert "torch" in below["kernels"][1]
    assert f"and not even a panel of {columns.split()[-2]} columns fits" in below["reason"]
    assert "all multiprocessors" in enough["kernels"][1]
    assert columns in enough["reason"]


@pytest.mark.parametrize(
    ("device", "classes", "panel"),
    [
        ("sm_90", 171, 32),
        ("sm_90", 1000, 24),
        ("sm_90", 1024, 24),
        ("no clusters", 2048, 8),
        ("sm_80", 1000, 16),
        ("sm_89", 1000, 8),
        ("sm_89", 1548, 8),
    ],
)
def test_a_panel_is_what_shared_memory_holds(device: str, classes: int, panel: int) -> None:
    assert f"one block eliminates panels of {panel} columns" in plan(10**6, classes, device)["reason"]


@pytest.mark.parametrize(
    ("device", "classes", "panel"), [("sm_90", 1025, 32), ("sm_90", 4096, 32), ("sm_120", 1025, 32), ("sm_120", 4096, 16)]
)
def test_a_cluster_shares_a_panel(device: str, classes: int, panel: int) -> None:
    assert f"a cluster of 8 blocks eliminates panels of {panel} columns" in plan(10**6, classes, device)["reason"]
    assert "cluster" not in plan(10**6, 1024, device)["reason"]


def test_one_cluster_is_none() -> None:
    """It would be all of the grid."""
    one, two = (ops.compiled.cuda_plan(10**6, 2048, 2048, False, 4, False, SM_90 | {"clusters": clusters}) for clusters in (1, 2))
    assert "cluster" not in one["reason"]
    assert "a cluster of 8 blocks" in two["reason"]


@pytest.mark.parametrize("device", DEVICES)
def test_joint_order(device: str) -> None:
    assert last_before(lambda c: "label order" in plan(10**6, c, device)["kernels"][0], 1, 5000) == 32
    assert plan(10**6, 65, device, soft=True)["kernels"][0] == "joint (soft targets)"


def test_plan_is_bounded() -> None:
    """Scratch memory stays within the goal where the factorisation is our own: 5 % of the gradient, 16 bytes for each entry of S
    and each row, 4 MiB. That includes S and V themselves, 16 bytes per entry."""
    for rows in (0, 1, 100, 10**4, 10**6, 10**8):
        for classes in (1, 10, 64, 65, 128, 170):
            for soft in (False, True):
                for value_bytes in (2, 4, 8):
                    found = plan(rows, classes, soft=soft, value_bytes=value_bytes)
                    allowed = 0.05 * rows * classes * value_bytes + 1.05 * (16 * classes**2 + 16 * rows) + 4 * 2**20
                    needed = found["workspace_bytes"] + 16 * classes**2
                    assert needed <= allowed, (rows, classes, soft, value_bytes, found)


@pytest.mark.parametrize("classes", [171, 1000, 1024, 1025, 2048, 2049, 4096, 10000])
def test_large_plan_is_bounded(classes: int) -> None:
    """V and one more matrix, no more than the goal. The grid factors in the memory of V, with S in the workspace; the LU path factors
    in the memory of S, which becomes V, with its solutions in the workspace."""
    for rows in (0, 100, 10**4, 10**6):
        found = plan(rows, classes)
        allowed = 0.05 * rows * classes * 4 + 1.05 * (16 * classes**2 + 16 * rows) + 4 * 2**20
        assert found["workspace_bytes"] + 8 * classes**2 <= allowed, (rows, found)


# --- the choice, on machines without a GPU ----------------------------------------------------------------------------------------


def test_forced_without_a_gpu_says_why() -> None:
    with pytest.raises(RuntimeError, match="engine 'cuda' was asked for and cannot run: it has kernels for NVIDIA GPUs, and the"):
        choose.choose_name(torch.device("cpu"), Options(engine="cuda"))
    with pytest.raises(RuntimeError, match="engine 'cpu' was asked for and cannot run: it has kernels for the CPU, and the log"):
        choose.choose_name(torch.device("cuda"), Options(engine="cpu"))


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "DEVICES", ("cpu",))
    assert "built without CUDA kernels" in choose.why_not("cuda", torch.device("cuda"))


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80 90a 100 120", (8, 0), True),
        ("80 90a 100 120", (8, 9), True),  # 8.0's machine code
        ("80 90a 100 120", (9, 0), True),
        ("80 90a 100 120", (7, 5), False),
        ("80 90a 100 120", (10, 3), True),
        ("80 90a 100 120", (11, 0), False),  # neither machine code nor older PTX
        ("80 90a 100 120", (12, 1), True),
        ("80 90a 100 120", (13, 0), True),  # PTX
        ("90a", (9, 0), True),
        ("90a", (8, 0), False),
        ("90a", (10, 0), True),
        ("120", (10, 0), False),
    ],
)
def test_architectures(monkeypatch: pytest.MonkeyPatch, archs: str, capability: tuple[int, int], runs: bool) -> None:
    class Built:
        cuda_archs = archs

    monkeypatch.setattr(ops, "compiled", Built)
    reason = native._architecture_missing(*capability)
    assert (reason == "") is runs
    if not runs:
        assert "{}.{}".format(*capability) in reason
        assert archs.split()[0] in reason
