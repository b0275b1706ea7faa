"""The GPU benchmark without a GPU: the model, results, the report, verified sources, and the script that runs the parts."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as bench_main
from bench.gpu import cases, floor, goals, machine, measure, report, results, sanitize, summary, verified
from bench.gpu.cases import Case
from bench.gpu.clocks import Clocks
from bench.gpu.results import CLOCKS, Launches, Peak, Result, Row
from bench.kernels.interleave import interleave
from bench.kernels.peers import PEERS
from bench.logdet import Size, joint_like
from bench.reporting import Outcome

from .synthetic import around

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "bench" / "gpu" / "run.sh"
MACHINE: dict[str, Any] = {
    "gpu": {"name": "Made-up GPU", "capability": "9.0", "multiprocessors": 100, "memory_bytes": 2**36, "l2_bytes": 2**25, "count": 1},
    "nvidia_smi": {"driver_version": "1.2.3", "clocks.sm": "1000 MHz", "clocks.mem": "2000 MHz"},
    "python": "3.12.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "nvcc": "release 13.0",
    "ldmi_fast": "0.0.0",
    "source_hash": "0123456789abcdef",
    "engine": "cuda",
}
COPY_BYTES = 2**28
BANDWIDTH = 2e12
SMALL, LARGE, HUGE = Case(256, 14), Case(65536, 100), Case(1048576, 100)


# --- the model ----------------------------------------------------------------------------------------------------------


def test_model_of_a_pass_over_memory() -> None:
    part = floor.floor(65536, 100, 4, "joint")
    assert part.launches == 1
    assert part.bytes == 65536 * (400 + 8 + 4) + 80_000
    assert part.seconds(2e12) == pytest.approx(1.24e-6 + part.bytes / 2e12)
    assert floor.floor(65536, 100, 2, "logits_grad").bytes == 65536 * (400 + 8 + 4) + 80_000


def test_model_of_the_whole_is_that_of_its_halves() -> None:
    for rows, classes in ((256, 14), (65536, 100), (65536, 1000)):
        forward, backward, both = (floor.floor(rows, classes, 4, part) for part in ("forward", "backward", "forward_backward"))
        assert both.seconds(3e12) == pytest.approx(forward.seconds(3e12) + backward.seconds(3e12))
        assert forward.seconds(3e12) - forward.seconds(3e12, factorisation=False) == pytest.approx(floor.factorise_seconds(classes))
    assert floor.floor(256, 14, 4, "forward").launches == 1
    assert floor.floor(65536, 1000, 4, "forward").launches > 1


def test_factorisation_between_what_is_known() -> None:
    for classes, seconds in floor.LU_SECONDS.items():
        assert floor.factorise_seconds(classes) == pytest.approx(seconds)
    counts = [2, 3, 14, 20, 100, 150, 1000, 2048, 4096, 10000, 20000]
    times = [floor.factorise_seconds(count) for count in counts]
    assert times == sorted(times)
    assert floor.factorise_seconds(20000) == pytest.approx(8 * floor.factorise_seconds(10000))
    assert floor.factorise_seconds(1) == 0
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        floor.floor(2, 2, 4, "joint").seconds(0.0)


# --- shapes and clocks --------------------------------------------------------------------------------------------------


def test_shapes_on_the_command_line() -> None:
    assert Case.parse("65536x100") == Case(65536, 100, "float32", compiled=True)
    assert Case.parse("256x14:bf16").torch_dtype == torch.bfloat16
    assert str(Case.parse("256x14:float64")) == "256x14:fp64"
    for text in ("256", "256x14:int8", "0x3", "256x1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected ROWSxCLASSES"):
            Case.parse(text)


def test_batches_outgrow_the_cache_or_stay_in_it() -> None:
    l2 = 50 * 2**20
    for case in cases.CASES:
        count = cases.batch_count(case, l2)
        if case.logits_bytes <= cases.HOT_BYTES:
            assert count == 1
        else:
            assert count * case.logits_bytes > 2 * l2
        assert measure.graph_calls(case, count) >= count
    (batch,) = cases.make_batches(Case(100, 7, "bfloat16"), torch.device("cpu"), l2)
    assert batch.logits.dtype == torch.bfloat16
    assert batch.logits.requires_grad
    assert batch.logits.data_ptr() == batch.detached.data_ptr()
    assert len(batch.target.unique()) == 7


@pytest.mark.parametrize("name", [peer.name for peer in PEERS.values() if peer.dmi and not peer.compiled])
def test_peers_take_half_precision(name: str) -> None:
    """Peers factor in float32 at least: a matrix in half precision cannot be factored usefully."""
    (batch,) = cases.make_batches(Case(256, 14, "bfloat16"), torch.device("cpu"), 0)
    loss = PEERS[name].loss(batch.logits, batch.target)
    (grad,) = torch.autograd.grad(loss, batch.logits)
    exact = PEERS["index_add_fp64"].loss(batch.detached.double(), batch.target)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert grad.dtype == torch.bfloat16
    assert grad.isfinite().all()


def test_every_goal_has_its_shape() -> None:
    timed = {(case.rows, case.classes, case.dtype) for case in cases.CASES}
    assert {(256, 14, "float32"), (65536, 10, "float32"), (65536, 14, "float32"), (65536, 100, "float32")} <= timed
    assert {case.classes for case in cases.CASES if case.rows == 65536} >= {26, 200, 500, 1000}
    assert {case.dtype for case in cases.CASES} == set(cases.DTYPES)
    assert any(case.logits_bytes >= goals.LARGE_BYTES for case in cases.CASES)
    assert set(goals.LOGDET_GOALS) <= {size.classes for size in cases.LOGDET_SIZES if size.count == 1}
    assert len(set(cases.CASES)) == len(cases.CASES)


def test_clocks_count_calls() -> None:
    """A captured function of five calls counts five, whatever the clock's unit."""
    clocks = Clocks(torch.device("cpu"))
    made = []
    captured = clocks.capture(lambda: made.append(1), 5)
    clocks.graph_seconds(captured, 3)
    assert len(made) == 15
    clocks.device_seconds(lambda: made.append(1), 2)
    clocks.wall_seconds(lambda: made.append(1), 4)
    assert len(made) == 21


def test_interleaving_by_another_clock_than_the_hosts() -> None:
    """``seconds_of`` counts, not the time that passes."""
    seconds = {"ours": 1e-6, "peer": 4e-6}
    functions = {name: (lambda name=name: name) for name in seconds}
    asked: list[int] = []

    def seconds_of(function: Any, calls: int) -> float:
        asked.append(calls)
        return seconds[function()] * calls

    timings = interleave(
        functions, reference="ours", time_cap=0.0, min_rounds=3, max_rounds=3, seconds_of=seconds_of, block_seconds=20e-6
    )
    assert timings.seconds("peer").p50 == pytest.approx(4e-6)
    assert timings.reference_over("peer").p50 == pytest.approx(0.25)
    assert timings.inner_calls == {"ours": 20, "peer": 5}
    assert max(asked) == 20


def test_matrices_for_logdet_are_well_conditioned() -> None:
    S, n = joint_like(Size(60), torch.device("cpu"))
    assert torch.linalg.cond(S / n.unsqueeze(1)).item() < 10
    torch.testing.assert_close(S.sum(1), n)


# --- results and the report ---------------------------------------------------------------------------------------------


def loss_rows(case: Case, ratios: dict[str, float], seconds: float) -> list[Row]:
    family = {"index_add_scatter": "index_add", "cross_entropy_compiled": "cross_entropy", "liger": "other"}
    return [
        Row(
            "loss", case.rows, case.classes, case.dtype, direction, clock, peer, family.get(peer, peer),
            around(seconds / ratio), around(ratio),
        )
        for direction in ("forward", "forward_backward")
        for clock in CLOCKS
        for peer, ratio in {"ours": 1.0, **ratios}.items()
    ]  # fmt: skip


def synthetic() -> Result:
    result = Result(MACHINE, "2026-01-31T12:00:00+00:00", rehearsal=False, copy_bytes=COPY_BYTES)
    result.rows += loss_rows(
        SMALL, {"onehot_slogdet": 0.08, "index_add": 0.05, "cross_entropy": 0.9, "cross_entropy_compiled": 1.1}, 8e-6
    )
    result.rows += loss_rows(
        LARGE, {"index_add": 0.1, "index_add_scatter": 0.25, "cross_entropy": 0.5, "cross_entropy_compiled": 0.8, "liger": 2.0}, 60e-6
    )
    for case, share in ((LARGE, 0.5), (HUGE, 0.95)):
        for step in ("joint", "logits_grad"):
            spent = floor.minimal_bytes(case.rows, case.classes, 4, step) / (share * BANDWIDTH)
            row = Row("step", case.rows, case.classes, "float32", step, "graph", "cuda", "engine", around(spent))
            copied = Row("step", case.rows, case.classes, "float32", step, "graph", "copy", "copy", around(2 * COPY_BYTES / BANDWIDTH))
            result.rows += [row, copied]
    for peer, ratio in {"ours": 1.0, "slogdet-float64": 0.05, "slogdet-float32": 0.2}.items():
        family = peer.partition("-")[0]
        times = (around(1e-3 / ratio), around(ratio))
        result.rows.append(Row("logdet", 1000, 1000, "float64", "logdet_inverse", "device", peer, family, *times))
    result.launches += [
        Launches(256, 14, "float32", "ours", "forward", 1, 0),
        Launches(256, 14, "float32", "ours", "forward_backward", 2, 0),
    ]
    result.peaks += [Peak(65536, 100, "float32", "ours", 28_000_000), Peak(65536, 100, "float32", "index_add", 80_000_000)]
    result.left_out.append({"where": str(HUGE), "what": "published", "reason": "too long"})
    return result


def outcome(found: list[Outcome], where: str, goal: str, clock: str) -> Outcome:
    return next(o for o in found if (o.where, o.goal, o.clock) == (where, goal, clock))


def test_result_file_round_trip(tmp_path: Path) -> None:
    result = synthetic()
    path = tmp_path / "gpu.json"
    results.write(result, path)
    assert results.load(path) == result
    text = path.read_text()
    assert sum('"what": "loss"' in line for line in text.splitlines()) == sum(row.what == "loss" for row in result.rows)
    empty = Result(MACHINE, "2026-01-31T12:00:00+00:00", rehearsal=True, copy_bytes=1)
    results.write(empty, path)
    assert results.load(path) == empty


def test_result_file_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"some\.json is not a result"):
        results.parse("{}", "some.json")
    with pytest.raises(ValueError, match="format 99"):
        results.parse('{"format": 99}', "some.json")


def test_bandwidth_is_that_of_the_copy() -> None:
    assert synthetic().bandwidth() == pytest.approx(BANDWIDTH)
    assert Result(MACHINE, "", rehearsal=False, copy_bytes=1).bandwidth() is None


def test_goals() -> None:
    found = goals.outcomes(synthetic())
    assert outcome(found, "256x14:fp32", "one launch forward, one backward", "-").met is True
    assert outcome(found, "256x14:fp32 fwd+bwd", "<= 10 us", "graph").met is True
    # the compiled one is the faster cross entropy here, and that is the bar
    of_cross_entropy = outcome(found, "256x14:fp32 fwd+bwd", "<= 1x cross_entropy", "wall")
    assert of_cross_entropy.met is False
    assert "of cross_entropy_compiled" in of_cross_entropy.measured
    assert outcome(found, "256x14:fp32 fwd+bwd", ">= 10x onehot_slogdet", "wall").met is True
    # index_add_scatter is the better of the family index_add: four times, not ten; a peer outside of the bar's families is no bar
    over_index_add = outcome(found, "65536x100:fp32 fwd+bwd", ">= 5x index_add", "graph")
    assert over_index_add.met is False
    assert over_index_add.measured.startswith("4x")
    assert outcome(found, "65536x100:fp32 fwd+bwd", "<= 1x cross_entropy", "graph").met is True
    assert outcome(found, "1048576x100:fp32 joint", ">= 90% of copy bandwidth", "graph").met is True
    model = outcome(found, "65536x100:fp32 joint + logits_grad", "<= 1.2x the model", "graph")
    assert model.met is False
    assert outcome(found, "C = 1000", ">= 5x slogdet + backward", "device").met is True
    assert outcome(found, "C = 4096", ">= 3x slogdet + backward", "device").met is None
    assert outcome(found, "C = 1000", "never slower than torch", "device").met is True
    assert outcome(found, "65536x100:fp32", "peak memory", "-").met is True
    assert sum(o.goal == "never slower than index_add" for o in found) == 12


def test_report_says_what_was_measured_and_what_was_not() -> None:
    text = report.report_markdown(synthetic(), ["plot.png"])
    assert "Made-up GPU (100 SMs, 32 MiB of level 2 cache), driver 1.2.3" in text
    assert "copy bandwidth in the run 2000 GB/s" in text
    assert "| 1048576x100:fp32 | joint | cuda |" in text
    assert "95% | memory |" in text
    assert "- 1048576x100:fp32: published: too long" in text
    assert "![plot](plot.png)" in text
    assert "rehearsal" not in text.lower()
    rehearsal = synthetic()
    rehearsal.rehearsal = True
    assert "No GPU ran any of this" in report.report_markdown(rehearsal, [])


def test_report_of_a_run_that_was_cut_short() -> None:
    text = report.report_markdown(Result(MACHINE, "2026-01-31", rehearsal=False, copy_bytes=1), [])
    assert "0 of 0 met" in text
    assert "not measured" in text


def test_report_and_plots_are_written_beside_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "gpu.json"
    results.write(synthetic(), path)
    assert report.main([str(path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu-speedup.png", "gpu-bandwidth.png"}
    assert (tmp_path / "gpu-speedup.png").read_bytes().startswith(b"\x89PNG")
    assert "gpu.md" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "none.json")])
    assert "no result file" in capsys.readouterr().err


def test_the_benchmark_itself_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One tiny shape and one matrix by every clock on the CPU: what it writes, the report reads."""
    threads = torch.get_num_threads()
    out = tmp_path / "gpu.json"
    try:
        case = Case(64, 3)
        monkeypatch.setattr(bench_main, "REHEARSAL_CASES", (case,))
        assert bench_main.main(["--rehearse", "--out", str(out), "--logdet", "4", "3x5"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = results.load(out)
    assert not [item for item in result.left_out if item["reason"].startswith("FAILED")], result.left_out
    assert result.rehearsal
    for clock in CLOCKS:
        for peer in ("ours", "published", "onehot_slogdet", "index_add", "cross_entropy"):
            assert result.find(case, "forward_backward", clock, peer) is not None, (clock, peer)
    if result.machine["engine"] != "composite":
        assert result.bandwidth() is not None
        assert result.find(case, "logits_grad", "graph", result.machine["engine"], "step") is not None
        for case in (Case(4, 4, "float64"), Case(15, 5, "float64")):
            for peer in ("slogdet-float64", "inv-float32", "lu-float64"):
                assert result.find(case, "logdet_inverse", "device", peer, "logdet") is not None
    assert "rehearsal" in report.report_markdown(result, []).lower()
    assert "timings in" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_main.main(["--out", str(tmp_path / "gpu.json")])
    assert "--rehearse" in capsys.readouterr().err


# --- sources and what a GPU has verified of them ------------------------------------------------------------------------


def tree(root: Path) -> None:
    for name in ("csrc/cuda/joint/launch.cuh", "csrc/cuda/joint.cu", "csrc/plan/cuda_plan.cpp", "ldmi_fast/engines/triton/joint.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_source_hash_changes_with_text_and_name(tmp_path: Path) -> None:
    tree(tmp_path)
    before = machine.source_hash(tmp_path)
    (tmp_path / "csrc" / "cuda" / "joint" / "launch.cuh").rename(tmp_path / "csrc" / "cuda" / "joint" / "other.cuh")
    renamed = machine.source_hash(tmp_path)
    (tmp_path / "csrc" / "cuda" / "other.cuh").write_text("changed")
    assert len({before, renamed, machine.source_hash(tmp_path)}) == 3


def test_verified_table(tmp_path: Path) -> None:
    tree(tmp_path)
    assert set(verified.stale({}, tmp_path).values()) == {"never run on a GPU"}
    assert len(verified.stale({}, tmp_path)) == 4
    table = verified.updated({}, ["cuda"], MACHINE, "2026-01-31T12:00:00+00:00", tmp_path)
    assert verified.stale(table, tmp_path) == {"ldmi_fast/engines/triton/joint.py": "never run on a GPU"}
    (tmp_path / "csrc" / "cuda" / "joint.cu").write_text("changed")
    assert verified.stale(table, tmp_path)["csrc/cuda/joint.cu"] == "changed since 2026-01-31 (Made-up GPU)"
    path = tmp_path / "gpu-verified.json"
    path.write_text(verified.dump(table))
    assert verified.load(path) == table
    (tmp_path / "csrc" / "cuda" / "joint.cu").unlink()
    assert "csrc/cuda/joint.cu" not in verified.updated(table, ["triton"], MACHINE, "2026-02-01", tmp_path)
    assert verified.load(tmp_path / "none.json") == {}


def test_only_a_gpu_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="only a GPU"):
        verified.updated({}, ["cuda"], {**MACHINE, "gpu": None}, "2026-01-31", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        verified.main(["--write", str(tmp_path / "table.json")])
    assert "only a GPU verifies" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()
    with pytest.raises(ValueError, match="no engine 'cpu'"):
        verified.sources("cpu")


def test_what_no_gpu_has_verified(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints which sources have changed since a GPU ran them. Fails only on a table that is broken."""
    table = verified.load()
    assert all(len(entry.sha256) == 64 and entry.device for entry in table.values())
    changed = verified.stale(table)
    total = sum(len(verified.sources(engine)) for engine in verified.SOURCES)
    with capsys.disabled():
        print(f"\n{total - len(changed)} of {total} GPU sources are as a GPU verified them")
        for name, state in changed.items():
            if table:  # else all of them are
                print(f"  {name}: {state}")


# --- sanitizers ---------------------------------------------------------------------------------------------------------


def test_sanitizer_commands_and_table(tmp_path: Path) -> None:
    program = tmp_path / "joint"
    assert sanitize.command_for(program, "", 7, None) == [str(program), "--seed", "1", "--iterations", "7"]
    under = sanitize.command_for(program, "racecheck", 2, "compute-sanitizer")
    assert under[:5] == ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "1"]
    assert "--right" in sanitize.command_for(tmp_path / "demo", "", 7, None), "demo has kernels that are wrong on purpose"
    good = sanitize.execute("joint", "", [sys.executable, "-c", "print('fine')"], 30)
    bad = sanitize.execute("joint", "memcheck", [sys.executable, "-c", "raise SystemExit(1)"], 30)
    slow = sanitize.execute("joint", "racecheck", [sys.executable, "-c", "import time; time.sleep(9)"], 0.2)
    assert (good.good, bad.outcome, slow.outcome) == (True, "FAILED", "timed out")
    text = sanitize.table([good, bad, slow], ("memcheck", "racecheck", "initcheck"))
    assert "FAILED" in text
    assert "timed out" in text
    assert text.splitlines()[1].endswith(" -")


def test_sanitize_names_programs_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sanitize.main(["--build", str(tmp_path), "--cases", "nothing"])
    assert "no test programs ['nothing']" in capsys.readouterr().err


# --- run.sh -------------------------------------------------------------------------------------------------------------

PARTS = """#!/usr/bin/env bash
case "$1" in
  list)
    printf '%s 60 %s\\n' good default bad default last default loud optional tests optional sanitize optional
    echo 'slow 1 optional'
    ;;
  tests | sanitize) echo passed ;;
  good) echo "rehearse $REHEARSE of $PART_SECONDS"; echo '=== 3 passed ===' ;;
  bad) echo 'it broke'; exit 3 ;;
  slow) echo 'waiting'; sleep 60 ;;
  last) echo made > "$OUT/made.txt" ;;
  loud) printf 'a\\tb "quoted" \\\\ \\033[1mbold\\n\\n' ;;
esac
"""


def run(tmp_path: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """run.sh with made-up parts; what it printed, and its summary."""
    parts = tmp_path / "parts.sh"
    parts.write_text(PARTS)
    out = tmp_path / "out"
    environment = {**os.environ, "GPU_PARTS": str(parts), "OUT": str(out), "PYTHON": sys.executable, "REHEARSE": "1", **variables}
    done = subprocess.run(["bash", str(RUN), *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False)
    path = out / "summary.json"
    return done, json.loads(path.read_text()) if path.exists() else {}


needs_bash = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None or sys.platform != "linux", reason="needs bash and timeout"
)


@needs_bash
def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    done, found = run(tmp_path)
    assert done.returncode == 1
    assert [(p["part"], p["outcome"], p["status"]) for p in found["parts"]] == [
        ("good", "ok", 0),
        ("bad", "failed", 3),
        ("last", "ok", 0),
    ]
    assert found["ok"] is False
    assert found["rehearsal"] is True
    assert found["parts"][0]["last_line"] == "=== 3 passed ==="
    assert found["parts"][1]["last_line"] == "it broke"
    assert (tmp_path / "out" / "made.txt").exists()
    # the summary is printed last
    tail = done.stdout.splitlines()[-6:]
    assert tail[1].split()[:2] == ["good", "ok"]
    assert "no GPU ran any of this" in tail[4]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "it broke" in log
    assert "rehearse 1 of 180" in log, "a rehearsal is given three times as long"
    assert not (tmp_path / "out" / "gpu-verified.json").exists()


@needs_bash
def test_parts_by_name(tmp_path: Path) -> None:
    done, found = run(tmp_path, "last", "good")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p["part"] for p in found["parts"]] == ["last", "good"]
    assert found["ok"] is True


@needs_bash
def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    done, found = run(tmp_path, "slow", "good", "last", LIMIT="12")
    assert done.returncode == 1
    assert found["parts"][0]["outcome"] == "timed out"
    assert found["parts"][0]["seconds"] < 30
    assert found["parts"][0]["last_line"] == "waiting"
    # nothing is started when no time is left
    assert [p["outcome"] for p in found["parts"][1:]] == ["no time", "no time"]


@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU, which could verify")
def test_nothing_is_verified_without_a_gpu(tmp_path: Path) -> None:
    """Tests and sanitizers that passed count only where a GPU ran them, whatever the arguments of the script."""
    done, found = run(tmp_path, "tests", "sanitize", REHEARSE="0")
    assert done.returncode == 0
    assert found["rehearsal"] is False
    assert "only a GPU verifies kernels" in done.stdout
    assert not (tmp_path / "out" / "gpu-verified.json").exists()


@needs_bash
def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    parts = tmp_path / "parts.sh"
    parts.write_text("case $1 in list) echo 'slow 60 default' ;; slow) echo $$ > \"$OUT/pid\"; sleep 60 ;; esac\n")
    out = tmp_path / "out"
    environment = {**os.environ, "GPU_PARTS": str(parts), "OUT": str(out), "PYTHON": sys.executable, "REHEARSE": "1"}
    process = subprocess.Popen(["bash", str(RUN)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (out / "pid").exists() or not (out / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 130
    part = int((out / "pid").read_text())
    while time.monotonic() < deadline:
        try:
            os.kill(part, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the part goes on")


@needs_bash
def test_any_text_may_be_said_last(tmp_path: Path) -> None:
    _, found = run(tmp_path, "loud")
    assert found["parts"][0]["last_line"] == 'a b "quoted" \\ [1mbold'


@needs_bash
def test_bad_arguments(tmp_path: Path) -> None:
    for arguments, variables, words in (
        (("fast",), {}, "no part 'fast': expected some of good bad last loud tests sanitize slow"),
        ((), {"LIMIT": "soon"}, "LIMIT must be a number of seconds, got 'soon'"),
        ((), {"PYTHON": "no-such-python"}, "there is no no-such-python"),
        ((), {"GPU_PARTS": "/dev/null"}, "lists no parts"),
    ):
        done, found = run(tmp_path, *arguments, **variables)
        assert done.returncode == 2
        assert words in done.stderr
        assert found == {}
    assert "OUT" in run(tmp_path, "--help")[0].stdout


@needs_bash
def test_the_real_parts_are_listed() -> None:
    listed = subprocess.run(["bash", str(RUN), "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    parts = {name: (int(seconds), default) for name, seconds, default in (line.split() for line in listed)}
    assert list(parts)[:6] == ["build", "tests", "sanitize", "bench", "soak", "triton"]
    assert parts["profile"][1] == "optional"
    assert all(0 < seconds <= 540 for seconds, _ in parts.values())
    for name in parts:
        assert f"\n  {name})" in (RUN.parent / "parts.sh").read_text(), name


def test_summary_of_a_line_that_is_cut() -> None:
    with pytest.raises(ValueError, match="expected 6 fields"):
        summary.read_parts("build\tok\n")
    (part,) = summary.read_parts("build\tok\t0\t12\t60\tdone\tand more")
    assert part["seconds"] == 12
    assert part["last_line"] == "done\tand more"
    assert math.isclose(part["limit"], 60)
