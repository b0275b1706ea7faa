"""One batch over the ranks of a torch.distributed group: its sums are added up before the determinant.

S, n, W and the cross entropy travel in one buffer, so a step has one all-reduce of C^2 + C + 4 numbers, and its backward none: with
the joint of the whole batch on every rank, each has V, and its own rows need nothing else. The local gradient is
world_size * dloss/dz, so that the averaging of DDP and FSDP gives what one process on the whole batch would.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor

from .options import LOSS_OPTION_NAMES, Options, describe_number
from .process_groups import resolve
from .sums import Sums

# Settings on which the ranks of a group have agreed, so that they are compared once and not at every step.
_agreed: WeakKeyDictionary[dist.ProcessGroup, set[tuple[float, ...]]] = WeakKeyDictionary()


@contextmanager
def _annotate_timeout(group: dist.ProcessGroup) -> Iterator[None]:
    """Add to the error of a failed collective what it usually means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"a rank of the group did not come to the loss's all-reduce (this is rank {group.rank()} of {group.size()}): it raised an "
            "error, ended, or has no such step, and the group's time limit is over. Every rank has to call the loss equally often; "
            f"the limit is the timeout of init_process_group or new_group. torch says: {error}"
        ) from error


class _AllReduce(torch.autograd.Function):
    """The sum of a tensor over the ranks.

    Every rank computes the same loss from the reduced sums, so the upstream gradients are equal, and their all-reduce is a
    multiplication by world_size, without communication. Under double backward they differ between the ranks, and a real all-reduce
    is needed.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, world_size: int, same_upstream_grad: bool) -> Tensor:
        ctx.group = group
        ctx.world_size = world_size
        ctx.same_upstream_grad = same_upstream_grad
        with nullcontext() if torch.compiler.is_compiling() else _annotate_timeout(group):
            total: Tensor = functional_collectives.wait_tensor(functional_collectives.all_reduce(tensor, "sum", group))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            ctx.same_upstream_grad = False
        if ctx.same_upstream_grad:
            return grad * ctx.world_size, None, None, None
        return _AllReduce.apply(grad.contiguous(), ctx.group, ctx.world_size, False), None, None, None


_NO_MOMENTUM = -1.0


def _settings(options: Options, momentum: float | None) -> dict[str, float]:
    """What ranks must share besides the number of classes, by name, as numbers."""
    return dict(zip(LOSS_OPTION_NAMES, options.as_numbers(), strict=True)) | {
        "momentum": _NO_MOMENTUM if momentum is None else momentum
    }


def _describe(name: str, value: float) -> str:
    return "no momentum" if name == "momentum" and value == _NO_MOMENTUM else describe_number(name, value)


def agree(classes: int, options: Options, device: torch.device, momentum: float | None = None) -> None:
    """Raise unless all ranks want the same loss. Communicates only when a group meets these settings for the first time.

    Raises:
        ValueError: on every rank, if the settings differ; it lists the setting of each rank.
    """
    group = resolve(options.group)
    settings = _settings(options, momentum)
    mine = (float(classes), *settings.values())
    known = _agreed.setdefault(group, set())
    if mine in known:
        return
    # sent as bytes, because some devices have no fp64
    local = torch.frombuffer(bytearray(struct.pack(f"<{len(mine)}d", *mine)), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(local) for _ in range(group.size())]
    with _annotate_timeout(group):
        dist.all_gather(gathered, local, group=group)
    everyone = [struct.unpack(f"<{len(mine)}d", bytes(row.cpu().tolist())) for row in gathered]
    for position, name in enumerate(("the number of classes", *settings)):
        values = [row[position] for row in everyone]
        if len(set(values)) > 1:
            words = [_describe(name, value) if position else f"{value:g} classes" for value in values[:8]]
            listed = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(words))
            raise ValueError(
                f"the ranks of the group do not want the same loss, {name} differs: {listed}"
                f"{', ...' if len(values) > 8 else ''} (this is rank {group.rank()} of the group)"
            )
    known.add(mine)


def all_reduce(sums: Sums, options: Options, momentum: float | None = None) -> Sums:
    """The sums over all ranks of ``options.group``; gradients come back multiplied by the number of ranks.

    The buffer includes a checksum of the settings. If ranks got out of step, the result is NaN instead of wrong.
    """
    group = resolve(options.group)
    classes = sums.S.shape[-1]
    if not torch.compiler.is_compiling():
        agree(classes, options, sums.S.device, momentum)
    checksum = 1.0
    for number in _settings(options, momentum).values():  # below 4093: sums and squares over thousands of ranks are exact in fp64
        checksum = float(int((31 * checksum + 1e12 * number + number) % 4093))
    world_size = group.size()
    tail = torch.stack((sums.total, sums.ce, sums.total.new_full((), checksum), sums.total.new_full((), checksum**2)))
    buffer = torch.cat((sums.S.flatten(), sums.n, tail))
    buffer = _AllReduce.apply(buffer, group, world_size, True)
    S, n, tail = buffer.split((classes * classes, classes, 4))
    total, ce, first, second = tail.unbind()
    nan = torch.where(first * first == second * world_size, 0.0, torch.nan).detach().to(S.dtype)
    return Sums(S.view(classes, classes) + nan, n.detach() + nan, total if sums.total.requires_grad else total.detach(), ce)
