"""``python -m bench.gpu.machine``: the machine and the sources as far as they influence a result, as JSON.

The host name is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ldmi_fast
from bench.kernels.results import cpu_model, write_atomic
from ldmi_fast import ops

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("csrc", "ldmi_fast", "tests", "bench")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".sh"}


def output_of(*command: str) -> str:
    """What a program prints; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def file_hash(path: Path) -> str:
    """SHA-256 of one file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source_files(root: Path = ROOT) -> list[Path]:
    """Every source that a result depends on, sorted."""
    found: Iterable[Path] = (path for folder in SOURCE_FOLDERS for path in (root / folder).rglob("*"))
    return sorted(path for path in found if path.suffix in SOURCE_SUFFIXES and path.is_file())


def source_hash(root: Path = ROOT) -> str:
    """One hash over all sources and their names: says what was measured where there is no git."""
    total = hashlib.sha256()
    for path in source_files(root):
        total.update(f"{path.relative_to(root).as_posix()}\0{file_hash(path)}\n".encode())
    return total.hexdigest()


def git_revision() -> str | None:
    """The commit, with a plus sign if files differ from it; None outside a checkout."""
    revision = output_of("git", "rev-parse", "HEAD")
    if not revision:
        return None
    return revision + ("+" if output_of("git", "status", "--porcelain", "--untracked-files=no") else "")


def gpu() -> dict[str, Any] | None:
    """The device that torch would use, or None."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "count": torch.cuda.device_count(),
    }


def versions(text: str) -> str:
    """``release 13.0, V13.0.88`` out of what nvcc prints."""
    found = re.search(r"release .*", text)
    return found[0] if found else ""


def machine() -> dict[str, Any]:
    """The GPU, its driver and clocks, the versions of everything, and the sources."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,persistence_mode"
    names = query.split(",")
    values = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines()
    return {
        "gpu": gpu(),
        "nvidia_smi": dict(zip(names, (v.strip() for v in values[0].split(",")), strict=False)) if values else None,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version_of("triton"),
        "nvcc": versions(output_of("nvcc", "--version")),
        "compute_sanitizer": output_of("compute-sanitizer", "--version").splitlines()[-1:] or None,
        "ldmi_fast": ldmi_fast.__version__,
        "build_info": None if ops.compiled is None else {k: str(v) for k, v in ops.compiled.build_info().items()},
        "git": git_revision(),
        "source_hash": source_hash(),
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.machine", description=__doc__)
    parser.add_argument("--out", type=Path, help="write there, with all that nvidia-smi -q says")
    options = parser.parse_args(arguments)
    found = machine()
    print(json.dumps(found, indent=1))
    if options.out is not None:
        # The serial numbers and the UUID of the card are private.
        everything = re.sub(r"(?im)^(.*(serial|uuid|guid).*?:\s*).*$", r"\1-", output_of("nvidia-smi", "-q"))
        write_atomic(options.out, json.dumps({**found, "nvidia_smi_q": everything.splitlines()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
