"""``python -m bench.gpu.verified``: which kernel sources a GPU has run, and what has changed since.

``bench/results/gpu-verified.json`` has for each source of an engine the hash that it had when the tests and the sanitizers passed on
a GPU, the device and the date. Only ``bench/gpu/run.sh`` writes it, after both passed on a real GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.gpu.machine import ROOT, file_hash, gpu, machine
from bench.kernels.results import RESULTS_DIR, write_atomic
from ldmi_fast.engines.choose import available

VERIFIED_JSON = RESULTS_DIR / "gpu-verified.json"

SOURCES: dict[str, tuple[str, ...]] = {
    "cuda": ("csrc/cuda/**/*", "csrc/simt/*.cuh", "csrc/plan/cuda_plan.*", "csrc/plan/device_limits.h", "csrc/torch/ops_cuda.cpp"),
    "triton": ("ldmi_fast/engines/triton/*.py",),
}
"""The files that make up each engine on a GPU."""


@dataclass(frozen=True)
class Entry:
    """One source file as a GPU last verified it."""

    sha256: str
    device: str
    date: str
    torch: str
    driver: str


def sources(engine: str, root: Path = ROOT) -> list[str]:
    """The source files of an engine, relative to the root."""
    if engine not in SOURCES:
        raise ValueError(f"no engine {engine!r} that a GPU verifies: expected one of {sorted(SOURCES)}")
    found = {path for pattern in SOURCES[engine] for path in root.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(root).as_posix() for path in found)


def load(path: Path = VERIFIED_JSON) -> dict[str, Entry]:
    """The table; empty where there is none yet."""
    if not path.exists():
        return {}
    try:
        return {name: Entry(**entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a table of verified sources: {type(error).__name__}: {error}") from error


def stale(table: dict[str, Entry], root: Path = ROOT) -> dict[str, str]:
    """Every source that no GPU has verified in its present state, with the reason: never verified, or changed since a date."""
    found: dict[str, str] = {}
    for engine in SOURCES:
        for name in sources(engine, root):
            entry = table.get(name)
            if entry is None:
                found[name] = "never run on a GPU"
            elif entry.sha256 != file_hash(root / name):
                found[name] = f"changed since {entry.date[:10]} ({entry.device})"
    return found


def updated(table: dict[str, Entry], engines: Sequence[str], here: dict[str, Any], date: str, root: Path = ROOT) -> dict[str, Entry]:
    """The table with the sources of ``engines`` as they are now, verified by the machine ``here``; files that are gone leave it."""
    if here["gpu"] is None:
        raise RuntimeError("no CUDA device that this torch can use: only a GPU verifies kernels")
    smi = here["nvidia_smi"] or {}
    entry = {"device": here["gpu"]["name"], "date": date, "torch": here["torch"], "driver": smi.get("driver_version", "")}
    new = {name: old for name, old in table.items() if (root / name).is_file()}
    for engine in engines:
        new |= {name: Entry(sha256=file_hash(root / name), **entry) for name in sources(engine, root)}
    return dict(sorted(new.items()))


def dump(table: dict[str, Entry]) -> str:
    """JSON with one file per line."""
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(asdict(entry))}" for name, entry in table.items())
    return "{\n" + lines + "\n}\n" if table else "{}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.verified", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="record the sources as verified by this machine's GPU, now")
    parser.add_argument("--engines", nargs="*", default=["cuda"], help="whose sources (default: cuda)")
    options = parser.parse_args(arguments)
    table = load()
    if options.write is not None:
        if gpu() is None:
            parser.error("no CUDA device that this torch can use: only a GPU verifies kernels")
        can_run = available("cuda")
        for name in options.engines:
            if can_run.get(name, "there is no such engine"):
                parser.error(f"engine {name!r} cannot run, so nothing verified it: {can_run.get(name, 'there is no such engine')}")
        table = updated(table, options.engines, machine(), datetime.now(timezone.utc).isoformat(timespec="seconds"))
        write_atomic(options.write, dump(table))
        print(f"written: {options.write} ({', '.join(options.engines)})")
        return 0
    for name, state in stale(table).items():
        print(f"{name}: {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
