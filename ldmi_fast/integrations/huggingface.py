"""The loss in Hugging Face's Trainer."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..batches import device_of, logits_of
from ..files import replacing
from ..modules import SAMPLES_PER_CLASS, DMILoss

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
    - With ``average_tokens_across_devices`` (its default) it multiplies the loss by the number of processes; here it is divided by it.
      So the gradient over several processes is the mean of theirs, and with ``group="world"`` that of one process on the whole batch.

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

    def __init__(self, criterion: nn.Module) -> None:
        if not callable(criterion) or isinstance(criterion, type):
            raise TypeError(f"hf() takes a criterion such as DMILoss(num_classes), got {criterion!r}")
        self.criterion = criterion

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None, **ignored: Any) -> Tensor:
        if labels is None:
            raise ValueError(
                "the Trainer has no labels for the loss: it hands on only what is under 'labels' in a batch, whatever label_names "
                "says; rename the column, such as dataset.rename_column('noisy', 'labels')"
            )
        logits = logits_of(outputs)
        if logits.dim() == 3 and labels.shape == logits.shape[:-1]:
            logits = logits.movedim(-1, 1)
        if isinstance(self.criterion, nn.Module):
            held = next(iter(self.criterion.buffers()), None)
            if held is not None and held.device != logits.device:
                self.criterion.to(logits.device)
        trainer = _running_trainer()
        loss = self.criterion(logits, labels)
        return loss / (1 if trainer is None else _factor(trainer, num_items_in_batch))


def _running_trainer() -> Trainer | None:
    """The Trainer whose method is calling, if there is one: what it will do to the loss is known to it alone."""
    frame = sys._getframe(2)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


def _factor(trainer: Trainer, num_items_in_batch: Any) -> float:
    """What a loss will be multiplied by, or added up: ``Trainer.compute_loss`` and ``training_step`` of transformers."""
    args, factor = trainer.args, 1.0
    if getattr(args, "average_tokens_across_devices", False) and num_items_in_batch is not None:
        parallel = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
        factor *= args.n_gpu if args.n_gpu > 1 else trainer.accelerator.num_processes // parallel
    # loss_is_scaled_for_ga = False asks the Trainer to divide by itself
    if torch.is_grad_enabled() and getattr(trainer, "loss_is_scaled_for_ga", None) is not False:
        # of this step: the last one of an epoch may have fewer
        factor *= getattr(trainer, "current_gradient_accumulation_steps", args.gradient_accumulation_steps)
    return factor


class HFCallback(TrainerCallback):
    """Looks after the moving average of a criterion in Hugging Face's Trainer, which knows nothing of it.

    - When training begins, :meth:`ldmi_fast.DMILoss.calibrate` on some of the training data, unless the average has something in it.
    - With each checkpoint the criterion's state is saved, as ``dmi_criterion.pt`` in its folder.
    - ``trainer.train(resume_from_checkpoint=...)`` restores it from there.

    Args:
        criterion: the :class:`ldmi_fast.DMILoss` that :func:`hf` was given. Without momentum there is nothing to do.
        calibrate: whether to calibrate.
        samples: how many samples to calibrate with; None: 250 a class.

    Raises:
        TypeError: no DMILoss.
    """

    def __init__(self, criterion: DMILoss, *, calibrate: bool = True, samples: int | None = None) -> None:
        if not isinstance(criterion, DMILoss):
            raise TypeError(f"HFCallback takes the DMILoss that hf() was given, got {type(criterion).__name__}")
        self.criterion, self.calibrate, self.samples = criterion, calibrate, samples

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **ignored: Any
    ) -> None:
        """Restore, or calibrate."""
        if self.criterion.momentum is None:
            return
        self.criterion.to(device_of(model))
        if state.global_step > 0:
            self._restore(args, state)
        elif self.calibrate and train_dataloader is not None and self.criterion.average_weight.item() == 0:
            loader = self._some_of(train_dataloader, args)
            # in batches' order and dropout nothing changes because of this pass
            with torch.random.fork_rng():
                self.criterion.calibrate(loader, _without_wrapper(model))

    def on_save(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
        """Write the state into the checkpoint."""
        if self.criterion.momentum is None or not state.is_world_process_zero:
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

    def _restore(self, args: Any, state: Any) -> None:
        folder = Path(_resumed_from() or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        path = folder / FILE
        if not path.is_file():
            warnings.warn(
                f"{folder} has no {FILE}: it was saved without HFCallback. The moving average starts from nothing: call "
                "criterion.calibrate(loader, model) before, or go on from a checkpoint that has it",
                stacklevel=2,
            )
            return
        self.criterion.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _some_of(self, loader: Any, args: Any) -> Iterator[Any] | DataLoader[Any]:
        """Batches of random training samples, by a loader of their own: the Trainer's must not be begun twice."""
        wanted = SAMPLES_PER_CLASS * self.criterion.num_classes if self.samples is None else self.samples
        data = loader.dataset
        size = args.per_device_train_batch_size
        ranks, rank = (args.world_size, args.process_index) if self.criterion.options.group is not None else (1, 0)
        if isinstance(data, IterableDataset):
            own: DataLoader[Any] = DataLoader(data, batch_size=size, collate_fn=loader.collate_fn, generator=torch.Generator())
            return islice(own, -(-wanted // (size * ranks)))
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:wanted][rank::ranks]
        return DataLoader(Subset(data, chosen.tolist()), batch_size=size, collate_fn=loader.collate_fn, generator=torch.Generator())


def _without_wrapper(model: Any) -> Callable[..., Any]:
    """The model inside DDP and the like: with uneven data a rank may call it more often than another."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def _resumed_from() -> str | None:
    """The folder that ``Trainer.train`` goes on from; it tells callbacks the step alone."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(found, (str, os.PathLike)) and isinstance(frame.f_locals.get("self"), Trainer):
            return os.fspath(found)
        frame = frame.f_back
    return None
