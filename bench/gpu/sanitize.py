"""``python -m bench.gpu.sanitize``: the kernels' test programs on a GPU, plainly and under compute-sanitizer's four tools.

It builds the programs of tests/simt with nvcc for this machine's GPU. With ``--rehearse`` it builds them for the CPU, which runs their
threads as fibers and has no such tools. Each run is one process with a time limit; a table says how each ended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "simt"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

PLAIN_ITERATIONS = 100
TOOL_ITERATIONS = 4
REHEARSAL_ITERATIONS = 3
RUN_SECONDS = 45.0
JOBS = 8
"""The number of programs that run at a time: under a tool most of the time is spent on the host."""
SHOWN_LINES = 40


@dataclass(frozen=True)
class Run:
    """One program, plainly (``tool`` empty) or under a tool."""

    case: str
    tool: str
    outcome: str  # "ok", "FAILED" or "timed out"
    seconds: float
    output: str

    @property
    def good(self) -> bool:
        """Whether the run succeeded."""
        return self.outcome == "ok"


def cases() -> list[str]:
    """The programs that exist."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


def tool_path(name: str) -> str | None:
    """Find a program next to this Python, on the PATH, or where CUDA is usually installed."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if "CUDA_HOME" in os.environ:
        places.insert(0, f"{os.environ['CUDA_HOME']}/bin")
    return shutil.which(name, path=os.pathsep.join(places))


def architecture() -> str:
    """The architecture that nvcc compiles for: this machine's GPU, with its architecture-specific features where it has any."""
    found = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    number = found.replace(".", "")
    return f"{number}a" if number == "90" else number


def build(folder: Path, definitions: dict[str, str], targets: Sequence[str]) -> None:
    """Configure and build the programs ``targets`` in ``folder``."""
    cmake, ninja = tool_path("cmake"), tool_path("ninja")
    if cmake is None or ninja is None:
        raise SystemExit("cmake and ninja are needed to build the test programs")
    settings = {"CMAKE_MAKE_PROGRAM": ninja, "CMAKE_BUILD_TYPE": "None", **definitions}
    flags = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run([cmake, "-S", str(FOLDER), "-B", str(folder), "-G", "Ninja", *flags], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", str(folder), "-j", str(os.cpu_count() or 1), "--target", *targets], check=True)


def execute(case: str, tool: str, command: Sequence[str], seconds: float) -> Run:
    """Run one program with a time limit."""
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        outcome, output = ("ok" if done.returncode == 0 else "FAILED"), done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        outcome, output = "timed out", str(error)
    return Run(case, tool, outcome, time.monotonic() - start, output)


def command_for(program: Path, tool: str, iterations: int, sanitizer: str | None) -> list[str]:
    """The command line of a program, under a tool if one is named."""
    under = []
    if tool:
        assert sanitizer is not None
        under = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    # demo also has kernels that are wrong on purpose.
    right = ["--right"] if program.name == "demo" else []
    return [*under, str(program), *right, "--seed", "1", "--iterations", str(iterations)]


def table(runs: Sequence[Run], tools: Sequence[str]) -> str:
    """One line per program: how it ended plainly and under each tool."""
    names = sorted({run.case for run in runs})
    columns = ("", *tools)
    width = max(map(len, names), default=0)
    lines = [" " * width + "".join(f"  {tool or 'plain':>16}" for tool in columns)]
    for name in names:
        cells = []
        for tool in columns:
            run = next((r for r in runs if (r.case, r.tool) == (name, tool)), None)
            cells.append("-" if run is None else f"{run.outcome} {run.seconds:.1f} s")
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>16}" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sanitize", description=__doc__)
    parser.add_argument("--build", type=Path, required=True, help="folder to build in; kept, so that a second run is quick")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, a few iterations, no tools")
    parser.add_argument("--cases", nargs="*", help="only these programs (default: all)")
    options = parser.parse_args(arguments)
    names = options.cases if options.cases else cases()
    unknown = sorted(set(names) - set(cases()))
    if unknown:
        parser.error(f"no test programs {unknown}: expected some of {cases()}")

    if options.rehearse:
        build(options.build, {"CMAKE_CXX_FLAGS": "-O1"}, names)
        sanitizer, plain = None, REHEARSAL_ITERATIONS
    else:
        build(options.build, {"LDMI_SIMT_NVCC": "ON", "LDMI_SIMT_ARCHITECTURES": architecture()}, names)
        sanitizer = tool_path("compute-sanitizer")
        plain = PLAIN_ITERATIONS
        if sanitizer is None:
            print("compute-sanitizer is MISSING: the programs run plainly only, and nothing counts as sanitized")
    tools = TOOLS if sanitizer else ()
    work = [(name, "", plain) for name in names] + [(name, tool, TOOL_ITERATIONS) for tool in tools for name in names]
    runs: list[Run] = []
    with ThreadPoolExecutor(min(JOBS, os.cpu_count() or 1)) as pool:
        waiting = [
            pool.submit(execute, name, tool, command_for(options.build / name, tool, iterations, sanitizer), RUN_SECONDS)
            for name, tool, iterations in work
        ]
        for future in as_completed(waiting):  # printed at once: a user who stops this early still knows what passed
            run = future.result()
            runs.append(run)
            print(f"{run.case} {run.tool or 'plain'}: {run.outcome} after {run.seconds:.1f} s", flush=True)
            if not run.good:
                print("\n".join(run.output.splitlines()[-SHOWN_LINES:]), flush=True)
    print(table(runs, tools))
    bad = sum(not run.good for run in runs)
    missing = sanitizer is None and not options.rehearse
    print(f"{len(runs) - bad} of {len(runs)} runs are good" + ("; compute-sanitizer is missing" if missing else ""))
    return 1 if bad or missing else 0


if __name__ == "__main__":
    sys.exit(main())
