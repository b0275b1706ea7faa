"""JointState: two passes over micro-batches give the loss and the gradients of one big batch."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldmi_fast import JointState, RNGReplay, dmi_loss, dmi_score, joint_matrix
from tests.support.compare import DERIVATIVE, EXACT, REORDERED, Result, assert_matches
from tests.support.problems import Problem, gradient_of, problem

OPTIONS: list[Any] = [
    pytest.param({}, {}, id="hard"),
    pytest.param({"weighted": True}, {"ignore_index": 1, "cross_entropy_weight": 0.5}, id="weighted-ignore-ce"),
    pytest.param({"soft": True, "weighted": True}, {"eps": 1e-6, "cross_entropy_weight": 0.5}, id="soft-eps-ce"),
    pytest.param({"absent": (2,)}, {"normalize": False}, id="absent-counts"),
    pytest.param({}, {"input": "probs"}, id="probs"),
]


def rows(batch: Problem, sizes: list[int]) -> list[Any]:
    weights = [None] * len(sizes) if batch.sample_weight is None else batch.sample_weight.split(sizes)
    return list(zip(batch.logits.split(sizes), batch.target.split(sizes), weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_is_one_big_batch(
    engine: str, device: torch.device, build: dict[str, Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Micro-batches of any size, one of them empty; most lack some class."""
    whole = problem(120, 7, dtype=dtype, **build)
    if options.get("input") == "probs":
        whole = Problem(whole.logits.softmax(1), whole.target, whole.sample_weight)
    here = whole.to(device=device)
    micro = rows(here, [3, 40, 0, 76, 1])
    state = JointState(7, engine=engine, **options)
    for part in micro:
        state.update(*part)
    solution = state.solve()
    answer = whole.answer(**options)
    assert solution.sign.item() == answer.sign
    assert solution.kept.item() == answer.kept
    assert solution.log_abs_det.item() == pytest.approx(answer.log_abs_det, rel=1e-6 if dtype == torch.float32 else REORDERED)
    grads, total = [], 0.0
    for logits, *rest in micro:
        leaf = logits.clone().requires_grad_()
        loss = state.loss(leaf, *rest)
        assert loss.dtype == dtype
        loss.backward()
        total += loss.item()
        grads.append(gradient_of(leaf))
    assert_matches(Result(solution.loss.to(dtype), torch.cat(grads), None), answer, dtype)
    ce = answer.loss + answer.log_abs_det if "cross_entropy_weight" in options and "eps" not in options else 0.0
    if "eps" not in options:
        assert total == pytest.approx(ce - answer.kept, rel=1e-5)


def test_targets_get_their_gradient(engine: str, device: torch.device) -> None:
    whole = problem(60, 5, soft=True, weighted=True, dtype=torch.float64)
    here = whole.to(device=device)
    state = JointState(5, engine=engine)
    state.update(here.logits, here.target, here.sample_weight)
    state.solve()
    target = here.target.clone().requires_grad_()
    state.loss(here.logits, target, here.sample_weight).backward()
    answer = whole.answer()
    assert answer.target_grad is not None
    torch.testing.assert_close(gradient_of(target).cpu(), torch.from_numpy(answer.target_grad), rtol=DERIVATIVE, atol=DERIVATIVE)


@pytest.mark.parametrize("kind", ["empty", "ignored", "singular", "strict"])
def test_edge_cases(engine: str, device: torch.device, kind: str) -> None:
    batch = problem(40, 5, dtype=torch.float64, absent=(1,) if kind == "strict" else ()).to(device=device)
    state = JointState(5, absent="strict" if kind == "strict" else "present", engine=engine, device=device)
    logits = (torch.zeros_like(batch.logits) if kind == "singular" else batch.logits).requires_grad_()
    target = torch.full_like(batch.target, -100) if kind == "ignored" else batch.target
    if kind != "empty":
        state.update(logits, target)
    assert state.solve().loss.item() == (0 if kind in ("empty", "ignored") else torch.inf)
    state.loss(logits, target).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_dropout_is_replayed() -> None:
    """With the replay the second pass sees the same outputs: the gradient is that of one batch with these masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 5)).double()
    x, y = torch.randn(90, 6, dtype=torch.float64), torch.arange(90) % 5
    micro = list(zip(x.split(30), y.split(30), strict=True))
    state, replay = JointState(5), RNGReplay()
    outputs = []
    for xs, ys in micro:
        with torch.no_grad(), replay.record():
            outputs.append(model(xs))
            state.update(outputs[-1], ys)
    state.solve()
    before = torch.get_rng_state()
    for (xs, ys), first in zip(micro, outputs, strict=True):
        with replay.play():
            logits = model(xs)
        assert torch.equal(logits, first)
        state.loss(logits, ys).backward()
    assert torch.equal(torch.get_rng_state(), before)
    grads = [gradient_of(p).clone() for p in model.parameters()]
    model.zero_grad()
    again = RNGReplay()
    again._recorded = replay._recorded  # the same masks again, in one graph
    logits = []
    for xs, _ in micro:
        with again.play():
            logits.append(model(xs))
    dmi_loss(torch.cat(logits), y).backward()
    for ours, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=DERIVATIVE, atol=DERIVATIVE)
    with pytest.raises(RuntimeError, match=r"play\(\) called 4 times, but record\(\) only 3 times"), replay.play():
        pass


def filled(seed: int, **options: Any) -> JointState:
    state = JointState(6, **options)
    batch = problem(50, 6, seed=seed, dtype=torch.float64)
    state.update(batch.logits, batch.target)
    return state


def test_merge() -> None:
    both = filled(0).merge(filled(1)).merge(JointState(6)).solve()
    batches = [problem(50, 6, seed=seed, dtype=torch.float64) for seed in (0, 1)]
    whole = torch.cat([b.logits for b in batches]), torch.cat([b.target for b in batches])
    torch.testing.assert_close(both.loss, dmi_loss(*whole))
    torch.testing.assert_close(JointState(6).merge(filled(1)).solve().loss, filled(1).solve().loss)
    with pytest.raises(ValueError, match="a state of 5 classes into one of 6"):
        filled(0).merge(JointState(5))
    with pytest.raises(ValueError, match=r"different options: eps=0\.0 here, 0\.001 there"):
        filled(0).merge(JointState(6, eps=1e-3))
    with pytest.raises(TypeError, match="takes a JointState, got dict"):
        filled(0).merge({})  # type: ignore[arg-type]


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "joint.pt"
    state = filled(0, eps=1e-3, cross_entropy_weight=0.25)
    state.save(path)
    state.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["joint.pt"]
    loaded = JointState.load(path)
    assert loaded.options == state.options
    assert torch.equal(loaded.solve().loss, state.solve().loss)
    loaded.merge(filled(1, eps=1e-3, cross_entropy_weight=0.25))
    JointState(6).save(path)
    assert JointState.load(path).solve().loss == 0
    with pytest.raises(FileNotFoundError):
        JointState.load(tmp_path / "nothing.pt")
    (tmp_path / "other.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"not a file that JointState\.save wrote"):
        JointState.load(tmp_path / "other.pt")
    torch.save({"format": "ldmi_fast.JointState", "version": 99}, tmp_path / "later.pt")
    with pytest.raises(ValueError, match="format version 99"):
        JointState.load(tmp_path / "later.pt")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "joint.pt"
    filled(0).save(path)
    before = path.read_bytes()

    def broken(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        filled(1).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["joint.pt"]


def test_order_of_calls() -> None:
    state = filled(0)
    batch = problem(50, 6)
    with pytest.raises(RuntimeError, match=r"call solve\(\) after the first pass"):
        state.loss(batch.logits, batch.target)
    state.solve()
    state.update(batch.logits, batch.target)
    with pytest.raises(RuntimeError, match=r"call solve\(\) after the first pass"):
        state.loss(batch.logits, batch.target)
    state.reset()
    assert repr(state) == "JointState(6, empty)"
    assert state.solve().loss == 0


def test_bad_arguments() -> None:
    batch = problem(50, 6)
    with pytest.raises(TypeError, match="num_classes must be an int, got str"):
        JointState("6")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        JointState(0)
    with pytest.raises(TypeError, match="did you mean 'absent'"):
        JointState(6, absnt="present")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="for 5 classes, got logits with 6"):
        JointState(5).update(batch.logits, batch.target)
    state = filled(0)
    before = state.sums.S.clone()
    with pytest.raises(IndexError, match="target 6 of sample 0"):
        state.update(batch.logits, torch.full_like(batch.target, 6))
    assert torch.equal(state.sums.S, before)


def test_score_of_a_data_set(engine: str, device: torch.device) -> None:
    """Noise moves the score of every model by the same constant."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 4, dtype=torch.float64).to(device), torch.arange(200, device=device) % 4
    noise = 0.6 * torch.eye(4, dtype=torch.float64, device=device) + 0.1
    clean: list[float] = []
    noisy: list[float] = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).double().to(device)
        for scores, target in ((clean, y), (noisy, noise[y])):
            solution = dmi_score(model, [(x[:120], target[:120]), (x[120:], target[120:])], 4, engine=engine)
            scores.append(solution.log_abs_det.item())
        assert model.training
        model.eval()
        expected = torch.linalg.slogdet(joint_matrix(model(x).detach(), y))[1].item()
        assert clean[-1] == pytest.approx(expected, rel=REORDERED)
    shift = torch.linalg.slogdet(noise)[1].item()
    assert noisy == pytest.approx([value + shift for value in clean], rel=REORDERED)


def test_inference_mode_and_outside(engine: str, device: torch.device, tmp_path: Path) -> None:
    """Whichever call is made inside inference_mode, the state consists of ordinary tensors."""
    first, second = (problem(60, 5, seed=seed, dtype=torch.float64).to(device=device) for seed in (0, 1))
    logits = torch.cat((first.logits, second.logits))
    target = torch.cat((first.target, second.target))
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dmi_loss(leaf, target, engine=engine), leaf)
    for outside in (False, True):
        state, other = JointState(5, engine=engine), JointState(5, engine=engine)
        with torch.inference_mode():
            state.update(first.logits, first.target)
            other.update(second.logits, second.target)
            empty = JointState(5, engine=engine, device=device).sums
        if outside:
            state.merge(other)
            solution = state.solve()
        else:
            with torch.inference_mode():
                state.merge(other)
                solution = state.solve()
        assert not solution.V.is_inference()
        assert not empty.S.is_inference()
        leaf = logits.clone().requires_grad_()
        (found,) = torch.autograd.grad(state.loss(leaf, target), leaf)
        torch.testing.assert_close(found, expected)
        with torch.inference_mode():
            state.save(tmp_path / "state")
            read = JointState.load(tmp_path / "state", engine=engine, device=device)
        read.update(first.logits, first.target)
        assert read.sums.total.item() == 180


def test_gradient_of_sample_weights(engine: str, device: torch.device) -> None:
    for options in ({}, {"eps": 1e-5, "cross_entropy_weight": 0.4}, {"normalize": False}, {"absent": "strict"}):
        batch = problem(90, 5, weighted=True, absent=(2,) if "absent" in options else (), dtype=torch.float64).to(device=device)
        weight = batch.weight.double().requires_grad_()
        loss = dmi_loss(batch.logits, batch.target, sample_weight=weight, engine=engine, **options)
        (expected,) = torch.autograd.grad(loss, weight)
        assert expected.any() or "absent" in options
        state = JointState(5, engine=engine, **options)
        parts = [slice(0, 30), slice(30, 90)]
        for rows in parts:
            state.update(batch.logits[rows], batch.target[rows], weight[rows])
        assert not state.sums.total.requires_grad
        state.solve()
        total = torch.stack([state.loss(batch.logits[rows], batch.target[rows], weight[rows]) for rows in parts]).sum()
        torch.testing.assert_close(torch.autograd.grad(total, weight)[0], expected, rtol=DERIVATIVE, atol=EXACT)
        plain = torch.stack([state.loss(batch.logits[rows], batch.target[rows], weight[rows].detach()) for rows in parts]).sum()
        torch.testing.assert_close(total, plain)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_usual_permissions(tmp_path: Path, umask: int) -> None:
    state = JointState(3)
    before = os.umask(umask)
    try:
        state.save(tmp_path / "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask
    os.chmod(tmp_path / "new", 0o640)
    state.save(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need rights elsewhere")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    target, link = folder / "state", tmp_path / "latest"
    JointState(3).save(target)
    link.symlink_to(target)
    state = JointState(3)
    state.update(torch.randn(9, 3), torch.arange(9) % 3)
    state.save(link)
    assert link.is_symlink()
    for path in (link, target):
        assert JointState.load(path).sums.total.item() == 9
    assert [path.name for path in folder.iterdir()] == ["state"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    JointState(3).save(path)

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    state = JointState(4)
    with pytest.raises(OSError, match="no space left"):
        state.save(path)
    monkeypatch.undo()
    assert JointState.load(path).num_classes == 3
    assert [found.name for found in tmp_path.iterdir()] == ["state"]


@pytest.mark.skipif(os.name != "posix", reason="a named pipe is POSIX")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a device or another special file")):
        with pytest.raises(OSError, match=f"is {kind}, and cannot be replaced by a file"):
            JointState(3).save(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_load_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JointState.load(tmp_path / "nowhere")
