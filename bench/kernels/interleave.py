"""Round-robin timing: on a shared machine a time means little, but the ratio of two times taken side by side does.

Every round times each function once, in a random order, so that a slow second of the machine affects all of them equally.
The medians over the rounds of the ratio within a round are reported.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

BLOCK_SECONDS = 2e-3
"""Short calls are repeated within a round until they last about this long."""
MAX_INNER_CALLS = 200
LONG_CALL_SECONDS = 0.5
"""A call this long is warmed up once, not twice."""
MAX_SHARE = 4.0
"""A function that has had more than this multiple of the reference's time skips rounds once it has ``SLOW_ROUNDS``."""
SLOW_ROUNDS = 3


@dataclass(frozen=True)
class Quantiles:
    """The 20th, 50th and 80th percentile of ``count`` values."""

    p20: float
    p50: float
    p80: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Quantiles:
        """Quantiles of a non-empty list."""
        if not values:
            raise ValueError("no values: quantiles need at least one")
        p20, p50, p80 = np.percentile(values, (20, 50, 80)).tolist()
        return cls(p20, p50, p80, len(values))

    @property
    def spread(self) -> float:
        """Half the distance from p20 to p80, relative to the median."""
        return (self.p80 - self.p20) / (2 * self.p50)


@dataclass
class Timings:
    """Seconds per call: ``rounds[name][round]``. A slow function may be left out of some rounds."""

    reference: str
    inner_calls: dict[str, int]
    rounds: dict[str, dict[int, float]] = field(default_factory=dict)

    def seconds(self, name: str) -> Quantiles:
        """Seconds per call of ``name``."""
        return Quantiles.of(list(self.rounds[name].values()))

    def reference_over(self, name: str) -> Quantiles:
        """The reference's time over that of ``name``, round by round: below 1 where the reference is the faster one."""
        mine = self.rounds[self.reference]
        return Quantiles.of([mine[index] / seconds for index, seconds in self.rounds[name].items()])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, then keep the collector from running within a timing."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    reference: str,
    time_cap: float,
    min_rounds: int = 5,
    max_rounds: int = 400,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    seconds_of: Callable[[Callable[[], object], int], float] | None = None,
    block_seconds: float = BLOCK_SECONDS,
    on_round: Callable[[float], None] = lambda fraction: None,
) -> Timings:
    """Time ``functions`` round-robin until ``time_cap`` seconds or ``max_rounds`` rounds have passed.

    Each function is first called twice (a long one once) to warm up. At least ``min_rounds`` rounds are made however long
    they take; if ``max_rounds`` is the same, exactly that number. ``reference`` takes part in every round; otherwise a
    function that has had ``MAX_SHARE`` times the reference's total time skips rounds. ``clock`` returns seconds;
    ``seconds_of(function, calls)`` makes that many calls and returns the seconds that count, where that is not the clock's
    difference, as on a device that runs behind the host. Short calls are repeated within a round until they last about
    ``block_seconds``. ``on_round`` is called after each round with the fraction of the work that is done.
    """
    if reference not in functions:
        raise ValueError(f"reference {reference!r} is not among the functions: {sorted(functions)}")
    if min_rounds < 1 or max_rounds < min_rounds:
        raise ValueError(f"expected 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}")

    def run(name: str, calls: int) -> float:
        function = functions[name]
        if seconds_of is not None:
            return seconds_of(function, calls)
        start = clock()
        for _ in range(calls):
            function()
        return clock() - start

    order = list(functions)
    shuffle = random.Random(seed).shuffle
    with no_garbage_collection():
        inner_calls = {}
        for name in order:
            seconds = run(name, 1)
            if seconds < LONG_CALL_SECONDS:
                seconds = run(name, 1)
            inner_calls[name] = max(1, min(MAX_INNER_CALLS, round(block_seconds / max(seconds, 1e-9))))
        timings = Timings(reference, inner_calls, {name: {} for name in order})
        spent = dict.fromkeys(order, 0.0)
        start = clock()
        for index in range(max_rounds):
            elapsed = clock() - start
            if index >= min_rounds and elapsed >= time_cap:
                break
            shuffle(order)
            for name in order:
                slow = name != reference and spent[name] > MAX_SHARE * spent[reference]
                if slow and min_rounds < max_rounds and len(timings.rounds[name]) >= SLOW_ROUNDS:
                    continue
                block = run(name, inner_calls[name])
                spent[name] += block
                timings.rounds[name][index] = block / inner_calls[name]
            on_round(max((index + 1) / max_rounds, min(1.0, elapsed / time_cap) if time_cap > 0 else 0.0))
    return timings
