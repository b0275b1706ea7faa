"""Why is my loss inf, flat or noisy: the joint matrix of a batch, in numbers and words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_tensors
from .engines import composite
from .engines.choose import choose_name
from .functional import evaluate, prepare
from .options import OPTION_NAMES, Options, explain_keywords, make_options


@dataclass(frozen=True)
class JointReport:
    """What :func:`diagnose` found.

    Attributes:
        loss: the loss that :func:`ldmi_fast.dmi_loss` gives for the same arguments.
        log_abs_det: log|det U| of the classes kept (of S with ``normalize=False``); -inf if singular.
        sign: the sign of that determinant; 0 if singular. A warmed-up model has +1.
        condition_number: of R = diag(1/n) S, rows scaled to mean predictions, in the 2-norm; inf if singular.
        counts: [C] fp64, the weight of each class in the batch.
        absent_classes: the classes without weight.
        kept: how many classes the determinant is of.
        num_samples: how many rows count.
        singular: whether the loss treats the matrix as singular.
        engine: which engine computes the loss.
        advice: what to do, in words; empty if nothing is wrong.
    """

    loss: float
    log_abs_det: float
    sign: int
    condition_number: float
    counts: Tensor
    absent_classes: list[int]
    kept: int
    num_samples: int
    singular: bool
    engine: str
    advice: list[str] = field(default_factory=list)

    @property
    def num_absent(self) -> int:
        """How many classes have no weight."""
        return len(self.absent_classes)

    def __str__(self) -> str:
        classes = len(self.counts)
        shown = ", ".join(map(str, self.absent_classes[:10])) + (", ..." if self.num_absent > 10 else "")
        lines = [
            f"loss              {self.loss:.6g}",
            f"log|det|          {self.log_abs_det:.6g}   (sign {self.sign:+d}, {self.kept} of {classes} classes)",
            f"condition number  {self.condition_number:.3g}",
            f"samples that count {self.num_samples}, per class {self.counts.min().item():.6g} to {self.counts.max().item():.6g}",
            f"absent classes    {self.num_absent}" + (f": {shown}" if shown else ""),
            f"engine            {self.engine}",
        ]
        return "\n".join(lines + [f"- {line}" for line in self.advice])


def diagnose(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    absent: str = "present",
    eps: float = 0.0,
    normalize: bool = True,
    cross_entropy_weight: float = 0.0,
    input: str = "logits",
    engine: str | None = None,
    **unknown: Any,
) -> JointReport:
    """Look into the joint matrix of a batch. Reads device data (it synchronises), so it is not for every step.

    Args:
        logits, target and the options: as for :func:`ldmi_fast.dmi_loss`.

    Returns:
        A :class:`JointReport`; print it.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`ldmi_fast.dmi_loss`.
    """
    if unknown:
        explain_keywords("diagnose", unknown, ("sample_weight", *OPTION_NAMES))
    options = make_options(ignore_index, absent, eps, normalize, cross_entropy_weight, input, engine)
    check_tensors(logits, target, sample_weight, options)
    with torch.no_grad():
        logits, target = logits.detach(), target.detach()
        loss = evaluate(logits, target, sample_weight, options).item()
        flat = prepare(logits, target, sample_weight, options)
        classes = flat[0].shape[1]
        S, n, _, _ = composite.joint(*flat, classes, ignore_index, input, need_ce=False)
        log_abs_det, sign, kept, _ = composite.logdet_inverse(S, n, absent)
        total = composite.total_weight(flat[1], flat[2], n)
        present = n > 0
        R = (S / n.unsqueeze(-1))[present][:, present]
        if options.normalize and kept > 0:
            log_abs_det = log_abs_det - kept * total.log()
        finite = bool(torch.isfinite(S).all())
        singular = finite and math.isinf(log_abs_det.item())
        # a nearly singular matrix still has a number, which says how far gone it is
        condition = math.nan if not finite else torch.linalg.cond(R).item() if len(R) else 1.0
        if singular and not condition > 2.0**52:
            condition = math.inf
        used = composite.used_rows(flat[1], flat[2], classes, ignore_index, n.dtype)[0]
        rows = flat[0].shape[0] if used is None else int(used.sum())
    absent_classes = (~present).nonzero().squeeze(-1).tolist() if finite else []
    report = JointReport(
        loss=loss,
        log_abs_det=log_abs_det.item(),
        sign=int(sign.item()) if finite else 0,
        condition_number=condition,
        counts=n.cpu(),
        absent_classes=absent_classes,
        kept=int(kept.item()),
        num_samples=rows,
        singular=singular,
        engine=choose_name(logits.device, options),
    )
    report.advice.extend(_advice(report, options, finite, classes))
    return report


def _advice(report: JointReport, options: Options, finite: bool, classes: int) -> list[str]:
    advice = []
    if not finite:
        advice.append(
            "a row that counts holds NaN or +inf, or has no finite logit: look at the model's outputs (learning rate, "
            "overflow in half precision); give such rows sample_weight 0 to leave them out. On a device where labels are not "
            "checked, a label out of range has the same effect"
        )
        return advice
    if report.num_samples == 0:
        advice.append("no row counts (empty batch, every label ignored, or every weight 0): the loss is 0 and so is the gradient")
        return advice
    if report.num_absent:
        what = (
            "the determinant is of the other classes only"
            if options.absent == "present"
            else "with absent='strict' that makes the batch singular and its gradient zero; use absent='present'"
        )
        advice.append(
            f"{report.num_absent} of {classes} classes have no sample in this batch: {what}. Larger or class-balanced batches help"
        )
    if report.num_samples < report.kept:
        advice.append(
            f"{report.num_samples} samples cannot give a joint matrix of rank {report.kept}: the batch must have at least as "
            "many samples as classes, better several times as many"
        )
    if report.singular:
        advice.append(
            "the joint matrix is singular: two classes are predicted alike (an untrained or collapsed model); warm up with cross "
            "entropy, or add cross_entropy_weight so that the step is not wasted"
        )
    elif report.condition_number > 1e4:
        advice.append(
            f"condition number {report.condition_number:.1e}: some class is nearly a mixture of others, and the gradient is "
            "large and noisy along it; use larger batches, or a longer cross entropy stage"
        )
    if report.sign < 0:
        advice.append(
            "the determinant is negative: the predictions are an odd permutation of the labels, or the batch is too small to "
            "tell; gradients then point the wrong way. Warm up with cross entropy, or use larger batches"
        )
    if not report.singular and options.eps > 0 and report.log_abs_det < math.log(options.eps) - 2.3:
        advice.append(
            f"|det| is far below eps = {options.eps:g}: the loss sits near {-math.log(options.eps):.4g} and the gradient is scaled by "
            f"{math.exp(report.log_abs_det - math.log(options.eps)):.1e}; use eps=0"
        )
    return advice
