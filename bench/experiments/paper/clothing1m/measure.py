"""What the parts of a training step cost: the loss (ours, the published form, cross entropy), the network, the loader."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.experiments.paper.clothing1m.model import build
from bench.experiments.paper.clothing1m.options import Options, check
from bench.experiments.paper.clothing1m.sampler import Seeded, worker_start
from bench.experiments.paper.clothing1m.sets import open_sets
from bench.kernels.interleave import interleave
from bench.kernels.peers import published
from bench.kernels.results import environment, write_atomic
from bench.reporting import markdown_table
from ldmi_fast import DMILoss

LOSSES = {"ours": "DMILoss.recommended", "published": "the published form", "cross_entropy": "F.cross_entropy"}


class Jpegs(Dataset[tuple[Tensor, int]]):
    """Made-up JPEG files of about the size of Clothing1M's, through its training transforms: for a loader without the data set."""

    def __init__(self, folder: Path, options: Options, count: int = 64, side: int = 400) -> None:
        from PIL import Image
        from torchvision import transforms

        generator = torch.Generator().manual_seed(0)
        self.paths = []
        for index in range(count):
            coarse = torch.rand(1, 3, 25, 25, generator=generator)
            smooth = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)[0]
            grain = 0.05 * torch.randn(3, side, side, generator=generator)
            pixels = (255 * (smooth + grain).clamp(0, 1)).byte().permute(1, 2, 0).contiguous().numpy()
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=90)
            path = folder / f"{index}.jpg"
            path.write_bytes(stream.getvalue())
            self.paths.append(path)
        self.labels = torch.arange(count) % options.classes
        self.transform = transforms.Compose(
            [
                transforms.Resize((options.resize, options.resize)),
                transforms.RandomCrop(options.crop),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), int(self.labels[index])


def _synchronised(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    """Seconds of a number of calls, the device's work included."""

    def seconds(function: Callable[[], object], calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return seconds


def time_losses(options: Options, device: torch.device, seconds: float) -> dict[str, float]:
    """Seconds of one forward and backward of each loss, medians, taken in turns."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(options.batch_size) % options.classes).to(device)
    signal = 2.0 * F.one_hot(labels.cpu(), options.classes)
    logits = (signal + torch.randn(options.batch_size, options.classes, generator=generator)).to(device).requires_grad_()
    ours = DMILoss.recommended(options.classes, options.batch_size).to(device)
    losses = {
        "ours": lambda: torch.autograd.grad(ours(logits, labels), logits),
        "published": lambda: torch.autograd.grad(published(logits, labels, normalize=False), logits),
        "cross_entropy": lambda: torch.autograd.grad(F.cross_entropy(logits, labels), logits),
    }
    timings = interleave(losses, reference="ours", time_cap=seconds, seconds_of=_synchronised(device))
    return {name: timings.seconds(name).p50 for name in losses}


def time_network(options: Options, fabric: Fabric, batch: int, seconds: float) -> float:
    """Seconds of forward, backward and update on a number of images that are on the device already; the median."""
    net = build(options)
    if options.channels_last:
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=options.lr_ce, momentum=options.sgd_momentum, weight_decay=options.weight_decay)
    model, optimizer = fabric.setup(net, optimizer)
    x = torch.randn(batch, 3, options.crop, options.crop, device=fabric.device)
    if options.channels_last:
        x = x.to(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        fabric.backward(model(x).float().square().mean())
        optimizer.step()

    timed = _synchronised(fabric.device)
    timed(step, 2)
    rounds: list[float] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or (time.perf_counter() < end and len(rounds) < 200):
        rounds.append(timed(step, 1))
    return sorted(rounds)[len(rounds) // 2]


def time_loader(data: Any, batch: int, workers: int, seconds: float) -> float:
    """Images per second that the loader makes when no consumer slows it down; its start is not counted."""
    keys = [[(step * batch + i, (step * batch + i) % len(data)) for i in range(batch)] for step in range(100_000)]
    loader = DataLoader(Seeded(data), batch_sampler=keys, num_workers=workers, multiprocessing_context=worker_start(workers))
    batches = iter(loader)
    for _ in range(max(1, workers)):
        next(batches)
    count, start = 0, time.perf_counter()
    while count < 2 * max(1, workers) or time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * batch / (time.perf_counter() - start)


def measure(options: Options, model_batch: int, seconds: float, path: Path) -> str:
    """Measure, write ``path`` and a table next to it, and return the table.

    Args:
        model_batch: images that the network is timed with; its time is scaled to the batch. 0: the batch.
        seconds: for each of the parts.
    """
    check(options, 1)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(accelerator=device, devices=1, precision="bf16-mixed" if options.precision == "bf16" else "32-true")
    batch = model_batch or options.batch_size
    losses = time_losses(options, fabric.device, seconds)
    network = time_network(options, fabric, batch, seconds) * options.batch_size / batch
    with tempfile.TemporaryDirectory() as folder:
        made_up = not (options.data or options.sets)
        data = Jpegs(Path(folder), options) if made_up else open_sets(options).train
        loaded = time_loader(data, max(1, min(32, options.batch_size)), options.workers, seconds)
    trained = options.batch_size / (network + losses["ours"])
    result = {
        "model": options.model,
        "precision": options.precision,
        "batch_size": options.batch_size,
        "classes": options.classes,
        "crop": options.crop,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "model_batch": batch,
        "loss_s": losses,
        "network_s": network,
        "loss_share": {name: value / (network + value) for name, value in losses.items()},
        "network_images_per_s": trained,
        "loader_images_per_s": loaded,
        "loader_workers": options.workers,
        "loader_data": "made-up JPEG files, 400 x 400" if made_up else "the data set",
        "bound": "loader" if loaded < trained else "network",
        "workers_needed": math.ceil(trained / (loaded / max(1, options.workers))),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
    }
    table = to_markdown(result)
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    write_atomic(path.with_suffix(".md"), table + "\n")
    return table


def to_markdown(result: dict[str, Any]) -> str:
    """The result as text: a table of the losses, a sentence about the loader."""
    network, batch = result["network_s"], result["batch_size"]
    rows = [
        [
            words,
            f"{1e6 * result['loss_s'][name]:.0f} us",
            f"{1e3 * (network + result['loss_s'][name]):.1f} ms",
            f"{result['loss_share'][name]:.4%}",
        ]
        for name, words in LOSSES.items()
    ]
    scaled = "" if result["model_batch"] == batch else f", timed on {result['model_batch']} and scaled"
    return "\n".join(
        (
            "# What a training step costs",
            "",
            f"{result['date']}, {result['device']}, {result['model']} at {result['crop']} pixels in {result['precision']}, "
            f"{batch} images{scaled}, {result['classes']} classes, {result['environment']['threads']} thread(s), "
            f"torch {result['environment']['torch']}. The loss forward and backward, medians.",
            "",
            markdown_table(("loss", "the loss", "the step", "the loss's share"), rows),
            "",
            f"The network trains on {result['network_images_per_s']:.1f} images per second; the loader makes "
            f"{result['loader_images_per_s']:.1f} with {result['loader_workers']} worker(s) ({result['loader_data']}). So the "
            f"{result['bound']} bounds the run; the network wants {result['workers_needed']} worker(s) at this speed.",
        )
    )
