"""The losses that are timed side by side, each as ``loss(logits [N, C], target [N]) -> scalar``.

==========================  ==========================================================================================
``ours``                    ``ldmi_fast.dmi_loss``
``published``               the published formula: one-hot matrix built on the CPU, ``U = onehot^T P / N``,
                            ``-log(|det U| + 0.001)``
``onehot_slogdet``          one-hot product, then ``slogdet``
``index_add``               softmax, ``index_add_``, ``slogdet``: eager PyTorch at its best
``index_add_scatter``       ``index_add`` with ``scatter_add_`` in its place
``index_add_fp64``          ``index_add`` with the joint in float64
``index_add_compiled``      ``index_add`` under ``torch.compile``
``cross_entropy``           ``F.cross_entropy``
``cross_entropy_compiled``  ``F.cross_entropy`` under ``torch.compile``
==========================  ==========================================================================================

A *family* gathers the variants of one idea. A comparison with a family is a comparison with its fastest member, so that
no goal is met by leaving the better variant out. Other eager variants were tried and were no faster: a joint
by ``segment_reduce`` over sorted labels, by ``index_reduce``, by ``index_add`` out of place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ldmi_fast

PUBLISHED_EPS = 0.001
"""The constant that the published code adds to ``|det U|``."""

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One method to compute a loss.

    ``family`` names the idea whose fastest member is the bar; ``dmi`` tells whether the value is L_DMI's, so that it
    can be checked against the others; ``compiled`` asks for ``torch.compile``; ``overwrites`` says that it destroys its
    logits, so that it needs its own.
    """

    name: str
    family: str
    loss: Loss
    description: str
    dmi: bool = True
    compiled: bool = False
    overwrites: bool = False

    def build(self) -> Loss:
        """The function to call; for a compiled peer a fresh ``torch.compile``, specialised to its first shape."""
        if not self.compiled:
            return self.loss
        return torch.compile(self.loss, fullgraph=True, dynamic=False)


def published(logits: Tensor, target: Tensor, *, normalize: bool = True) -> Tensor:
    """The loss as published with the paper (arXiv 1909.03388): ``-log(|det U| + 0.001)`` in float32.

    ``normalize=True`` is the form of its Fashion-MNIST script, ``U = onehot^T P / N``; ``normalize=False`` that of its
    CIFAR-10 and Clothing1M scripts, which take the determinant of the raw counts. The one-hot matrix is built on the
    CPU, as there.
    """
    num_rows, num_classes = logits.shape
    probs = _softmax(logits)
    onehot = torch.zeros(num_rows, num_classes).scatter_(1, target.cpu().unsqueeze(1), 1.0)
    joint = onehot.T.to(logits.device) @ probs
    if normalize:
        joint = joint / num_rows
    return -torch.log(torch.det(joint.float()).abs() + PUBLISHED_EPS)


def onehot_slogdet(logits: Tensor, target: Tensor) -> Tensor:
    """One-hot product on the logits' device, then ``slogdet``."""
    num_rows, num_classes = logits.shape
    probs = _softmax(logits)
    onehot = torch.zeros_like(probs).scatter_(1, target.unsqueeze(1), 1.0)
    return _minus_log_abs_det(onehot.T @ probs, num_rows, num_classes)


def index_add_slogdet(logits: Tensor, target: Tensor) -> Tensor:
    """Softmax, ``index_add_`` by label, ``slogdet``, all in float32."""
    num_rows, num_classes = logits.shape
    probs = _softmax(logits)
    joint = probs.new_zeros(num_classes, num_classes).index_add_(0, target, probs)
    return _minus_log_abs_det(joint, num_rows, num_classes)


def scatter_add_slogdet(logits: Tensor, target: Tensor) -> Tensor:
    """As ``index_add_slogdet`` with ``scatter_add_``, whose CPU kernel is the faster one at some class counts."""
    num_rows, num_classes = logits.shape
    index = target.unsqueeze(1).expand(-1, num_classes)
    probs = _softmax(logits)
    joint = probs.new_zeros(num_classes, num_classes).scatter_add_(0, index, probs)
    return _minus_log_abs_det(joint, num_rows, num_classes)


def index_add_slogdet_fp64(logits: Tensor, target: Tensor) -> Tensor:
    """As ``index_add_slogdet`` with the joint accumulated and factored in float64, as ldmi_fast does."""
    num_rows, num_classes = logits.shape
    probs = _softmax(logits).double()
    joint = probs.new_zeros(num_classes, num_classes).index_add_(0, target, probs)
    return _minus_log_abs_det(joint, num_rows, num_classes)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """``F.cross_entropy`` with its default options."""
    return F.cross_entropy(logits, target)


def ours(logits: Tensor, target: Tensor) -> Tensor:
    """``ldmi_fast.dmi_loss`` with its default options."""
    return ldmi_fast.dmi_loss(logits, target)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax in float32 at least, which the factorisation needs; half precision is converted in the same pass, as good code does."""
    return F.softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _minus_log_abs_det(joint: Tensor, num_rows: int, num_classes: int) -> Tensor:
    # log|det(S / N)| = log|det S| - C log N: one kernel less than dividing the matrix.
    return num_classes * math.log(num_rows) - torch.linalg.slogdet(joint).logabsdet


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("ours", "ours", ours, "ldmi_fast.dmi_loss"),
        Peer("published", "published", published, "published formula", dmi=False),
        Peer("onehot_slogdet", "onehot_slogdet", onehot_slogdet, "one-hot product + slogdet"),
        Peer("index_add", "index_add", index_add_slogdet, "softmax + index_add_ + slogdet, fp32"),
        Peer("index_add_scatter", "index_add", scatter_add_slogdet, "softmax + scatter_add_ + slogdet, fp32"),
        Peer("index_add_fp64", "index_add", index_add_slogdet_fp64, "softmax + index_add_ + slogdet, joint in fp64"),
        Peer("index_add_compiled", "index_add_compiled", index_add_slogdet, "index_add under torch.compile", compiled=True),
        Peer("cross_entropy", "cross_entropy", cross_entropy, "F.cross_entropy, eager", dmi=False),
        Peer(
            "cross_entropy_compiled", "cross_entropy", cross_entropy, "F.cross_entropy under torch.compile", dmi=False, compiled=True
        ),
    )
}
