"""The options of a run: a dataclass whose fields are the command's options, and the checks that need no data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

METHODS = ("ce", "dmi", "published")
MODELS = ("resnet50", "resnet18", "tiny", "tiny-bn")
SAMPLERS = ("balanced", "shuffle")
SELECTORS = ("clean", "dmi")
PRECISIONS = ("bf16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
STARTS = ("best", "last")
LAYOUTS = ("auto", "annotations", "keys")

STAGES = ("ce", "dmi")
"""The names of the two stages. The second is called so whatever its ``--method``."""


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Options:
    """A run. The defaults are the paper's set-up for Clothing1M, with the recommended form of the loss."""

    data: str = _option("", "folder of the data set", metavar="FOLDER")
    layout: str = _option("auto", "which lists the folder has", choices=LAYOUTS)
    cache: str = _option("", "folder that keeps the images once resized; empty: none", metavar="FOLDER")
    resize: int = _option(256, "side to which training images are resized")
    crop: int = _option(224, "side of the random crop, and of validation and test images")
    sets: str = _option("", "module:function that makes the sets instead, from these options", metavar="NAME")
    out: str = _option("clothing1m-results", "folder for log, checkpoints and result", metavar="FOLDER")
    resume: str = _option("auto", "auto: from the newest good checkpoint in the output folder; never; or a file", metavar="FILE")
    classes: int = _option(14, "number of classes")

    model: str = _option("resnet50", "the network", choices=MODELS)
    weights: str = _option("", "state dict to start from; a head of another size is left out", metavar="FILE")
    dropout: float = _option(0.0, "before the last layer")
    sync_batchnorm: bool = _option(False, "batch norm over all processes (GPU only)")
    channels_last: bool = _option(True, "memory format of images and convolutions")
    precision: str = _option("bf16", "of the model; the loss is in fp32 and fp64", choices=PRECISIONS)
    device: str = _option("auto", "where to run", choices=DEVICES)

    method: str = _option("dmi", "the second stage's loss", choices=METHODS)
    momentum: str = _option("auto", "of the moving average of dmi: auto (recommended for classes and batch), none, or 0 <= m < 1")
    calibrate: int = _option(-1, "samples that the average starts from; -1: 250 per class; 0: the first batch")
    batch_size: int = _option(256, "of all processes together")
    epochs_ce: int = _option(10, "of the first stage")
    epochs_dmi: int = _option(10, "of the second stage")
    lr_ce: float = _option(1e-2, "first stage")
    lr_ce_later: float = _option(1e-3, "first stage, from --drop-at on")
    lr_dmi: float = _option(1e-6, "second stage")
    lr_dmi_later: float = _option(5e-7, "second stage, from --drop-at on")
    drop_at: int = _option(5, "epoch of a stage from which the later rate holds")
    sgd_momentum: float = _option(0.9, "of SGD")
    weight_decay: float = _option(1e-3, "of SGD")
    clip: float = _option(0.0, "largest norm of the gradient; 0: none")
    start: str = _option("best", "which model of the first stage the second starts from", choices=STARTS)

    sampler: str = _option("balanced", "balanced: each class equally often in every batch; shuffle: as published", choices=SAMPLERS)
    per_class: int = _option(0, "balanced: samples of each class an epoch; 0: the size of the set over the classes")
    select: str = _option(
        "clean", "the best epoch by clean validation accuracy, or by log|det U| on held-out noisy data", choices=SELECTORS
    )
    holdout: float = _option(0.02, "--select dmi: share of the training data held out for it")
    seed: int = _option(0, "of weights, order, augmentation and dropout")

    workers: int = _option(4, "loader processes for each training process")
    save_every: int = _option(500, "steps between checkpoints; one is written at the end of an epoch, too")
    log_every: int = _option(20, "steps a log line")
    keep: int = _option(2, "checkpoints kept besides the best ones")
    timeout: float = _option(600.0, "seconds that a process waits for another")
    tensorboard: bool = _option(True, "write TensorBoard files, too, where it is installed")

    @property
    def epochs(self) -> tuple[int, int]:
        """Epochs by stage."""
        return self.epochs_ce, self.epochs_dmi

    @property
    def rates(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Learning rates by stage: before and after the drop."""
        return (self.lr_ce, self.lr_ce_later), (self.lr_dmi, self.lr_dmi_later)


FREE = frozenset(
    ("data", "layout", "cache", "sets", "out", "resume", "weights", "device", "workers", "save_every", "log_every", "keep", "timeout")
) | {"tensorboard"}
"""Options that a resumed run may change: they say where and how fast, not what is computed."""


def decisive(options: Options) -> dict[str, Any]:
    """The options that a resumed run has to share with the one that wrote the checkpoint."""
    return {name: value for name, value in asdict(options).items() if name not in FREE}


def check(options: Options, processes: int) -> Options:
    """The options, if they can work with this number of processes.

    Raises:
        ValueError: with the option, what was given and what is expected.
    """

    def expect(good: bool, name: str, expected: str) -> None:
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {expected}")

    for name, kind in _choices().items():
        expect(getattr(options, name) in kind, name, f"one of {', '.join(kind)}")
    for name in ("resize", "crop", "batch_size", "drop_at", "save_every", "log_every", "keep"):
        expect(getattr(options, name) >= 1, name, "1 or more")
    for name in ("epochs_ce", "epochs_dmi", "weight_decay", "clip", "per_class", "seed", "workers"):
        expect(getattr(options, name) >= 0, name, "0 or more")
    for name in ("lr_ce", "lr_ce_later", "lr_dmi", "lr_dmi_later", "timeout"):
        expect(getattr(options, name) > 0, name, "more than 0")
    for name in ("dropout", "sgd_momentum"):
        expect(0 <= getattr(options, name) < 1, name, "0 <= x < 1")
    expect(options.crop <= options.resize, "crop", f"no more than --resize {options.resize}")
    expect(options.calibrate >= -1, "calibrate", "-1, 0 or a number of samples")
    expect(0 < options.holdout < 1, "holdout", "0 < x < 1")
    expect(options.classes >= 2, "classes", "2 or more")
    try:
        good = options.momentum in ("auto", "none") or 0 <= float(options.momentum) < 1
    except ValueError:
        good = False
    expect(good, "momentum", "auto, none, or a number 0 <= m < 1")
    if options.batch_size % processes:
        lower = options.batch_size - options.batch_size % processes
        near = f"{lower} or {lower + processes}" if lower else f"{processes}"
        raise ValueError(
            f"--batch-size {options.batch_size} is that of all processes together and not divisible by {processes} of them: "
            f"take {near}"
        )
    if options.sync_batchnorm and options.device == "cpu":
        raise ValueError("--sync-batchnorm: torch has it for GPUs only; on the CPU take a model without batch norm (tiny)")
    return options


def _choices() -> dict[str, tuple[str, ...]]:
    return {item.name: item.metadata["choices"] for item in fields(Options) if "choices" in item.metadata}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One argument for each field."""
    for item in fields(Options):
        assert item.default is not MISSING
        flag, help = f"--{item.name.replace('_', '-')}", f"{item.metadata['help']} (default: {item.default})"
        if isinstance(item.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=item.default, help=item.metadata["help"])
            continue
        more = {name: item.metadata[name] for name in ("choices", "metavar") if name in item.metadata}
        if not more:
            more = {"metavar": type(item.default).__name__.upper()}
        parser.add_argument(flag, type=type(item.default), default=item.default, help=help.replace("%", "%%"), **more)


def from_namespace(namespace: argparse.Namespace) -> Options:
    """The options among parsed arguments."""
    return Options(**{item.name: getattr(namespace, item.name) for item in fields(Options)})


def to_arguments(options: Options) -> Sequence[str]:
    """The command line that gives these options."""
    found = []
    for item in fields(Options):
        value, flag = getattr(options, item.name), item.name.replace("_", "-")
        if value == item.default:
            continue
        found += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
    return found


def out_folder(options: Options) -> Path:
    """The folder that everything is written to."""
    return Path(options.out)
