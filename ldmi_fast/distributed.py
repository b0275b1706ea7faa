"""One batch over the ranks of a torch.distributed group: its sums are added up before the determinant.

S, n, W and the cross entropy travel in one buffer, so a step has one all-reduce of C^2 + C + 4 numbers, and its backward none: with
the joint of the whole batch on every rank, each has V, and its own rows need nothing else. The local gradient is
world_size * dloss/dz, so that the averaging of DDP and FSDP gives what one process on the whole batch would.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed.device_mesh import DeviceMesh

from .options import Options
from .stages import Sums

# The name for the default group. Unlike the object, it may be pickled, and written down before init_process_group.
WORLD = "world"

# Settings on which the ranks of a group have agreed, so that they are compared once and not at every step.
_agreed: WeakKeyDictionary[dist.ProcessGroup, set[tuple[float, ...]]] = WeakKeyDictionary()


def check_group(group: Any) -> None:
    """Raise if this can never be a group. What it is now is found out when it is used.

    Raises:
        TypeError: not a ProcessGroup, a DeviceMesh or ``"world"``.
        ValueError: a group without this process, or another word.
    """
    if isinstance(group, str):
        if group != WORLD:
            raise ValueError(f"group must be a ProcessGroup, a 1-D DeviceMesh, {WORLD!r} (the default group) or None, got {group!r}")
    elif isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a 1-D DeviceMesh, got one of {group.ndim} dimensions; pick one: mesh['dp']")
    elif dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of the group: new_group() gave it GroupMember.NON_GROUP_MEMBER")
    elif not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"group must be a torch.distributed ProcessGroup, a 1-D DeviceMesh, {WORLD!r} (the default group) or None, "
            f"got {type(group).__name__}: {group!r}"
        )


def resolve(group: Any) -> dist.ProcessGroup:
    """The process group that is meant.

    Raises:
        RuntimeError: torch.distributed is not set up.
    """
    if isinstance(group, DeviceMesh):
        return group.get_group()
    if group == WORLD:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(f"group={WORLD!r} needs a process group: call torch.distributed.init_process_group first")
        return dist.group.WORLD
    return group


class _AllReduce(torch.autograd.Function):
    """The sum of a tensor over the ranks.

    All of them go on to compute the same from it, so the sum over the ranks of what comes back is world_size times what comes back
    here, and needs no communication. That fails for derivatives of a gradient: from the moment that one is asked for, the
    backward communicates too.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup, world_size: int, alike: bool) -> Tensor:
        ctx.group = group
        ctx.world_size = world_size
        ctx.alike = alike
        return functional_collectives.wait_tensor(functional_collectives.all_reduce(tensor, "sum", group))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            ctx.alike = False
        if ctx.alike:
            return grad * ctx.world_size, None, None, None
        return _AllReduce.apply(grad.contiguous(), ctx.group, ctx.world_size, False), None, None, None


def _settings(classes: int, options: Options, extra: tuple[float, ...]) -> tuple[float, ...]:
    """The settings that ranks must share, as numbers, in the order of ``_NAMES``."""

    def number(value: Any) -> float:
        if value is None:
            return -1.0
        return float(zlib.crc32(value.encode())) if isinstance(value, str) else float(value)

    return (float(classes), *(number(getattr(options, name)) for name in _NAMES[1 : 1 + len(_SHARED)]), *extra)


_SHARED = tuple(field.name for field in fields(Options) if field.name not in ("engine", "group"))
_NAMES = ("the number of classes", *_SHARED, "momentum")


def _describe(name: str, value: float, options: Options, mine: float) -> str:
    if value == mine and name in _SHARED:
        return f"{name}={getattr(options, name)!r}"
    if name in ("absent", "input"):
        return f"another {name}"
    if name == "momentum" and value < 0:
        return "no momentum"
    return f"{name}={value:g}" if name in (*_SHARED, "momentum") else f"{value:g} classes"


def agree(classes: int, options: Options, device: torch.device, momentum: float | None = None) -> None:
    """See to it that all ranks want the same loss. Communicates the first time that a group meets these settings.

    Raises:
        ValueError: on every rank, if they differ, with who has what.
    """
    group = resolve(options.group)
    mine = _settings(classes, options, (-1.0 if momentum is None else momentum,))
    known = _agreed.setdefault(group, set())
    if mine in known:
        return
    # as bytes, so that no device has to know fp64
    local = torch.frombuffer(bytearray(struct.pack(f"<{len(mine)}d", *mine)), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(gathered, local, group=group)
    everyone = [struct.unpack(f"<{len(mine)}d", bytes(row.cpu().tolist())) for row in gathered]
    for position, name in enumerate(_NAMES):
        values = [row[position] for row in everyone]
        if len(set(values)) > 1:
            listed = ", ".join(
                f"rank {rank}: {_describe(name, value, options, mine[position])}" for rank, value in enumerate(values[:8])
            )
            raise ValueError(
                f"the ranks of the group do not want the same loss, {name} differs: {listed}"
                f"{', ...' if len(values) > 8 else ''} (this is rank {group.rank()} of the group)"
            )
    known.add(mine)


def all_reduce(sums: Sums, options: Options, momentum: float | None = None) -> Sums:
    """The sums over all ranks of ``options.group``; gradients come back multiplied by the number of ranks.

    The buffer carries a checksum of the settings along: ranks that got out of step make the result NaN instead of wrong.
    """
    group = resolve(options.group)
    classes = sums.S.shape[-1]
    if not torch.compiler.is_compiling():
        agree(classes, options, sums.S.device, momentum)
    # small enough for exact sums and squares in fp64 over thousands of ranks
    checksum = float(zlib.crc32(repr(_settings(classes, options, (-1.0 if momentum is None else momentum,))).encode()) % 4093)
    world_size = group.size()
    tail = torch.stack((sums.total, sums.ce, sums.total.new_full((), checksum), sums.total.new_full((), checksum**2)))
    buffer = torch.cat((sums.S.flatten(), sums.n, tail))
    buffer = _AllReduce.apply(buffer, group, world_size, True)
    S, n, tail = buffer.split((classes * classes, classes, 4))
    total, ce, first, second = tail.unbind()
    nan = torch.where(first * first == second * world_size, 0.0, torch.nan).detach().to(S.dtype)
    return Sums(S.view(classes, classes) + nan, n.detach() + nan, total.detach(), ce)
