"""The goals on a GPU, and what a result says of each."""

from __future__ import annotations

from bench.gpu.cases import Case
from bench.gpu.floor import Part, floor, minimal_bytes
from bench.gpu.results import CLOCKS, Clock, Peak, Result, Row
from bench.kernels.cases import DIRECTIONS
from bench.reporting import LABELS, Outcome, at_most, speedup_text, times_faster

CLOTHING = Case(256, 14)
LARGE_BYTES = 256_000_000
LARGE_ROWS = 65536
FEW_CLASSES = 100
LOGDET_GOALS = {100: 10.0, 1000: 5.0, 4096: 3.0, 10000: 2.0}
LOGDET_FAMILIES = ("slogdet", "inv", "lu")
SAME = 0.03
"""The relative difference that two paths with the same work may show, such as torch's LU and ours by way of it."""
STEPS: tuple[Part, ...] = ("joint", "logits_grad")


def microseconds(row: Row) -> str:
    """Median, p20 and p80 in microseconds."""
    seconds = row.seconds
    return f"{seconds.p50 * 1e6:.2f} us ({seconds.p20 * 1e6:.2f}-{seconds.p80 * 1e6:.2f})"


def against_cross_entropy(result: Result, case: Case, clock: Clock, limit: float) -> Outcome:
    """Ours takes at most ``limit`` times as long as the fastest cross entropy, forward and backward."""
    row = result.fastest(case, "forward_backward", clock, "cross_entropy")
    return at_most(f"{case} {LABELS['forward_backward']}", f"<= {limit:g}x cross_entropy", row, limit, clock=clock)


def faster(result: Result, case: Case, direction: str, clock: Clock, family: str, times: float, goal: str = "") -> Outcome:
    """Ours is at least ``times`` times as fast as the fastest member of a family."""
    row = result.fastest(case, direction, clock, family)
    return times_faster(f"{case} {LABELS[direction]}", goal or f">= {times:g}x {family}", row, times, clock=clock)


def launch_outcomes(result: Result) -> list[Outcome]:
    """Judge the goal of one launch forward and one backward at Clothing1M's batch."""
    found = {
        entry.direction: entry
        for entry in result.launches
        if (entry.rows, entry.classes, entry.dtype, entry.peer) == (CLOTHING.rows, CLOTHING.classes, CLOTHING.dtype, "ours")
    }
    goal = "one launch forward, one backward"
    if set(found) != set(DIRECTIONS):
        return [Outcome(str(CLOTHING), goal, "-", "not measured", None)]
    forward, both = found["forward"], found["forward_backward"]
    counts = (forward.kernels + forward.others, both.kernels + both.others - forward.kernels - forward.others)
    return [Outcome(str(CLOTHING), goal, "-", f"{counts[0]} and {counts[1]}", counts == (1, 1))]


def step_outcomes(result: Result) -> list[Outcome]:
    """joint and logits_grad of the engine that runs: a share of the copy's bandwidth where they are large, else near the model."""
    found: list[Outcome] = []
    bandwidth = result.bandwidth()
    engine = str(result.machine.get("engine"))
    for case in result.cases("step"):
        rows = {step: result.find(case, step, "graph", engine, "step") for step in STEPS}
        if bandwidth is None or any(row is None for row in rows.values()):
            found.append(Outcome(str(case), "bandwidth or model", "graph", "not measured", None))
        elif case.logits_bytes >= LARGE_BYTES:
            for step, row in rows.items():
                assert row is not None
                share = step_bandwidth(row) / bandwidth
                found.append(Outcome(f"{case} {step}", ">= 90% of copy bandwidth", "graph", f"{share:.0%}", share >= 0.9))
        else:
            spent = sum(row.seconds.p50 for row in rows.values() if row is not None)
            model = sum(step_floor(case, step, bandwidth) for step in STEPS)
            text = f"{spent / model:.2f}x ({spent * 1e6:.1f} us, model {model * 1e6:.1f} us)"
            found.append(Outcome(f"{case} {' + '.join(STEPS)}", "<= 1.2x the model", "graph", text, spent <= 1.2 * model))
    return found


def step_floor(case: Case, step: Part, bandwidth: float) -> float:
    """The model's seconds of one step."""
    return floor(case.rows, case.classes, case.torch_dtype.itemsize, step).seconds(bandwidth)


def step_bandwidth(row: Row) -> float:
    """Bytes per second that a step moved, counting the logits and the gradient alone."""
    (step,) = (name for name in STEPS if name == row.direction)
    return minimal_bytes(row.rows, row.classes, row.case.torch_dtype.itemsize, step) / row.seconds.p50


def logdet_outcomes(result: Result) -> list[Outcome]:
    """Judge log|det| and inverse: against slogdet and its backward, the faster of fp32 and fp64, and against each of torch's paths."""
    found = []
    for classes, times in LOGDET_GOALS.items():
        case = Case(classes, classes, "float64")
        row = result.fastest(case, "logdet_inverse", "device", "slogdet", "logdet")
        goal = f">= {times:g}x slogdet + backward"
        found.append(times_faster(f"C = {classes}", goal, row, times, clock="device"))
    for case in result.cases("logdet"):
        rows = [result.fastest(case, "logdet_inverse", "device", family, "logdet") for family in LOGDET_FAMILIES]
        ratios = [(row.ours_over_peer, row.peer) for row in rows if row is not None and row.ours_over_peer is not None]
        if ratios:
            ratio, peer = max(ratios, key=lambda pair: pair[0].p50)
            text = f"{speedup_text(ratio)} of {peer}"
            found.append(Outcome(logdet_text(case), "never slower than torch", "device", text, ratio.p50 <= 1 + SAME))
    return found


def logdet_text(case: Case) -> str:
    """How many matrices of how many classes."""
    count = case.rows // case.classes
    return f"C = {case.classes}" if count == 1 else f"C = {case.classes}, {count} at once"


def goal_bytes(peak: Peak) -> float:
    """The goal for ours: 1.05 (dZ + 16 C^2 + 16 N) + 4 MB."""
    logits = Case(peak.rows, peak.classes, peak.dtype).logits_bytes
    return 1.05 * (logits + 16 * peak.classes**2 + 16 * peak.rows) + 4e6


def outcomes(result: Result) -> list[Outcome]:
    """Every goal on a GPU against a result."""
    found = launch_outcomes(result)
    row = result.find(CLOTHING, "forward_backward", "graph", "ours")
    text, met = ("not measured", None) if row is None else (microseconds(row), row.seconds.p50 <= 10e-6)
    found.append(Outcome(f"{CLOTHING} fwd+bwd", "<= 10 us", "graph", text, met))
    found.append(against_cross_entropy(result, CLOTHING, "wall", 1.0))
    found.append(faster(result, CLOTHING, "forward_backward", "wall", "onehot_slogdet", 10.0))
    found += step_outcomes(result)
    for case in result.cases():
        if case.rows >= LARGE_ROWS and case.classes <= FEW_CLASSES:
            for clock in ("graph", "wall"):
                found += [
                    against_cross_entropy(result, case, clock, 1.0),
                    faster(result, case, "forward_backward", clock, "index_add", 5.0),
                ]
    found += logdet_outcomes(result)
    for case in result.cases():
        for direction in DIRECTIONS:
            for clock in CLOCKS:
                if result.find(case, direction, clock, "ours") is not None:
                    found.append(faster(result, case, direction, clock, "index_add", 1.0, "never slower than index_add"))
    for peak in result.peaks:
        if peak.peer == "ours":
            text = f"{peak.extra_bytes / 1e6:.1f} MB of {goal_bytes(peak) / 1e6:.1f}"
            case = Case(peak.rows, peak.classes, peak.dtype)
            found.append(Outcome(str(case), "peak memory", "-", text, peak.extra_bytes <= goal_bytes(peak)))
    return found
