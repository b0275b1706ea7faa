"""A small made-up result of the kernel benchmark, for the tests of the code that reads results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bench.kernels.cases import Direction, Shape
from bench.kernels.interleave import Quantiles
from bench.kernels.results import Record

ENVIRONMENT: dict[str, Any] = {
    "ldmi_fast": "0.0.0",
    "engine": "cpu",
    "build_info": None,
    "torch": "2.0.0",
    "python": "3.10.0",
    "system": "Linux x86_64",
    "cpu": "Made-up CPU",
    "isa": "AVX2",
    "threads": 2,
    "load_average": 0.25,
    "copy_bytes": 2**26,
}


def around(value: float, spread: float = 0.05, count: int = 50) -> Quantiles:
    """Quantiles of a measurement of ``value`` with the given relative spread."""
    return Quantiles(value * (1 - spread), value, value * (1 + spread), count)


def record(shape: Shape, direction: Direction, peer: str, ratio: float, spread: float = 0.05) -> Record:
    """One peer of which ours takes ``ratio``, in a case where ours takes a nanosecond per logit."""
    ours = shape.rows * shape.classes * 1e-9
    return Record(shape, direction, peer, 2, around(ours / ratio, spread), around(ratio, spread), None)


def result_text(records: Sequence[Record], unavailable: Sequence[dict[str, str]] = ()) -> str:
    """The records as a result file."""
    return json.dumps(
        {
            "machine_info": ENVIRONMENT,
            "datetime": "2026-01-31T12:00:00+00:00",
            "benchmarks": [{"extra_info": item.to_extra_info()} for item in records],
            "unavailable": list(unavailable),
        }
    )
