"""The training: two stages on Lightning Fabric. It can be killed at any moment, and a resumed run ends with the same weights.

What a step computes depends on the checkpoint and the options alone: batches come from ``sampler.Order``, random transforms from the
sample's place in the run, dropout from the generator of the rank, which is in the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import ldmi_fast
from bench.experiments.paper.clothing1m import checkpoint
from bench.experiments.paper.clothing1m.log import Log
from bench.experiments.paper.clothing1m.model import build
from bench.experiments.paper.clothing1m.options import STAGES, Options, check, decisive, to_arguments
from bench.experiments.paper.clothing1m.sampler import Batches, Order, Seeded, mixed, worker_start
from bench.experiments.paper.clothing1m.sets import Sets
from bench.experiments.paper.clothing1m.show import Display
from bench.kernels.results import write_atomic
from ldmi_fast import DMILoss, JointState
from ldmi_fast.modules import SAMPLES_PER_CLASS

IGNORE = -100
CHECKPOINTS, LOG, RESULT = "checkpoints", "log.jsonl", "result.json"


def processes() -> int:
    """The number of processes that torchrun, or another launcher that sets its variables, has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_fabric(options: Options) -> Fabric:
    """The engine, launched: this process belongs to its group, if there are several."""
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed" if options.precision == "bf16" else "32-true"
    if processes() == 1:
        fabric = Fabric(accelerator=device, devices=1, precision=precision)
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
        strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), timeout=timedelta(seconds=options.timeout))
        fabric = Fabric(accelerator=device, devices=local, num_nodes=processes() // local, strategy=strategy, precision=precision)
    fabric.launch()
    return fabric


class GlobalCrossEntropy(nn.Module):
    """Mean cross entropy over all ranks' samples that count.

    A rank's part is multiplied by the number of ranks, so that DDP's averaging gives the gradient, and the mean of the values the
    value. If each rank took its own mean, a rank with images that cannot be read would give its other images too much weight.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        count = (labels >= 0).sum().to(logits.dtype)
        size = 1
        if dist.is_initialized():
            dist.all_reduce(count)
            size = dist.get_world_size()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") * size / count.clamp(min=1)


def make_criterion(options: Options, stage: int, group: str | None) -> nn.Module:
    """The loss of a stage: of all ranks' samples together, but for cross entropy, whose mean DDP takes."""
    if STAGES[stage] == "ce" or options.method == "ce":
        return GlobalCrossEntropy()
    if options.method == "published":  # -log(|det S| + 0.001) of the counts, as its Clothing1M script has it
        return DMILoss(options.classes, eps=1e-3, normalize=False, group=group)
    if options.momentum == "auto":
        return DMILoss.recommended(options.classes, options.batch_size, group=group)
    return DMILoss(options.classes, momentum=None if options.momentum == "none" else float(options.momentum), group=group)


def _rng_state(device: torch.device) -> dict[str, Any]:
    state = {"python": list(random.getstate()), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass
class Place:
    """What comes next: a stage, an epoch of it, a step of that."""

    stage: int = 0
    epoch: int = 0
    step: int = 0


class Trainer:
    """One process's part of a run.

    Args:
        options: checked for the number of processes.
        sets: the data.
        fabric: launched.
    """

    def __init__(self, options: Options, sets: Sets, fabric: Fabric) -> None:
        self.options, self.fabric, self.device = options, fabric, fabric.device
        self.rank, self.size = fabric.global_rank, fabric.world_size
        self.group = "world" if self.size > 1 else None
        self.out = Path(options.out)
        self.folder = self.out / CHECKPOINTS
        self.sets = sets
        self._split()
        torch.manual_seed(options.seed)
        self.net = build(options)
        if options.sync_batchnorm:
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        if options.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.place, self.started = Place(), False
        self.best: list[dict[str, float] | None] = [None, None]
        self._wrap(0)
        self._settle_buckets()
        self.meter = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.waited = self.worked = 0.0
        self.state = self._find_checkpoint()

    # ------------------------------------------------------------------------------------------------------------- data

    def _split(self) -> None:
        options, train = self.options, self.sets.train
        plain = train if self.sets.plain is None else self.sets.plain
        labels = torch.as_tensor(train.labels, dtype=torch.int64)
        self.held: Any = None
        used = torch.arange(len(labels))
        if options.select == "dmi":
            shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(mixed(options.seed, 4)))
            cut = max(1, round(options.holdout * len(labels)))
            self.held, used = Subset(plain, shuffled[:cut].tolist()), shuffled[cut:].sort().values
        self.plain = Subset(plain, used.tolist())
        balanced = options.sampler == "balanced"
        self.order = Order(
            labels[used], options.classes, options.batch_size, balanced=balanced, per_class=options.per_class, seed=options.seed
        )
        self.batches = Batches(self.order, self.rank, self.size)
        self.loader = self._loader(Seeded(Subset(train, used.tolist())), batch_sampler=self.batches)

    def _loader(self, data: Any, **more: Any) -> DataLoader[Any]:
        workers = self.options.workers
        return DataLoader(
            data,
            num_workers=workers,
            multiprocessing_context=worker_start(workers),
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.options.seed),  # or it would draw from the model's
            **more,
        )

    def _share(self, data: Any, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of a data set in plain order; none of it twice."""
        indices = range(self.rank, len(data) if count is None else min(count, len(data)), self.size)
        loader = DataLoader(
            Subset(data, indices),
            batch_size=max(1, self.options.batch_size // self.size),
            num_workers=self.options.workers,
            multiprocessing_context=worker_start(self.options.workers),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),
        )
        for x, labels, *_ in loader:
            yield self._to_device(x), labels.to(self.device, non_blocking=True)

    def _to_device(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        return x.to(self.device, non_blocking=True, memory_format=layout)

    # ------------------------------------------------------------------------------------------------------------ stages

    def _wrap(self, stage: int) -> None:
        """Optimizer, schedule and loss of a stage. The network is wrapped once."""
        options = self.options
        rate, later = options.rates[min(stage, len(STAGES) - 1)]
        optimizer = torch.optim.SGD(self.net.parameters(), lr=rate, momentum=options.sgd_momentum, weight_decay=options.weight_decay)
        if not hasattr(self, "model"):
            self.model = self.fabric.setup_module(self.net)
        self.optimizer: Any = self.fabric.setup_optimizers(optimizer)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [options.drop_at], gamma=later / rate)
        self.criterion = make_criterion(options, min(stage, len(STAGES) - 1), self.group).to(self.device)

    def _settle_buckets(self) -> None:
        """DDP reorders its buckets after its first backward, and with them the sums of more than two ranks. The first backward is
        therefore one of zeros, so that a resumed run adds in the same order as one that was not interrupted."""
        if self.size == 1:
            return
        before = {name: value.clone() for name, value in self.net.state_dict().items()}
        shape = self.sets.train[0][0].shape
        self.net.train()
        logits = self.model(self._to_device(torch.zeros(2, *shape)))
        self.fabric.backward(0.0 * logits.sum())
        self.optimizer.zero_grad()
        self.net.load_state_dict(before)

    def _enter(self, stage: int) -> None:
        """The start of a stage: a new optimizer; before the second the best model of the first, and the average of its joint."""
        options = self.options
        self.fabric.barrier()  # rank 0 has written what is read now
        if stage == 1 and options.epochs_ce and options.start == "best":
            self.net.load_state_dict(checkpoint.read(self.best_path(0))["model"])
        self._wrap(stage)
        self.place = Place(stage)
        wanted = SAMPLES_PER_CLASS * options.classes if options.calibrate < 0 else options.calibrate
        if isinstance(self.criterion, DMILoss) and self.criterion.momentum is not None and wanted and options.epochs[stage]:
            self.net.eval()
            shuffled = torch.randperm(len(self.plain), generator=torch.Generator().manual_seed(mixed(options.seed, 5)))
            self.criterion.calibrate(self._share(Subset(self.plain, shuffled[:wanted].tolist())), self._predict)
        self.log.write("stage", self.steps_done, stage=STAGES[stage], method="ce" if stage == 0 else options.method)

    @property
    def epochs_before(self) -> int:
        """Epochs of earlier stages."""
        return sum(self.options.epochs[: self.place.stage])

    @property
    def steps_done(self) -> int:
        """Steps of the run so far, over both stages."""
        return (self.epochs_before + self.place.epoch) * self.order.steps + self.place.step

    def best_path(self, stage: int) -> Path:
        """The checkpoint of a stage's best epoch."""
        return self.folder / f"best-{STAGES[stage]}.pt"

    # ------------------------------------------------------------------------------------------------------- checkpoints

    def _find_checkpoint(self) -> dict[str, Any] | None:
        """What to go on from. All ranks look at the same file, which rank 0 chooses."""
        options = self.options
        # an error is broadcast, too: if one rank raised alone, the other ranks would wait for it
        choice: tuple[str, str] = ("none", "")
        if self.rank == 0:
            try:
                if options.resume not in ("auto", "never"):
                    checkpoint.read_or_name_another(Path(options.resume))
                    choice = ("file", options.resume)
                elif options.resume == "auto" and (good := checkpoint.newest(self.folder, Display.warn)) is not None:
                    choice = ("file", str(good[0]))
                elif options.resume == "never" and checkpoint.found(self.folder):
                    raise ValueError(f"--resume never: {self.folder} has the checkpoints of another run: take another --out")
            except ValueError as error:
                choice = ("error", str(error))
        kind, value = self.fabric.broadcast(choice)
        if kind == "error":
            raise ValueError(value)
        if kind == "none":
            return None
        state = checkpoint.read(Path(value))
        mine, theirs = decisive(options), state["options"]
        differ = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if differ:
            listed = "; ".join(f"--{name.replace('_', '-')} was {theirs.get(name)}, is {mine.get(name)}" for name in differ)
            raise ValueError(f"{value} was written with other options: {listed}. Give the same ones, or another --out")
        if state["samples"] != self.order.count:
            raise ValueError(f"{value} was written with {state['samples']} training samples, there are {self.order.count}: other data")
        return state

    def save(self, *paths: Path) -> None:
        """Write everything to each of these files, from rank 0; every rank has to call this."""
        self.flush()
        rngs = [_rng_state(self.device)]
        if self.size > 1:
            gathered: list[Any] = [None] * self.size
            dist.all_gather_object(gathered, rngs[0])
            rngs = gathered
        if self.rank:
            return
        state = {
            "place": asdict(self.place),
            "steps": self.steps_done,
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "criterion": self.criterion.state_dict(),
            "rng": rngs,
            "sampler": {"epoch": self.epochs_before + self.place.epoch, "step": self.place.step},
            "best": self.best,
            "options": decisive(self.options),
            "samples": self.order.count,
            "log_size": self.log.sync(),
            "versions": {"torch": str(torch.__version__), "ldmi_fast": ldmi_fast.__version__},
        }
        for path in paths:
            checkpoint.write(path, state)
        checkpoint.tidy(self.folder, self.options.keep)

    def _restore(self, state: dict[str, Any]) -> None:
        self.place, self.best = Place(**state["place"]), list(state["best"])
        self.net.load_state_dict(state["model"])
        self._wrap(self.place.stage)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.criterion.load_state_dict(state["criterion"])
        if len(state["rng"]) == self.size:
            _set_rng_state(state["rng"][self.rank], self.device)
        else:  # other batches of dropout, and other sums: equal to rounding, not to the bit
            torch.manual_seed(mixed(self.options.seed, 6, self.rank, self.steps_done))
            if self.rank == 0:
                Display.warn(
                    f"the checkpoint is of {len(state['rng'])} processes, these are {self.size}: equal to rounding, not to the bit"
                )

    # ---------------------------------------------------------------------------------------------------------- training

    def run(self) -> dict[str, Any]:
        """Both stages, and the test. Returns the result."""
        options, state = self.options, self.state
        main = self.rank == 0
        size = None if state is None else state["log_size"]
        board = self.out / "tensorboard" if options.tensorboard else None
        self.log = Log(self.out / LOG if main else None, size, board, 0 if state is None else state["steps"])
        total = sum(options.epochs) * self.order.steps
        with Display(total, main) as self.display:
            try:
                if state is None:
                    torch.manual_seed(mixed(options.seed, 6, self.rank))
                    random.seed(mixed(options.seed, 6, self.rank))
                    self.log.write(
                        "start",
                        0,
                        arguments=" ".join(to_arguments(options)),
                        processes=self.size,
                        steps=total,
                        problems=self.sets.problems,
                    )
                    self._enter(0)
                else:
                    self._restore(state)
                    self.log.write("resume", self.steps_done, stage=STAGES[min(self.place.stage, 1)], processes=self.size)
                self.display.at(self.steps_done)
                while self.place.stage < len(STAGES):
                    self._stage()
                return self._finish()
            except BaseException as error:
                self.log.write("error", self.steps_done, error=f"{type(error).__name__}: {error}")
                raise
            finally:
                self.log.close()

    def _stage(self) -> None:
        stage = self.place.stage
        while self.place.epoch < self.options.epochs[stage]:
            self._epoch()
            better = self._judge()
            last = self.folder / checkpoint.name_of(self.steps_done)
            self.save(*([self.best_path(stage)] if better else []), last)
        if stage + 1 < len(STAGES):
            self._enter(stage + 1)
        else:
            self.place = Place(len(STAGES))

    def _epoch(self) -> None:
        """Train what is left of an epoch."""
        options, place = self.options, self.place
        self.net.train()
        self.batches.set(self.epochs_before + place.epoch, place.step)
        clock = time.perf_counter()
        for x, labels in self.loader:
            arrived = time.perf_counter()
            x, labels = self._to_device(x), labels.to(self.device, non_blocking=True)
            logits = self.model(x)
            # outside of autocast, which is within the model: the softmax in fp32, the determinant in fp64
            loss = self.criterion(logits.float(), labels)
            self.optimizer.zero_grad()
            self.fabric.backward(loss)
            if options.clip:
                self.fabric.clip_gradients(self.net, self.optimizer, max_norm=options.clip, error_if_nonfinite=False)
            self.optimizer.step()
            value = loss.detach().double()
            finite = value.isfinite()
            self.meter += torch.stack(
                (torch.where(finite, value, 0.0), finite.double(), value.isinf().double(), value.isnan().double())
            )
            place.step += 1
            self.waited += arrived - clock
            clock = time.perf_counter()
            self.worked += clock - arrived
            self.display.at(self.steps_done)
            if self.steps_done % options.log_every == 0:
                self.flush()
            if self.steps_done % options.save_every == 0 and place.step < self.order.steps:
                self.save(self.folder / checkpoint.name_of(self.steps_done))
                clock = time.perf_counter()
        self.flush()
        place.epoch, place.step = place.epoch + 1, 0
        self.schedule.step()

    def flush(self) -> None:
        """Log what has gathered since the last line.

        Raises:
            RuntimeError: on every rank, a loss was NaN.
        """
        meter: Any = self.fabric.all_reduce(self.meter.clone(), reduce_op="sum") if self.size > 1 else self.meter.clone()
        self.meter.zero_()
        total, finite, infinite, nan = meter.tolist()
        if finite + infinite + nan == 0:
            return
        mean = total / finite if finite else math.inf
        waited, worked, self.waited, self.worked = self.waited, self.worked, 0.0, 0.0
        steps = round((finite + infinite + nan) / self.size)
        self.log.write(
            "train",
            self.steps_done,
            stage=STAGES[self.place.stage],
            epoch=self.place.epoch,
            loss=mean,
            steps=steps,
            singular=round(infinite / self.size),
            rate=self.optimizer.param_groups[0]["lr"],
            loader_s=round(waited, 4),
            step_s=round(worked, 4),
            images_per_s=round(steps * self.options.batch_size / max(waited + worked, 1e-9), 1),
        )
        self.display.note(f"{STAGES[self.place.stage]} {self.place.epoch + 1}  loss {mean:.4g}")
        if nan:
            raise RuntimeError(
                f"the loss is NaN at step {self.steps_done}, in stage {STAGES[self.place.stage]}, epoch {self.place.epoch + 1}: "
                "a lower rate, --clip, or --precision fp32. The last checkpoint is from before it"
            )

    # -------------------------------------------------------------------------------------------------------- validation

    def _predict(self, x: Tensor) -> Tensor:
        # the network itself, not DDP's: ranks may have another number of batches, and DDP would wait at each of them
        with torch.no_grad(), self.fabric.autocast():
            return self.net(x).float()

    def _agree_on_statistics(self) -> None:
        """Batch norm's running statistics are rank 0's, as in a checkpoint."""
        if self.size > 1:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)

    def measure(self, data: Any) -> tuple[float, float]:
        """Accuracy, 0..100, and log|det U| of a data set, over all ranks."""
        self._agree_on_statistics()
        self.net.eval()
        state = JointState(self.options.classes)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for x, labels in self._share(data):
            logits = self._predict(x)
            state.update(logits, labels)
            sums += torch.stack(((logits.argmax(1) == labels).sum(), (labels >= 0).sum())).double()
        if self.size > 1:
            state.all_reduce("world")
            dist.all_reduce(sums)
        right, count = sums.tolist()
        return 100 * right / max(count, 1.0), state.solve().log_abs_det.item()

    def _judge(self) -> bool:
        """Validate after an epoch; whether it is the stage's best so far."""
        place, stage = self.place, self.place.stage
        accuracy, clean_score = self.measure(self.sets.valid)
        values = {"valid_accuracy": accuracy, "valid_dmi": clean_score}
        score = accuracy
        if self.held is not None:
            values["noisy_accuracy"], values["noisy_dmi"] = self.measure(self.held)
            score = values["noisy_dmi"]
        best = self.best[stage]
        better = best is None or score > best["score"] or math.isnan(best["score"])
        if better:
            self.best[stage] = {"score": score, "epoch": place.epoch, "step": self.steps_done, **values}
        unreadable = self._unreadable()
        self.log.write("valid", self.steps_done, stage=STAGES[stage], epoch=place.epoch, best=better, unreadable=unreadable, **values)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        self.display.line(f"{STAGES[stage]} epoch {place.epoch}: {shown}{' (best)' if better else ''}")
        if unreadable:
            self.display.line(f"{unreadable} training images could not be read so far, and were left out")
        return better

    def _unreadable(self) -> int:
        """Training images that some rank could not read since it started."""
        if not hasattr(self.sets.train, "unreadable"):
            return 0
        found: list[Any] = [self.sets.train.unreadable()]
        if self.size > 1:
            mine, found = found[0], [None] * self.size
            dist.all_gather_object(found, mine)
        return len(set().union(*found))

    def _finish(self) -> dict[str, Any]:
        """Clean test accuracy of the last model and of each stage's best."""
        self.fabric.barrier()  # rank 0 has written what is read now
        result: dict[str, Any] = {"test_last": self.measure(self.sets.test)[0], "best": {}}
        for stage, name in enumerate(STAGES):
            best = self.best[stage]
            if best is not None:
                self.net.load_state_dict(checkpoint.read(self.best_path(stage))["model"])
                result["best"][name] = {**best, "test": self.measure(self.sets.test)[0]}
        result |= {"options": asdict(self.options), "processes": self.size, "steps": self.steps_done}
        result["versions"] = {"torch": str(torch.__version__), "ldmi_fast": ldmi_fast.__version__}
        if self.rank == 0:
            write_atomic(self.out / RESULT, json.dumps(result, indent=1) + "\n")
            shown = ", ".join(f"best of {name} {entry['test']:.2f}%" for name, entry in result["best"].items())
            self.display.line(f"clean test accuracy: last {result['test_last']:.2f}%{', ' + shown if shown else ''}")
        self.log.write("done", self.steps_done, test_last=result["test_last"], best=result["best"])
        return result


def train(options: Options, open_sets: Callable[[Options], Sets]) -> dict[str, Any]:
    """Do a run, or what is left of it, on this process and the other ranks.

    Raises:
        ValueError, RuntimeError, OSError: what cannot work, on this rank or on another.
    """
    check(options, processes())
    sets = open_sets(options)
    fabric = make_fabric(options)
    try:
        result = Trainer(options, sets, fabric).run()
        fabric.barrier()
        return result
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
