"""Why is my loss inf, flat or noisy: the joint matrix of a batch, in numbers and words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import stages
from .average import MovingAverage
from .checks import NEGATIVE_SHARE, SUM_ROUNDING, TWO_CLASSES, check_place, check_tensors, probability_rows
from .engines.choose import choose, choose_name
from .engines.contract import Engine
from .evaluate import evaluate, prepare
from .options import OptionKeywords, Options, make_options, shows_options
from .precision import EPSILON, compute_dtype
from .presence import present_classes
from .rows import used_rows


@dataclass(frozen=True)
class AverageReport:
    """How a batch compares with the moving average of a :class:`ldmi_fast.DMILoss`. The batch does not enter it.

    Attributes:
        log_abs_det: log|det B|, over the classes that B has.
        sign: of that determinant.
        kept: how many classes these are.
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
        absent_classes: the classes that the determinant leaves out: those without weight (a share below 1e-12), and those of which
            soft targets say nothing: their column is the same in every row, as label smoothing makes it for a class without samples.
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
        average: how this batch compares with a moving average, from :meth:`ldmi_fast.DMILoss.diagnose`; else None.
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
        """How many classes the determinant leaves out."""
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


@shows_options()
def diagnose(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[OptionKeywords],
) -> JointReport:
    """Look into the joint matrix of a batch. Reads device data (it synchronises), so it is not for every step.

    Args:
        logits: as for :func:`ldmi_fast.dmi_loss`.
        target: as for :func:`ldmi_fast.dmi_loss`.
        sample_weight: as for :func:`ldmi_fast.dmi_loss`.
        options: those of :func:`ldmi_fast.dmi_loss`. With ``group`` every rank has to call, and has the report of the whole batch.

    Returns:
        A :class:`JointReport`; print it.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`ldmi_fast.dmi_loss`.
    """
    checked = make_options("diagnose", options)
    check_tensors(logits, target, sample_weight, checked)
    return report_on(logits, target, sample_weight, checked)


def report_on(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: Options, average: MovingAverage | None = None
) -> JointReport:
    """The report for checked options; ``average``: to compare the batch with."""
    if average is not None:
        check_place(average.joint.device, logits)
    with torch.no_grad():
        logits, target = logits.detach(), target.detach()
        sample_weight = None if sample_weight is None else sample_weight.detach()
        loss = evaluate(logits, target, sample_weight, options).item()
        x, y, w = prepare(logits, target, sample_weight, options)
        engine = choose(x, options)
        sums = stages.joint_sums(x, y, w, options, engine)
        used, label, weight, _ = used_rows(y, w, x.shape[1], options.ignore_index, sums.n.dtype)
        rows = _Rows(x, label, used, weight, options, sums.n)
        if options.group is not None:
            from .distributed import all_reduce

            sums = all_reduce(sums, options)
        S, n, total, _ = sums
        log_abs_det, sign, kept, V = engine.logdet_inverse(S, n, options.absent)
        W = torch.where(total == 0, 1, total)
        if options.normalize:
            log_abs_det = log_abs_det - kept * W.log()
        seen = rows.look(V, kept / W)
        present = present_classes(n)
        R = (S / seen.counts.unsqueeze(-1))[present][:, present]
        finite = bool(torch.isfinite(S).all())
        singular = finite and math.isinf(log_abs_det.item())
        # a nearly singular matrix still has a number, which says how far gone it is
        condition = math.nan if not finite else torch.linalg.cond(R).item() if len(R) else 1.0
        if singular and not condition > 2.0**52:
            condition = math.inf
        spread = math.sqrt(seen.leverage) if finite and not singular else math.nan
        compared = None
        if average is not None and finite:
            compared = _compare(S / W, average, spread, seen.heights / W.item() ** 2, seen.weights / W.item() ** 2, engine)
        without = present_classes(seen.counts) & ~present if finite else torch.zeros_like(present)
        target_rank = rows.target_rank(present | without) if singular or (finite and bool(without.any())) else len(R)
    report = JointReport(
        loss=loss,
        log_abs_det=log_abs_det.item(),
        sign=int(sign.item()) if finite else 0,
        condition_number=condition,
        counts=seen.counts.cpu(),
        absent_classes=_listed(~present) if finite else [],
        kept=int(kept.item()),
        num_samples=seen.used,
        singular=singular,
        engine=choose_name(logits.device, options),
        rank=int(torch.linalg.matrix_rank(R)) if finite and len(R) else 0,
        spread=spread,
        permutation=_permutation(R, present) if finite else None,
        average=compared,
    )
    report.advice.extend(_advice(report, options, finite, R, seen, _Targets(target_rank, _listed(without), _listed(present))))
    return report


@dataclass(frozen=True)
class _Seen:
    """What was seen in the rows that count, of all ranks.

    Attributes:
        leverage: sum over the rows of the squares of which the spread is made.
        heights: sum over the rows of the squares of which the drift is made.
        weights: sum of the squares of the weights.
        used: how many rows count.
        counts: [C], the weight of each class.
        tops: [C], in how many rows the class has the largest target.
        probable: how many rows of the first argument are probabilities.
        improper: how many rows of soft targets do not sum to 1.
    """

    leverage: float
    heights: float
    weights: float
    used: int
    probable: int
    improper: int
    counts: Tensor
    tops: Tensor


@dataclass(frozen=True)
class _Targets:
    """``rank``: of the targets of the classes that have weight. ``without``: those of them that the determinant leaves out because
    the targets say nothing about them. ``kept``: those that it is of."""

    rank: int
    without: list[int]
    kept: list[int]


class _Rows:
    """The rows of one rank, flattened, and sums over them, which are added up over the ranks. The methods communicate: every rank has
    to call them equal."""

    def __init__(self, x: Tensor, label: Tensor, used: Tensor | None, weight: Tensor | None, options: Options, like: Tensor) -> None:
        self.x, self.label, self.options = x, label, options
        self.used = torch.ones(len(x), dtype=torch.bool, device=x.device) if used is None else used
        self.weight = like.new_ones(len(x)) if weight is None else weight
        self.acc = like.dtype

    def _soft(self) -> Tensor:
        """T [N, C], zero in rows that do not count."""
        return torch.where(self.used.unsqueeze(-1), self.label.to(self.acc), 0)

    def _hard(self) -> Tensor:
        """The weight of each class [C] of labels that are indices."""
        return self.weight.new_zeros(self.x.shape[1]).index_add(0, self.label, self.weight)

    def _summed(self, values: Tensor) -> Tensor:
        return values if self.options.group is None else _summed(values, self.options.group)

    def look(self, V: Tensor, share: Tensor) -> _Seen:
        """``share``: what each unit of weight has of the sum of <p, V[y]> over all rows, which is the number of classes kept."""
        classes = self.x.shape[1]
        soft = self.label.is_floating_point()
        p = _probabilities(self.x, self.used, self.options).to(self.acc)
        leverage = self.weight * (p * (self.label.to(V.dtype) @ V if soft else V[self.label])).sum(-1)
        if soft:
            T = self._soft()
            counts = (T * self.weight.unsqueeze(-1)).sum(0)
            tops = torch.where(self.used, T.argmax(-1), classes)
            improper = self.used & ~((T.sum(-1) - 1).abs() <= SUM_ROUNDING)
        else:
            counts = self._hard()
            tops = torch.where(self.used, self.label, classes)
            improper = torch.zeros_like(self.used)
        slack = SUM_ROUNDING if self.options.input == "probs" else None
        parts = (
            (leverage - share * self.weight).square().sum(),
            (self.weight.square() * p.square().sum(-1)).sum(),
            self.weight.square().sum(),
            self.used.sum(),
            (self.used & probability_rows(self.x, slack)).sum(),
            improper.sum(),
        )
        numbers = torch.stack([part.to(self.acc) for part in parts])
        found = self._summed(torch.cat((numbers, counts, torch.bincount(tops, minlength=classes + 1)[:classes].to(self.acc))))
        squares, heights, weights, used, probable, improper_rows = found[: len(parts)].tolist()
        counts, tops = found[len(parts) :].split(classes)
        return _Seen(squares, heights, weights, int(used), int(probable), int(improper_rows), counts, tops)

    def target_rank(self, which: Tensor) -> int:
        """The numerical rank of the targets of some classes [C] bool, seen in their products: T^T diag(w) T."""
        rounding = 0.0
        if self.label.is_floating_point():
            T = self._soft()
            products = T.mT @ (T * self.weight.unsqueeze(-1))
            # entries of T are exact up to the rounding of their dtype, which is squared in the products
            rounding = torch.finfo(self.label.dtype).eps
        else:
            products = torch.diag(self._hard())
        products = self._summed(products)[which][:, which]
        scale = products.diagonal().clamp(min=0).sqrt()
        scale = torch.where(scale > 0, scale, 1)
        products = products / scale / scale.unsqueeze(-1)
        # the products are sums over all rows, in an order that the BLAS library chooses: more roundings than one for each class
        tolerance = max(64 * len(products) * EPSILON[self.acc], (4 * rounding) ** 2)
        return int(torch.linalg.matrix_rank(products, rtol=tolerance, hermitian=True)) if len(products) else 0


def _listed(which: Tensor) -> list[int]:
    return which.nonzero().squeeze(-1).tolist()


def _summed(values: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    from .process_groups import resolve

    values = values.clone()
    dist.all_reduce(values, group=resolve(group))
    return values


def _probabilities(logits: Tensor, used: Tensor, options: Options) -> Tensor:
    """p [N, C], zero in rows that do not count."""
    x = logits.to(compute_dtype(logits.dtype))
    p = torch.softmax(x, -1) if options.input == "logits" else x
    return torch.where(used.unsqueeze(-1), p, 0)


def _permutation(R: Tensor, present: Tensor) -> list[int] | None:
    """Where each class is mostly predicted, if all go to different places and not all to their own."""
    kept = present.nonzero().squeeze(-1)
    best = R.argmax(-1) if len(R) else kept
    if len(best.unique()) < len(best) or bool((best == torch.arange(len(best), device=best.device)).all()):
        return None
    found = torch.full((len(present),), -1, device=R.device)
    found[kept] = kept[best]
    return found.tolist()


def _compare(U: Tensor, average: MovingAverage, spread: float, heights: float, weights: float, engine: Engine) -> AverageReport:
    """``heights``: sum (w_i |p_i| / W)^2; ``weights``: sum (w_i / W)^2. So E|U - E U|^2 is about heights - weights |E U|^2."""
    B, counts = average.mean()
    log_abs_det, sign, kept, _ = engine.logdet_inverse(B, counts, "present")  # as the loss
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


def _advice(report: JointReport, options: Options, finite: bool, R: Tensor, seen: _Seen, targets: _Targets) -> list[str]:
    advice = []
    classes = len(report.counts)
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
    if classes == 1:
        advice.append(f"with one class the loss is constant and its gradient 0: {TWO_CLASSES[options.input]}, and labels 0 and 1")
        return advice
    advice.extend(_advice_on_input(report, options, seen))
    what = (
        "the determinant is of the other classes only"
        if options.absent == "present"
        else "with absent='strict' that makes the batch singular and its gradient zero; use absent='present'"
    )
    missing = report.num_absent - len(targets.without)
    if missing:
        advice.append(f"{missing} of {classes} classes have no sample in this batch: {what}. Larger or class-balanced batches help")
    if targets.without:
        column = "its column is" if len(targets.without) == 1 else "each of their columns is"
        advice.append(
            f"{_own(targets.without)}: the targets have rank {targets.rank} of {len(targets.kept) + len(targets.without)}, because "
            f"{column} the same in every row, as smoothing makes it for a class that is not in the batch; {what}"
        )
    if report.num_samples < report.kept:
        advice.append(
            f"{report.num_samples} samples cannot give a joint matrix of rank {report.kept}: the batch must have at least as "
            "many samples as classes, better several times as many"
        )
    strict = options.absent == "strict" and report.num_absent > 0
    if report.singular:
        advice.extend(_advice_on_singular(report, R, seen, targets, strict))
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


def _advice_on_singular(report: JointReport, R: Tensor, seen: _Seen, targets: _Targets, strict: bool) -> list[str]:
    """``strict``: absent classes make it singular, and that has been said."""
    singular = f"the joint matrix is singular (rank {report.rank} of {report.kept})"
    if targets.rank < len(targets.kept):
        without = [y for y in targets.kept if seen.tops[y] == 0]
        own = f" ({_own(without)}: no row has its largest target there)" if without else ""
        return [
            f"{singular}, whatever the model predicts: the targets have rank {targets.rank} of {len(targets.kept)}{own}. Pass hard "
            "labels, or targets that are 0 for a class without samples, or larger batches"
        ]
    if strict and report.rank == len(R):
        return []
    return [
        f"{singular}: {_alike(R, report)} (an untrained or collapsed model); warm up with cross entropy, or add "
        "cross_entropy_weight so that the step is not wasted"
    ]


def _own(classes: list[int]) -> str:
    shown = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
    return f"class {shown} has no sample of its own" if len(classes) == 1 else f"classes {shown} have no samples of their own"


def _advice_on_input(report: JointReport, options: Options, seen: _Seen) -> list[str]:
    """On arguments that can be computed with and are hardly what was meant."""
    advice = []
    if options.input == "logits" and seen.probable == seen.used:
        advice.append(
            "every row of the logits is >= 0 and sums to 1, as probabilities do: if they are, pass input='probs', or the model's "
            "output before its softmax; the softmax of probabilities is nearly uniform"
        )
    if options.input == "probs" and seen.probable < seen.used:
        advice.append(
            f"input='probs', and {seen.used - seen.probable} of {seen.used} rows are no probabilities (>= 0 with the sum 1): for "
            "logits leave out input"
        )
    negative = _listed(seen.counts < -NEGATIVE_SHARE * seen.counts.abs().sum())
    if negative:
        advice.append(
            f"soft targets below 0: those of class {negative[0]} sum to {seen.counts[negative[0]].item():.3g} ({len(negative)} such "
            f"of {len(seen.counts)} classes), and the determinant leaves such a class out; targets are probabilities"
        )
    elif seen.improper:
        advice.append(
            f"{seen.improper} of {seen.used} rows of the soft targets do not sum to 1: the loss is for one label per sample, with "
            "soft targets as its distribution over the classes. Divide target by target.sum(1, keepdim=True); where a sample may have "
            "several labels at once, give each label a loss of two classes"
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
    return f"classes {kept[first]} and {kept[second]} have the most similar predictions: their means differ by {gap:.1g}"
