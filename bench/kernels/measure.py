"""Time all peers of one shape in one direction, interleaved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.kernels.cases import Batch, Direction, Shape, make_batches
from bench.kernels.interleave import Timings, interleave
from bench.kernels.peers import PEERS, Loss, Peer, index_add_slogdet_fp64

COPY = "copy"
"""Name of the memory copy timed among the peers of a large shape: it shows the bandwidth of the memory at that moment."""
COPY_BYTES = 64 * 2**20
"""Size of the copied buffer; the traffic of one copy is twice that, read and written."""

LOSS_TOLERANCE = 1e-3
"""A peer whose L_DMI is further than this from the float64 value (relative above 1, else absolute) is not timed."""


@dataclass
class CaseResult:
    """Timings of one shape and direction, and the peers that could not be timed with the reason."""

    shape: Shape
    direction: Direction
    threads: int
    timings: Timings
    losses: dict[str, float]
    unavailable: dict[str, str] = field(default_factory=dict)


def make_call(loss: Loss, batches: Sequence[Batch], direction: Direction) -> Callable[[], object]:
    """A function that runs ``loss`` on the next of ``batches``: forward without gradients, or forward and backward."""
    batch = itertools.cycle(batches)
    if direction == "forward":

        def forward() -> object:
            current = next(batch)
            return loss(current.detached, current.target)

        return forward

    def forward_backward() -> object:
        current = next(batch)
        return torch.autograd.grad(loss(current.logits, current.target), current.logits)

    return forward_backward


def make_copy() -> Callable[[], object]:
    """A function that copies a buffer larger than the cache, with torch's own copy and threads."""
    source = torch.ones(COPY_BYTES // 4)
    destination = torch.zeros_like(source)
    return lambda: destination.copy_(source)


def prepare(peer: Peer, batches: Sequence[Batch], direction: Direction) -> tuple[Callable[[], object], float]:
    """Build a peer (this may compile), run it once and return its call and the first batch's loss."""
    loss = peer.build()
    call = make_call(loss, batches, direction)
    if peer.compiled:
        call()  # compiles the backward as well, and fails here if it cannot
    with torch.no_grad() if direction == "forward" else torch.enable_grad():
        batch = batches[0]
        value = float(loss(batch.detached if direction == "forward" else batch.logits, batch.target).detach())
    return call, value


def check_loss(peer: Peer, value: float, expected: float) -> None:
    """Raise if a peer's L_DMI is not the float64 value: the time of a wrong result means nothing."""
    # `not <=` so that a NaN fails too
    if peer.dmi and not abs(value - expected) <= LOSS_TOLERANCE * max(1.0, abs(expected)):
        raise RuntimeError(f"peer {peer.name!r} gives the loss {value!r} where float64 gives {expected!r}: not timed")


def measure(
    shape: Shape,
    direction: Direction,
    peers: Sequence[str],
    *,
    time_cap: float,
    min_rounds: int = 5,
    max_rounds: int = 400,
    on_round: Callable[[float], None] = lambda fraction: None,
) -> CaseResult:
    """Time ``peers`` (names in ``PEERS``, ``"ours"`` among them) on ``shape``, interleaved, for ``time_cap`` seconds.

    A compiled peer that cannot be compiled is left out and listed in ``unavailable``. Any other failure raises.
    """
    with num_threads(threads_for(shape)):
        calls, losses, unavailable = prepare_all(shape, direction, peers)
        timings = interleave(
            calls, reference="ours", time_cap=time_cap, min_rounds=min_rounds, max_rounds=max_rounds, on_round=on_round
        )
        return CaseResult(shape, direction, torch.get_num_threads(), timings, losses, unavailable)


def threads_for(shape: Shape) -> int:
    """Threads to time a shape with: torch's default for a large shape, one for a small one.

    Such small work gains almost nothing from a second thread. But on a busy machine every parallel region waits tens of
    milliseconds until the scheduler runs a suspended thread again: a peer that opens a parallel region, as the smallest
    softmax does, would look a hundred times slower than it is.
    """
    return torch.get_num_threads() if shape.large else 1


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Run torch with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare_all(
    shape: Shape, direction: Direction, peers: Sequence[str]
) -> tuple[dict[str, Callable[[], object]], dict[str, float], dict[str, str]]:
    """The calls to time by name, the loss each gives, and the compiled peers that failed with the reason."""
    # Each shape compiles again; without the reset dynamo would reach its limit of recompilations and run eager code.
    torch.compiler.reset()
    batches = make_batches(shape)
    with torch.no_grad():
        expected = float(index_add_slogdet_fp64(batches[0].detached, batches[0].target))
    if not math.isfinite(expected):
        raise RuntimeError(f"the inputs made for {shape} have the loss {expected!r}; shapes with N < C cannot be compared")
    calls: dict[str, Callable[[], object]] = {}
    losses: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    for name in peers:
        peer = PEERS[name]
        try:
            calls[name], losses[name] = prepare(peer, batches, direction)
        except Exception as error:
            if not peer.compiled:
                raise
            unavailable[name] = f"torch.compile failed: {type(error).__name__}: {first_line(error)}"
            continue
        check_loss(peer, losses[name], expected)
    if shape.large:
        calls[COPY] = make_copy()
    return calls, losses, unavailable


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"
