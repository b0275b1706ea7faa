"""What surrounds a call: whether its tensors have data, and whether a derivative can be asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_mode = torch._C._get_dispatch_mode


_FAKE, _PROXY, _FUNCTIONAL = (getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))


def transformed() -> bool:
    """Whether a functorch transform (torch.func.grad, vmap, ...) is tracing this call."""
    return torch._C._are_functorch_transforms_active()


def may_look(value: Tensor) -> bool:
    """Whether there are data to look at, now: not while a graph is traced, a functorch transform runs, or tensors are fake."""
    return (
        not torch.compiler.is_compiling()
        and type(value).__torch_dispatch__ == Tensor.__torch_dispatch__
        and not value.is_meta
        and not transformed()
        and _mode(_FAKE) is None
        and _mode(_PROXY) is None
        and _mode(_FUNCTIONAL) is None
    )


def may_need_gradient(tensor: Tensor) -> bool:
    """Whether a derivative by this tensor can be asked for: by autograd, in forward mode or by a torch.func transform."""
    return (tensor.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0 or transformed()
