"""A kernel is checked at its first use on a device, before its results are used.

Most kernels for GPUs are written on machines that have none, and no test can try every device, driver and compiler. So at the first
use of each kernel path (engine, device, op, and the kernel that the plan picks for the shape and dtypes) in a process, :mod:`.verify`
holds the result against invariants, on the device. If it is wrong, or if the device refuses the launch (a cooperative grid that does
not fit because other processes share the device, a cluster, too little shared memory), the process goes on by the next path, with one
warning:

    fused  ->  loss_forward and logits_grad  ->  joint, logdet_inverse, combine  ->  the composite engine's op

composite's ``logdet_inverse`` is torch's LU, which the CUDA engine uses for the largest matrices too, so the compiled plan needs no
list of forbidden paths. What was refused stays refused for the process, and a launch may also be refused later on: then the same
happens.

Nothing is checked, and nothing remembered, while a CUDA graph is captured or a graph is traced, and for tensors without data; the next
call that can be is. A compiled graph calls the ops themselves: what should be checked must have run once in eager mode, or
``python -m ldmi_fast`` does it. LDMI_FAST_VERIFY=0 turns all of this off. The CPU engine is what the test suite tests on the very
machine that builds it, and is not guarded.

A check that shows nothing, because values are not finite or the matrix is singular, is repeated at later calls, ever more rarely.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from .._version import __version__
from ..precision import compute_dtype, full_precision
from ..sums import total_weight
from . import composite, verify
from .combine import combine
from .contract import OPS, Engine
from .triton import engine as triton
from .triton import plan as triton_plan
from .verify import Finding

VARIABLE = "LDMI_FAST_VERIFY"
_REPORT_TO = "the maintainers of ldmi_fast"

#: The engines that are guarded.
GUARDED = frozenset({"cuda", "triton"})

# Shapes whose path is known. A program that has more of them, with a new batch size at every step, looks them up again.
_KNOWN_SHAPES = 4096

# After this many inconclusive checks, check only at calls whose number is a power of two.
_EVERY_TIME = 8

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_PLAIN = frozenset({Tensor, torch.nn.Parameter})

# What the CUDA runtime says when nothing can run on the device any more in this process.
_LOST = (
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "hardware stack error",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "launch timed out",
    "uncorrectable ECC",
)


def enabled() -> bool:
    """Whether first uses are checked.

    Raises:
        ValueError: LDMI_FAST_VERIFY is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable {VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


@dataclass
class Path:
    """One kernel path on a device.

    Attributes:
        name: the op and its kernel.
        calls: of which none was conclusive.
        right: a check has found its result right.
        refused: why it is not used any more; empty if it is.
    """

    name: str
    calls: int = 0
    right: bool = False
    refused: str = ""


def _staged_rows(rows: int, classes: int) -> int:
    """Rows of a shape that is not fused and takes the same kernels otherwise: these depend on classes and dtypes."""
    fused = 8192
    if ops.compiled is not None:
        fused = max(ops.compiled.fused_limits()[0], ops.compiled.cuda_fused_limits()[0], ops.compiled.fused_limits()[1] * classes**2)
    return max(rows, int(fused) // classes + 1, triton_plan.FUSED_ELEMENTS // classes + 1)


def staged_kernels(
    engine: str, device: torch.device, rows: int, classes: int, labels: int, soft: bool, dtype: torch.dtype, probs: bool
) -> tuple[str, ...]:
    """joint, logdet_inverse and logits_grad as the plan of an engine calls the kernels that it takes for them."""
    return kernels(engine, device, _staged_rows(rows, classes), classes, labels, soft, dtype, probs)[0]


def kernels(
    engine: str, device: torch.device, rows: int, classes: int, labels: int, soft: bool, dtype: torch.dtype, probs: bool
) -> tuple[tuple[str, ...], str]:
    """The kernels of a loss, and the regime of the forward."""
    if engine == "triton":
        found = triton.explanation(rows, classes, soft, dtype)
        return found.kernels, ""
    if engine == "composite" or ops.compiled is None:
        return ("joint", "logdet_inverse", "logits_grad"), ""
    shape = (rows, classes, labels, soft, dtype.itemsize, probs)
    if engine == "cpu":
        return tuple(ops.compiled.plan(*shape)["kernels"]), ""
    plan = ops.compiled.cuda_plan(*shape, ops.compiled.cuda_limits(device.index))
    return tuple(plan["kernels"]), plan["regime"].partition(",")[0]


def path_name(engine: str, op: str, args: tuple[Any, ...]) -> str:
    """The op, its kernel, and what the kernel is compiled for: dtypes, and the number of classes up to a power of two."""
    first = args[0]
    classes = first.shape[-1]
    width = 1 << max(classes - 1, 0).bit_length()
    if op == "logdet_inverse":
        (_, kernel, *_) = staged_kernels(engine, first.device, 1, classes, classes, False, torch.float32, False)
        return f"{kernel}, C <= {width}"
    target, sample_weight = args[1], args[2]
    rows, soft = first.shape[0], target.is_floating_point()
    labels = args[3] if op == "joint" else args[4].shape[0] if op == "logits_grad" else classes
    probs = args[5 if op == "joint" else 8] == "probs"
    about = (engine, first.device, rows, classes, labels, soft, first.dtype, probs)
    if op in ("joint", "logits_grad"):
        kernel = staged_kernels(*about)[0 if op == "joint" else 2]
    else:
        found, regime = kernels(*about)
        kernel = found[0] if found[0].startswith(op) else f"{op} ({'; '.join(part for part in (regime, *found) if part)})"
    words = [kernel, str(first.dtype).removeprefix("torch."), f"C <= {width}"]
    words += ["probabilities"] if probs else []
    words += ["weights"] if sample_weight is not None else []
    words += [] if labels == classes else ["stacked problems"]
    words += [] if op in ("joint", "logits_grad") or args[9:] != (False,) else ["without the gradient"]
    return ", ".join(words)


def _has_data(tensor: Any) -> bool:
    """Whether this is a tensor to compute with, in eager mode, and nothing else looks at what is computed."""
    return (
        type(tensor) in _PLAIN
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_argument_error(error: Exception) -> bool:
    """Whether the arguments, or the memory that is left, are what is wrong: the next path would not do better."""
    if isinstance(error, (TypeError, ValueError, IndexError, torch.OutOfMemoryError)):
        # Triton's own errors for what it cannot compile are none of these
        return True
    text = str(error)
    if "out of memory" in text:
        return True
    return "ldmi_fast: " in text and "failed" not in text  # the checks of csrc/torch


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """As the kernels compute: no gradient, and no autocast."""
    with torch.no_grad(), full_precision(device):
        yield


class Guarded(ModuleType):
    """An engine with the ops of another one, checked at their first use.

    Args:
        name: of the engine.
        engine: the module that has its ops.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        super().__init__(f"{__name__}.{name}", f"The {name} engine, checked at the first use of each kernel.")
        self.engine_name = name
        self.engine = engine
        self.paths: dict[tuple[torch.device, str], Path] = {}
        self._shapes: dict[tuple[Any, ...], Path] = {}
        self._raw: dict[str, Callable[..., Any]] = {op: getattr(engine, op) for op in OPS}

    def can_run(self, device: torch.device) -> str:
        """Why the engine cannot run on ``device``; empty if it can."""
        return self.engine.can_run(device)

    def is_fused(self, logits: Tensor, target: Tensor) -> bool:
        """Whether the loss and its gradient come from one call."""
        return self.engine.is_fused(logits, target)

    def joint(self, *args: Any) -> Four:
        """``composite.joint``."""
        logits, target, weight = args[:3]
        key = ("joint", logits.shape, logits.dtype, logits.device, target.dtype, weight is None, args[3], args[5])
        return cast(Four, self._run("joint", key, args, composite.joint, verify.joint))

    def logdet_inverse(self, *args: Any) -> Four:
        """``composite.logdet_inverse``."""
        S = args[0]
        key = ("logdet_inverse", S.shape, S.device)
        return cast(Four, self._run("logdet_inverse", key, args, composite.logdet_inverse, verify.logdet_inverse))

    def logits_grad(self, *args: Any) -> Tensor:
        """``composite.logits_grad``."""
        logits, target, weight, _, V = args[:5]
        key = ("logits_grad", logits.shape, logits.dtype, logits.device, target.dtype, weight is None, V.shape, args[8])
        return cast(Tensor, self._run("logits_grad", key, args, composite.logits_grad, verify.logits_grad))

    def loss_forward(self, *args: Any) -> Five:
        """``composite.loss_forward``."""
        logits, target, weight = args[:3]
        key = ("loss_forward", logits.shape, logits.dtype, logits.device, target.dtype, weight is None, args[8], args[9])
        return cast(Five, self._run("loss_forward", key, args, self._in_steps, self._verify_forward))

    def fused(self, *args: Any) -> tuple[Tensor, Tensor]:
        """``composite.fused``."""
        logits, target, weight = args[:3]
        key = ("fused", logits.shape, logits.dtype, logits.device, target.dtype, weight is None, args[8])
        return cast("tuple[Tensor, Tensor]", self._run("fused", key, args, self._staged, self._verify_fused))

    def _run(
        self,
        op: str,
        key: tuple[Any, ...],
        args: tuple[Any, ...],
        fall_back: Callable[..., Any],
        check: Callable[..., Finding | None],
    ) -> Any:
        if type(args[0]) not in _PLAIN:  # shapes of traced tensors are no keys
            return (getattr(composite, op) if (self.engine_name, args[0].device.type) in refused else self._raw[op])(*args)
        path = self._shapes.get(key)
        if path is None:
            if not _has_data(args[0]):
                return self._raw[op](*args)
            path = self._find(op, key, args)
        if path.refused:
            with _plainly(args[0].device):
                return fall_back(*args)
        try:
            out = self._raw[op](*args)
        except Exception as error:
            return self._recover(op, path, args, fall_back, error)
        if path.right or not _has_data(args[0]):
            return out
        path.calls += 1
        if path.calls > _EVERY_TIME and path.calls & (path.calls - 1):
            return out
        return self._believe(path, args, out, fall_back, check)

    def _find(self, op: str, key: tuple[Any, ...], args: tuple[Any, ...]) -> Path:
        """The path of a shape that has not been met."""
        name = path_name(self.engine_name, op, args)
        path = self.paths.setdefault((args[0].device, name), Path(name))
        if len(self._shapes) >= _KNOWN_SHAPES:
            self._shapes.clear()
        self._shapes[key] = path
        return path

    def _believe(
        self, path: Path, args: tuple[Any, ...], out: Any, fall_back: Callable[..., Any], check: Callable[..., Finding | None]
    ) -> Any:
        """The result, or if a check finds it wrong that of the next path."""
        device = args[0].device
        try:
            with _plainly(device):
                found = check(args, out)
        except Exception as error:
            if _is_lost(error):
                raise RuntimeError(self._lost(path, device, error)) from error
            return out  # such as too little memory for the check: it is made at another call
        if found is None:
            return out
        if found.right:
            path.right = True
            return out
        self._refuse(path, device, f"its result is wrong: {found.what} is off by {found.error:.3g} times what rounding explains")
        with _plainly(device):
            return fall_back(*args)

    def _recover(self, op: str, path: Path, args: tuple[Any, ...], fall_back: Callable[..., Any], error: Exception) -> Any:
        """The result of the next path after an error of this one; or the error, if the next path cannot help."""
        if not _has_data(args[0]) or _is_argument_error(error):
            raise error
        device = args[0].device
        if _is_lost(error):
            raise RuntimeError(self._lost(path, device, error)) from error
        try:
            with _plainly(device):
                out = fall_back(*args)
        except Exception:
            raise error from None  # the arguments suit neither
        self._refuse(path, device, f"it failed: {_first_line(error)}")
        return out

    def _refuse(self, path: Path, device: torch.device, why: str) -> None:
        path.refused = why
        refused.add((self.engine_name, device.type))
        warnings.warn(
            f"ldmi_fast does not use a kernel of its {self.engine_name} engine: {path.name} on {_describe(device)}: {why}. This "
            "process goes on by a slower path, whose results are right. Please report this message, with the output of "
            f"`python -m ldmi_fast`, to {_REPORT_TO} ({_versions()}). {VARIABLE}=0 in the environment turns such checks off",
            UserWarning,
            stacklevel=5,
        )

    def _lost(self, path: Path, device: torch.device, error: BaseException) -> str:
        return (
            f"{_first_line(error)} (seen by ldmi_fast, {self.engine_name} engine, {path.name}, on {_describe(device)}). After such an "
            "error nothing can run on this device in this process any more, so there is no way to go on by another path. It may stem "
            "from this kernel or from any earlier one: CUDA_LAUNCH_BLOCKING=1 shows which. To go on without these kernels start anew "
            f"with LDMI_FAST_ENGINE=composite; if the error then stays away, please report this to {_REPORT_TO} ({_versions()})"
        )

    def _in_steps(self, *args: Any) -> tuple[Tensor, ...]:
        """``loss_forward`` by joint, logdet_inverse and PyTorch's scalars."""
        logits, target, sample_weight, ignore_index, absent, eps, normalize, cross_entropy_weight, input, gradient = args
        S, n, lse, ce = self.joint(logits, target, sample_weight, logits.shape[1], ignore_index, input)
        log_abs_det, _, kept, V = self.logdet_inverse(S, n, absent)
        total = total_weight(target, sample_weight, n)
        loss, scale, ce_scale = combine(log_abs_det, kept, total, ce, eps, normalize, cross_entropy_weight)
        dtype = compute_dtype(logits.dtype)
        return loss.to(dtype), lse, V if gradient else V.new_empty((0, 0)), scale, ce_scale

    def _staged(self, *args: Any) -> tuple[Tensor, ...]:
        """``fused`` by loss_forward and logits_grad."""
        logits, target, sample_weight, ignore_index, input = *args[:4], args[8]
        loss, lse, V, scale, ce_scale = self.loss_forward(*args, True)
        return loss, self.logits_grad(logits, target, sample_weight, lse, V, scale, ce_scale, ignore_index, input)

    def _verify_forward(self, args: tuple[Any, ...], out: tuple[Tensor, ...]) -> Finding | None:
        return verify.loss_forward(args, out, self.joint, self.logdet_inverse)

    def _verify_fused(self, args: tuple[Any, ...], out: tuple[Tensor, ...]) -> Finding | None:
        return verify.fused(args, out, self.joint, self.logdet_inverse)


def _is_lost(error: BaseException) -> bool:
    text = str(error)
    return any(words in text for words in _LOST)


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})"


def _versions() -> str:
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else f", ROCm {torch.version.hip}" if torch.version.hip else ""
    return f"ldmi_fast {__version__}, torch {torch.__version__}{cuda}, Python {platform.python_version()}"


#: Engines, each with a kind of device, of which some path is refused: torch.compile traces composite in their place.
refused: set[tuple[str, str]] = set()

_guards: dict[tuple[str, Engine], Guarded] = {}


def guarded(name: str, engine: Engine) -> Guarded:
    """The guarded form of an engine; what it has learned lasts as long as the process."""
    found = _guards.get((name, engine))
    if found is None:
        found = _guards[name, engine] = Guarded(name, engine)
    return found


def refusals(name: str, device: torch.device) -> list[Path]:
    """The paths of an engine that this process has refused on a device."""
    return [
        path
        for (guard, _), engine in _guards.items()
        if guard == name
        for (place, _), path in engine.paths.items()
        if place == device and path.refused
    ]


def forget() -> None:
    """Forget what was found: for tests."""
    _guards.clear()
    refused.clear()
