"""The result file: pytest-benchmark's JSON, with the interleaved ratios in each benchmark's ``extra_info``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import ldmi_fast
from bench.kernels.cases import Direction, Shape
from bench.kernels.interleave import Quantiles
from bench.kernels.measure import COPY, COPY_BYTES, CaseResult
from bench.kernels.peers import PEERS
from ldmi_fast.files import replacing

RESULTS_DIR = Path(__file__).resolve().parents[1] / "results"
KERNELS_JSON = RESULTS_DIR / "kernels-cpu.json"

BUSY_SHARE = 0.5
"""Share of the cores above which the load average at the start calls for a warning."""


@dataclass(frozen=True)
class Record:
    """One peer (or the copy) at one shape in one direction. Times are seconds per call."""

    shape: Shape
    direction: Direction
    peer: str
    threads: int
    seconds: Quantiles
    ours_over_peer: Quantiles
    loss: float | None

    @property
    def family(self) -> str:
        """The family of the peer, or ``"copy"``."""
        return COPY if self.peer == COPY else PEERS[self.peer].family

    def to_extra_info(self) -> dict[str, Any]:
        """The form in which a record is kept in a benchmark's ``extra_info``."""
        return {
            "rows": self.shape.rows,
            "classes": self.shape.classes,
            "direction": self.direction,
            "peer": self.peer,
            "threads": self.threads,
            "seconds": asdict(self.seconds),
            "ours_over_peer": asdict(self.ours_over_peer),
            "loss": self.loss,
        }

    @classmethod
    def from_extra_info(cls, info: dict[str, Any]) -> Record:
        """Read what ``to_extra_info`` wrote."""
        return cls(
            shape=Shape(info["rows"], info["classes"]),
            direction=info["direction"],
            peer=info["peer"],
            threads=info["threads"],
            seconds=Quantiles(**info["seconds"]),
            ours_over_peer=Quantiles(**info["ours_over_peer"]),
            loss=info["loss"],
        )


@dataclass
class RunResult:
    """All records of a run, the machine it ran on, and what could not be timed."""

    environment: dict[str, Any]
    date: str
    records: list[Record]
    unavailable: list[dict[str, str]] = field(default_factory=list)

    def find(self, shape: Shape, direction: Direction, peer: str) -> Record | None:
        """The record of one peer at one shape in one direction, or None."""
        for record in self.records:
            if (record.shape, record.direction, record.peer) == (shape, direction, peer):
                return record
        return None

    def fastest(self, shape: Shape, direction: Direction, family: str) -> Record | None:
        """The member of a family that ours compares worst with, or None where none was timed."""
        members = [r for r in self.records if (r.shape, r.direction, r.family) == (shape, direction, family)]
        return max(members, key=lambda record: record.ours_over_peer.p50, default=None)

    def shapes(self) -> list[Shape]:
        """The shapes timed, sorted."""
        return sorted({record.shape for record in self.records})


def records_of(case: CaseResult) -> list[Record]:
    """The records of one measured case."""
    return [
        Record(
            case.shape,
            case.direction,
            name,
            case.threads,
            case.timings.seconds(name),
            case.timings.reference_over(name),
            case.losses.get(name),
        )
        for name in case.timings.rounds
    ]


def parse_result(text: str, source: str) -> RunResult:
    """Read a result file's text; ``source`` names it in errors."""
    try:
        data = json.loads(text)
        records = [Record.from_extra_info(benchmark["extra_info"]) for benchmark in data["benchmarks"]]
        return RunResult(data["machine_info"], data["datetime"], records, data["unavailable"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{source} is not a result of `python -m bench.kernels.run`: {type(error).__name__}: {error}") from error


def load_result(path: Path) -> RunResult:
    """Read a result file."""
    return parse_result(path.read_text(encoding="utf-8"), str(path))


def write_atomic(path: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write a file, and its folder if need be, so that no reader ever sees half of the file. ``sync``: as for ``replacing``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=sync) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def dump_lines(data: dict[str, Any], *lists: str) -> str:
    """JSON with each item of the named lists on one line: a committed result is short, and its diff is readable."""
    parts = []
    for name, value in data.items():
        if name in lists and value:
            text = "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n ]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def environment() -> dict[str, Any]:
    """Versions and the machine, as far as they influence speed. The host name is left out."""
    build_info = getattr(ldmi_fast, "build_info", None)
    return {
        "ldmi_fast": ldmi_fast.__version__,
        "engine": ldmi_fast.explain(torch.zeros(2, 2), torch.tensor([0, 1])).engine,
        "build_info": build_info() if callable(build_info) else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "copy_bytes": COPY_BYTES,
    }


def load_average() -> float | None:
    """The number of processes that wanted to run over the last minute; None where the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy_warning() -> str:
    """A warning if other processes use the CPU, else empty. Ratios are less sensitive to that than times."""
    load, cores = load_average(), os.cpu_count() or 1
    if load is None or load <= BUSY_SHARE * cores:
        return ""
    return f"the machine is busy (load average {load:.1f} on {cores} cores): expect noisy ratios"


def cpu_model() -> str:
    """The CPU's model name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def committed_text(path: Path) -> tuple[str, str] | None:
    """The text of ``path`` at git's HEAD, or on disk where git does not have it, and a description of its origin."""
    git = ("git", "-C", str(path.parent))
    shown = subprocess.run((*git, "show", f"HEAD:./{path.name}"), capture_output=True, text=True, check=False)
    if shown.returncode == 0:
        return shown.stdout, f"{path.name} as committed"
    if path.exists():
        return path.read_text(encoding="utf-8"), f"{path.name} on disk (not committed)"
    return None
