"""The counterparts and L_DMI behind one interface: a loss of logits and noisy labels, and what it needs to know first.

Every method goes on from the same cross entropy stage. With p = softmax(logits), y the noisy label, T[i, j] = P(noisy = j | true = i):

| method | loss of a sample, or of a batch | source |
|:--|:--|:--|
| ce | -log p_y | |
| fw | -log (p T)_y, T estimated from the cross entropy stage | Patrini et al., CVPR 2017 |
| fw-true | the same with the T that made the noise: an oracle | |
| gce | (1 - p_y^q) / q, q = 0.7 | Zhang & Sabuncu, NeurIPS 2018 |
| mae | 1 - p_y, which is gce with q = 1: linear in p, as L_DMI is for each sample | Ghosh et al., AAAI 2017 |
| lccn | -log p_z, z drawn from p_z phi_{z y}, phi the posterior mean of T given all other z | Yao et al., AAAI 2019 |
| dmi-published | -log(det(one_hot^T p / N) + 0.001), in fp32 | Xu et al., NeurIPS 2019 |
| dmi-exact | -log det U of every single batch | the same, without the constant |
| dmi | -log det of the average joint, as ``DMILoss.recommended``, calibrated | docs/beyond-one-batch.md |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.experiments.demo.train import logits_of
from ldmi_fast import DMILoss, dmi_loss


@dataclass(frozen=True)
class Setting:
    """What a method may look at before it starts.

    x, noisy: the training set, (N, ...) and (N,); transition: the T that made the noise, (C, C), for oracles alone, or None.
    """

    x: Tensor
    noisy: Tensor
    num_classes: int
    batch_size: int
    transition: Tensor | None = None


class Method:
    """Cross entropy, and what the others are made from."""

    def start(self, model: nn.Module, setting: Setting) -> None:
        """After the cross entropy stage: look at the model and the training set."""

    def loss(self, logits: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch, a scalar. ``index``: which samples of the training set these are, (N,)."""
        return self.valid_loss(logits, noisy)

    def valid_loss(self, logits: Tensor, noisy: Tensor) -> Tensor:
        """What picks the best epoch: the method's own loss on noisy validation labels, without side effects."""
        return F.cross_entropy(logits, noisy)


def estimated_transition(probs: Tensor, percentile: float = 97.0) -> Tensor:
    """T from anchor points: row i is the prediction for the sample at this percentile of p_i (Patrini et al., section 4.1).

    Args:
        probs: (N, C), predictions of a network trained on noisy labels.

    Returns:
        (C, C), fp64; rows sum to 1.
    """
    if not 0.0 <= percentile <= 100.0:
        raise ValueError(f"percentile must be in 0..100, got {percentile}")
    rank = round((len(probs) - 1) * percentile / 100)
    anchors = probs.argsort(dim=0)[rank]
    return probs[anchors].double() / probs[anchors].double().sum(1, keepdim=True)


@dataclass
class Forward(Method):
    """Forward correction. ``oracle``: with the T that made the noise."""

    oracle: bool = False

    def start(self, model: nn.Module, setting: Setting) -> None:
        if self.oracle:
            if setting.transition is None:
                raise ValueError("fw-true needs the transition matrix that made the noise, and this data set's noise has none")
            self.T = setting.transition.float()
        else:
            self.T = estimated_transition(logits_of(model, setting.x).softmax(1)).float()

    def valid_loss(self, logits: Tensor, noisy: Tensor) -> Tensor:
        # a label that T excludes would have an infinite loss
        return F.nll_loss((logits.softmax(1) @ self.T).clamp(min=1e-8).log(), noisy)


@dataclass
class Generalised(Method):
    """Generalised cross entropy: q = 0 is cross entropy, q = 1 the mean absolute error."""

    q: float = 0.7

    def valid_loss(self, logits: Tensor, noisy: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, 1).gather(1, noisy[:, None])
        return (1 - (self.q * log_p).exp()).mean() / self.q


@dataclass
class LatentNoise(Method):
    """Latent class-conditional noise: a Gibbs sampler over the true labels z, one batch at a time, between the steps.

    counts[i, j]: how many samples have z = i and the noisy label j. A batch's own are taken out before it is drawn again.
    alpha: the Dirichlet prior of every entry.
    """

    alpha: float = 1.0

    def start(self, model: nn.Module, setting: Setting) -> None:
        self.C = setting.num_classes
        self.noisy = setting.noisy
        self.z = logits_of(model, setting.x).argmax(1)
        self.counts = self._count(self.z, self.noisy)

    def _count(self, z: Tensor, noisy: Tensor) -> Tensor:
        return torch.bincount(z * self.C + noisy, minlength=self.C**2).view(self.C, self.C)

    def posterior(self) -> Tensor:
        """phi, (C, C), rows sum to 1."""
        raised = self.counts.double() + self.alpha
        return raised / raised.sum(1, keepdim=True)

    def loss(self, logits: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad():
            self.counts -= self._count(self.z[index], noisy)
            weight = logits.double().softmax(1) * self.posterior()[:, noisy].T
            # if the complete row underflows, there is nothing to draw from
            weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, 1.0)
            z = torch.multinomial(weight, 1)[:, 0]
            self.counts += self._count(z, noisy)
            self.z[index] = z
        return F.cross_entropy(logits, z)

    def valid_loss(self, logits: Tensor, noisy: Tensor) -> Tensor:
        return F.nll_loss((logits.double().softmax(1) @ self.posterior()).log(), noisy)


@dataclass
class Published(Method):
    """The paper's formula as its repository writes it: fp32, det itself. ``normalize``: the mean over the batch, not the sum."""

    normalize: bool = True

    def valid_loss(self, logits: Tensor, noisy: Tensor) -> Tensor:
        one_hot = F.one_hot(noisy, logits.shape[1]).float()
        joint = one_hot.T @ logits.float().softmax(1)
        return -(torch.det(joint / len(noisy) if self.normalize else joint).abs() + 0.001).log()


class Exact(Method):
    """L_DMI of every single batch."""

    def valid_loss(self, logits: Tensor, noisy: Tensor) -> Tensor:
        return dmi_loss(logits, noisy)


class Recommended(Exact):
    """L_DMI of the moving average that ``DMILoss.recommended`` picks, calibrated on the training set."""

    def start(self, model: nn.Module, setting: Setting) -> None:
        self.criterion = DMILoss.recommended(setting.num_classes, setting.batch_size)
        self.criterion.calibrate(zip(setting.x.split(1000), setting.noisy.split(1000), strict=True), model)

    def loss(self, logits: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        return self.criterion(logits, noisy)


METHODS: dict[str, Callable[[], Method]] = {
    "ce": Method,
    "fw": Forward,
    "fw-true": lambda: Forward(oracle=True),
    "gce": Generalised,
    "mae": lambda: Generalised(q=1.0),
    "lccn": LatentNoise,
    "dmi-published": Published,
    "dmi-exact": Exact,
    "dmi": Recommended,
}

#: The methods that the paper compares, and ours: the default of a grid.
COMPARED = ("ce", "fw", "gce", "lccn", "dmi-published", "dmi")
