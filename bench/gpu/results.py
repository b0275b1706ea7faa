"""The result file of the GPU benchmark: one JSON object, one measurement per line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.gpu.cases import Case
from bench.kernels.interleave import Quantiles
from bench.kernels.results import dump_lines, write_atomic

What = Literal["loss", "step", "logdet"]
Clock = Literal["device", "graph", "wall"]
CLOCKS: tuple[Clock, ...] = ("graph", "device", "wall")

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One function at one shape by one clock. Times are seconds per call; ``ours_over_peer`` is below 1 where ours is faster.

    ``what``: "loss" (``direction``: forward or forward_backward), "step" (direction: the name of the op; rows of engines and of the
    copy) or "logdet" (log|det| and the inverse of a C x C matrix).
    """

    what: What
    rows: int
    classes: int
    dtype: str
    direction: str
    clock: Clock
    peer: str
    family: str
    seconds: Quantiles
    ours_over_peer: Quantiles | None = None

    @property
    def case(self) -> Case:
        """Shape and dtype as one value."""
        return Case(self.rows, self.classes, self.dtype)


@dataclass(frozen=True)
class Peak:
    """Peak bytes of one forward and backward beyond the inputs."""

    rows: int
    classes: int
    dtype: str
    peer: str
    extra_bytes: int


@dataclass(frozen=True)
class Launches:
    """What a captured graph of one call holds: kernels, and other nodes (copies, memsets)."""

    rows: int
    classes: int
    dtype: str
    peer: str
    direction: str
    kernels: int
    others: int


@dataclass
class Result:
    """Everything that one run measured, and what it left out with the reason."""

    machine: dict[str, Any]
    date: str
    rehearsal: bool
    copy_bytes: int
    rows: list[Row] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    launches: list[Launches] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def find(self, case: Case, direction: str, clock: Clock, peer: str, what: What = "loss") -> Row | None:
        """The row of one peer, or None."""
        wanted = (what, case.rows, case.classes, case.dtype, direction, clock, peer)
        return next(
            (r for r in self.rows if (r.what, r.rows, r.classes, r.dtype, r.direction, r.clock, r.peer) == wanted),
            None,
        )

    def fastest(self, case: Case, direction: str, clock: Clock, family: str, what: What = "loss") -> Row | None:
        """The member of a family that ours compares worst with, or None where none was timed."""
        wanted = (what, case.rows, case.classes, case.dtype, direction, clock, family)
        members = [
            r
            for r in self.rows
            if (r.what, r.rows, r.classes, r.dtype, r.direction, r.clock, r.family) == wanted and r.ours_over_peer is not None
        ]
        return max(members, key=lambda r: r.ours_over_peer.p50 if r.ours_over_peer else 0.0, default=None)

    def cases(self, what: What = "loss") -> list[Case]:
        """The cases timed, by dtype, rows and classes."""
        found = {row.case for row in self.rows if row.what == what}
        return sorted(found, key=lambda case: (case.dtype != "float32", case.dtype, case.rows, case.classes))

    def bandwidth(self) -> float | None:
        """Bytes per second that the copy reached, read and written, median over the run; None where it was not timed."""
        times = sorted(row.seconds.p50 for row in self.rows if row.peer == "copy")
        return 2 * self.copy_bytes / times[len(times) // 2] if times else None


LISTS: dict[str, type] = {"rows": Row, "peaks": Peak, "launches": Launches}


def dump(result: Result) -> str:
    """JSON with one measurement per line."""
    return dump_lines({"format": FORMAT, **asdict(result)}, *LISTS, "left_out")


def write(result: Result, path: Path) -> None:
    """Write the file completely or not at all."""
    write_atomic(path, dump(result))


def _row(item: dict[str, Any]) -> Row:
    ratio = item["ours_over_peer"]
    return Row(
        **{
            **item,
            "seconds": Quantiles(**item["seconds"]),
            "ours_over_peer": None if ratio is None else Quantiles(**ratio),
        }
    )


def parse(text: str, source: str) -> Result:
    """Read what ``dump`` wrote; ``source`` names it in errors."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"{source} has format {data['format']}, expected {FORMAT}")
        return Result(
            machine=data["machine"],
            date=data["date"],
            rehearsal=data["rehearsal"],
            copy_bytes=data["copy_bytes"],
            rows=[_row(item) for item in data["rows"]],
            peaks=[Peak(**item) for item in data["peaks"]],
            launches=[Launches(**item) for item in data["launches"]],
            left_out=data["left_out"],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{source} is not a result of `python -m bench.gpu`: {type(error).__name__}: {error}") from error


def load(path: Path) -> Result:
    """Read a result file."""
    return parse(path.read_text(encoding="utf-8"), str(path))
