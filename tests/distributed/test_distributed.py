"""group=: several processes give the loss and the update of one. Gloo, 1 to 4 processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldmi_fast import DMILoss, JointState, dmi_loss, joint_matrix, linear_dmi_loss
from tests.distributed import cases
from tests.distributed.pool import SHORT, Pool
from tests.support.compare import DERIVATIVE, EXACT, REORDERED
from tests.support.problems import gradient_of, problem

SIZES = [1, 2, 3, 4]
OPTIONS: list[Any] = [
    pytest.param({}, {}, id="hard"),
    pytest.param({"weighted": True}, {"ignore_index": 1, "cross_entropy_weight": 0.5}, id="weighted-ignore-ce"),
    pytest.param({"soft": True, "weighted": True}, {"eps": 1e-6, "cross_entropy_weight": 0.5}, id="soft-eps-ce"),
    pytest.param({"absent": (2,)}, {"normalize": False}, id="absent-counts"),
    pytest.param({"n": 900, "classes": 70}, {"eps": 1e-2, "normalize": False}, id="in-stages"),
]


def full(build: dict[str, Any]) -> dict[str, Any]:
    return {"n": 100, "classes": 6, "dtype": torch.float64, **build}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_all_ranks_have_the_loss_of_the_whole_batch(
    pool: Pool, engine: str, size: int, build: dict[str, Any], options: dict[str, Any]
) -> None:
    """Uneven parts, with an empty one: the same loss on every rank, and world_size times the gradient of its rows."""
    whole = problem(**full(build))
    logits = whole.leaf()
    target = whole.target.clone().requires_grad_() if whole.target.is_floating_point() else whole.target
    expected = dmi_loss(logits, target, sample_weight=whole.sample_weight, **options)
    expected.backward()
    results = pool.run(size, cases.loss_and_gradient, full(build), {"engine": engine, **options})
    for loss, _, _ in results:
        assert torch.equal(loss, results[0][0])
        torch.testing.assert_close(loss, expected.detach(), rtol=REORDERED, atol=0)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in results]), size * gradient_of(logits), rtol=DERIVATIVE, atol=EXACT)
    if target is not whole.target:
        torch.testing.assert_close(
            torch.cat([grad for _, _, grad in results]), size * gradient_of(target), rtol=DERIVATIVE, atol=EXACT
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"cross_entropy_weight": 0.4, "eps": 1e-6}], ids=str)
def test_gradient_of_sample_weights(pool: Pool, engine: str, size: int, options: dict[str, Any]) -> None:
    whole = problem(100, 6, weighted=True, dtype=torch.float64)
    weight = whole.weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dmi_loss(whole.logits, whole.target, sample_weight=weight, **options), weight)
    assert expected.any()
    for found in zip(*pool.run(size, cases.gradient_of_weights, {"engine": engine, **options}), strict=True):
        # weights, and so their gradient, are fp32: both sides are rounded to it
        torch.testing.assert_close(torch.cat(found), size * expected, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_smoothed_labels_of_a_class_that_no_rank_has(pool: Pool, size: int) -> None:
    results = pool.run(size, cases.smoothed)
    assert any(hard.any() for hard, _ in results)
    for hard, soft in results:
        torch.testing.assert_close(soft, hard, rtol=DERIVATIVE, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(pool: Pool, dtype: torch.dtype) -> None:
    whole = problem(100, 6, dtype=dtype)
    logits = whole.leaf()
    dmi_loss(logits, whole.target).backward()
    results = pool.run(2, cases.loss_and_gradient, {"n": 100, "classes": 6, "dtype": dtype}, {})
    ours = torch.cat([grad for _, grad, _ in results])
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, 2 * gradient_of(logits))


def test_one_graph(pool: Pool, engine: str) -> None:
    """torch.compile(fullgraph=True), the collective inside."""
    build, options = full({"weighted": True}), {"cross_entropy_weight": 0.5, "engine": engine}
    compiled = pool.run(2, cases.loss_and_gradient, build, options, "compiled")
    eager = pool.run(2, cases.loss_and_gradient, build, options)
    for (loss, grad, _), (expected, expected_grad, _) in zip(compiled, eager, strict=True):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad, expected_grad)


def test_fsdp_that_casts_buffers_leaves_the_average_alone(pool: Pool) -> None:
    ((plain, _),) = pool.run(1, cases.cast_by_fsdp, None)
    ((cast, dtype),) = pool.run(1, cases.cast_by_fsdp, torch.bfloat16)
    assert dtype == torch.float64
    assert cast == plain


def test_a_step_is_one_all_reduce(pool: Pool) -> None:
    assert pool.run(2, cases.counts_collectives) == [1, 1]


def test_groups_by_name_and_by_mesh(pool: Pool) -> None:
    whole = problem(100, 5)
    expected = dmi_loss(whole.logits, whole.target).item()
    for losses in pool.run(4, cases.named_groups):
        assert losses == pytest.approx([expected] * 5, rel=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_second_derivatives(pool: Pool, engine: str, size: int) -> None:
    """A gradient penalty: every rank's gradient depends on the rows of all ranks."""
    build = full({"n": 40, "weighted": True})
    options: dict[str, Any] = {"cross_entropy_weight": 0.5, "eps": 1e-4}
    whole = problem(**build)
    logits = whole.leaf()
    loss = dmi_loss(logits, whole.target, sample_weight=whole.sample_weight, **options)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), logits)
    ours = pool.run(size, cases.gradient_penalty, build, {"engine": engine, **options})
    torch.testing.assert_close(torch.cat(ours), expected, rtol=DERIVATIVE, atol=EXACT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("momentum", [None, 0.8])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2", "ddp-with-criterion"])
def test_training_is_that_of_one_process(pool: Pool, size: int, momentum: float | None, wrap: str) -> None:
    if wrap == "fsdp2" and size == 3:
        pytest.skip("the mesh of three of four ranks needs a default group of three")
    if wrap == "ddp-with-criterion" and size != 4:
        pytest.skip("one size is enough to see that DDP may broadcast the buffers")
    expected = cases.train(None, "plain", momentum)
    if wrap == "fsdp2" and size != 4:
        pytest.skip("fully_shard makes its mesh from the default group, which has four ranks")
    for result in pool.run(size, cases.train, wrap, momentum):
        assert result["losses"] == pytest.approx(expected["losses"], rel=REORDERED)
        for ours, theirs in zip(result["parameters"], expected["parameters"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=DERIVATIVE, atol=DERIVATIVE)
        assert set(result["state"]) == set(expected["state"])
        for name, value in result["state"].items():
            torch.testing.assert_close(value, expected["state"][name], rtol=DERIVATIVE, atol=DERIVATIVE)


@pytest.mark.parametrize(("saved_by", "size"), [(4, 1), (1, 4)])
def test_state_dicts_go_from_four_processes_to_one_and_back(pool: Pool, saved_by: int, size: int) -> None:
    state = pool.run(saved_by, cases.train, "ddp", 0.8)[-1]["state"]
    criterion = DMILoss(5, momentum=0.8, cross_entropy_weight=0.3)
    criterion.load_state_dict(state)
    x, y = cases.data(7)
    expected = criterion(cases.network()(x), y).item()
    assert pool.run(size, cases.go_on, state) == pytest.approx([expected] * size, rel=REORDERED)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"cross_entropy_weight": 0.3, "eps": 1e-4, "normalize": False}], ids=["plain", "ce-eps-counts"]
)
def test_joint_state(pool: Pool, size: int, options: dict[str, Any]) -> None:
    x, y = cases.data(0)
    model = cases.network()
    loss = dmi_loss(model(x), y, **options)
    loss.backward()
    for result in pool.run(size, cases.joint_state, options):
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=REORDERED, atol=0)
        for ours, parameter in zip(result["grads"], model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=DERIVATIVE, atol=DERIVATIVE)
        if not options:
            assert result["sum"] == pytest.approx(-5, rel=1e-6)
        assert f"over {size} ranks" in result["repr"]


@pytest.mark.parametrize("size", [1, 3])
def test_linear(pool: Pool, engine: str, size: int) -> None:
    options: dict[str, Any] = {"cross_entropy_weight": 0.5, "engine": engine}
    whole = problem(90, 5, weighted=True, dtype=torch.float64)
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    hidden = whole.leaf()
    expected = linear_dmi_loss(hidden, weight, whole.target, sample_weight=whole.sample_weight, **options)
    expected.backward()
    results = pool.run(size, cases.linear, options)
    assert all(torch.equal(loss, results[0][0]) for loss, _, _ in results)
    torch.testing.assert_close(results[0][0], expected.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in results]), size * gradient_of(hidden))
    torch.testing.assert_close(sum(grad for _, _, grad in results), size * gradient_of(weight))


def test_metric(pool: Pool) -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install .[integrations]")
    whole = problem(90, 5)
    expected = -dmi_loss(whole.logits, whole.target).item()
    assert pool.run(4, cases.metric) == pytest.approx([expected] * 4, rel=1e-6)


def test_calibration_scores_and_reports(pool: Pool) -> None:
    x, y = cases.data(0)
    U = joint_matrix(cases.network()(x).detach(), y)
    for result in pool.run(3, cases.passes_over_data):
        torch.testing.assert_close(result["joint"], U)
        assert result["score"] == pytest.approx(torch.linalg.slogdet(U)[1].item(), rel=REORDERED)
        assert result["report"] == pytest.approx(result["score"], rel=REORDERED)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "classes",
            "ValueError: the ranks of the group do not want the same loss, the number of classes differs: rank 0: 4 classes, rank 1",
        ),
        ("eps", "eps differs: rank 0: eps=0"),
        ("absent", "absent differs: rank 0: "),
        ("momentum", "momentum differs: rank 0: no momentum, rank 1: momentum=0.9"),
        ("state", "the number of classes differs: rank 0: 4 classes, rank 1: 5"),
    ],
)
def test_ranks_with_different_settings_get_an_error(pool: Pool, kind: str, message: str) -> None:
    """On every rank; afterwards the group still works."""
    for rank, (first, then) in enumerate(pool.run(2, cases.mismatch, kind)):
        assert message in first
        assert f"this is rank {rank}" in first
        assert then == "no error: True"


def test_ranks_out_of_step_get_nan(pool: Pool) -> None:
    assert all(value != value for value in pool.run(2, cases.out_of_step))


def test_a_bad_label_on_one_rank(pool: Pool) -> None:
    good, bad = pool.run(2, cases.bad_label)
    assert good == "no error: nan"
    assert bad.startswith("IndexError: target 4 of sample 3")


@pytest.mark.parametrize("when", ["at-once", "later"])
def test_a_rank_that_raises_does_not_leave_the_others_waiting(pool: Pool, when: str) -> None:
    """The other ranks get an error when the group's timeout has passed."""
    (waiting, seconds), (raising, _) = pool.run(None, cases.one_rank_raises, when)
    assert raising.startswith("ValueError: target must have shape")
    assert waiting.startswith("RuntimeError: a rank of the group did not come")
    assert "timeout" in waiting
    assert seconds < SHORT.total_seconds() + 20


def test_bad_groups() -> None:
    batch = problem(20, 4)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed ProcessGroup.*got int: 3"):
        dmi_loss(batch.logits, batch.target, group=3)
    with pytest.raises(ValueError, match=r"'world'.*got 'word'"):
        DMILoss(group="word")
    with pytest.raises(ValueError, match="not a member of the group"):
        DMILoss(group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(RuntimeError, match="init_process_group first"):
        dmi_loss(batch.logits, batch.target, group="world")
    with pytest.raises(TypeError, match=r"JointState\(\) takes no group"):
        JointState(4, group="world")
