"""``python -m bench.kernels.run``: time every peer at every shape and write the result file.

A full run writes ``bench/results/kernels-cpu.json``; a run of some shapes or peers writes only to the file that ``--out`` names.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from bench.kernels.cases import DIRECTIONS
from bench.kernels.results import KERNELS_JSON, RunResult, busy_warning, dump_lines, load_result, write_atomic

HERE = Path(__file__).resolve().parent
TABLE_WIDTH = 110


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.run", description=__doc__)
    parser.add_argument("--shapes", help="ROWSxCLASSES, comma-separated: 65536x10,256x14 (default: all)")
    parser.add_argument("--peers", help="comma-separated: index_add,cross_entropy (default: all; ours is always timed)")
    parser.add_argument("--rounds", type=int, help="exactly this many rounds a shape (default: until a time cap)")
    parser.add_argument("--out", type=Path, help=f"result file (default for a full run: {KERNELS_JSON.name})")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    return options


def run_pytest(options: argparse.Namespace, out: Path) -> int:
    """Run the benchmarks through pytest-benchmark; returns pytest's exit status."""
    arguments = [str(HERE / "bench_dmi_loss.py"), f"--rootdir={HERE.parents[1]}", "-q", "-s", "-p", "no:cacheprovider"]
    # the project's addopts disable benchmarks for its test suite
    arguments += ["-o", "addopts=", "-o", "console_output_style=classic"]
    arguments += ["--benchmark-quiet", f"--benchmark-json={out}"]
    for name in ("shapes", "peers", "rounds"):
        value = getattr(options, name)
        if value is not None:
            arguments.append(f"--{name}={value}")
    return int(pytest.main(arguments))


def ratio_table(result: RunResult) -> Table:
    """Our time over each peer's, medians of the ratios within a round."""
    peers = list(dict.fromkeys(record.peer for record in result.records if record.peer != "ours"))
    table = Table(title="ours / peer, median of per-round ratios (below 1: ours is faster)")
    for column in ("shape", "", "ours, ms", *peers):
        table.add_column(column, justify="right", no_wrap=True)
    for shape in result.shapes():
        for direction in DIRECTIONS:
            mine = result.find(shape, direction, "ours")
            if mine is None:
                continue
            found = [result.find(shape, direction, peer) for peer in peers]
            cells = ["-" if record is None else f"{record.ours_over_peer.p50:.2f}" for record in found]
            table.add_row(str(shape), "fwd" if direction == "forward" else "fwd+bwd", f"{mine.seconds.p50 * 1e3:.3f}", *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    partial = any(getattr(options, name) is not None for name in ("shapes", "peers", "rounds"))
    out = options.out if options.out is not None else None if partial else KERNELS_JSON
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    warning = busy_warning()
    if warning:
        console.print(warning)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "result.json"
        status = run_pytest(options, raw)
        if status != 0 or not raw.exists():
            print(f"the benchmarks did not finish (pytest exit status {status}); nothing written", file=sys.stderr)
            return status or 1
        result = load_result(raw)
        data = json.loads(raw.read_text(encoding="utf-8"))
    console.print(ratio_table(result))
    for item in result.unavailable:
        console.print(f"{item['peer']} unavailable at {item['shape']} {item['direction']}: {item['reason']}")
    if out is not None:
        write_atomic(out, dump_lines(data, "benchmarks"))
        console.print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
