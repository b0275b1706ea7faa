"""The loss as a module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .average import MovingAverage, new_state, takes_part
from .checks import check_place, check_tensors
from .diagnostics import JointReport, report_on
from .evaluate import evaluate
from .joint_state import JointState
from .options import OptionKeywords, as_float, as_int, check_num_classes, make_options, raise_unexpected_keyword, shows_options
from .precision import accumulator
from .tracing import may_look, transformed

SAMPLES_PER_CLASS = 250
"""The number of samples per class in the average that :meth:`DMILoss.recommended` aims at. With fewer the determinant is noise, with
more the average lags behind the model without a benefit (``bench/experiments/many_classes.py`` measures both)."""
_ROUNDED = (
    "the moving average of this DMILoss was rounded to half or single precision, and a determinant of rounded numbers is noise. It is "
    "fp64 again, but what it had held is rounded: call calibrate() or reset(). A state in half precision does this when it is loaded: "
    "save it in fp64. So do wrappers that cast buffers, such as MixedPrecision(buffer_dtype=...): leave that out, or keep the "
    "criterion out of the wrapped module"
)

AVERAGES = ("average_joint", "average_counts", "average_weight")

LEAST_MOMENTUM, MOST_MOMENTUM = 0.9, 0.999


class DMILoss(nn.Module):
    """:func:`ldmi_fast.dmi_loss` as a module, its options fixed at construction.

    With ``momentum=m`` the determinant is not that of the batch but of B, a bias-corrected moving average of the batches' joint
    matrices that includes the batch at hand:

        B_t = A_t / (1 - m^t),    A_t = m A_{t-1} + (1 - m) U_t,    loss = -log|det(B + U - stop_gradient(U))|

    The value is that of B, the gradient what it would be if the batch's joint were B. So noise in single determinants averages out,
    and batches with fewer samples than classes work. Which classes are present is decided by B as well.

    The average is kept in buffers (fp64, whatever dtype the module is converted to) and so in the state dict. Only a forward in
    training mode, where a gradient can be asked for, enters it. In eval mode, and under ``torch.no_grad()`` or
    ``torch.inference_mode()`` in either mode, the loss is that of the batch alone. A forward that activation checkpointing repeats
    uses the average as it is. A batch in which nothing counts, or with NaN, does not enter. The buffers have to be on the device of
    the logits: ``criterion.to(device)``. A class whose share of the average falls below 1e-12 is absent.

    Args:
        num_classes: C, if it is to be checked against the logits; None takes any. ``momentum`` needs it.
        momentum: m, 0 <= m < 1; None: each batch alone. About 1 / (1 - m) batches are averaged.
        options: those of :func:`ldmi_fast.dmi_loss`.

    Raises:
        TypeError, ValueError: an option that cannot work.

    Example:
        >>> criterion = DMILoss(14, momentum=0.9).to(device)
        >>> criterion(model(images), noisy_labels).backward()
    """

    # 2: with momentum there are buffers
    _version = 2

    average_joint: Tensor
    average_counts: Tensor
    average_weight: Tensor
    average_steps: Tensor

    @shows_options()
    def __init__(
        self,
        num_classes: int | None = None,
        *,
        momentum: float | None = None,
        **options: Unpack[OptionKeywords],
    ) -> None:
        super().__init__()
        self.num_classes = None if num_classes is None else check_num_classes(num_classes)
        self.momentum = _check_momentum(momentum)
        self.options = make_options("DMILoss", options, others=("num_classes", "momentum"))
        if momentum is not None:
            if self.num_classes is None:
                raise ValueError("momentum needs num_classes: the average is a num_classes x num_classes buffer")
            for name, tensor in new_state(self.num_classes).items():
                self.register_buffer(name, tensor)
            self._remember()

    @classmethod
    def recommended(cls, num_classes: int, batch_size: int, **options: Unpack[OptionKeywords]) -> DMILoss:
        """The loss with the momentum that suits these classes and batches, for noisy labels. Call :meth:`calibrate` after the cross
        entropy stage: with more classes than samples in a batch it matters as much as the momentum.

        The average with momentum m has the variance of (1 + m) / (1 - m) independent batches. The momentum is chosen so that these
        batches have 250 samples per class, but at least 0.9 and at most 0.999:

            m = (n - 1) / (n + 1),    n = 250 num_classes / batch_size

        Args:
            num_classes: C.
            batch_size: samples that count in one step; with ``group`` those of all ranks together.
            options: as for :class:`DMILoss`, without ``momentum``.

        Raises:
            TypeError, ValueError: a size that is no positive integer; an option that cannot work.

        Example:
            >>> criterion = DMILoss.recommended(100, 64)
            >>> criterion.momentum
            0.9948...
            >>> criterion.calibrate(loader, model)
        """
        if "momentum" in options:
            raise TypeError("DMILoss.recommended() chooses the momentum: for one of your own call DMILoss(num_classes, momentum=...)")
        batch_size = as_int("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        batches = SAMPLES_PER_CLASS * check_num_classes(num_classes) / batch_size
        momentum = min(max((batches - 1) / (batches + 1), LEAST_MOMENTUM), MOST_MOMENTUM)
        return cls(num_classes, momentum=momentum, **options)

    @property
    def average(self) -> MovingAverage | None:
        """The moving average, over this module's buffers; None without momentum."""
        if self.momentum is None:
            return None
        if not torch.compiler.is_compiling() and self.average_joint.is_inference() and not torch.is_inference_mode_enabled():
            for name in (*AVERAGES, "average_steps"):  # made or loaded in inference mode, such tensors cannot be changed outside
                self._buffers[name] = self._tensor(name).clone()
            self._remember()
        self._restore_precision()
        return MovingAverage(self.average_joint, self.average_counts, self.average_weight, self.average_steps, self.momentum)

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None, **unknown: Any) -> Tensor:
        """The loss of a batch, a scalar; see :func:`ldmi_fast.dmi_loss` for shapes and errors.

        Raises:
            TypeError: a keyword that other losses take, with what to do instead.
            ValueError: the logits do not have ``num_classes`` classes, or are not where the average is.
            RuntimeError: an average would have to be updated inside a ``torch.func`` transform.
        """
        if unknown:
            raise_unexpected_keyword("DMILoss.forward", next(iter(unknown)), ("sample_weight",))
        self._check_classes(logits)
        if self.momentum is None or not self.training:
            return evaluate(logits, target, sample_weight, self.options)
        # evaluation, even if this module is in training mode
        if not torch.compiler.is_compiling() and (not takes_part() or (isinstance(logits, Tensor) and logits.is_inference())):
            return evaluate(logits, target, sample_weight, self.options)
        if transformed():
            raise RuntimeError(
                "DMILoss with momentum cannot update its average inside a torch.func transform (grad, vmap, ...); "
                "use torch.autograd, or criterion.eval() for the loss of the batch alone"
            )
        if isinstance(logits, Tensor):
            check_place(self.average_joint.device, logits)
        return evaluate(logits, target, sample_weight, self.options, self.average)

    def activation(self, logits: Tensor) -> Tensor:
        """Probabilities, the softmax over dimension 1 (the logits themselves with ``input="probs"``). fastai calls it for predictions.

        Args:
            logits: (N, C) or (N, C, d1, ...).
        """
        return logits if self.options.input == "probs" else logits.softmax(1)

    def decodes(self, logits: Tensor) -> Tensor:
        """The most probable class, (N,) or (N, d1, ...) int64. fastai calls it for predictions.

        Args:
            logits: (N, C) or (N, C, d1, ...); probabilities are as good.
        """
        return logits.argmax(1)

    def reset(self) -> None:
        """Forget every batch that the average has seen.

        Raises:
            RuntimeError: there is no momentum.
        """
        self._with_momentum("reset").reset()

    def calibrate(self, loader: Iterable[Any], model: nn.Module | Callable[[Any], Tensor]) -> None:
        """Set the average to the joint of a pass over data, with the weight of an average that has run for ever.

        Without it the average starts from the first batch alone, whose determinant is as noisy as that of any batch. With ``group``
        each rank passes over its own part.

        Args:
            loader: as for :meth:`JointState.update_from`; a few hundred samples per class are enough.
            model: as for :meth:`JointState.update_from`. A module runs in eval mode, without gradients; modes are put back.

        Raises:
            RuntimeError: there is no momentum. ValueError: nothing in the data counts, or the model's outputs are not finite.
            TypeError, ValueError: a batch or an output of another form.
        """
        average = self._with_momentum("calibrate")
        assert self.num_classes is not None  # momentum needs it
        state = JointState(self.num_classes, **self.options.saved(), engine=self.options.engine)
        state.device = self.average_joint.device
        state.update_from(loader, model)
        if self.options.group is not None:
            state.all_reduce(self.options.group)
        if may_look(state.sums.S):
            if state.sums.total.item() == 0:
                raise ValueError("calibrate() found no sample that counts: an empty loader, or every label ignored, or every weight 0")
            if not bool(torch.isfinite(state.sums.S).all()):
                raise ValueError("calibrate() met logits that are NaN or infinite, and leaves the average as it was")
        average.set(state.sums)

    def diagnose(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> JointReport:
        """Examine a batch as :func:`ldmi_fast.diagnose` does, with this module's options. With momentum the report also compares the
        batch with the average (``report.average``). The batch does not enter the average.

        Args:
            logits: as for the loss.
            target: as for the loss.
            sample_weight: as for the loss.
        """
        check_tensors(logits, target, sample_weight, self.options)
        self._check_classes(logits)
        return report_on(logits, target, sample_weight, self.options, self.average)

    def _tensor(self, name: str) -> Tensor:
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer

    def _remember(self) -> None:
        """Keep a second tensor over the memory of each buffer of the average. It costs nothing, and it still has the fp64 numbers if
        other code replaces the data of the buffer by a rounded copy."""
        self._exact = {name: self._tensor(name).detach() for name in AVERAGES}

    def _restore_precision(self) -> None:
        """Bring the average back to fp64 if something has cast the buffers without asking the module: FSDP and DDP with
        ``MixedPrecision(buffer_dtype=...)`` replace the data of buffers, ``load_state_dict(assign=True)`` the buffers themselves."""
        wide = accumulator(self.average_joint.device)
        if all(self._tensor(name).dtype == wide for name in AVERAGES):
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"something has cast the moving average of this DMILoss to {self.average_joint.dtype}, and a compiled forward cannot "
                "bring it back: leave buffer_dtype out of MixedPrecision, keep the criterion out of the wrapped module or of the "
                "compiled function, or call it once in eager mode after loading a state in half precision"
            )
        rounded = False
        for name in AVERAGES:
            buffer, exact = self._tensor(name), self.__dict__.get("_exact", {}).get(name)
            restored = buffer.detach().to(wide)
            if not may_look(buffer):
                continue
            if exact is not None and exact.dtype == wide and torch.equal(exact.to(buffer.device).to(buffer.dtype), buffer.detach()):
                restored = exact.to(buffer.device)
            else:
                rounded |= bool(buffer.count_nonzero())
            buffer.data = restored  # the same tensor: a wrapper may hold it
        self._remember()
        if rounded:
            warnings.warn(_ROUNDED, stacklevel=4)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_exact", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.momentum is not None:
            self._remember()

    def _check_classes(self, logits: Any) -> None:
        if self.num_classes is None or not isinstance(logits, Tensor) or logits.is_nested or logits.dim() < 2:
            return
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"this DMILoss is for {self.num_classes} classes, got logits of shape {tuple(logits.shape)} "
                f"with {logits.shape[1]} in dimension 1"
            )

    def _with_momentum(self, what: str) -> MovingAverage:
        if self.average is None:
            raise RuntimeError(f"{what}() is about the moving average, and this DMILoss has none: pass momentum, such as 0.9")
        return self.average

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DMILoss:
        # .half() and .to(dtype) must not change the average: rounded to half precision its determinant is noise. Only devices change.
        kept = dict(self.named_buffers(recurse=False))
        for name in kept:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(kept)
        for name, buffer in kept.items():
            device = fn(torch.empty(0, device=buffer.device)).device
            dtype = accumulator(device) if buffer.is_floating_point() else buffer.dtype
            if buffer.is_meta and device.type != "meta":
                self._buffers[name] = torch.zeros(buffer.shape, dtype=dtype, device=device)
            elif buffer.dtype != dtype or buffer.device != device:
                self._buffers[name] = buffer.to(dtype).to(device)
        if self.momentum is not None:
            self._remember()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        if local_metadata.get("version", 1) < 2 and self.momentum is not None:
            # written before there was an average: it stays what it is
            for name, buffer in self._buffers.items():
                state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if self.momentum is None:
            return
        self._remember()
        loaded = state_dict.get(prefix + "average_joint")
        wide = self.average_joint.dtype == accumulator(self.average_joint.device)  # else the next forward says it
        if wide and isinstance(loaded, Tensor) and loaded.dtype != self.average_joint.dtype and not loaded.is_meta:
            warnings.warn(_ROUNDED, stacklevel=3)

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults, as ``print`` shows them."""
        parts = [] if self.num_classes is None else [str(self.num_classes)]
        if self.momentum is not None:
            parts.append(f"momentum={self.momentum!r}")
        return ", ".join(parts + self.options.changed())


def _check_momentum(momentum: Any) -> float | None:
    if momentum is None:
        return None
    found = as_float("momentum", momentum, "0 <= momentum < 1, or None")
    if not 0 <= found < 1:
        raise ValueError(f"momentum must be >= 0 and < 1 (0.9 averages about 10 batches, 0.99 about 100), got {found!r}")
    return found
