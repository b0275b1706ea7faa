"""What ``group=`` may be, and the process group that is meant."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# The name for the default group. Unlike the object, it may be pickled, and written down before init_process_group.
WORLD = "world"


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
    if isinstance(group, str):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(f"group={WORLD!r} needs a process group: call torch.distributed.init_process_group first")
        group = dist.group.WORLD
    return cast("dist.ProcessGroup", group)
