"""``python -m ldmi_fast``: versions, engines and why each can or cannot run here, and a self-check against float64."""

from __future__ import annotations

import platform
import sys

import torch

from . import __version__, dmi_loss, ops
from .engines.choose import available
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
    return right


def main() -> int:
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
