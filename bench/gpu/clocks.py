"""Three methods to time a call on a device that runs asynchronously to the host.

========== ==========================================================================================================
``graph``  a CUDA graph of many calls, replayed: what the kernels take one after another, logits rotating through more than
           twice the cache where they are large, in the cache where they are small
``device`` events around one eager call, the cache flushed before it and the host far enough ahead that the device never waits
``wall``   the host's clock over eager calls, one after another: what a training loop sees, the Python of the call included
========== ==========================================================================================================

On the CPU, for a rehearsal, the host's clock replaces all three.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

AHEAD_CYCLES = 2_000_000
"""About a millisecond of a device's clock: as long as the host may take to queue an eager forward and backward."""
GRAPH_CALLS = 20
"""At least this many calls in a graph, so that the launch of the graph itself is not what is timed."""
KERNEL_NODE = 0
"""cudaGraphNodeTypeKernel"""


@dataclass(frozen=True)
class Captured:
    """Several calls that are replayed together. It keeps the call alive, and with it the memory that the graph reads and writes."""

    replay: Call
    calls: int
    call: Call

    def __call__(self) -> object:
        return self.replay()


@dataclass
class Clocks:
    """The clocks of one device."""

    device: torch.device

    def __post_init__(self) -> None:
        self.cuda = self.device.type == "cuda"
        self.l2_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size) if self.cuda else 2**20
        self._flush = torch.empty(2 * self.l2_bytes, dtype=torch.int8, device=self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def wall_seconds(self, function: Call, calls: int) -> float:
        """Eager calls by the host's clock, until the device has done them."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self.synchronize()
        return time.perf_counter() - start

    def device_seconds(self, function: Call, calls: int) -> float:
        """Eager calls by the device's clock, each with a cold cache."""
        if not self.cuda:
            total = 0.0
            for _ in range(calls):
                self._flush.zero_()
                total += self.wall_seconds(function, 1)
            return total
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, stop in events:
            self._flush.zero_()
            torch.cuda._sleep(AHEAD_CYCLES)
            start.record()
            function()
            stop.record()
        self.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in events) / 1e3

    def graph_seconds(self, function: Call, calls: int) -> float:
        """Replays of a ``Captured``: seconds of ``calls`` of its calls."""
        assert isinstance(function, Captured)
        if not self.cuda:
            return self.wall_seconds(function, calls) / function.calls
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        self.synchronize()
        return start.elapsed_time(stop) / 1e3 / function.calls

    def capture(self, call: Call, calls: int) -> Captured:
        """``calls`` calls as a CUDA graph.

        Raises:
            RuntimeError: the call cannot be captured, because it waits for the device, for instance.
        """
        if not self.cuda:

            def repeat() -> None:
                for _ in range(calls):
                    call()

            return Captured(repeat, calls, call)
        graph = capture_graph(call, calls)
        return Captured(graph.replay, calls, call)


def capture_graph(call: Call, calls: int = 1, *, keep: bool = False) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``calls`` calls, after two that are not in it: whatever is built or allocated once is so before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    if keep:
        graph.instantiate()
    return graph


def count_nodes(call: Call) -> tuple[int, int]:
    """How many kernels one call launches, and how many other nodes (copies, memsets) its graph has.

    Raises:
        RuntimeError: the call cannot be captured, or CUDA's runtime does not say.
    """
    graph = capture_graph(call, keep=True)
    runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()

    def check(error: int, what: str) -> None:
        if error != 0:
            raise RuntimeError(f"{what} failed with CUDA error {error}")

    check(runtime.cudaGraphGetNodes(handle, None, ctypes.byref(count)), "cudaGraphGetNodes")
    nodes = (ctypes.c_void_p * count.value)()
    check(runtime.cudaGraphGetNodes(handle, nodes, ctypes.byref(count)), "cudaGraphGetNodes")
    kernels = 0
    for node in nodes:
        kind = ctypes.c_int()
        check(runtime.cudaGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)), "cudaGraphNodeGetType")
        kernels += kind.value == KERNEL_NODE
    return kernels, count.value - kernels
