"""``python -m bench.gpu``: time the loss, its steps and log|det| on a GPU, next to their peers.

It runs for about ``--seconds``, starts with the most important shapes, and writes the result after each shape, so that an interrupted
run keeps what it measured. ``--rehearse`` runs the same code at tiny shapes on the CPU, to see that it works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from bench.gpu.cases import CASES, LOGDET_SIZES, REHEARSAL_CASES, REHEARSAL_LOGDET_SIZES, Case
from bench.gpu.clocks import Clocks
from bench.gpu.machine import machine
from bench.gpu.measure import Bench
from bench.gpu.peers import default_engine, gpu_peers
from bench.gpu.results import CLOCKS, Result, write
from bench.kernels.measure import first_line
from bench.logdet import Size

FIRST_CASES = 5
"""The number of shapes that are timed before log|det| alone; the others come after it."""
COPY_BYTES = 2**28
REHEARSAL_COPY_BYTES = 2**20


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--seconds", type=float, default=150.0, help="start nothing new after this long (default: %(default)s)")
    parser.add_argument("--time-cap", type=float, default=0.3, help="seconds a shape, direction and clock (default: %(default)s)")
    parser.add_argument("--cases", type=Case.parse, nargs="*", help="ROWSxCLASSES[:fp32|bf16|fp16|fp64] (default: all)")
    parser.add_argument("--logdet", type=Size.parse, nargs="*", help="log|det| alone: CLASSES or COUNTxCLASSES (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device that this torch can use; --rehearse runs the same code on the CPU")
    return options


def work(options: argparse.Namespace, bench: Bench) -> list[tuple[str, Callable[[], None]]]:
    """What to measure, in order."""
    cases = REHEARSAL_CASES if options.rehearse else CASES
    cases = cases if options.cases is None else tuple(options.cases)
    sizes = REHEARSAL_LOGDET_SIZES if options.rehearse else LOGDET_SIZES
    sizes = sizes if options.logdet is None else tuple(options.logdet)
    of_cases: list[tuple[str, Callable[[], None]]] = [
        (f"{case} {what.__name__}", partial(what, case))
        for case in cases
        for what in (bench.loss, bench.steps, bench.peak, bench.launches)
    ]
    of_sizes: list[tuple[str, Callable[[], None]]] = [(f"logdet {size}", partial(bench.logdet, size)) for size in sizes]
    early = FIRST_CASES * 4
    return of_cases[:early] + of_sizes[:FIRST_CASES] + of_cases[early:] + of_sizes[FIRST_CASES:]


def summary(bench: Bench, label: str, seen: int) -> str:
    """One line on what was added since ``seen`` rows: ours, and how it compares."""
    parts = []
    for clock in CLOCKS:
        new = [row for row in bench.result.rows[seen:] if row.clock == clock and row.direction != "forward"]
        mine = [row for row in new if row.peer == "ours" or row.family == "engine"]
        for row in mine:
            ratios = ", ".join(
                f"{r.peer} {r.ours_over_peer.p50:.2f}"
                for r in new
                if r.ours_over_peer is not None and r.peer != "ours" and r.direction == row.direction
            )
            name = f"{row.peer} {row.direction}" if row.what == "step" else clock
            parts.append(f"{name} {row.seconds.p50 * 1e6:.1f} us" + (f" ({ratios})" if ratios else ""))
    return f"{label}: " + "; ".join(parts) if parts else label


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    if options.rehearse:
        torch.set_num_threads(1)  # on a busy machine every parallel region waits tens of milliseconds for the scheduler
    started = time.monotonic()
    peers, missing = gpu_peers(device)
    result = Result(
        machine=machine() | {"engine": default_engine(device)},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        rehearsal=options.rehearse,
        copy_bytes=REHEARSAL_COPY_BYTES if options.rehearse else COPY_BYTES,
    )
    bench = Bench(Clocks(device), peers, result, time_cap=0.01 if options.rehearse else options.time_cap)
    for name, reason in missing.items():
        bench.left_out("everywhere", name, reason)
    failed = False
    for label, measure in work(options, bench):
        seen = len(result.rows)
        if time.monotonic() - started > options.seconds:
            bench.left_out(label, "all", "the run's time was up")
            continue
        try:
            measure()
        except Exception as error:
            failed = True
            bench.left_out(label, "ours", f"FAILED: {type(error).__name__}: {first_line(error)}")
            print(f"{label}: FAILED: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if len(result.rows) > seen:
            print(f"{time.monotonic() - started:5.0f} s  {summary(bench, label, seen)}", flush=True)
        write(result, options.out)
    write(result, options.out)
    skipped = sum(item["reason"] == "the run's time was up" for item in result.left_out)
    print(f"{len(result.rows)} timings in {time.monotonic() - started:.0f} s" + (f", {skipped} left out for time" if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
