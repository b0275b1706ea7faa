"""``python -m bench.logdet``: log|det| and inverse of one matrix, or of many at once, against what torch offers for both, on this CPU.

The peers, in fp64 and in fp32: slogdet and its backward, whose gradient is the inverse transposed; slogdet and inv; one LU, the
determinant from its diagonal and the inverse by solving with it (as LAPACK's getri would give it). They are timed interleaved and
compared with the floor: the 2 C^3 operations that both results need, at the rate of a large matrix product. The program prints a table
and writes JSON, markdown and a plot. ``bench.gpu`` times the same on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernels.interleave import Quantiles, interleave
from bench.kernels.results import RESULTS_DIR, busy_warning, dump_lines, environment, write_atomic
from bench.reporting import markdown_table

LOGDET_JSON = RESULTS_DIR / "logdet-cpu.json"
SECONDS = 5.0
PRODUCT = 1024
"""Rows and columns of the product whose rate makes the floor."""

Call = Callable[[], object]


@dataclass(frozen=True, order=True)
class Size:
    """``count`` matrices of ``classes`` classes."""

    classes: int
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read ``100``, or ``256x100`` for 256 matrices of 100 classes. argparse.ArgumentTypeError otherwise."""
        numbers = text.split("x")
        if len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise argparse.ArgumentTypeError(f"{text!r}: expected CLASSES or COUNTxCLASSES, such as 100 or 256x100")
        return cls(int(numbers[-1]), int(numbers[0]) if len(numbers) == 2 else 1)

    def __str__(self) -> str:
        return str(self.classes) if self.count == 1 else f"{self.count}x{self.classes}"


SIZES = (
    *map(Size, (2, 10, 14, 32, 64, 100, 128, 200, 256, 512, 1000, 2048, 4096)),
    Size(14, 1024),
    Size(64, 256),
    Size(100, 64),
)


@dataclass(frozen=True)
class Row:
    """One size: seconds of each function, and for each peer the reference's time over its own, below 1 where ours is faster."""

    classes: int
    count: int
    seconds: dict[str, Quantiles]
    ours_over: dict[str, Quantiles]

    @property
    def size(self) -> Size:
        """What was factored."""
        return Size(self.classes, self.count)


def joint_like(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """S [C, C] and n [C] in fp64, or [count, C, C] and [count, C], as batches of a model that has learnt something give them."""
    classes, shape = size.classes, () if size.count == 1 else (size.count,)
    generator = torch.Generator(device).manual_seed(classes)
    R = torch.rand(*shape, classes, classes, generator=generator, device=device, dtype=torch.float64)
    R = 0.4 * R / R.sum(-1, keepdim=True)
    R.diagonal(dim1=-2, dim2=-1).add_(0.6)
    n = torch.full((*shape, classes), 65536 / classes, device=device, dtype=torch.float64)
    return R * n.unsqueeze(-1), n


def slogdet_and_gradient(leaf: Tensor) -> Tensor:
    """Return the transposed inverse, as the gradient of log|det|."""
    return torch.autograd.grad(torch.linalg.slogdet(leaf).logabsdet.sum(), leaf)[0]


def slogdet_and_inverse(S: Tensor) -> Tensor:
    """Return the inverse and compute log|det|, with one factorisation each."""
    torch.linalg.slogdet(S)
    return torch.linalg.inv_ex(S).inverse.mT


def lu_and_inverse(S: Tensor) -> Tensor:
    """Return the inverse and compute log|det|, with one factorisation for both."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(S)
    lu.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return torch.linalg.lu_solve(lu, pivots, torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S), adjoint=True)


def stock(S: Tensor) -> dict[str, Call]:
    """The peers by name; the part of a name before the first ``-`` is its family. No call waits for a device."""
    calls: dict[str, Call] = {}
    for dtype in (torch.float64, torch.float32):
        short = str(dtype).removeprefix("torch.")
        plain = S.to(dtype, copy=True)
        leaf = plain.detach().requires_grad_()
        calls[f"slogdet-{short}"] = partial(slogdet_and_gradient, leaf)
        calls[f"inv-{short}"] = partial(slogdet_and_inverse, plain)
        calls[f"lu-{short}"] = partial(lu_and_inverse, plain)
    return calls


def product_rate(seconds: float) -> float:
    """Operations per second of a product of two matrices in fp64 with all threads."""
    A = torch.rand(PRODUCT, PRODUCT, dtype=torch.float64)
    timings = interleave({"product": lambda: A @ A}, reference="product", time_cap=seconds, min_rounds=3)
    return 2 * PRODUCT**3 / timings.seconds("product").p20


def measure(size: Size, seconds: float) -> Row:
    """All functions at one size."""
    S, n = joint_like(size, torch.device("cpu"))
    calls = {"ours": lambda: torch.ops.ldmi_fast.logdet_inverse(S, n, "present"), **stock(S)}
    timings = interleave(calls, reference="ours", time_cap=seconds, min_rounds=3)
    peers = [name for name in calls if name != "ours"]
    return Row(
        size.classes,
        size.count,
        {name: timings.seconds(name) for name in calls},
        {name: timings.reference_over(name) for name in peers},
    )


def floor_seconds(size: Size, rate: float) -> float:
    """Seconds for 2 C^3 operations per matrix at a rate."""
    return 2 * size.count * size.classes**3 / rate


def markdown(rows: Sequence[Row], rate: float, env: dict[str, Any], date: str, picture: str) -> str:
    """The table, with a link to the plot named ``picture``."""
    peers = list(rows[0].ours_over)
    cells = [
        (
            str(row.size),
            f"{row.seconds['ours'].p50 * 1e6:.4g}",
            f"{floor_seconds(row.size, rate) * 1e6:.4g}",
            *(f"{1 / row.ours_over[peer].p50:.2f}" for peer in peers),
        )
        for row in rows
    ]
    return (
        "# log|det| and inverse on a CPU\n\n"
        f"Measured on {date[:10]}: {env['cpu']}, {env['threads']} threads, torch {env['torch']}. Medians, interleaved; for each peer "
        "how many times as long as ours it takes. Ours is fp64 throughout. COUNTxCLASSES: COUNT matrices in one call. Floor: 2 C^3 "
        f"operations at the {rate / 1e9:.0f} GFLOP/s of a product of {PRODUCT} x {PRODUCT} matrices in the same run.\n\n"
        f"{markdown_table(('C', 'ours, us', 'floor, us', *peers), cells)}\n\n![times]({picture})\n"
    )


def plot(rows: Sequence[Row], rate: float) -> bytes:
    """Time over the floor, of one matrix."""
    from matplotlib.figure import Figure

    from bench.reporting import png

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    single = sorted((row for row in rows if row.count == 1), key=lambda row: row.classes)
    classes = [row.classes for row in single]
    for name in rows[0].seconds:
        line = "--" if "32" in name else "-"
        style: dict[str, Any] = {"color": "tab:blue", "linewidth": 2.5} if name == "ours" else {"linestyle": line, "alpha": 0.7}
        axes.plot(classes, [row.seconds[name].p50 * 1e6 for row in single], marker="o", label=name, **style)
    axes.plot(classes, [floor_seconds(row.size, rate) * 1e6 for row in single], color="black", linestyle=":", label="floor (fp64)")
    axes.set(xscale="log", yscale="log", xlabel="classes C", ylabel="us", title="log|det| and inverse")
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize="small")
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.logdet", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", type=Size.parse, nargs="+", help="CLASSES or COUNTxCLASSES (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="longest time per size in seconds (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help=f"JSON file (default for all sizes: {LOGDET_JSON.name}); table and plot go next to it"
    )
    options = parser.parse_args(arguments)
    if warning := busy_warning():
        print(warning, file=sys.stderr)
    rate = product_rate(min(options.seconds, 1.0))
    rows = []
    for size in options.sizes or SIZES:
        rows.append(measure(size, options.seconds))
        print(size, {name: round(quantiles.p50 * 1e6, 1) for name, quantiles in rows[-1].seconds.items()}, flush=True)
    env, date = environment(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    out = options.out if options.out is not None else LOGDET_JSON if options.sizes is None else None
    table = markdown(rows, rate, env, date, (out or LOGDET_JSON).with_suffix(".png").name)
    print(table)
    if out is not None:
        result = {"environment": env, "date": date, "flops": rate, "rows": [asdict(row) for row in rows]}
        write_atomic(out, dump_lines(result, "rows"))
        write_atomic(out.with_suffix(".png"), plot(rows, rate))
        write_atomic(out.with_suffix(".md"), table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
