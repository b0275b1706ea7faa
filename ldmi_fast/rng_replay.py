"""The random numbers of a first pass once more in a second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RNGReplay:
    """Repeats in a second pass the random numbers of a first, so that dropout drops the same again.

    Example:
        >>> replay = RNGReplay()
        >>> for x, y in micro_batches:
        ...     with torch.no_grad(), replay.record():
        ...         state.update(model(x), y)
        >>> state.solve()
        >>> for x, y in micro_batches:
        ...     with replay.play():
        ...         loss = state.loss(model(x), y)
        ...     loss.backward()

    Args:
        devices: the CUDA devices whose generators are recorded besides the CPU's; None: the current one, if CUDA is in use.
    """

    def __init__(self, devices: Iterable[torch.device | str | int] | None = None) -> None:
        if devices is None:
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        self._devices = list(devices)
        self._recorded: list[tuple[Tensor, list[Tensor]]] = []
        self._next = 0

    def _state(self) -> tuple[Tensor, list[Tensor]]:
        return torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices]

    def _set(self, state: tuple[Tensor, list[Tensor]]) -> None:
        torch.set_rng_state(state[0])
        for device, its in zip(self._devices, state[1], strict=True):
            torch.cuda.set_rng_state(its, device)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Remember where the generators are. Recording after playing starts a new sequence."""
        if self._next:
            self._recorded, self._next = [], 0
        self._recorded.append(self._state())
        yield

    @contextmanager
    def play(self) -> Iterator[None]:
        """Go through the next of the recorded forwards; the generators are then where they were before.

        Raises:
            RuntimeError: there are no more.
        """
        if self._next >= len(self._recorded):
            raise RuntimeError(f"play() called {self._next + 1} times, but record() only {len(self._recorded)} times")
        before = self._state()
        self._set(self._recorded[self._next])
        self._next += 1
        try:
            yield
        finally:
            self._set(before)
