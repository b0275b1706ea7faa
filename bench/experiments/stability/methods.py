"""The methods to take a step. Each makes gradients from one batch of images and labels, and returns the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmi_fast import DMILoss, JointState, RNGReplay, dmi_loss, joint_matrix

Loader = list[tuple[Tensor, Tensor]]


class Method:
    """One method. ``batches``: how many ordinary batches one step takes; ``clip``: largest norm of the gradient."""

    batches = 1
    clip: float | None = None

    def start(self, model: nn.Module, loader: Loader, classes: int, steps: int) -> None:
        """Before the stage: the warmed-up model, data to look at, the number of steps to come."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        raise NotImplementedError

    def step(self, model: nn.Module, x: Tensor, labels: Tensor) -> float:
        """Gradients of the model's parameters; returns the loss."""
        loss = self.loss(model(x), labels)
        if loss.requires_grad:
            loss.backward()
        return loss.item()


class CrossEntropy(Method):
    """The baseline: cross entropy goes on."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


@dataclass
class Exact(Method):
    """-log(|det U| + eps) of each batch."""

    eps: float = 0.0
    clip: float | None = None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return dmi_loss(logits, labels, eps=self.eps)


class Published(Method):
    """As the paper's repository writes it, in fp32: -log(|det(one_hot^T P / N)| + 0.001)."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        one_hot = F.one_hot(labels, logits.shape[1]).float()
        return -(torch.det(one_hot.T @ logits.float().softmax(1) / len(labels)).abs() + 0.001).log()


class SkipNegative(Method):
    """Exact, but the sign is known to be + after cross entropy: a batch with det U < 0 teaches nothing."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        sign = torch.linalg.slogdet(joint_matrix(logits.detach().double(), labels)).sign
        return torch.where(sign > 0, dmi_loss(logits, labels), 0.0)


@dataclass
class SignedEps(Method):
    """-log(softplus(det U / s) s), s = eps: for det >> s the exact loss, for det < 0 a bounded pull back towards +."""

    eps: float = 0.01

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        # relative to the best determinant that these labels allow, C^-C for balanced ones, or eps would mean nothing at C = 10
        scale = self.eps * F.one_hot(labels, logits.shape[1]).double().mean(0).clamp(min=1e-6).prod()
        det = torch.linalg.det(joint_matrix(logits.double(), labels))
        return -(F.softplus(det / scale)).log() - scale.log()


@dataclass
class Momentum(Method):
    """The moving average, from nothing or calibrated; ``until``: the momentum at the end, where it rises; ``cross_entropy``: how
    much of it is added."""

    momentum: float
    calibrate: bool = False
    until: float | None = None
    clip: float | None = None
    cross_entropy: float = 0.0

    def start(self, model: nn.Module, loader: Loader, classes: int, steps: int) -> None:
        self.criterion = DMILoss(classes, momentum=self.momentum, cross_entropy_weight=self.cross_entropy)
        self.steps, self.done = steps, 0
        if self.calibrate:
            self.criterion.calibrate(loader, model)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.until is not None:  # geometrically in the number of batches averaged
            share = self.done / max(self.steps - 1, 1)
            self.criterion.momentum = 1 - (1 - self.momentum) ** (1 - share) * (1 - self.until) ** share
        self.done += 1
        return self.criterion(logits, labels)


@dataclass
class Lagged(Method):
    """V from the average without the batch at hand, so that the two are independent: -<V_{t-1}, U_t>, unbiased given V."""

    momentum: float

    def start(self, model: nn.Module, loader: Loader, classes: int, steps: int) -> None:
        self.criterion = DMILoss(classes, momentum=self.momentum)
        self.criterion.calibrate(loader, model)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        average = self.criterion.average
        assert average is not None
        B = average.mean()[0]
        value = -torch.linalg.slogdet(B).logabsdet
        surrogate = -(torch.linalg.inv(B).mT * joint_matrix(logits, labels)).sum()
        with torch.no_grad():
            self.criterion(logits, labels)
        return surrogate + (value - surrogate).detach()


@dataclass
class TwoPass(Method):
    """JointState: the exact loss of ``batches`` batches, one step."""

    batches: int = 4

    def start(self, model: nn.Module, loader: Loader, classes: int, steps: int) -> None:
        self.state = JointState(classes)

    def step(self, model: nn.Module, x: Tensor, labels: Tensor) -> float:
        self.state.reset()
        replay = RNGReplay()
        micro = list(zip(x.chunk(self.batches), labels.chunk(self.batches), strict=True))
        for xs, ys in micro:
            with torch.no_grad(), replay.record():
                self.state.update(model(xs), ys)
        loss = self.state.solve().loss.item()
        for xs, ys in micro:
            with replay.play():
                part = self.state.loss(model(xs), ys)
            part.backward()
        return loss if not math.isnan(loss) else math.nan


METHODS: dict[str, Callable[[], Method]] = {
    "ce": CrossEntropy,
    "exact": Exact,
    "exact-clip": lambda: Exact(clip=1.0),
    "eps": lambda: Exact(eps=1e-3),
    "published": Published,
    "skip-negative": SkipNegative,
    "signed-eps": SignedEps,
    "momentum-0.9": lambda: Momentum(0.9),
    "momentum-0.99": lambda: Momentum(0.99),
    "calibrated-0.9": lambda: Momentum(0.9, calibrate=True),
    "calibrated-0.9-clip": lambda: Momentum(0.9, calibrate=True, clip=1.0),
    "calibrated-0.9-ce-1": lambda: Momentum(0.9, calibrate=True, cross_entropy=1.0),
    "calibrated-0.9-ce-5": lambda: Momentum(0.9, calibrate=True, cross_entropy=5.0),
    "calibrated-0.99": lambda: Momentum(0.99, calibrate=True),
    "rising": lambda: Momentum(0.8, calibrate=True, until=0.99),
    "lagged-0.9": lambda: Lagged(0.9),
    "lagged-0.99": lambda: Lagged(0.99),
    "two-pass-4": lambda: TwoPass(4),
    "two-pass-16": lambda: TwoPass(16),
}
