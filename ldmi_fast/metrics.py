"""L_DMI as a torchmetrics Metric. Needs torchmetrics, which the package itself does not: ``pip install torchmetrics``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import stages
from .checks import SUM_ROUNDING, probability_rows, raise_for_values
from .engines import composite
from .engines.choose import choose
from .evaluate import prepare
from .options import check_num_classes, make_options
from .precision import accumulator, compute_dtype
from .rows import used_rows
from .sums import Sums
from .tracing import may_look

try:
    from torchmetrics import Metric
except ImportError as error:
    if isinstance(error, ModuleNotFoundError) and error.name == "torchmetrics":
        raise ImportError("ldmi_fast.metrics needs torchmetrics: pip install torchmetrics") from error
    raise ImportError(f"ldmi_fast.metrics needs torchmetrics, which is installed, but its import fails: {error}") from error

_STATES = ("joint", "counts", "total")


class DMI(Metric):
    r"""log\|det U\| of all samples seen: a score for choosing a model on validation data with noisy labels. The larger, the better.

    U is the joint of labels and predictions over the whole data set, summed over batches and processes before the determinant. For
    noise that depends on the class alone the score is that of the clean labels plus a constant, the same for every model, so it
    chooses the model that clean labels would choose by this score; accuracy on noisy labels does not.

    Like the loss it cannot tell a labelling from a permuted one: a model whose classes are permuted scores as well as the right one.
    Compare models that cross entropy has warmed up, or look at the sign (``sign``) and at :func:`ldmi_fast.diagnose`.

    Args:
        num_classes: C.
        ignore_index: as for :func:`ldmi_fast.dmi_loss`.
        absent: as for :func:`ldmi_fast.dmi_loss`. With the default ``"present"`` the score is over the classes that occur, so compare
            scores only where the same classes occur.
        input: ``"logits"``, or ``"probs"`` if ``update`` is given probabilities. Which of the two they are cannot be seen in the
            score, so the first batch is checked: rows of probabilities in the place of logits give a warning, the other way round
            is an error.
        kwargs: as for every ``torchmetrics.Metric``.

    The state is fp64 (fp32 on a device that has no fp64) whatever dtype the metric is converted to.

    Raises:
        TypeError, ValueError: an argument that cannot work.

    Example:
        >>> score = DMI(14)
        >>> for images, noisy_labels in validation:
        ...     score.update(model(images), noisy_labels)
        >>> score.compute()
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    joint: Tensor
    counts: Tensor
    total: Tensor
    _looked: bool = False
    _sign: Tensor | None = None

    def __init__(
        self, num_classes: int, *, ignore_index: int = -100, absent: str = "present", input: str = "logits", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = check_num_classes(num_classes)
        self.options = make_options("DMI", {"ignore_index": ignore_index, "absent": absent, "input": input})
        acc = accumulator(torch.empty(0).device)
        classes = self.num_classes
        self.add_state("joint", torch.zeros(classes, classes, dtype=acc), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(classes, dtype=acc), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=acc), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: as for :func:`ldmi_fast.dmi_loss`.
            target: as for :func:`ldmi_fast.dmi_loss`.
            sample_weight: as for :func:`ldmi_fast.dmi_loss`.

        Raises:
            TypeError, ValueError, IndexError: as :func:`ldmi_fast.dmi_loss`; nothing is added then. ValueError also for
                ``input="probs"`` where the rows of the first batch are no distributions.
        """
        logits, target, sample_weight = prepare(logits, target, sample_weight, self.options)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"this DMI is for {self.num_classes} classes, got logits with {logits.shape[1]} in dimension 1")
        with torch.no_grad():
            sums = stages.joint_sums(logits, target, sample_weight, self.options, choose(logits, self.options))
            if sums.S.is_cpu and may_look(sums.S) and (sums.S.sum().isnan() or (sums.n < 0).any()):
                raise_for_values(target, sample_weight, self.num_classes, self.options.ignore_index)
            if not self._looked:
                self._look(logits, target, sample_weight)
            for name, part in zip(_STATES, (sums.S, sums.n, sums.total), strict=True):
                state = getattr(self, name)
                acc = accumulator(state.device)
                # what was made in inference mode cannot be written to outside; what was loaded may have any dtype
                if state.dtype != acc or (state.is_inference() and not torch.is_inference_mode_enabled()):
                    state = state.to(acc, copy=True)
                setattr(self, name, state.add_(_like(part, state)))

    def _look(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None) -> None:
        """At the first rows that count: are they what ``input`` says? Waits for the device, once."""
        if not may_look(logits) or (logits.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        used = used_rows(target, sample_weight, self.num_classes, self.options.ignore_index, torch.float32)[0]
        rows = logits if used is None else logits[used]
        self._looked = len(rows) > 0
        if not self._looked or not rows.isfinite().all():
            return
        if self.options.input == "probs" and not probability_rows(rows, SUM_ROUNDING).all():
            self._looked = False
            sums = rows.sum(1, dtype=compute_dtype(rows.dtype))
            raise ValueError(
                f'DMI(input="probs") takes rows of probabilities, >= 0 with the sum 1; got entries from {rows.min().item():.3g} to '
                f"{rows.max().item():.3g} and sums from {sums.min().item():.3g} to {sums.max().item():.3g}; for logits leave out input"
            )
        if self.options.input == "logits" and self.num_classes > 1 and probability_rows(rows).all():
            warnings.warn(
                "DMI takes logits, and every row of this batch is >= 0 with the sum 1, as probabilities are: the score of those is "
                f'that of another model. For probabilities pass DMI({self.num_classes}, input="probs")',
                stacklevel=4,
            )

    def _solve(self) -> tuple[Tensor, Tensor]:
        acc = accumulator(self.joint.device)
        sums = Sums(self.joint.to(acc), self.counts.to(acc), self.total.to(acc), self.total)
        log_abs_det, sign, kept, _ = composite.logdet_inverse(sums.S, sums.n, self.options.absent)
        return log_abs_det - kept * torch.where(sums.total == 0, 1, sums.total).log(), sign

    def compute(self) -> Tensor:
        """The score [], fp64. 0 before any sample counts, -inf for a singular joint."""
        value, self._sign = self._solve()
        return value

    @property
    def sign(self) -> Tensor:
        """The sign [] of the determinant; -1 tells of an odd permutation of the classes.

        Right after :meth:`compute` it is that of the score, over all processes; before, and after another update, that of what this
        process has seen. Reading it communicates nothing.
        """
        if self._computed is not None and self._sign is not None:
            return self._sign
        return self._solve()[1]

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot the score, or several, as every ``torchmetrics.Metric`` does; needs matplotlib.

        Args:
            val: what ``compute`` or ``forward`` returned, or a sequence of that; None: the score now.
            ax: a matplotlib axis to plot into; None: a new one.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> DMI:
        # .half() and .to(dtype) must not touch the state: rounded to half precision its determinant is noise. Only devices change.
        # torchmetrics would also convert what it has in store.
        stored: tuple[Any, ...] = (self._computed, self._forward_cache)
        self._computed = self._forward_cache = None
        super()._apply(fn, exclude_state=(*_STATES, *exclude_state))
        for name in _STATES:
            if name not in exclude_state:
                self._defaults[name] = _applied(fn, cast(Tensor, self._defaults[name]))
                setattr(self, name, _applied(fn, getattr(self, name)))
        moved = [None if value is None else _applied(fn, value) for value in (*stored, self._sign)]
        self._computed, self._forward_cache, self._sign = cast("Any", moved)
        return self


def _like(value: Tensor, like: Tensor) -> Tensor:
    """Move to the device and dtype of another tensor, without an intermediate dtype that a device lacks."""
    if value.dtype.itemsize > like.dtype.itemsize:
        return value.to(like.dtype).to(like.device)
    return value.to(like.device).to(like.dtype)


def _applied(fn: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """What ``Module._apply`` makes of a state whose dtype follows from its device alone."""
    device = fn(torch.empty(0, device=state.device)).device
    like = torch.empty(0, dtype=accumulator(device), device=device)
    if state.is_meta and device.type != "meta":
        return torch.zeros(state.shape, dtype=like.dtype, device=device)
    if device != state.device:
        return _like(state, like)
    result = fn(state)
    return result if result.dtype == like.dtype else _like(state, like)
