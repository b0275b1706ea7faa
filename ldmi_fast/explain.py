"""``explain``: which engine and kernels a loss would run, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import Unpack

from . import ops
from .checks import check_tensors
from .engines import guard
from .engines.choose import COMPILED, PREFERRED, choose_name, engine_module, why_not
from .engines.triton import engine as triton
from .evaluate import path_of
from .options import ENGINE_VARIABLE, OptionKeywords, Options, forced_engine, make_options, shows_options
from .precision import accumulator, compute_dtype

# What the reason says of an engine that was chosen.
_WHAT = {name: f"compiled kernels for {what}" for name, what in COMPILED.items()}
_WHAT["triton"] = "kernels in Triton for GPUs that have no compiled ones"


@dataclass(frozen=True)
class Plan:
    """What would run for given arguments.

    Attributes:
        engine: the name of the engine.
        kernels: its kernels in the order in which they would run, forward then backward.
        regime: which algorithm the shape falls into.
        workspace_bytes: the most scratch memory in use at a time, without the outputs.
        reason: why this engine, and why this regime.
    """

    engine: str
    kernels: tuple[str, ...]
    regime: str
    workspace_bytes: int
    reason: str

    def __str__(self) -> str:
        return (
            f"engine {self.engine}: {' -> '.join(self.kernels)}\n  regime: {self.regime}\n"
            f"  workspace: {self.workspace_bytes:,} bytes\n  reason: {self.reason}"
        )


@shows_options()
def explain(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[OptionKeywords],
) -> Plan:
    """Which engine and kernels :func:`ldmi_fast.dmi_loss` would run for these arguments, and why. Runs nothing.

    Args:
        logits: as for :func:`ldmi_fast.dmi_loss`. Its values are not read.
        target: as for :func:`ldmi_fast.dmi_loss`. Its values are not read.
        sample_weight: as for :func:`ldmi_fast.dmi_loss`.
        options: those of :func:`ldmi_fast.dmi_loss`. With ``group`` no rank has to call, and the plan is that for the samples of this
            one.

    Returns:
        A :class:`Plan`; print it.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ldmi_fast.dmi_loss` would.
    """
    checked = make_options("explain", options)
    soft = check_tensors(logits, target, sample_weight, checked)
    classes = logits.shape[1]
    rows = logits.numel() // classes
    name = choose_name(logits.device, checked)
    if forced_engine(checked) is not None:
        why = "forced by engine=" if checked.engine is not None else f"forced by {ENGINE_VARIABLE}"
    elif name == "composite":
        tried = PREFERRED.get(logits.device.type, ("cpu",))
        why = "; ".join(f"the {engine} engine cannot run: {why_not(engine, logits.device)}" for engine in tried)
    else:
        why = _WHAT[name]
    path = path_of(rows, classes, soft, sample_weight, checked, engine_module(name))
    found = _plan_of_few_rows(name, logits, rows, checked) if path == "few rows" else _plan(name, logits, rows, soft, checked)
    if path == "staged":
        found = _in_stages(found, name, logits, rows, soft, checked)
    lost = "".join(f"; not used after a check: {path.name}" for path in guard.refusals(name, logits.device))
    return replace(found, reason=f"{why}{'; ' if found.reason and why else ''}{found.reason}{lost}")


def _plan(name: str, logits: Tensor, rows: int, soft: bool, options: Options) -> Plan:
    """The plan of one engine, its reason that of the kernels alone."""
    classes, probs = logits.shape[1], options.input == "probs"
    if name == "composite":
        acc = accumulator(logits.device).itemsize
        compute = compute_dtype(logits.dtype).itemsize
        workspace = rows * classes * (2 * compute + acc) + 6 * classes * classes * acc
        return Plan(name, ("joint", "logdet_inverse", "combine", "autograd"), "plain PyTorch", workspace, "")
    if name == "triton":
        found = triton.explanation(rows, classes, soft, logits.dtype)
        return Plan(name, found.kernels, found.regime, found.workspace_bytes, found.reason)
    shape = (rows, classes, classes, soft, logits.dtype.itemsize, probs)
    if name == "cpu":
        plan = ops.compiled.plan(*shape)
    else:
        plan = ops.compiled.cuda_plan(*shape, ops.compiled.cuda_limits(logits.device.index))
    return Plan(name, tuple(plan["kernels"]), plan["regime"], plan["workspace_bytes"], plan["reason"])


def _plan_of_few_rows(name: str, logits: Tensor, rows: int, options: Options) -> Plan:
    """The plan for far fewer samples than classes: the joint of the labels that occur, in at most as many slots as there are rows."""
    classes, probs = logits.shape[1], options.input == "probs"
    labels = max(rows, 1)
    shape = (rows, classes, labels, False, logits.dtype, probs)
    joint, _, logits_grad = guard.staged_kernels(name, logits.device, *shape)
    square = guard.staged_kernels(name, logits.device, rows, labels, labels, False, logits.dtype, probs)[1]
    workspace = (2 * labels * classes + 2 * labels * labels) * accumulator(logits.device).itemsize
    return Plan(
        name,
        ("slots of the labels that occur", joint, square, logits_grad),
        "few rows",
        workspace,
        f"of {classes} classes at most {rows} occur: the determinant is of those",
    )


def _in_stages(alone: Plan, name: str, logits: Tensor, rows: int, soft: bool, options: Options) -> Plan:
    """The plan if something comes between joint and logdet_inverse: the sums of all ranks, or the gradient of sample weights. No
    engine then computes the loss in one call."""
    classes = logits.shape[1]
    how: tuple[str, ...] = alone.kernels
    rest: tuple[str, ...] = ()
    if name == "composite":
        how, rest = alone.kernels[:2], alone.kernels[2:]
    elif len(how) == 1:
        how = guard.staged_kernels(name, logits.device, rows, classes, classes, soft, logits.dtype, options.input == "probs")
    sums = (classes * classes + classes + 4) * accumulator(logits.device).itemsize
    ranks = options.group is not None
    reason = "the sums of all ranks are added up before the determinant" if ranks else "the sample weights get a gradient"
    return Plan(
        name,
        (how[0], *(("all_reduce",) if ranks else ()), *how[1:], *rest),
        "over the ranks of a group, staged" if ranks else "staged",
        alone.workspace_bytes + sums,
        f"{reason}; {alone.reason}" if alone.reason and len(alone.kernels) > 1 else reason,
    )
