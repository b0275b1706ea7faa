"""``python -m bench.linear``: linear_dmi_loss against dmi_loss of the materialised logits: time and peak memory.

Forward and backward with gradients of hidden, weight and bias, fp32. Times are interleaved in one process; peak memory is
measured as in ``bench.memory``, in a fresh process for each measurement. Ends with a table, and writes JSON and markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ldmi_fast
from bench.kernels.cases import Shape, parse_shapes
from bench.kernels.interleave import interleave
from bench.kernels.results import RESULTS_DIR, environment, write_atomic
from bench.memory import MIB, PR_SET_THP_DISABLE, status_bytes, warm_up_lapack
from bench.reporting import markdown_table

LINEAR_JSON = RESULTS_DIR / "linear-cpu.json"
SHAPES = (Shape(8192, 100), Shape(65536, 100), Shape(8192, 1000), Shape(65536, 1000), Shape(8192, 10000), Shape(65536, 10000))
WIDTH = 256
SECONDS = 30.0
ONCE = 2000
"""Above this number of classes the inverse takes so long that it is timed with one call."""
METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "fused": lambda hidden, weight, bias, target: ldmi_fast.linear_dmi_loss(hidden, weight, target, bias),
    "materialised": lambda hidden, weight, bias, target: ldmi_fast.dmi_loss(F.linear(hidden, weight, bias), target),
}


@dataclass(frozen=True)
class Row:
    """One shape: seconds and peak extra bytes of both methods; ratio: median of fused / materialised within rounds."""

    rows: int
    classes: int
    width: int
    seconds: dict[str, float]
    ratio: float
    peak_bytes: dict[str, int]


def make(shape: Shape, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [C, D], bias [C], target [N]; with a class signal, as in training."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.classes, width, generator=generator) / width**0.5
    target = torch.randint(shape.classes, (shape.rows,), generator=generator)
    hidden = torch.randn(shape.rows, width, generator=generator).add_(weight[target], alpha=4 * width**0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.zeros(shape.classes, requires_grad=True), target


def step(method: str, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(METHODS[method](*data), data[:3])


def measure_here(method: str, shape: Shape, width: int) -> tuple[int, float]:
    """Peak extra bytes and seconds of one call in this process, which should be a fresh one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    step(method, make(Shape(300, 60), width))
    warm_up_lapack(min(shape.classes, 1000))
    data = make(shape, width)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    result = step(method, data)
    seconds = time.perf_counter() - start
    peak = status_bytes("VmHWM")
    del result
    return peak - before, seconds


def measure_in_subprocess(method: str, shape: Shape, width: int) -> tuple[int, float]:
    """``measure_here`` in a fresh process with large allocations mapped one by one."""
    done = subprocess.run(
        (sys.executable, "-m", "bench.linear", "--measure", method, str(shape), "--width", str(width)),
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {method} at {shape} failed with exit status {done.returncode}:\n{done.stderr}")
    peak, elapsed = done.stdout.split()[-2:]
    return int(peak), float(elapsed)


def measure(shape: Shape, width: int, seconds: float) -> Row:
    """Time and memory at one shape. Where one call takes minutes, its time is that of the memory measurement."""
    singles = {method: measure_in_subprocess(method, shape, width) for method in METHODS}
    peaks = {method: peak for method, (peak, _) in singles.items()}
    if shape.classes > ONCE:
        times = {method: elapsed for method, (_, elapsed) in singles.items()}
        return Row(shape.rows, shape.classes, width, times, times["fused"] / times["materialised"], peaks)
    data = make(shape, width)
    calls = {method: partial(step, method, data) for method in METHODS}
    timings = interleave(calls, reference="fused", time_cap=seconds, min_rounds=3)
    times = {method: timings.seconds(method).p50 for method in METHODS}
    return Row(shape.rows, shape.classes, width, times, timings.reference_over("materialised").p50, peaks)


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for row in result["rows"]:
        gradients = 4 * (row["rows"] * row["width"] + row["classes"] * (row["width"] + 1))
        seconds = row["seconds"]
        rows.append(
            (
                f"{row['rows']}x{row['classes']}",
                *(f"{seconds[method]:.3g}" for method in METHODS),
                f"{row['ratio']:.2f}",
                *(f"{row['peak_bytes'][method] / MIB:.0f}" for method in METHODS),
                f"{gradients / MIB:.0f}",
                f"{4 * row['rows'] * row['classes'] / MIB:.0f}",
            )
        )
    header = ("N x C", "fused, s", "materialised, s", "ratio", "fused, MiB", "materialised, MiB", "the gradients", "the logits")
    env = result["environment"]
    return (
        "# The head fused in, and not\n\n"
        f"Measured on {result['date'][:10]}: {env['cpu']}, {env['threads']} threads, torch {env['torch']}, "
        f"D = {result['rows'][0]['width']}, fp32, forward and backward with gradients of hidden, weight and bias. Times: medians, "
        "interleaved in one process; ratio: the median of fused / materialised within a round "
        f"(above {ONCE} classes one call each, in fresh processes). Memory: peak beyond the inputs, the gradients that come back "
        "included.\n\n"
        f"{markdown_table(header, rows)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description="linear_dmi_loss against the materialised logits.")
    parser.add_argument("--shapes", type=parse_shapes, help="ROWSxCLASSES, comma-separated (default: all)")
    parser.add_argument("--width", type=int, default=WIDTH, help="D (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time a shape at most so long (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"JSON file (default for all shapes: {LINEAR_JSON.name}); the table goes next to it")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "SHAPE"), help="one memory measurement in this process, in bytes")
    options = parser.parse_args(arguments)
    if options.measure is not None:
        method, shape = options.measure
        print(*measure_here(method, Shape.parse(shape), options.width))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory is measured through /proc/self/clear_refs, which this system does not have")
    rows = []
    for shape in options.shapes or SHAPES:
        rows.append(measure(shape, options.width, options.seconds))
        print(rows[-1], flush=True)
    result = {
        "environment": environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in rows],
    }
    print(markdown(result))
    out = options.out if options.out is not None else LINEAR_JSON if options.shapes is None else None
    if out is not None:
        write_atomic(out, json.dumps(result, indent=1) + "\n")
        write_atomic(out.with_suffix(".md"), markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
