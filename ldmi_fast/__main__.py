"""``python -m ldmi_fast``: versions, engines and why each can or cannot run here, a self-check against float64, and the checks that a
GPU's kernels have at their first use, of every kernel path."""

from __future__ import annotations

import itertools
import platform
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import __version__, dmi_loss, ops
from .engines import guard, verify
from .engines.choose import available, engine_module
from .options import ENGINE_VARIABLE, Options, forced_engine


def _self_check(engine: str, device: torch.device) -> tuple[float, float]:
    """Relative errors of loss and gradient in fp32 against float64 autograd of the formula, written out here."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 14, (256,), generator=generator)
    logits = torch.randn(256, 14, generator=generator) + 3 * torch.nn.functional.one_hot(target, 14)
    exact = logits.double().requires_grad_()
    U = torch.nn.functional.one_hot(target, 14).double().T @ exact.softmax(-1) / 256
    want = -torch.linalg.slogdet(U)[1]
    (want_grad,) = torch.autograd.grad(want, exact)
    logits = logits.to(device).requires_grad_()
    got = dmi_loss(logits, target.to(device), engine=engine)
    (grad,) = torch.autograd.grad(got, logits)
    return (
        abs(got.item() - want.item()) / abs(want.item()),
        ((grad.cpu() - want_grad).abs().max() / want_grad.abs().max()).item(),
    )


def _check_engines(device: torch.device) -> bool:
    """Print what each engine does on ``device``; whether all that should run are right."""
    right = True
    for name, reason in available(device).items():
        if reason:
            print(f"engine {name:<10} cannot run: {reason}")
            continue
        try:
            loss_error, grad_error = _self_check(name, device)
        except RuntimeError as error:  # such as an LDMI_FAST_ISA that this processor lacks
            print(f"engine {name:<10} cannot run: {error}")
            right = False
            continue
        good = loss_error < 4e-6 and grad_error < 4e-6
        right &= good
        print(
            f"engine {name:<10} runs; against float64 at N = 256, C = 14: loss {loss_error:.1e}, gradient {grad_error:.1e} "
            f"relative  {'ok' if good else 'WRONG'}"
        )
        if name != "composite" and not (name == "triton" and device.type == "cpu"):  # PyTorch's own; interpreted: minutes
            right &= _check_paths(name, device)
    return right


# (N, C) for each kernel path of the engines: few classes in one call and in stages, and classes on both sides of every change of
# algorithm. The last ones are for GPUs alone, which need milliseconds for them.
_SHAPES = ((128, 2), (256, 14), (20_000, 14), (256, 40), (7_000, 40), (1_000, 180), (800, 300))
_LARGE = ((2_000, 600), (3_000, 1_300), (2_500, 2_100))


def _check_paths(name: str, device: torch.device) -> bool:
    """Check every kernel path of an engine; print a line for each kernel, and one for each path that is not right. True: all are."""
    engine = engine_module(name)
    right: dict[str, list[float]] = {}  # by kernel: of its paths
    wrong: list[str] = []
    unknown: dict[str, None] = {}
    seen: set[str] = set()
    for rows, classes in (*_SHAPES, *_LARGE) if device.type == "cuda" else _SHAPES:
        for dtype, soft in itertools.product((torch.float32, torch.bfloat16, torch.float64), (False, True)):
            for path, check in _paths(name, engine, device, rows, classes, dtype, soft):
                if path in seen:
                    continue
                try:
                    found = check()
                except Exception as error:  # Triton's are no RuntimeErrors
                    wrong.append(f"{path}: REFUSED: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
                    seen.add(path)
                    continue
                if found is None:
                    unknown.setdefault(path)  # another shape may show something
                    continue
                seen.add(path)
                if found.right:
                    right.setdefault(re.split(r", (?:b?float\d+, )?C <= ", path)[0], []).append(found.error)
                else:
                    wrong.append(f"{path}: WRONG: {found.what} is off by {found.error:.3g} times what rounding may explain")
    for kernel, errors in right.items():
        print(f"  {kernel}: ok in {len(errors)} form{'s' * (len(errors) > 1)}, at most {max(errors):.2g} of what rounding may explain")
    for path in unknown:
        if path not in seen:
            print(f"  {path}: these examples show nothing")
    for line in wrong:
        print(f"  {line}")
    return not wrong


def _paths(
    name: str, engine: Any, device: torch.device, rows: int, classes: int, dtype: torch.dtype, soft: bool
) -> Iterator[tuple[str, Callable[[], verify.Finding | None]]]:
    """The paths that a loss of this shape may take, each with its check."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    logits = torch.randn(rows, classes, generator=generator) + 4 * torch.nn.functional.one_hot(labels, classes)
    target = (0.9 * torch.nn.functional.one_hot(labels, classes) + 0.1 / classes).to(device, dtype) if soft else labels.to(device)
    x = logits.to(device, dtype)
    sums_of = (x, target, None, classes, -100, "logits")
    loss_of = (x, target, None, -100, "present", 0.0, True, 0.0, "logits")

    def named(op: str, args: tuple[Any, ...]) -> str:
        return guard.path_name(name, op, args)

    def factored() -> verify.Finding | None:
        args = (*engine.joint(*sums_of)[:2], "present")
        return verify.logdet_inverse(args, engine.logdet_inverse(*args))

    def backward() -> verify.Finding | None:
        _, lse, V, scale, ce_scale = engine.loss_forward(*loss_of, True)
        args = (x, target, None, lse, V, scale, ce_scale, -100, "logits")
        return verify.logits_grad(args, engine.logits_grad(*args))

    square = torch.empty(classes, classes, dtype=torch.float64, device=device)
    yield named("joint", sums_of), lambda: verify.joint(sums_of, engine.joint(*sums_of))
    yield named("logdet_inverse", (square,)), factored
    yield named("logits_grad", (x, target, None, None, square, None, None, -100, "logits")), backward
    forward = (*loss_of, True)
    yield (
        named("loss_forward", forward),
        lambda: verify.loss_forward(forward, engine.loss_forward(*forward), engine.joint, engine.logdet_inverse),
    )
    if engine.is_fused(x, target):
        yield named("fused", loss_of), lambda: verify.fused(loss_of, engine.fused(*loss_of), engine.joint, engine.logdet_inverse)


def main() -> int:
    """Print the report."""
    print(f"ldmi_fast {__version__}   torch {torch.__version__}   Python {platform.python_version()}   {platform.platform()}")
    if ops.compiled is None:
        print(f"compiled kernels: none; {ops.why_not_compiled}")
    else:
        try:
            print("compiled kernels: " + ", ".join(f"{k} {v}" for k, v in ops.compiled.build_info().items()))
        except RuntimeError as error:
            print(f"compiled kernels: {error}")
    print(f"threads: {torch.get_num_threads()}")
    failed = False
    try:
        forced = forced_engine(Options())
        print(f"engine forced by {ENGINE_VARIABLE}: {forced or 'none'}")
    except ValueError as error:
        print(error)
        failed = True
    failed |= not _check_engines(torch.device("cpu"))
    if torch.cuda.is_available():
        print(f"CUDA: {torch.cuda.get_device_name()}")
        failed |= not _check_engines(torch.device("cuda"))
    else:
        print("CUDA: no device that this torch can use")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
