"""Builds the torch-free test programs with CMake and Ninja, and runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Fresh memory holds NaN: zeros would hide values that were never initialised.
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "max_malloc_fill_size=1000000000:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def tool(name: str) -> str:
    """The program ``name`` next to this Python or on the PATH. Skips the test if there is none."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build(folder: Path, definitions: dict[str, str], targets: tuple[str, ...] = ()) -> Path:
    """Configure and build ``targets``, by default all programs, in ``folder``; returns the folder of the programs."""
    cmake, ninja = tool("cmake"), tool("ninja")
    settings = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "LDMI_TESTS": "ON",
        "LDMI_MODULE": "OFF",
        **definitions,
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    run([*configure, *(f"-D{name}={value}" for name, value in settings.items())])
    jobs = str(min(os.cpu_count() or 1, 4))
    run([cmake, "--build", str(folder), "-j", jobs, *(["--target", *targets] if targets else [])])
    return folder / "tests" / "csrc"


def execute(command: list[str], *, isa: str | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``command`` with the instruction set ``isa``."""
    environment = {**os.environ, **SANITIZER_OPTIONS}
    environment.pop("LDMI_FAST_ISA", None)
    if isa is not None:
        environment["LDMI_FAST_ISA"] = isa
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=timeout)


def run(command: list[str], *, isa: str | None = None) -> str:
    """Run ``command`` and return its output. Fails the test if it fails; skips it if this machine lacks ``isa``."""
    done = execute(command, isa=isa)
    output = done.stdout + done.stderr
    if isa is not None and done.returncode == 3:
        pytest.skip(output.strip())
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}\n{output[-8000:]}", pytrace=False)
    return output


def counts(output: str) -> dict[str, int]:
    """The number of batches of each kind, from the last line that ``fuzz`` prints."""
    words = (part.rsplit(" ", 1) for part in output.strip().splitlines()[-1].split("; ")[1:])
    return {name: int(number) for name, number in words}
