"""The loss in Hugging Face's Trainer."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..batches import classes_second, device_of, logits_of
from ..files import replacing
from ..modules import SAMPLES_PER_CLASS, DMILoss
from ..options import as_int

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(f"ldmi_fast.integrations.hf needs transformers: pip install 'transformers[torch]' ({error})") from error

FILE = "dmi_criterion.pt"
"""What :class:`HFCallback` writes into a checkpoint: the criterion's state dict."""


def hf(criterion: nn.Module) -> HFLoss:
    """A criterion as the ``compute_loss_func`` of Hugging Face's Trainer.

    It takes the logits out of what the model returns, with the classes in the last dimension for tokens (N, L, C), and undoes what the
    Trainer does to a loss that it takes for a sum over ``num_items_in_batch``: L_DMI is one number for a batch.

    - With ``gradient_accumulation_steps`` the Trainer adds up losses; here each is divided by the number of micro-batches of the step.
      Each of them is a separate batch for the loss, and enters a moving average separately: ``DMILoss.recommended`` is to be given the
      size of one.
    - With ``average_tokens_across_devices`` (its default) it multiplies the loss by the number of processes; here it is divided by it.
      So the gradient over several processes is the mean of theirs, and with ``group="world"`` that of one process on the whole batch.

    It works in a ``compute_loss`` of your own as well, and outside of a Trainer, where nothing is divided. Labels are compared with
    logits position by position: a causal language model's have to be shifted before.

    Args:
        criterion: a :class:`ldmi_fast.DMILoss`, or another module or function of logits and labels. It is moved to the device of the
            logits. Under ``torch.no_grad()``, as in ``Trainer.evaluate``, a DMILoss gives the loss of the batch alone, and its
            average stays as it is.

    Returns:
        A function ``(outputs, labels, num_items_in_batch=None) -> loss []``.

    Raises:
        ValueError: by the function: the Trainer has no labels to hand on. TypeError: the outputs have no logits.

    Example:
        >>> criterion = DMILoss.recommended(num_labels, batch_size)
        >>> Trainer(model, args, train_dataset=data, compute_loss_func=hf(criterion), callbacks=[HFCallback(criterion)])
    """
    return HFLoss(criterion)


class HFLoss:
    """What :func:`hf` returns."""

    def __init__(self, criterion: Callable[..., Any]) -> None:
        if not callable(criterion) or isinstance(criterion, type):
            raise TypeError(f"hf() takes a criterion such as DMILoss(num_classes), got {criterion!r}")
        self.criterion = criterion

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None, **ignored: Any) -> Tensor:
        """The loss of a batch, multiplied by what the Trainer will divide it by.

        Args:
            outputs: what the model returned.
            labels: (N,) or (N, L) for tokens.
            num_items_in_batch: what the Trainer takes the loss for a sum over.
            ignored: what other versions of the Trainer pass.

        Raises:
            ValueError: there are no labels. TypeError: there are no logits.
        """
        if labels is None:
            raise ValueError(
                "the Trainer has no labels for the loss: it hands on only what is under 'labels' in a batch, whatever label_names "
                "says; rename the column, such as dataset.rename_column('noisy', 'labels')"
            )
        logits, labels = classes_second(logits_of(outputs), labels)
        if isinstance(self.criterion, nn.Module):
            held = next(iter(self.criterion.buffers()), None)
            if held is not None and held.device != logits.device:
                self.criterion.to(logits.device)
        loss: Tensor = self.criterion(logits, labels)
        return loss / _factor(num_items_in_batch)


def _callers() -> Iterator[Any]:
    """The frames of the functions that are running, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _running_trainer() -> Trainer | None:
    """The Trainer whose method is calling, if there is one: what it will do to the loss is known to it alone."""
    return next((found for frame in _callers() if isinstance(found := frame.f_locals.get("self"), Trainer)), None)


def _factor(num_items_in_batch: Any) -> float:
    """What a loss will be multiplied by, or how often added up: ``Trainer.compute_loss`` and ``training_step`` of transformers."""
    trainer = _running_trainer()
    if trainer is None:
        return 1.0
    args, factor = trainer.args, 1.0
    counted = num_items_in_batch is not None
    multiplies = getattr(args, "average_tokens_across_devices", False) and counted and trainer.compute_loss_func is not None
    # a compute_loss of a subclass that does not call this one multiplies nothing
    if multiplies and any(frame.f_code is Trainer.compute_loss.__code__ for frame in _callers()):
        parallel = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
        factor *= args.n_gpu if args.n_gpu > 1 else trainer.accelerator.num_processes // parallel
    divides = getattr(trainer, "loss_is_scaled_for_ga", None)
    if divides is None:
        divides = trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and counted)
    if torch.is_grad_enabled() and divides:  # otherwise the Trainer itself divides
        # of this step: the last one of an epoch may have fewer
        factor *= getattr(trainer, "current_gradient_accumulation_steps", args.gradient_accumulation_steps)
    return factor


class HFCallback(TrainerCallback):
    """Looks after the moving average of a criterion in Hugging Face's Trainer, which knows nothing of it.

    - When training begins, :meth:`ldmi_fast.DMILoss.calibrate` on some of the training data. What was in the average before, such as
      that of another model, is forgotten.
    - With each checkpoint the criterion's state is saved, as ``dmi_criterion.pt`` in its folder.
    - ``trainer.train(resume_from_checkpoint=...)`` restores it from there, and does not calibrate.

    Args:
        criterion: the :class:`ldmi_fast.DMILoss` that :func:`hf` was given. Without momentum there is nothing to do.
        calibrate: whether to calibrate; False: the average starts as it is.
        samples: how many samples to calibrate with, those of all processes together; None: 250 a class.

    Raises:
        TypeError: no DMILoss; ``samples`` is no integer. ValueError: ``samples`` is less than 1; when training begins, the Trainer has
            no ``compute_loss_func``, or one that :func:`hf` made of another criterion.
    """

    def __init__(self, criterion: DMILoss, *, calibrate: bool = True, samples: int | None = None) -> None:
        if not isinstance(criterion, DMILoss):
            raise TypeError(f"HFCallback takes the DMILoss that hf() was given, got {type(criterion).__name__}")
        if samples is not None and as_int("samples", samples) < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.criterion, self.calibrate = criterion, calibrate
        self.samples = None if samples is None else as_int("samples", samples)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **ignored: Any
    ) -> None:
        """Restore, or calibrate."""
        self._check_use()
        if self.criterion.momentum is None:
            return
        self.criterion.to(device_of(model))
        if state.global_step > 0 and self._restore(args, state):
            return
        if self.calibrate and train_dataloader is not None:
            with _same_random_numbers(device_of(model)):
                self.criterion.calibrate(self._some_of(train_dataloader, args), _without_wrapper(model))

    def on_save(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
        """Write the state into the checkpoint."""
        if self.criterion.momentum is None or not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():  # a search over hyperparameters puts a folder between
            found = sorted(Path(args.output_dir).glob(f"*/{folder.name}"), key=os.path.getmtime)
            if not found:
                raise FileNotFoundError(
                    f"the Trainer says that it saved a checkpoint, and there is no folder {folder} for the average"
                )
            folder = found[-1]
        with replacing(folder / FILE) as file:
            torch.save(self.criterion.state_dict(), file)

    def _check_use(self) -> None:
        """Raise if the criterion is not the one that the Trainer calls: the callback would have no effect, silently."""
        trainer = _running_trainer()
        if trainer is None:
            return
        loss = trainer.compute_loss_func
        if isinstance(loss, HFLoss) and loss.criterion is not self.criterion:
            raise ValueError("HFCallback and hf() were given two different criteria: give both the same one")
        if loss is None and type(trainer).compute_loss is Trainer.compute_loss:
            raise ValueError("HFCallback is there, and the Trainer does not use its criterion: pass compute_loss_func=hf(criterion)")

    def _restore(self, args: Any, state: Any) -> bool:
        """Whether the checkpoint that training goes on from has the average."""
        folder = Path(_resumed_from() or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        path = folder / FILE
        if not path.is_file():
            instead = "It is calibrated now" if self.calibrate else "It starts as it is"
            warnings.warn(
                f"{folder} has no {FILE}, so the moving average is not what it was: the checkpoint was saved without HFCallback, or "
                f"by another node (save_on_each_node). {instead}",
                stacklevel=2,
            )
            return False
        self.criterion.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return True

    def _some_of(self, loader: Any, args: Any) -> Iterator[Any] | DataLoader[Any]:
        """Batches of random training samples, from a separate loader: the Trainer's loader must not be started twice."""
        wanted = SAMPLES_PER_CLASS * (self.criterion.num_classes or 0) if self.samples is None else self.samples
        data = loader.dataset
        size = args.per_device_train_batch_size
        ranks, rank = (args.world_size, args.process_index) if self.criterion.options.group is not None else (1, 0)
        options = {
            "batch_size": size,
            "collate_fn": loader.collate_fn,
            "num_workers": loader.num_workers,
            "worker_init_fn": loader.worker_init_fn,
            "generator": torch.Generator(),
        }
        if isinstance(data, IterableDataset):
            return islice(DataLoader(data, **options), -(-wanted // (size * ranks)))
        chosen = random.Random(0).sample(range(len(data)), min(wanted, len(data)))
        if len(chosen) > ranks:  # as many on each: a sharded model has to be called equally often
            chosen = chosen[: len(chosen) // ranks * ranks]
        return DataLoader(Subset(data, chosen[rank::ranks]), **options)


@contextmanager
def _same_random_numbers(device: torch.device | None) -> Iterator[None]:
    """Afterwards all generators are where they were: batches' order, augmentation and dropout do not depend on what is done here."""
    numpy = sys.modules.get("numpy")
    before = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda"):
            yield
    finally:
        random.setstate(before[0])
        if numpy is not None:
            numpy.random.set_state(before[1])


def _without_wrapper(model: Any) -> Callable[..., Any]:
    """The model inside DDP and the like: with uneven data a rank may call it more often than another."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    found: Callable[..., Any] = model
    return found


def _resumed_from() -> str | None:
    """The folder that ``Trainer.train`` goes on from; it tells callbacks the step alone."""
    for frame in _callers():
        found = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(found, (str, os.PathLike)) and isinstance(frame.f_locals.get("self"), Trainer):
            return os.fspath(found)
    return None
