"""The exact loss of a batch that is too large for memory, in two passes over its micro-batches; and of a whole data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from . import stages
from .batches import device_of, eval_mode, outputs
from .checks import raise_for_values
from .engines.choose import choose
from .engines.combine import combine
from .evaluate import may_check_values, prepare
from .files import replacing
from .options import OptionKeywords, Options, check_num_classes, make_options, shows_options
from .precision import accumulator, compute_dtype
from .sums import Sums

_FORMAT = "ldmi_fast.JointState"
_VERSION = 1


@dataclass(frozen=True)
class JointSolution:
    """What :meth:`JointState.solve` found. All tensors without gradient.

    Attributes:
        loss: [], the loss of everything that was accumulated, as :func:`ldmi_fast.dmi_loss` of one batch of it.
        log_abs_det: [], log|det U| of the classes kept (of S with ``normalize=False``); -inf if singular. The larger, the better
            the predictions, also where the labels are noisy.
        sign: [], of that determinant; 0 if singular.
        kept: [] int64, k, how many classes it is of.
        V: [C, C], S^-T.
        scale: [], the factor of the determinant's part of the gradient.
        ce_scale: [], the factor of the cross entropy's part.
    """

    loss: Tensor
    log_abs_det: Tensor
    sign: Tensor
    kept: Tensor
    V: Tensor
    scale: Tensor
    ce_scale: Tensor


class JointState:
    """Exact L_DMI over micro-batches, ranks, or a data set: sums first, the determinant once, then the gradient of each micro-batch.

    The first pass, without gradients, adds up S. :meth:`solve` takes the determinant and V = S^-T. In the second pass
    :meth:`loss` of each micro-batch is -<V, S_micro>, which is linear in the probabilities; the gradients add up to exactly that of
    one big batch, and the values to -k (k: the number of classes kept), whatever the loss is: that is ``solve().loss``.

    Both passes have to see the same model outputs. :class:`RNGReplay` repeats dropout; batch norm in training mode sees
    each micro-batch twice, and alone.

    Args:
        num_classes: C.
        device: where the sums live; None: where the first batch is.
        options: those of :func:`ldmi_fast.dmi_loss`, without ``group``. With ``eps > 0`` values add up to -k times eps's factor of
            the gradient; a cross entropy term adds up to itself.

    Raises:
        TypeError, ValueError: an option that cannot work.

    Example:
        >>> state = JointState(num_classes)
        >>> with torch.no_grad():
        ...     for x, y in micro_batches:
        ...         state.update(model(x), y)
        >>> state.solve()
        >>> for x, y in micro_batches:
        ...     state.loss(model(x), y).backward()
    """

    @shows_options("group")
    def __init__(
        self,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        **options: Unpack[OptionKeywords],
    ) -> None:
        if "group" in options:
            raise TypeError("JointState() takes no group: accumulate on every rank, then call all_reduce(group) once, before solve()")
        self.num_classes = check_num_classes(num_classes)
        self.options = make_options("JointState", options, without=("group",), others=("num_classes", "device"))
        self.device = None if device is None else torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums: Sums | None = None
        self._solution: JointSolution | None = None
        self._world_size: int | None = None

    def __repr__(self) -> str:
        state = "empty" if self._sums is None else "solved" if self._solution is not None else "accumulating"
        over = "" if self._world_size is None else f", over {self._world_size} ranks"
        return f"JointState({self.num_classes}, {state}{over})"

    @property
    def sums(self) -> Sums:
        """S [C, C], n [C], W [] and the summed cross entropy [] so far; zeros before the first batch."""
        if self._sums is None:
            acc = accumulator(self.device or torch.device("cpu"))
            with _ordinary():
                zero = torch.zeros((), dtype=acc, device=self.device)
                shape = (self.num_classes, self.num_classes)
                return Sums(zero.new_zeros(shape), zero.new_zeros(self.num_classes), zero.clone(), zero.clone())
        return self._sums

    def _prepare(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        logits, target, sample_weight = prepare(logits, target, sample_weight, self.options)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"this JointState is for {self.num_classes} classes, got logits with {logits.shape[1]} in dimension 1")
        return logits, target, sample_weight

    def _open(self, what: str) -> None:
        if self._world_size is not None:
            raise RuntimeError(f"{what} after all_reduce() would count ranks twice: reset() first, or all_reduce() last")

    def _add(self, sums: Sums) -> None:
        with _ordinary():
            if self._sums is None:
                device = self.device or sums.S.device
                # to a device without fp64 the dtype goes first
                acc = accumulator(device)
                self._sums = Sums(*(part.detach().to(acc).to(device).clone() for part in sums))
                self.device = self._sums.S.device
            else:
                for mine, other in zip(self._sums, sums, strict=True):
                    mine.add_(other.detach().to(mine.dtype).to(mine.device))
        self._solution = None

    def update(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> None:
        """Add a micro-batch: the first pass. No gradient is kept.

        Args:
            logits: as for :func:`ldmi_fast.dmi_loss`.
            target: as for :func:`ldmi_fast.dmi_loss`.
            sample_weight: as for :func:`ldmi_fast.dmi_loss`.

        Raises:
            TypeError, ValueError, IndexError: as :func:`ldmi_fast.dmi_loss`; nothing is added then. RuntimeError: after
                :meth:`all_reduce`.
        """
        self._open("update()")
        with torch.no_grad():
            logits, target, sample_weight = self._prepare(logits, target, sample_weight)
            sums = stages.joint_sums(logits, target, sample_weight, self.options, choose(logits, self.options))
        # A wrong label must not poison what other batches have added up; what is NaN for another reason stays, and shows.
        if may_check_values(sums.S) and sums.S.sum().isnan():
            raise_for_values(target, sample_weight, self.num_classes, self.options.ignore_index)
        self._add(sums)

    def update_from(self, loader: Iterable[Any], model: nn.Module | Callable[[Any], Tensor]) -> JointState:
        """Add a pass over data: ``update(model(input), target)`` for each batch of the loader, without gradients and, for a
        module, in eval mode (the mode of each submodule is put back).

        Args:
            loader: batches ``(input, target)``, ``(input, target, sample_weight)``, or mappings of the model's arguments with the
                labels under ``"labels"`` (and weights under ``"sample_weight"``), as Hugging Face's collators make them. Tensors are
                moved to the device of the model's first parameter.
            model: input -> logits, as a tensor or in something that has them as ``.logits``. It is called with keywords if the input
                is a mapping.

        Returns:
            This state.

        Raises:
            ValueError: a batch of another form. TypeError: weights that are integers, such as an index; outputs without logits.
        """
        device = device_of(model)
        if self._sums is None and self.device is None:
            self.device = device  # also where this loader has nothing
        with torch.no_grad(), eval_mode(model):
            for batch in loader:
                self.update(*outputs(batch, model))
        return self

    def merge(self, other: JointState) -> JointState:
        """Add what another state has accumulated.

        Returns:
            This state.

        Raises:
            TypeError, ValueError: no JointState, or one with other classes or options. RuntimeError: either was reduced over ranks.
        """
        if not isinstance(other, JointState):
            raise TypeError(f"merge() takes a JointState, got {type(other).__name__}")
        self._open("merge()")
        other._open("merge() of a state")
        if self.num_classes != other.num_classes:
            raise ValueError(f"cannot merge a state of {other.num_classes} classes into one of {self.num_classes}")
        mine, theirs = (state.options.saved() for state in (self, other))
        for name, value in mine.items():
            if theirs[name] != value:
                raise ValueError(f"cannot merge states with different options: {name}={value!r} here, {theirs[name]!r} there")
        if other._sums is not None:
            self._add(other._sums)
        return self

    def all_reduce(self, group: Any = "world") -> JointState:
        """Add up the sums of all ranks; every rank has to call, also one that has seen nothing. Then :meth:`solve` gives all of them
        the same, and :meth:`loss` is multiplied by world_size, so that the averaging of DDP and FSDP gives what one process would.

        Args:
            group: a torch.distributed ProcessGroup, a 1-D DeviceMesh or ``"world"``.

        Returns:
            This state.

        Raises:
            RuntimeError: called a second time; or no process group is set up. ValueError: ranks with other classes or options.
        """
        from . import distributed, process_groups  # import torch.distributed, which most programs do without

        self._open("all_reduce()")
        options = Options(**self.options.saved(), engine=self.options.engine, group=group)
        with _ordinary():
            self._sums = distributed.all_reduce(self.sums, options)
        self.device = self._sums.S.device
        self._world_size = process_groups.resolve(group).size()
        self._solution = None
        return self

    def solve(self) -> JointSolution:
        """The determinant of everything so far, and what the second pass needs.

        Returns:
            A :class:`JointSolution`.
        """
        sums, options = self.sums, self.options
        with _ordinary():
            log_abs_det, sign, kept, V = choose(sums.S, options).logdet_inverse(sums.S, sums.n, options.absent)
            loss, scale, ce_scale = combine(
                log_abs_det, kept, sums.total, sums.ce, options.eps, options.normalize, options.cross_entropy_weight
            )
            if options.normalize:
                log_abs_det = log_abs_det - kept * torch.where(sums.total == 0, 1, sums.total).log()
        self._solution = JointSolution(loss, log_abs_det, sign, kept, V, scale, ce_scale)
        return self._solution

    def loss(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The part of one micro-batch: the second pass. Linear in the probabilities; its gradient is that of the loss of everything.

        Args:
            logits: as in the first pass.
            target: as in the first pass.
            sample_weight: as in the first pass.

        Returns:
            A scalar, fp32 (fp64 for fp64 logits). Over all micro-batches of all ranks it adds up to -k (times world_size after
            :meth:`all_reduce`).

        Raises:
            RuntimeError: :meth:`solve` has not been called since the last change. TypeError, ValueError, IndexError: as
                :func:`ldmi_fast.dmi_loss`.
        """
        if self._solution is None:
            raise RuntimeError("call solve() after the first pass, before loss()")
        solution, options = self._solution, self.options
        logits, target, sample_weight = self._prepare(logits, target, sample_weight)
        sums = stages.joint_sums(logits, target, sample_weight, options, choose(logits, options))
        value = -solution.scale * (solution.V.to(sums.S.device) * sums.S).sum()
        if options.cross_entropy_weight != 0:
            value = value + solution.ce_scale * sums.ce
        if sums.total.requires_grad:
            # Sample weights: loss = -log|det S| + k log W + a CE / W. What comes through W is 0 here, and has its gradient.
            W = torch.where(self.sums.total == 0, 1, self.sums.total)
            slope = -solution.ce_scale * self.sums.ce / W
            if options.normalize:
                slope = slope + torch.where(solution.sign == 0, 0, solution.scale * solution.kept / W)
            value = value + slope.to(sums.total.device) * (sums.total - sums.total.detach())
        if self._world_size is not None:
            value = value * self._world_size
        if may_check_values(value) and value.isnan():
            raise_for_values(target, sample_weight, self.num_classes, options.ignore_index)
        return value.to(compute_dtype(logits.dtype))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sums and options to a file, complete or not at all. It has the permissions that ``open`` gives a file; one that is
        replaced keeps its own, and a symbolic link stays one.

        Args:
            path: of the file; its folder must be there.

        Raises:
            OSError: it cannot be written. What was there before is as it was.
        """
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "num_classes": self.num_classes,
            "options": self.options.saved(),
            "world_size": self._world_size,
            **{name: part.cpu() for name, part in self.sums._asdict().items()},
        }
        with replacing(path) as file:
            torch.save(content, file)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, engine: str | None = None, device: torch.device | str | None = None) -> JointState:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: :meth:`save` did not write it, or it is damaged, or of a newer format.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a file that JointState.save wrote: {error}") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a file that JointState.save wrote")
        if content["version"] > _VERSION:
            raise ValueError(f"{path} has format version {content['version']}, and this ldmi_fast reads up to {_VERSION}")
        state = cls(content["num_classes"], engine=engine, device=device, **content["options"])
        state._add(Sums(*(content[name] for name in Sums._fields)))
        state._world_size = content["world_size"]
        return state


@contextmanager
def _ordinary() -> Iterator[None]:
    """Tensors without gradient that can be used everywhere, also if this runs in inference mode: those made there cannot be changed
    or saved for a backward outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def dmi_score(
    model: nn.Module | Callable[[Any], Tensor], loader: Iterable[Any], num_classes: int, *, group: Any = None, **options: Any
) -> JointSolution:
    """L_DMI of a whole data set, in one pass: a validation score that needs no clean labels.

    ``log_abs_det`` of the result is the score, the larger the better. For noise that depends on the class alone it is that of the
    clean labels plus a constant, log|det T|, so it ranks models as clean labels would, up to a permutation of the classes.

    Args:
        model: as for :meth:`JointState.update_from`; a module runs in eval mode.
        loader: as for :meth:`JointState.update_from`.
        num_classes: C.
        group: a torch.distributed group whose ranks each have a part of the data, none of it twice.
        options: as for :class:`JointState`.

    Returns:
        A :class:`JointSolution`.

    Example:
        >>> score = dmi_score(model, noisy_validation_loader, 14).log_abs_det.item()
    """
    state = JointState(num_classes, **options).update_from(loader, model)
    if group is not None:
        state.all_reduce(group)
    return state.solve()
