"""``python -m tests.gpu.soak``: thousands of random small problems through an engine, each compared with the composite engine in fp64.

Every problem is drawn from its own seed: ``--first 1234 --problems 1`` runs that one again. Exits with 1 if any problem differs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.peers import default_engine, engines
from bench.kernels.results import write_atomic
from ldmi_fast import dmi_loss
from tests.engines.test_fuzz import Batch, assert_close, budget, laid_out

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
LAYOUTS = ["contiguous", "contiguous", "channels last", "padded", "strided"]
CLASSES = [1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 14, 15, 16, 17, 20, 31, 32, 33, 48, 63, 64, 65, 80, 100, 128, 144, 170, 171]

CHUNK = 100
"""Problems that one process runs before it reports."""
SHOWN_FAILURES = 20
BAR = 30


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Uniform in low..high."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def pick(self, values: Sequence[Any]) -> Any:
        """One of the values."""
        return values[self.integer(0, len(values) - 1)]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return float(torch.rand((), generator=self.generator)) < probability


def problem(seed: int) -> Batch:
    """Any combination of shape, dtypes, layout, options, and rows that do not count."""
    draw = Draw(seed)
    generator = draw.generator
    classes = draw.pick(CLASSES)
    n = draw.integer(2 * classes, 3 * classes + 300) if draw.chance(0.8) else draw.pick([0, 1, draw.integer(2, 40), 900])
    extra = draw.pick([(), (), (), (3,)])
    shape, samples = (n, classes, *extra), (n, *extra)
    dtype = draw.pick(FLOATS)
    logits = draw.pick([0.3, 1.0, 1.0, 5.0]) * torch.randn(shape, generator=generator, dtype=torch.float64)
    logits += draw.pick([0.0, 0.0, 0.0, 500.0, -500.0])
    kept = classes if draw.chance(0.7) else draw.integer(1, classes)  # the other classes are absent
    labels = torch.randint(0, kept, samples, generator=generator)
    if n:
        signal = draw.pick([2.0, 2.0 + math.log(classes), 6.0])
        logits.scatter_add_(1, labels.unsqueeze(1), torch.full((n, 1, *extra), signal, dtype=torch.float64))
    if logits.numel() and draw.chance(0.05):
        logits[draw.integer(0, n - 1), draw.integer(0, classes - 1)] = draw.pick([math.nan, math.inf, -math.inf])
    probs = draw.chance(0.15)
    logits = laid_out((logits.softmax(1) if probs else logits).to(dtype), draw.pick(LAYOUTS))

    ignore_index = -100
    if draw.chance(0.7):
        label_dtype = draw.pick(INTEGERS if classes <= 127 else INTEGERS[2:])
        ignore_index = draw.pick([-100, -100, 0, classes - 1, 10**9])
        if torch.iinfo(label_dtype).min <= ignore_index <= torch.iinfo(label_dtype).max and draw.chance(0.5):
            labels[torch.rand(samples, generator=generator) < 0.2] = ignore_index
        if labels.numel() and draw.chance(0.04):
            labels[0] = draw.pick([classes, torch.iinfo(label_dtype).max])
        target = laid_out(labels.to(label_dtype), draw.pick(LAYOUTS))
    else:
        soft = torch.rand(shape, generator=generator) ** 3
        soft.scatter_add_(1, labels.unsqueeze(1), torch.ones(n, 1, *extra))
        target = laid_out((soft / soft.sum(1, keepdim=True)).to(draw.pick(FLOATS)), draw.pick(LAYOUTS))
    weight = None
    if draw.chance(0.4):
        weight = torch.rand(samples, generator=generator) + 0.1
        weight[torch.rand(samples, generator=generator) < draw.pick([0.0, 0.3, 0.3, 1.0])] = 0
        weight = laid_out(weight.to(draw.pick(FLOATS)), draw.pick(LAYOUTS))
    options = {
        "ignore_index": ignore_index,
        "absent": draw.pick(["present", "present", "present", "strict"]),
        "eps": draw.pick([0.0, 0.0, 0.0, 1e-3]),
        "normalize": draw.chance(0.7),
        "cross_entropy_weight": draw.pick([0.0, 0.0, 0.7]),
        "input": "probs" if probs else "logits",
    }
    return Batch(logits, target, weight, options)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on another device with the same strides, which ``.to`` does not always keep."""
    if device.type == "cpu":
        return tensor
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return out.copy_(tensor)


def evaluate(batch: Batch, engine: str, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss and gradients, on the CPU. Labels or weights out of range count as a loss of NaN even if they raise."""
    logits = moved(batch.logits, device).requires_grad_()
    target = moved(batch.target, device)
    if target.is_floating_point():
        target.requires_grad_()
    weight = None if batch.weight is None else moved(batch.weight, device)
    try:
        loss = dmi_loss(logits, target, sample_weight=weight, engine=engine, **batch.options)
    except (IndexError, ValueError):
        return torch.tensor(math.nan), None, None
    loss.backward()
    grad, target_grad = (None if leaf.grad is None else leaf.grad.cpu() for leaf in (logits, target))
    return loss.detach().cpu(), grad, target_grad


def detached(batch: Batch, double: bool) -> Batch:
    """A copy that shares no gradient, in fp64 if asked."""
    logits = batch.logits.detach().clone() if not double else batch.logits.detach().double()
    target = batch.target.detach()
    if target.is_floating_point():
        target = target.double() if double else target.clone()
    return Batch(logits, target, batch.weight, batch.options)


def compare(seed: int, engine: str, device: torch.device) -> str:
    """Compare one problem with the composite engine in fp64; returns its kind, for the count.

    Raises:
        AssertionError: they differ by more than the rounding of the softmax explains.
    """
    batch = problem(seed)
    ours = evaluate(Batch(batch.logits.detach(), batch.target.detach(), batch.weight, batch.options), engine, device)
    want, want_grad, want_target_grad = evaluate(detached(batch, double=True), "composite", torch.device("cpu"))
    loss, grad, target_grad = ours
    if want.isnan() or loss.isnan():
        assert want.isnan(), f"loss NaN, composite {want.item()}"
        assert loss.isnan(), f"loss {loss.item()}, composite NaN"
        return "NaN"
    assert grad is not None
    assert want_grad is not None
    allowed = budget(batch)
    if allowed is None:
        assert not grad.isnan().any(), "a gradient near to singular may be anything, but not NaN"
        return "too near to singular"
    margin = allowed.loss * max(1.0, abs(float(want))) if want.isfinite() else 0.0
    # In the dtype that ours is stored in, so that a rounding to it is not counted as an error.
    assert_close("loss", loss, want.to(loss.dtype), margin)
    assert_close("gradient", grad, want_grad.to(grad.dtype), allowed.grad)
    if want_target_grad is not None:
        assert target_grad is not None
        assert_close("gradient of the targets", target_grad, want_target_grad.to(target_grad.dtype), allowed.target_grad)
    return "compared" if want.isfinite() else "infinite"


@dataclass
class Chunk:
    """The results of a process."""

    done: int
    kinds: dict[str, int]
    failures: list[dict[str, Any]]


def run_chunk(seeds: range, engine: str, device_name: str) -> Chunk:
    """Run some problems, one after another."""
    torch.set_num_threads(1)
    device = torch.device(device_name)
    kinds: dict[str, int] = {}
    failures: list[dict[str, Any]] = []
    for seed in seeds:
        try:
            kind = compare(seed, engine, device)
        except Exception as error:
            kind = "FAILED"
            failures.append({"seed": seed, "error": f"{type(error).__name__}: {error}"[:600]})
        kinds[kind] = kinds.get(kind, 0) + 1
    return Chunk(len(seeds), kinds, failures)


def bar(done: int, total: int, seconds: float) -> str:
    """One line of progress."""
    filled = BAR * done // max(total, 1)
    return f"soak [{'#' * filled}{'.' * (BAR - filled)}] {done}/{total}  {seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.soak", description=__doc__)
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", help="default: the one that would be chosen there")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing new after this long")
    parser.add_argument("--out", type=Path, help="result (JSON)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    engine = options.engine or default_engine(device)
    if engine not in engines(device):
        parser.error(f"engine {engine!r} cannot run on {device}: expected one of {engines(device)}")
    started = time.monotonic()
    last = options.first + options.problems
    chunks = [range(start, min(start + CHUNK, last)) for start in range(options.first, last, CHUNK)]
    total = Chunk(0, {}, [])
    interactive = sys.stdout.isatty()
    said = -math.inf
    # Not forked: a CUDA context does not survive that.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(run_chunk, seeds, engine, options.device) for seeds in chunks]
        for future in as_completed(waiting):
            if future.cancelled():
                continue
            found = future.result()
            total.done += found.done
            total.failures += found.failures
            for kind, count in found.kinds.items():
                total.kinds[kind] = total.kinds.get(kind, 0) + count
            seconds = time.monotonic() - started
            if interactive or seconds - said > 5:
                print(bar(total.done, options.problems, seconds), end="\r" if interactive else "\n", flush=True)
                said = seconds
            if seconds > options.seconds:
                for other in waiting:
                    other.cancel()
    seconds = time.monotonic() - started
    total.failures.sort(key=lambda failure: failure["seed"])
    for failure in total.failures[:SHOWN_FAILURES]:
        print(f"seed {failure['seed']}: {failure['error']}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(total.kinds.items()))
    print(f"{total.done} of {options.problems} problems by engine {engine} on {device} in {seconds:.0f} s: {kinds}")
    if options.out is not None:
        report = {
            "engine": engine,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "first_seed": options.first,
            "asked": options.problems,
            "done": total.done,
            "kinds": total.kinds,
            "failures": total.failures,
            "seconds": round(seconds, 1),
            "torch": torch.__version__,
        }
        write_atomic(options.out, json.dumps(report, indent=1) + "\n")
    return 1 if total.failures or not total.done else 0


if __name__ == "__main__":
    sys.exit(main())
