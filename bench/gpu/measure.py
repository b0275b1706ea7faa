"""What is measured at one shape: the loss next to its peers, the steps alone, log|det| and inverse alone, memory, launches."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu.cases import HOT_BYTES, Case, make_batches
from bench.gpu.clocks import GRAPH_CALLS, Call, Captured, Clocks, count_nodes
from bench.gpu.peers import kernel_engines, why_not_timed
from bench.gpu.results import CLOCKS, Clock, Launches, Peak, Result, Row, What
from bench.kernels.cases import DIRECTIONS, Batch, Direction
from bench.kernels.interleave import Timings, interleave
from bench.kernels.measure import COPY, check_loss, first_line, make_call, prepare
from bench.kernels.peers import Loss, Peer, index_add_slogdet_fp64
from bench.logdet import Size, joint_like, stock

PEAK_PEERS = ("ours", "index_add", "cross_entropy")
TWICE_CLASSES = 2048
"""Above this number of classes the paths to log|det| and inverse with two factorisations are not timed."""
NOT_CAPTURED = {"published": "its one-hot matrix comes from the CPU", "ours-composite": "it waits for the device"}
"""A capture that fails keeps what it had allocated."""
BLOCK_SECONDS: dict[Clock, float] = {"graph": 2e-3, "device": 0.0, "wall": 2e-3}
"""How long a function is repeated within a round. The events of the device's clock surround one call at a time."""


@dataclass
class Bench:
    """One run: the clocks, the peers, and the result that the measurements go to."""

    clocks: Clocks
    peers: Mapping[str, Peer]
    result: Result
    time_cap: float
    min_rounds: int = 5
    max_rounds: int = 200

    def left_out(self, where: str, what: str, reason: str) -> None:
        """Note what was not measured, and why."""
        self.result.left_out.append({"where": where, "what": what, "reason": reason})

    def time(self, functions: Mapping[str, Call], clock: Clock, reference: str) -> Timings:
        """Interleaved timings by one clock."""
        seconds_of = {
            "graph": self.clocks.graph_seconds,
            "device": self.clocks.device_seconds,
            "wall": self.clocks.wall_seconds,
        }
        # A replay is many calls, and the clock counts calls.
        calls = max(function.calls if isinstance(function, Captured) else 1 for function in functions.values())
        return interleave(
            functions,
            reference=reference,
            time_cap=self.time_cap,
            min_rounds=self.min_rounds,
            max_rounds=self.max_rounds,
            seconds_of=seconds_of[clock],
            block_seconds=BLOCK_SECONDS[clock] / calls,
        )

    def captured(self, calls: Mapping[str, Call], count: int, where: str) -> dict[str, Call]:
        """The calls as graphs; those that cannot be captured are noted."""
        graphs: dict[str, Call] = {}
        for name, call in calls.items():
            if self.clocks.cuda and name in NOT_CAPTURED:
                self.left_out(where, f"{name} under a CUDA graph", NOT_CAPTURED[name])
                continue
            try:
                graphs[name] = self.clocks.capture(call, count)
            except Exception as error:
                self.left_out(where, f"{name} under a CUDA graph", f"{type(error).__name__}: {first_line(error)}")
                # A capture that failed must not leave the device unusable for what follows.
                self.clocks.synchronize()
        return graphs

    def loss(self, case: Case) -> None:
        """Time the loss next to its peers, forward alone and with its backward, by every clock."""
        if case.compiled:
            # Fresh: dynamo would otherwise reach its limit of recompilations and run eager code.
            torch.compiler.reset()
        # Existing objects are frozen: each timing collects garbage first, and need not visit all of torch's objects again.
        gc.collect()
        gc.freeze()
        for direction in DIRECTIONS:
            batches = make_batches(case, self.clocks.device, self.clocks.l2_bytes)
            where = f"{case} {direction}"
            calls = self._prepare(case, direction, batches, where)
            for clock in CLOCKS:
                functions = calls
                if clock == "graph":
                    functions = self.captured(calls, graph_calls(case, len(batches)), where)
                if "ours" not in functions:
                    continue
                timings = self.time(functions, clock, "ours")
                self._add("loss", case, direction, clock, timings, {name: self.peers[name].family for name in functions})
            del calls, functions, batches
            gc.collect()
            if self.clocks.cuda:
                torch.cuda.empty_cache()  # graphs have pools of their own

    def _prepare(self, case: Case, direction: Direction, batches: Sequence[Batch], where: str) -> dict[str, Call]:
        with torch.no_grad():
            expected = float(index_add_slogdet_fp64(batches[0].detached, batches[0].target))
        calls: dict[str, Call] = {}
        for name, peer in self.peers.items():
            if peer.compiled and (direction == "forward" or not case.compiled):
                continue  # each takes seconds to build; the goals are about forward and backward
            reason = why_not_timed(name, case.rows, case.classes)
            if reason:
                self.left_out(where, name, reason)
                continue
            own = batches
            if peer.overwrites:
                own = [Batch(b.detached.clone().requires_grad_(), b.detached.clone(), b.target) for b in batches]
            try:
                call, value = prepare(peer, own, direction)
                check_loss(peer, value, expected)
                calls[name] = call
            except Exception as error:
                if name == "ours":
                    raise
                self.left_out(where, name, f"{type(error).__name__}: {first_line(error)}")
        return calls

    def _add(self, what: What, case: Case, direction: str, clock: Clock, timings: Timings, families: Mapping[str, str]) -> None:
        for name in timings.rounds:
            ratio = timings.reference_over(name) if timings.reference == "ours" else None
            seconds = timings.seconds(name)
            found = Row(what, case.rows, case.classes, case.dtype, direction, clock, name, families[name], seconds, ratio)
            self.result.rows.append(found)

    def steps(self, case: Case) -> None:
        """Time joint and logits_grad of each engine alone, next to a copy, for the share of the bandwidth that they reach."""
        batches = make_batches(case, self.clocks.device, self.clocks.l2_bytes)
        for name, module in kernel_engines(self.clocks.device).items():
            for step, calls in step_calls(module, batches).items():
                where = f"{case} {step}"
                graphs = self.captured({name: calls}, graph_calls(case, len(batches)), where)
                graphs |= self.captured({COPY: make_copy(self.clocks.device, self.result.copy_bytes)}, 1, where)
                if name not in graphs or COPY not in graphs:
                    continue
                timings = self.time(graphs, "graph", name)
                self._add("step", case, step, "graph", timings, {name: "engine", COPY: COPY})

    def logdet(self, size: Size) -> None:
        """Time log|det| and the inverse of one matrix, or of many in one call, next to torch's paths to both."""
        device = self.clocks.device
        case = Case(size.count * size.classes, size.classes, "float64")
        S, n = joint_like(size, device)
        modules = kernel_engines(device)
        calls: dict[str, Call] = {}
        for name, module in modules.items():
            peer = "ours" if not calls else f"ours-{name}"
            calls[peer] = partial(module.logdet_inverse, S, n, "present")
        where = f"logdet {size}"
        if not calls:
            self.left_out(where, "ours", "no engine has its own kernels here")
            return
        for name, call in stock(S).items():
            if name.startswith("inv-") and size.classes > TWICE_CLASSES:
                self.left_out(where, name, "it factors twice, and takes as long as two others")
            else:
                calls[name] = call
        families = {name: "engines" if name.startswith("ours-") else name.partition("-")[0] for name in calls}
        for clock in ("device", "graph"):
            small = size.count * size.classes**2 <= 200**2
            functions = calls if clock == "device" else self.captured(calls, GRAPH_CALLS if small else 1, where)
            if "ours" in functions:
                self._add("logdet", case, "logdet_inverse", clock, self.time(functions, clock, "ours"), families)

    def peak(self, case: Case) -> None:
        """Peak memory of one forward and backward beyond the inputs, by torch's allocator."""
        if not self.clocks.cuda:
            return
        batch = make_batches(case, self.clocks.device, 0)[0]
        for name in PEAK_PEERS:
            call = make_call(self.peers[name].build(), [batch], "forward_backward")
            self.result.peaks.append(Peak(case.rows, case.classes, case.dtype, name, peak_bytes(call)))

    def launches(self, case: Case) -> None:
        """How many kernels the forward launches, and forward and backward together."""
        if not self.clocks.cuda:
            return
        batch = make_batches(case, self.clocks.device, 0)[0]
        for name, peer in self.peers.items():
            if peer.family not in ("ours", "engines") or name == "ours-composite":
                continue
            for direction in DIRECTIONS:
                kernels, others = count_nodes(launch_call(peer.loss, batch, direction))
                self.result.launches.append(Launches(case.rows, case.classes, case.dtype, name, direction, kernels, others))


def graph_calls(case: Case, batches: int) -> int:
    """The number of calls in a graph: one per batch of large logits; for small logits enough to hide the graph's launch."""
    return GRAPH_CALLS if case.logits_bytes <= HOT_BYTES else batches


def launch_call(loss: Loss, batch: Batch, direction: Direction) -> Call:
    """A call that launches what a training step does: the forward saves what the backward needs, and the upstream gradient is there
    already, as it is where another operation comes after the loss."""
    if direction == "forward":
        return lambda: loss(batch.logits, batch.target)
    upstream = torch.ones((), dtype=torch.promote_types(batch.logits.dtype, torch.float32), device=batch.logits.device)
    return lambda: torch.autograd.grad(loss(batch.logits, batch.target), batch.logits, upstream)


def peak_bytes(call: Call) -> int:
    """Peak bytes that torch's allocator gave out during a call, beyond what it held before.

    cuBLAS and cuSOLVER make their buffers first.
    """
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def make_copy(device: torch.device, size: int) -> Call:
    """A copy of ``size`` bytes; its traffic is twice that."""
    source = torch.ones(size // 4, device=device)
    destination = torch.zeros_like(source)
    return lambda: destination.copy_(source)


def step_calls(module: object, batches: Sequence[Batch]) -> dict[str, Call]:
    """The ops joint and logits_grad of an engine, each rotating through the batches."""
    joint: Callable[..., tuple[Tensor, ...]] = module.joint  # type: ignore[attr-defined]
    logdet_inverse: Callable[..., tuple[Tensor, ...]] = module.logdet_inverse  # type: ignore[attr-defined]
    logits_grad: Callable[..., Tensor] = module.logits_grad  # type: ignore[attr-defined]
    classes = batches[0].detached.shape[1]
    forward = itertools.cycle([(b.detached, b.target, None, classes, -100, "logits") for b in batches])
    saved = []
    for b in batches:
        S, n, lse, _ = joint(b.detached, b.target, None, classes, -100, "logits")
        V = logdet_inverse(S, n, "present")[3]
        scale, ce_scale = S.new_ones(()), S.new_zeros(())
        saved.append((b.detached, b.target, None, lse, V, scale, ce_scale, -100, "logits"))
    backward = itertools.cycle(saved)
    return {"joint": lambda: joint(*next(forward)), "logits_grad": lambda: logits_grad(*next(backward))}
