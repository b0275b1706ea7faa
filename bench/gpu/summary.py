"""``python bench/gpu/summary.py PARTS OUT KIND``: the parts of a run as a table, and as ``OUT/summary.json``. Needs only Python.

``run.sh`` keeps one line per part in the file PARTS: name, outcome, exit status, seconds, limit and the last line of its output,
separated by tabs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FIELDS = ("part", "outcome", "status", "seconds", "limit", "last_line")


def read_parts(text: str) -> list[dict[str, Any]]:
    """The parts in the order in which they ran."""
    parts = []
    for line in text.splitlines():
        values = line.split("\t", len(FIELDS) - 1)
        if len(values) != len(FIELDS):
            raise ValueError(f"expected {len(FIELDS)} fields separated by tabs ({', '.join(FIELDS)}), got {line!r}")
        part: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
        for number in ("status", "seconds", "limit"):
            part[number] = int(part[number])
        parts.append(part)
    return parts


def table(parts: list[dict[str, Any]]) -> str:
    """Name, outcome, seconds of the limit, and what the part said last."""
    lines = [f"{'part':<10} {'outcome':<10} {'seconds':>12}  said last"]
    for part in parts:
        seconds = f"{part['seconds']} of {part['limit']}"
        lines.append(f"{part['part']:<10} {part['outcome']:<10} {seconds:>12}  {part['last_line'][:110]}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print("usage: summary.py PARTS OUT rehearsal|gpu", file=sys.stderr)
        return 2
    parts_file, out, kind = Path(arguments[0]), Path(arguments[1]), arguments[2]
    parts = read_parts(parts_file.read_text(encoding="utf-8"))
    good = bool(parts) and all(part["outcome"] == "ok" for part in parts)
    summary = {"rehearsal": kind == "rehearsal", "ok": good, "seconds": sum(p["seconds"] for p in parts), "parts": parts}
    # It is renamed into place by the standard library alone: this must work where nothing else did.
    with tempfile.NamedTemporaryFile("w", dir=out, prefix=".summary", delete=False) as stream:
        json.dump(summary, stream, indent=1)
        stream.write("\n")
    Path(stream.name).chmod(0o644)
    Path(stream.name).replace(out / "summary.json")
    print(table(parts))
    if kind == "rehearsal":
        print("A REHEARSAL: no GPU ran any of this")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
