"""L_DMI as a torchmetrics Metric. Needs torchmetrics, which the package itself does not: ``pip install torchmetrics``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import stages
from .checks import raise_for_values
from .engines import composite
from .engines.choose import choose
from .functional import prepare
from .joint_state import check_num_classes
from .options import make_options
from .stages import Sums

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("ldmi_fast.metrics needs torchmetrics: pip install torchmetrics") from error


class DMI(Metric):
    r"""log\|det U\| of all samples seen: a score for choosing a model on validation data with noisy labels. The larger, the better.

    U is the joint of labels and predictions over the whole data set, summed over batches and processes before the determinant. For
    noise that depends on the class alone the score is that of the clean labels plus a constant, the same for every model, so it
    chooses the model that clean labels would choose by this score; accuracy on noisy labels does not.

    Like the loss it cannot tell a labelling from a permuted one: a model whose classes are permuted scores as well as the right one.
    Compare models that cross entropy has warmed up, or look at the sign (``sign``) and at :func:`ldmi_fast.diagnose`.

    Args:
        num_classes: C.
        ignore_index, absent, input: as for :func:`ldmi_fast.dmi_loss`. With the default ``absent="present"`` the score is over the
            classes that occur, so compare scores only where the same classes do.
        kwargs: as for every ``torchmetrics.Metric``.

    The state is fp64 and stays so in ``.half()``.

    Raises:
        TypeError, ValueError: an argument that cannot work.

    Example:
        >>> score = DMI(14)
        >>> for images, noisy_labels in validation:
        ...     score.update(model(images), noisy_labels)
        >>> score.compute()
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    joint: Tensor
    counts: Tensor
    total: Tensor

    def __init__(
        self, num_classes: int, *, ignore_index: int = -100, absent: str = "present", input: str = "logits", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = check_num_classes(num_classes)
        self.options = make_options(ignore_index, absent, 0.0, True, 0.0, input, None)
        acc = torch.float64
        self.add_state("joint", torch.zeros(num_classes, num_classes, dtype=acc), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_classes, dtype=acc), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=acc), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits, target, sample_weight: as for :func:`ldmi_fast.dmi_loss`.

        Raises:
            TypeError, ValueError, IndexError: as :func:`ldmi_fast.dmi_loss`; nothing is added then.
        """
        logits, target, sample_weight = prepare(logits.detach(), target.detach(), sample_weight, self.options)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"this DMI is for {self.num_classes} classes, got logits with {logits.shape[1]} in dimension 1")
        with torch.no_grad():
            sums = stages.joint_sums(logits, target, sample_weight, self.options, choose(logits, self.options))
        if sums.S.is_cpu and sums.S.sum().isnan():
            raise_for_values(target, sample_weight, self.num_classes, self.options.ignore_index)
        self.joint += sums.S.to(self.joint.device)
        self.counts += sums.n.to(self.joint.device)
        self.total += sums.total.to(self.joint.device)

    def _solve(self) -> tuple[Tensor, Tensor]:
        sums = Sums(self.joint, self.counts, self.total, self.total)
        log_abs_det, sign, kept, _ = composite.logdet_inverse(sums.S, sums.n, self.options.absent)
        return log_abs_det - kept * torch.where(sums.total == 0, 1, sums.total).log(), sign

    def compute(self) -> Tensor:
        """The score [], fp64. 0 before any sample counts, -inf for a singular joint."""
        return self._solve()[0]

    @property
    def sign(self) -> Tensor:
        """The sign [] of the determinant of what this process has seen; -1 tells of an odd permutation of the classes."""
        return self._solve()[1]

    def set_dtype(self, dst_type: Any) -> DMI:
        """The state keeps its precision, whatever is asked for."""
        return self
