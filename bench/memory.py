"""``python -m bench.memory``: peak memory of one forward and backward, beyond the inputs.

Measured as the process's resident high-water mark (VmHWM, reset through /proc/self/clear_refs) in a fresh process for
each measurement. torch's profiler and tracemalloc would miss what a C++ kernel takes from malloc; ru_maxrss cannot be
reset, so making the inputs would hide a smaller peak. Three things make the mark exact to a few pages: every allocation
above 64 KiB is its own mapping (MALLOC_MMAP_THRESHOLD_), so that no memory freed earlier is reused unseen; freed heap
is given back before the baseline is read; transparent huge pages are off. The peers' code, the thread pools and
LAPACK's own buffers are warmed up on other shapes first, so that scratch memory which an operation keeps for a shape counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.kernels.cases import SHAPES, Batch, Shape, make_batch, parse_shapes
from bench.kernels.peers import PEERS
from bench.kernels.results import RESULTS_DIR, dump_lines, environment, write_atomic
from bench.reporting import markdown_table

MEMORY_JSON = RESULTS_DIR / "memory-cpu.json"
MEASURED = ("ours", "index_add", "cross_entropy")
MIB = 2**20
WARM_UP = (Shape(64, 4), Shape(200, 80))
"""Few and more classes: the factorisation of one panel and of several."""
PR_SET_THP_DISABLE = 41


@dataclass(frozen=True)
class Peak:
    """Peak extra bytes of a peer's forward and backward at a shape: loss, gradient and everything between."""

    rows: int
    classes: int
    peer: str
    extra_bytes: int

    @property
    def shape(self) -> Shape:
        """The shape as one value."""
        return Shape(self.rows, self.classes)


@dataclass
class MemoryResult:
    """All peaks of a run and the machine it ran on."""

    environment: dict[str, Any]
    date: str
    peaks: list[Peak]

    def find(self, shape: Shape, peer: str) -> Peak | None:
        """The peak of one peer at one shape, or None."""
        return next((peak for peak in self.peaks if (peak.shape, peak.peer) == (shape, peer)), None)


def goal_bytes(shape: Shape) -> float:
    """The goal for ours: 1.05 (dZ + 16 C^2 + 16 N) + 4 MB."""
    return 1.05 * (shape.logits_bytes + 16 * shape.classes**2 + 16 * shape.rows) + 4e6


def status_bytes(key: str) -> int:
    """A memory field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")


def forward_backward(peer: str, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Loss, then its gradient, as in the speed benchmark."""
    return torch.autograd.grad(PEERS[peer].loss(batch.logits, batch.target), batch.logits)


def warm_up_lapack(classes: int) -> None:
    """Let LAPACK make its buffers for matrices of this size: they are not the operation's own."""
    for dtype in (torch.float32, torch.float64):
        matrix = torch.eye(classes, dtype=dtype).requires_grad_()
        torch.autograd.grad(torch.linalg.slogdet(matrix).logabsdet, matrix)
        torch.linalg.inv_ex(matrix.detach())


def measure_here(peer: str, shape: Shape) -> int:
    """Peak extra bytes in this process, which should be a fresh one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    generator = torch.Generator().manual_seed(0)
    for warm in WARM_UP:
        forward_backward(peer, make_batch(warm, generator))
    warm_up_lapack(shape.classes)
    batch = make_batch(shape, generator)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_bytes("VmRSS")
    result = forward_backward(peer, batch)
    peak = status_bytes("VmHWM")
    del result
    return peak - before


def measure_in_subprocess(peer: str, shape: Shape) -> int:
    """``measure_here`` in a fresh process with large allocations mapped one by one."""
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        (sys.executable, "-m", "bench.memory", "--measure", peer, str(shape)),
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {peer} at {shape} failed with exit status {done.returncode}:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def load_memory(path: Path) -> MemoryResult:
    """Read the JSON that this module writes."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return MemoryResult(data["environment"], data["date"], [Peak(**peak) for peak in data["peaks"]])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of `python -m bench.memory`: {type(error).__name__}: {error}") from error


def table_rows(result: MemoryResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, in MiB."""
    peers = [peer for peer in MEASURED if any(peak.peer == peer for peak in result.peaks)]
    rows = []
    for shape in sorted({peak.shape for peak in result.peaks}):
        peaks = {peer: result.find(shape, peer) for peer in peers}
        cells = ["-" if peak is None else f"{peak.extra_bytes / MIB:.1f}" for peak in peaks.values()]
        mine = peaks.get("ours")
        met = "-" if mine is None else "yes" if mine.extra_bytes <= goal_bytes(shape) else "**no**"
        rows.append([str(shape), f"{shape.logits_bytes / MIB:.1f}", *cells, f"{goal_bytes(shape) / MIB:.1f}", met])
    return ["shape", "dZ", *peers, "goal for ours", "met"], rows


def memory_markdown(result: MemoryResult) -> str:
    """The table as markdown with a line on how it was measured."""
    header, rows = table_rows(result)
    return (
        f"Peak resident memory of one forward and backward beyond the inputs, in MiB, {result.date[:10]}, a fresh "
        f"process each. The goal is 1.05 (dZ + 16 C^2 + 16 N) + 4 MB, dZ being the gradient itself.\n\n"
        f"{markdown_table(header, rows)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Peak memory of one forward and backward.")
    parser.add_argument("--shapes", type=parse_shapes, help="ROWSxCLASSES, comma-separated (default: all)")
    parser.add_argument("--out", type=Path, help=f"JSON file (default for all shapes: {MEMORY_JSON.name})")
    parser.add_argument("--measure", nargs=2, metavar=("PEER", "SHAPE"), help="one measurement in this process, in bytes")
    options = parser.parse_args(arguments)
    if options.measure is not None:
        peer, shape = options.measure
        print(measure_here(peer, Shape.parse(shape)))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory is measured through /proc/self/clear_refs, which this system does not have")
    console = Console()
    work = [(peer, shape) for shape in options.shapes or SHAPES for peer in MEASURED]
    peaks = [
        Peak(shape.rows, shape.classes, peer, measure_in_subprocess(peer, shape))
        for peer, shape in track(work, description="memory", console=console)
    ]
    result = MemoryResult(environment(), datetime.now(timezone.utc).isoformat(timespec="seconds"), peaks)
    header, rows = table_rows(result)
    table = Table(title="peak extra memory of forward + backward, MiB")
    for column in header:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("*", "") for cell in row))
    console.print(table)
    out = options.out if options.out is not None else MEMORY_JSON if options.shapes is None else None
    if out is not None:
        write_atomic(out, dump_lines(asdict(result), "peaks"))
        console.print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
