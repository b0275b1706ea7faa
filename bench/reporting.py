"""What the reports share: tables in markdown, ratios as text, goals and their outcomes, the look of the plots.

It needs no matplotlib until a figure is drawn: the machine that wrote a result may lack it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bench.kernels.interleave import Quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {"forward": "fwd", "forward_backward": "fwd+bwd"}
"""The directions as tables name them."""


@dataclass(frozen=True)
class Style:
    """How a plot shows a family of peers."""

    label: str
    color: str
    marker: str


FAMILIES = {
    "published": Style("published formula", "tab:gray", "o"),
    "onehot_slogdet": Style("one-hot + slogdet", "tab:brown", "v"),
    "index_add": Style("best eager index_add / scatter_add", "tab:blue", "s"),
    "index_add_compiled": Style("index_add, compiled", "tab:cyan", "^"),
    "cross_entropy": Style("cross entropy, better of eager and compiled", "tab:orange", "D"),
}
"""The families of peers that the plots of speed-ups show."""


class Timed(Protocol):
    """A measurement of a peer next to ours."""

    @property
    def peer(self) -> str:
        """The name of the peer."""

    @property
    def ours_over_peer(self) -> Quantiles | None:
        """Our time over the peer's, or None where ours was not timed in the same run."""


@dataclass(frozen=True)
class Outcome:
    """One goal and what was measured. ``met`` is None where nothing was measured; ``clock`` is empty where there is only one."""

    where: str
    goal: str
    clock: str
    measured: str
    met: bool | None


def at_most(where: str, goal: str, timed: Timed | None, limit: float, *, clock: str = "") -> Outcome:
    """Judge the goal that ours takes at most ``limit`` times as long as a peer."""
    if timed is None or timed.ours_over_peer is None:
        return Outcome(where, goal, clock, "not measured", None)
    ratio = timed.ours_over_peer
    return Outcome(where, goal, clock, f"{ratio_text(ratio)} of {timed.peer}", ratio.p50 <= limit)


def times_faster(where: str, goal: str, timed: Timed | None, times: float, *, clock: str = "", digits: str = ".3g") -> Outcome:
    """Judge the goal that ours is at least ``times`` times as fast as a peer."""
    if timed is None or timed.ours_over_peer is None:
        return Outcome(where, goal, clock, "not measured", None)
    ratio = timed.ours_over_peer
    return Outcome(where, goal, clock, f"{speedup_text(ratio, digits)} of {timed.peer}", 1 / ratio.p50 >= times)


def ratio_text(ratio: Quantiles) -> str:
    """Median, p20 and p80 of our time over the peer's: ``0.45x (0.43-0.48)``."""
    return f"{ratio.p50:.2f}x ({ratio.p20:.2f}-{ratio.p80:.2f})"


def speedup_text(ratio: Quantiles, digits: str = ".3g") -> str:
    """The inverse of the same ratio: how many times faster ours is."""
    return f"{1 / ratio.p50:{digits}}x ({1 / ratio.p80:{digits}}-{1 / ratio.p20:{digits}})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table of cells that are text already; the first column is aligned left, the others right."""
    rule = (":--", *("--:" for _ in header[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def goals_markdown(found: Sequence[Outcome]) -> str:
    """The table of goals: goal, measured, met or not; with the clocks where there are several."""
    verdicts = {True: "yes", False: "**no**", None: "-"}
    if not any(outcome.clock for outcome in found):
        rows = [(o.where, o.goal, o.measured, verdicts[o.met]) for o in found]
        return markdown_table(("where", "goal", "measured (p20-p80)", "met"), rows)
    with_clock = [(o.where, o.goal, o.clock, o.measured, verdicts[o.met]) for o in found]
    return markdown_table(("where", "goal", "clock", "measured (p20-p80)", "met"), with_clock)


def plot_speedups(axis: Axes, family: str, points: Sequence[tuple[int, Quantiles]]) -> None:
    """Add a family's speed-ups by class count to a plot, with bars from p20 to p80."""
    if not points:
        return
    style = FAMILIES[family]
    ratios = [ratio for _, ratio in points]
    axis.errorbar(
        [classes for classes, _ in points],
        [1 / ratio.p50 for ratio in ratios],
        yerr=(
            [1 / ratio.p50 - 1 / ratio.p80 for ratio in ratios],
            [1 / ratio.p20 - 1 / ratio.p50 for ratio in ratios],
        ),
        color=style.color,
        marker=style.marker,
        markersize=5,
        capsize=3,
        label=style.label,
    )


def png(figure: Figure) -> bytes:
    """Render a figure as PNG and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
