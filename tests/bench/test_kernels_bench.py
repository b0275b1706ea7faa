"""The kernel benchmark: its peers compute what they claim, its timer interleaves, its gate fails when it should."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.kernels import cases, check, measure, run
from bench.kernels.cases import LARGE_ROWS, Batch, Shape, make_batches, parse_shapes
from bench.kernels.interleave import Quantiles, interleave
from bench.kernels.peers import PEERS, PUBLISHED_EPS, Peer, index_add_slogdet, published
from bench.kernels.results import load_result, parse_result, write_atomic

from .synthetic import around, record, result_text

EAGER = [peer for peer in PEERS.values() if not peer.compiled]
CASES = [Shape(200, 2), Shape(256, 14), Shape(500, 100)]


def reference(batch: Batch) -> tuple[float, np.ndarray]:
    """-log|det U| and its gradient in float64 numpy, from the definition."""
    logits = batch.detached.double().numpy()
    target = batch.target.numpy()
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    onehot = np.eye(logits.shape[1])[target]
    joint = onehot.T @ probs
    loss = logits.shape[1] * np.log(len(target)) - np.linalg.slogdet(joint)[1]
    rows = np.linalg.inv(joint).T[target]
    return float(loss), -probs * (rows - (probs * rows).sum(1, keepdims=True))


def loss_and_gradient(peer: Peer, batch: Batch) -> tuple[float, np.ndarray]:
    loss = peer.loss(batch.logits, batch.target)
    (gradient,) = torch.autograd.grad(loss, batch.logits)
    return loss.item(), gradient.numpy()


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("peer", [peer for peer in EAGER if peer.dmi], ids=lambda peer: peer.name)
def test_peers_compute_the_loss(peer: Peer, shape: Shape) -> None:
    (batch,) = make_batches(shape)
    expected_loss, expected_gradient = reference(batch)
    loss, gradient = loss_and_gradient(peer, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-4 * np.abs(expected_gradient).max())


@pytest.mark.parametrize("normalize", [True, False])
def test_published_formula(normalize: bool) -> None:
    # few classes: the determinant is within float32's range and not negligible next to the constant
    (batch,) = make_batches(Shape(120, 3))
    plain, expected_gradient = reference(batch)
    log_det = -plain if normalize else -plain + 3 * np.log(120)
    leaf = batch.logits
    loss = published(leaf, batch.target, normalize=normalize)
    (gradient,) = torch.autograd.grad(loss, leaf)
    det = np.exp(log_det)
    assert loss.item() == pytest.approx(-np.log(det + PUBLISHED_EPS), rel=1e-5)
    np.testing.assert_allclose(
        gradient.numpy(), expected_gradient * det / (det + PUBLISHED_EPS), atol=1e-5 * np.abs(expected_gradient).max()
    )


def test_every_class_is_in_every_batch() -> None:
    batches = make_batches(Shape(16384, 100))
    assert len(batches) * Shape(16384, 100).logits_bytes >= 2**27
    assert all(len(batch.target.unique()) == 100 for batch in batches)
    assert not torch.equal(batches[0].detached, batches[1].detached)
    assert batches[0].detached.data_ptr() == batches[0].logits.data_ptr()


@pytest.mark.parametrize("text", ["256", "256x", "x14", "0x14", "256x1", "256x14x2", "axb"])
def test_shape_that_is_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected ROWSxCLASSES"):
        parse_shapes(text)


class FakeTime:
    """A clock and functions that take made-up times, which drift as on a shared machine."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def function(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            # an hour later everything takes a hundred times as long
            self.now += seconds * (1 + self.now)

        return call


def test_interleaving_keeps_ratios_while_the_machine_slows_down() -> None:
    time = FakeTime()
    functions = {"ours": time.function("ours", 0.01), "peer": time.function("peer", 0.02)}
    timings = interleave(functions, reference="ours", time_cap=100.0, max_rounds=100, clock=time.clock)
    ratio = timings.reference_over("peer")
    seconds = timings.seconds("peer")
    assert ratio.count == 100
    assert ratio.p50 == pytest.approx(0.5, rel=0.03)
    assert seconds.p80 > 1.5 * seconds.p20  # while the times themselves vary widely
    # both orders occur, so that neither always runs after the other
    firsts = set(time.calls[4::2])
    assert firsts == {"ours", "peer"}


def test_slow_peer_gets_its_rounds_but_not_all_the_time() -> None:
    time = FakeTime()
    functions = {"ours": time.function("ours", 1e-4), "slow": time.function("slow", 1e-1)}
    timings = interleave(functions, reference="ours", time_cap=2.0, min_rounds=5, max_rounds=1000, clock=time.clock)
    assert 3 <= len(timings.rounds["slow"]) < len(timings.rounds["ours"]) / 5
    assert set(timings.rounds["slow"]) <= set(timings.rounds["ours"])
    assert timings.inner_calls["ours"] > 1 == timings.inner_calls["slow"]


def test_exact_number_of_rounds() -> None:
    time = FakeTime()
    functions = {"ours": time.function("ours", 1e-3), "slow": time.function("slow", 1.0)}
    timings = interleave(functions, reference="ours", time_cap=0.0, min_rounds=6, max_rounds=6, clock=time.clock)
    assert timings.seconds("ours").count == timings.seconds("slow").count == 6
    with pytest.raises(ValueError, match="min_rounds"):
        interleave(functions, reference="ours", time_cap=0.0, min_rounds=4, max_rounds=3)
    with pytest.raises(ValueError, match="not among the functions"):
        interleave(functions, reference="theirs", time_cap=0.0)


def test_uncompilable_peer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **kwargs: object) -> Callable[[Tensor, Tensor], Tensor]:
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    case = measure.measure(Shape(64, 3), "forward", ("ours", "index_add_compiled"), time_cap=0.0, min_rounds=1, max_rounds=1)
    assert case.unavailable == {"index_add_compiled": "torch.compile failed: RuntimeError: no C++ compiler found"}
    assert set(case.timings.rounds) == {"ours"}


def test_small_shapes_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return index_add_slogdet(logits, target)

    monkeypatch.setitem(PEERS, "index_add", Peer("index_add", "index_add", watched, "watched"))
    monkeypatch.setattr(cases, "WORKING_SET_BYTES", 1)  # one batch is enough here
    with measure.num_threads(2):
        for shape, threads in ((Shape(64, 3), 1), (Shape(LARGE_ROWS, 3), 2)):
            case = measure.measure(shape, "forward", ("ours", "index_add"), time_cap=0.0, min_rounds=1, max_rounds=1)
            assert case.threads == threads
            assert set(seen) == {threads}
            seen.clear()
        assert torch.get_num_threads() == 2


def test_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Tensor, target: Tensor) -> Tensor:
        return index_add_slogdet(logits, target) + 1

    monkeypatch.setitem(PEERS, "index_add", Peer("index_add", "index_add", wrong, "wrong"))
    with pytest.raises(RuntimeError, match="peer 'index_add' gives the loss"):
        measure.measure(Shape(64, 3), "forward", ("ours", "index_add"), time_cap=0.0, min_rounds=1, max_rounds=1)


def test_run_writes_pytest_benchmark_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    options = ["--shapes", "64x3", "--peers", "index_add,cross_entropy", "--rounds", "4", "--out", str(out)]
    assert run.main(options) == 0
    assert "64x3" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = load_result(out)
    assert {(r.direction, r.peer) for r in result.records} == {
        (direction, peer) for direction in ("forward", "forward_backward") for peer in ("ours", "index_add", "cross_entropy")
    }
    assert result.environment["torch"] == torch.__version__
    assert result.environment["threads"] == torch.get_num_threads()
    assert "node" not in result.environment
    for benchmark in json.loads(out.read_text())["benchmarks"]:
        info = Quantiles(**benchmark["extra_info"]["seconds"])
        # pytest-benchmark's own statistics are those of the interleaved timings
        assert benchmark["stats"]["rounds"] == info.count == 4
        assert benchmark["stats"]["median"] == pytest.approx(info.p50)
        assert benchmark["stats"]["min"] <= info.p20 <= info.p80 <= benchmark["stats"]["max"]


def test_partial_run_leaves_the_committed_result_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    committed = tmp_path / "kernels.json"
    monkeypatch.setattr(run, "KERNELS_JSON", committed)
    assert run.main(["--shapes", "64x3", "--peers", "cross_entropy", "--rounds", "1"]) == 0
    assert not committed.exists()


def test_unknown_peer() -> None:
    assert run.main(["--shapes", "64x3", "--peers", "Z", "--rounds", "1"]) != 0


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomic(path, "old")

    def full(source: Path, target: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


SHAPE = Shape(256, 14)


def gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *measured: float, committed: float = 0.5) -> int:
    """The gate's exit status when index_add was ``committed`` and is measured as each of ``measured`` in turn, the rest as before."""
    baseline = tmp_path / "kernels.json"
    names = {"ours": 1.0, "index_add": committed, "cross_entropy": 0.9}
    baseline.write_text(result_text([record(SHAPE, "forward_backward", name, value) for name, value in names.items()]))
    values = iter(measured)

    def fake(*args: object) -> list[object]:
        return [record(SHAPE, "forward_backward", "index_add", next(values)), record(SHAPE, "forward_backward", "cross_entropy", 0.9)]

    monkeypatch.setattr(check, "measure_records", fake)
    status = check.main(["--baseline", str(baseline)])
    assert next(values, None) is None, "the gate measured less often than expected"
    return status


def test_gate_passes_what_is_within_the_margin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gate(monkeypatch, tmp_path, 0.5 * (1 + check.FLOOR) - 1e-6) == 0
    assert gate(monkeypatch, tmp_path, 0.2) == 0


def test_gate_fails_when_it_is_worse_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate(monkeypatch, tmp_path, 1.0, 0.9) == 1
    shown = capsys.readouterr().out
    assert "WORSE" in shown
    assert "0.900" in shown


def test_gate_forgives_a_single_slip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gate(monkeypatch, tmp_path, 1.0, 0.51) == 0


def test_gate_without_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--baseline", str(tmp_path / "none.json")]) == 2
    assert "no result none.json" in capsys.readouterr().out


def test_gate_with_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(result_text([record(Shape(7, 3), "forward_backward", "index_add", 0.5)]))
    assert check.main(["--baseline", str(path)]) == 2
    assert "nothing compared" in capsys.readouterr().out


def test_margin_follows_the_recorded_spread() -> None:
    assert check.noise_margin(around(0.5, 0.01), around(0.5, 0.01), check.FLOOR) == check.FLOOR
    assert check.noise_margin(around(0.5, 0.15), around(0.9, 0.2), check.FLOOR) == pytest.approx(0.5)
    assert check.noise_margin(around(0.5, 0.9), around(0.5, 0.9), check.FLOOR) == check.CEILING


def test_floor_is_wider_on_another_machine() -> None:
    here = {"cpu": "a", "isa": "AVX2", "threads": 2}
    assert check.floor_for(here, dict(here)) == check.FLOOR
    for key, value in (("cpu", "b"), ("isa", "AVX512"), ("threads", 4)):
        assert check.floor_for(here, {**here, key: value}) == check.OTHER_MACHINE_FLOOR


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_committed_result_is_what_git_has(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text("on disk")
    assert check.committed_text(path) == ("on disk", "kernels.json on disk (not committed)")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", path.name), ("commit", "-q", "--no-verify", "-m", "a result")):
        subprocess.run((*git, *command), check=True)
    path.write_text("a newer one, not committed")
    assert check.committed_text(path) == ("on disk", "kernels.json as committed")


def test_broken_result_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"some\.json is not a result"):
        parse_result("{}", "some.json")
