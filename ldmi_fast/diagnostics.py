"""Why is my loss inf, flat or noisy: the joint matrix of a batch, in numbers and words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .average import MovingAverage
from .checks import check_tensors
from .engines import composite
from .engines.choose import choose_name
from .functional import evaluate, prepare
from .options import OPTION_NAMES, Options, explain_keywords, make_options
from .stages import Sums


@dataclass(frozen=True)
class AverageReport:
    """How a batch stands to the moving average of a :class:`ldmi_fast.DMILoss`. The batch does not enter it.

    Attributes:
        log_abs_det, sign: of B, over the classes that it has.
        kept: how many these are.
        steps: how many batches have entered since the start or the last calibration.
        spread: the standard error of log|det B|: that of a batch times sqrt((1 - m) / (1 + m)).
        drift: the distance of U from B in the Frobenius norm over what sampling alone makes it. About 1: the batch is one of
            those averaged; much larger: the model or the data have moved on and B lags behind.
    """

    log_abs_det: float
    sign: int
    kept: int
    steps: int
    spread: float
    drift: float

    def __str__(self) -> str:
        return (
            f"average           log|det| {self.log_abs_det:.6g} +- {self.spread:.2g}   (sign {self.sign:+d}, {self.kept} classes, "
            f"{self.steps} batches, drift {self.drift:.2g})"
        )


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
        rank: numerical rank of R: how many classes the predictions tell apart.
        spread: how much log|det| scatters from batch to batch of this kind, one standard error, estimated from this one (see
            docs/math.md); NaN if singular.
        permutation: the column that each class is mostly predicted as, where that is a permutation other than the identity (-1 for
            absent classes), else None.
        average: how this batch stands to a moving average, from :meth:`ldmi_fast.DMILoss.diagnose`; else None.
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
    rank: int = 0
    spread: float = math.nan
    permutation: list[int] | None = None
    average: AverageReport | None = None

    @property
    def num_absent(self) -> int:
        """How many classes have no weight."""
        return len(self.absent_classes)

    def __str__(self) -> str:
        classes = len(self.counts)
        shown = ", ".join(map(str, self.absent_classes[:10])) + (", ..." if self.num_absent > 10 else "")
        lines = [
            f"loss              {self.loss:.6g}",
            f"log|det|          {self.log_abs_det:.6g} +- {self.spread:.2g}   (sign {self.sign:+d}, {self.kept} of {classes} classes)",
            f"condition number  {self.condition_number:.3g}   (rank {self.rank})",
            f"samples that count {self.num_samples}, per class {self.counts.min().item():.6g} to {self.counts.max().item():.6g}",
            f"absent classes    {self.num_absent}" + (f": {shown}" if shown else ""),
            f"engine            {self.engine}",
        ]
        if self.average is not None:
            lines.append(str(self.average))
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
    group: Any = None,
    engine: str | None = None,
    **unknown: Any,
) -> JointReport:
    """Look into the joint matrix of a batch. Reads device data (it synchronises), so it is not for every step.

    Args:
        logits, target and the options: as for :func:`ldmi_fast.dmi_loss`. With ``group`` every rank has to call, and has the report of
            the whole batch.

    Returns:
        A :class:`JointReport`; print it.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`ldmi_fast.dmi_loss`.
    """
    if unknown:
        explain_keywords("diagnose", unknown, ("sample_weight", *OPTION_NAMES))
    options = make_options(ignore_index, absent, eps, normalize, cross_entropy_weight, input, engine, group)
    check_tensors(logits, target, sample_weight, options)
    return report_on(logits, target, sample_weight, options)


def report_on(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options, average: MovingAverage | None = None
) -> JointReport:
    """The report for checked options; ``average``: to compare the batch with."""
    with torch.no_grad():
        logits, target = logits.detach(), target.detach()
        loss = evaluate(logits, target, sample_weight, options).item()
        flat = prepare(logits, target, sample_weight, options)
        classes = flat[0].shape[1]
        ignore_index, input = options.ignore_index, options.input
        S, n, _, ce = composite.joint(*flat, classes, ignore_index, input, need_ce=False)
        sums = Sums(S, n, composite.total_weight(flat[1], flat[2], n), ce)
        used, label, weight, _ = composite.used_rows(flat[1], flat[2], classes, ignore_index, n.dtype)
        rows = torch.tensor(flat[0].shape[0]) if used is None else used.sum()
        if options.group is not None:
            from .distributed import all_reduce

            sums = all_reduce(sums, options)
        S, n, total, _ = sums
        log_abs_det, sign, kept, V = composite.logdet_inverse(S, n, options.absent)
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
        weight = n.new_ones(len(flat[0])) if weight is None else weight
        p = _probabilities(flat[0], used, options).to(n.dtype)
        # sums over rows, and so over ranks: of the squares that the spread and the drift are made of, and of rows
        W = torch.where(total == 0, 1, total)
        leverage = weight * (p * (label.to(V.dtype) @ V if label.is_floating_point() else V[label])).sum(-1)
        moments = torch.stack(
            (
                (leverage - kept * weight / W).square().sum(),
                (weight.square() * p.square().sum(-1)).sum(),
                weight.square().sum(),
                rows.to(n),
            )
        )
        if options.group is not None:
            moments = _summed(moments, options.group)
        squares, heights, weights, count = moments.tolist()
        spread = math.sqrt(squares) if finite and not singular else math.nan
        compared = None
        if average is not None and finite:
            compared = _compare(S / W, average, spread, heights / W.item() ** 2, weights / W.item() ** 2)
    absent_classes = (~present).nonzero().squeeze(-1).tolist() if finite else []
    report = JointReport(
        loss=loss,
        log_abs_det=log_abs_det.item(),
        sign=int(sign.item()) if finite else 0,
        condition_number=condition,
        counts=n.cpu(),
        absent_classes=absent_classes,
        kept=int(kept.item()),
        num_samples=int(count),
        singular=singular,
        engine=choose_name(logits.device, options),
        rank=int(torch.linalg.matrix_rank(R)) if finite and len(R) else 0,
        spread=spread,
        permutation=_permutation(R, present) if finite else None,
        average=compared,
    )
    report.advice.extend(_advice(report, options, finite, classes, R))
    return report


def _summed(values: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    from .distributed import resolve

    values = values.clone()
    dist.all_reduce(values, group=resolve(group))
    return values


def _probabilities(logits: Tensor, used: Tensor | None, options: Options) -> Tensor:
    """p [N, C], zero in rows that do not count."""
    x = logits.to(composite.compute_dtype(logits.dtype))
    p = torch.softmax(x, -1) if options.input == "logits" else x
    return p if used is None else torch.where(used.unsqueeze(-1), p, 0)


def _permutation(R: Tensor, present: Tensor) -> list[int] | None:
    """Where each class is mostly predicted, if all go to different places and not all to their own."""
    kept = present.nonzero().squeeze(-1)
    best = R.argmax(-1) if len(R) else kept
    if len(best.unique()) < len(best) or bool((best == torch.arange(len(best), device=best.device)).all()):
        return None
    found = torch.full((len(present),), -1, device=R.device)
    found[kept] = kept[best]
    return found.tolist()


def _compare(U: Tensor, average: MovingAverage, spread: float, heights: float, weights: float) -> AverageReport:
    """``heights``: sum (w_i |p_i| / W)^2; ``weights``: sum (w_i / W)^2. So E|U - E U|^2 is about heights - weights |E U|^2."""
    B, counts = average.mean()
    log_abs_det, sign, kept, _ = composite.logdet_inverse(B, counts, "present")
    m = average.momentum
    expected = math.sqrt(max(heights - weights * U.square().sum().item(), 0.0))
    distance = (U - B).norm().item()
    return AverageReport(
        log_abs_det=log_abs_det.item(),
        sign=int(sign.item()),
        kept=int(kept.item()),
        steps=int(average.steps.item()),
        spread=spread * math.sqrt((1 - m) / (1 + m)),
        drift=distance / expected if expected > 0 else math.inf if distance > 0 else 0.0,
    )


def _advice(report: JointReport, options: Options, finite: bool, classes: int, R: Tensor) -> list[str]:
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
            f"the joint matrix is singular (rank {report.rank} of {report.kept}): {_alike(R, report)} (an untrained or collapsed "
            "model); warm up with cross entropy, or add cross_entropy_weight so that the step is not wasted"
        )
    elif report.condition_number > 1e4:
        advice.append(
            f"condition number {report.condition_number:.1e}: some class is nearly a mixture of others ({_alike(R, report)}), and the "
            "gradient is large and noisy along it; use larger batches, momentum, or a longer cross entropy stage"
        )
    if report.sign < 0:
        advice.append(
            "the determinant is negative: the predictions are an odd permutation of the labels, or the batch is too small to "
            "tell; gradients then point the wrong way. Warm up with cross entropy, or use larger batches or DMILoss(momentum=...)"
        )
    if report.spread > _NOISY:
        advice.append(
            f"log|det| scatters by about +-{report.spread:.2g} from batch to batch, so single gradients are noisy, some of them huge: "
            f"DMILoss(momentum=0.9) would bring that to about +-{report.spread * math.sqrt(0.1 / 1.9):.2g}, momentum=0.99 to "
            f"+-{report.spread * math.sqrt(0.01 / 1.99):.2g}; larger batches (JointState) by the root of their size"
        )
    if report.permutation is not None:
        moved = [(y, c) for y, c in enumerate(report.permutation) if c not in (-1, y)]
        shown = ", ".join(f"{y} as {c}" for y, c in moved[:5]) + (", ..." if len(moved) > 5 else "")
        advice.append(
            f"the predictions look like a permutation of the labels (label {shown}), which this loss cannot tell from the right "
            "order: it had no cross entropy stage, or one that ended too early; unless the noise moves most samples of those classes. "
            "A "
            "few clean labels show the order; cross_entropy_weight holds it"
        )
    if report.average is not None:
        advice.extend(_advice_on_average(report, report.average))
    if not report.singular and options.eps > 0 and report.log_abs_det < math.log(options.eps) - 2.3:
        advice.append(
            f"|det| is far below eps = {options.eps:g}: the loss sits near {-math.log(options.eps):.4g} and the gradient is scaled by "
            f"{math.exp(report.log_abs_det - math.log(options.eps)):.1e}; use eps=0"
        )
    return advice


def _advice_on_average(report: JointReport, average: AverageReport) -> list[str]:
    advice = []
    if average.kept == 0:
        advice.append("the average is empty: it has seen no batch since it was made or reset; calibrate() fills it")
        return advice
    if average.sign < 0:
        advice.append(
            "the determinant of the average is negative, which noise hardly explains: the predictions are an odd permutation of the "
            "labels. Go back to cross entropy, then calibrate() or reset()"
        )
    elif report.sign < 0:
        advice.append("the average's determinant is positive: it keeps this batch from pulling the wrong way, which is what it is for")
    if average.drift > 3:
        advice.append(
            f"the batch is {average.drift:.2g} times as far from the average as sampling explains: the average lags behind (a lower "
            "momentum, a lower learning rate, or calibrate() after a change), or this is other data"
        )
    return advice


# Above it, one batch in fifty or so has less than a third of the determinant that it should have, and a gradient as much larger.
_NOISY = 0.5


def _alike(R: Tensor, report: JointReport) -> str:
    """The two classes whose mean predictions differ least, in words."""
    if len(R) < 2:
        return "no class is predicted"
    kept = [y for y in range(len(report.counts)) if y not in set(report.absent_classes)]
    distance = torch.cdist(R, R, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    first, second = divmod(int(distance.argmin()), len(R))
    gap = distance.min().item()
    return f"classes {kept[first]} and {kept[second]} are predicted most alike, their mean predictions differ by {gap:.1g}"
