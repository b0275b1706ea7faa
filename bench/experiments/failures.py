"""``python -m bench.experiments.failures``: what the published formula does where it fails, next to ``ldmi_fast.dmi_loss``.

Every number is computed when it runs, on the CPU: a small classifier is trained with cross-entropy on noisy labels of
synthetic Gaussian classes, then both losses are evaluated on its predictions.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import ldmi_fast
from bench.kernels.measure import num_threads
from bench.kernels.peers import PUBLISHED_EPS, Loss, published
from bench.kernels.results import write_atomic
from bench.reporting import markdown_table

FEATURES = 64
NOISE_RATE = 0.4
"""Share of labels replaced by another class, about that of Clothing1M (0.385)."""
CE_STEPS = 300
DMI_STEPS = 50


@dataclass(frozen=True)
class Evaluation:
    """A loss and the largest absolute entry of its gradient with respect to the logits."""

    loss: float
    gradient: float

    def __str__(self) -> str:
        return f"loss {number(self.loss)}, gradient {number(self.gradient)}"


@dataclass(frozen=True)
class Failure:
    """One row of the table: the published formula and ours on the same logits and labels."""

    case: str
    determinant: float
    published: Evaluation
    ours: Evaluation
    remark: str


def number(value: float) -> str:
    """A number as the table shows it: four decimals, or a power of ten where it is small."""
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "NaN")
    if value == 0:
        return "0"
    return f"{value:.4f}" if abs(value) >= 1e-2 else f"{value:.0e}"


class GaussianClasses:
    """Gaussian clusters, one per class, whose labels are wrong at ``NOISE_RATE``, uniformly over the other classes."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        self.classes = classes
        self.generator = torch.Generator().manual_seed(seed)
        self.centers = torch.randn(classes, FEATURES, generator=self.generator)

    def sample(self, rows: int) -> tuple[Tensor, Tensor]:
        """Features ``[rows, FEATURES]`` and noisy labels ``[rows]``."""
        label = torch.randint(self.classes, (rows,), generator=self.generator)
        features = self.centers[label] + torch.randn(rows, FEATURES, generator=self.generator)
        other = torch.randint(1, self.classes, (rows,), generator=self.generator)
        wrong = torch.rand(rows, generator=self.generator) < NOISE_RATE
        return features, torch.where(wrong, (label + other) % self.classes, label)


def train(model: nn.Module, data: GaussianClasses, loss: Loss, steps: int, rows: int = 256) -> list[float]:
    """Train ``model`` with Adam for ``steps`` batches; returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        features, target = data.sample(rows)
        value = loss(model(features), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def cross_entropy_model(data: GaussianClasses) -> nn.Module:
    """A small network after the cross-entropy stage that the paper puts before L_DMI."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, data.classes))
    train(model, data, F.cross_entropy, CE_STEPS)
    return model


def evaluate(loss: Loss, logits: Tensor, target: Tensor) -> Evaluation:
    """Loss and largest gradient entry; NaN if any entry is NaN."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target)
    (gradient,) = torch.autograd.grad(value, leaf)
    return Evaluation(value.item(), gradient.abs().max().item())


def float32_determinant(logits: Tensor, target: Tensor, normalize: bool) -> float:
    """The determinant that the published formula takes."""
    probs = F.softmax(logits.detach(), dim=1)
    joint = F.one_hot(target, logits.shape[1]).float().T @ probs
    return torch.det(joint / len(target) if normalize else joint).item()


def side_by_side(case: str, logits: Tensor, target: Tensor, normalize: bool, remark: str) -> Failure:
    """Both losses on the same logits, in the same form (mean or counts)."""
    return Failure(
        case,
        float32_determinant(logits, target, normalize),
        evaluate(lambda z, y: published(z, y, normalize=normalize), logits, target),
        evaluate(lambda z, y: ldmi_fast.dmi_loss(z, y, normalize=normalize), logits, target),
        remark,
    )


def underflow() -> Failure:
    """14 classes, 256 rows, mean form: the determinant is negligible next to the published 0.001."""
    data = GaussianClasses(14)
    model = cross_entropy_model(data)
    features, target = data.sample(256)
    logits = model(features)
    moved = {}
    for name, loss in (("published", published), ("ours", ldmi_fast.dmi_loss)):
        losses = train(copy.deepcopy(model), GaussianClasses(14), loss, DMI_STEPS)
        moved[name] = f"{number(losses[0])} -> {number(losses[-1])}"
    remark = f"loss over {DMI_STEPS} more steps: published {moved['published']}, ours {moved['ours']}"
    return side_by_side("fp32 det of U/N, C = 14, N = 256, after CE training", logits, target, True, remark)


def overflow(classes: int, rows: int) -> Failure:
    """Counts form: the determinant leaves float32's range."""
    data = GaussianClasses(classes)
    model = cross_entropy_model(data)
    features, target = data.sample(rows)
    stepped = copy.deepcopy(model)
    train(stepped, data, lambda z, y: published(z, y, normalize=False), 1, rows)
    weights = torch.cat([parameter.flatten() for parameter in stepped.parameters()])
    remark = f"one optimiser step with the published formula: {weights.isnan().float().mean():.0%} of the weights are NaN"
    return side_by_side(f"fp32 det of counts, C = {classes}, N = {rows}", model(features), target, False, remark)


def missing_class() -> Failure:
    """14 classes, 32 rows: most batches lack a class."""
    data = GaussianClasses(14)
    model = cross_entropy_model(data)
    batches = [data.sample(32) for _ in range(200)]
    lacking = [(features, target) for features, target in batches if len(target.unique()) < 14]
    features, target = lacking[0]
    remark = f"{len(lacking)} of {len(batches)} random batches lack a class; ours uses the classes that are there"
    return side_by_side("a class missing from the batch, C = 14, N = 32", model(features), target, True, remark)


def more_classes_than_rows() -> Failure:
    """700 classes, batch 64: no batch can ever have them all."""
    data = GaussianClasses(700)
    model = cross_entropy_model(data)
    features, target = data.sample(64)
    return side_by_side("700 classes, batch 64", model(features), target, True, "every batch lacks most classes")


CASES: tuple[Callable[[], Failure], ...] = (
    underflow,
    lambda: overflow(14, 65536),
    lambda: overflow(100, 1024),
    missing_class,
    more_classes_than_rows,
)

SYNC_NOTE = (
    "Not a number of this table, for it takes a GPU: the published code builds the one-hot matrix on the CPU, so on a "
    "GPU every step waits for the labels to come to the host and for the one-hot matrix to go back, two "
    "synchronisations per step."
)


def markdown(failures: Sequence[Failure]) -> str:
    """The table as markdown."""
    header = ("case", "fp32 det", "published formula", "ldmi_fast", "remark")
    rows = [(row.case, number(row.determinant), str(row.published), str(row.ours), row.remark) for row in failures]
    legend = f"Gradients are the largest absolute entry. {-math.log(PUBLISHED_EPS):.4f} is -log(0.001)."
    return f"{markdown_table(header, rows)}\n\n{legend} {SYNC_NOTE}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.failures", description="The published formula's failures, run.")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    # matrices as small as these are slower on several threads, and much slower on a busy machine
    with num_threads(1):
        text = markdown([case() for case in track(CASES, description="failures", console=console)])
    print(text, end="")
    if options.markdown is not None:
        write_atomic(options.markdown, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
