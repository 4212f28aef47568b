"""Plots as SVG inside the page. Text stays text, and colours are the page's own, so that dark mode and print work.

matplotlib draws them with placeholder colours, which are then replaced. A plot holds no name that comes from a run: the
legend stands in the page, where it is escaped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = 8
"""Colours before they repeat; markers differ too."""
TIMES = "\u00d7"
_INK, _RULE = "#010203", "#040506"
_MARKERS = "os^Dv<>P"


@dataclass(frozen=True, slots=True)
class Scale:
    """What the height of a plot is."""

    top: float
    """The value at its upper end; 0 is at the lower."""
    ticks: tuple[str, ...]
    """What stands at 0, 25, 50, 75 and 100 % of it."""

    def share(self, value: float | None) -> float | None:
        """A value as a share of the height."""
        return None if value is None else value / self.top


PERCENT = Scale(1.0, ("0", "25", "50", "75", "100 %"))
TO_TEN = Scale(10.0, ("0", "2.5", "5", "7.5", "10"))


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one model."""

    place: int
    """Of the model; gives colour and marker."""
    values: list[float | None]
    intervals: list[tuple[float, float] | None]


def profile(labels: Sequence[str], series: Sequence[Series], *, ident: str, title: str, scale: Scale = PERCENT) -> str:
    """Shares of the scale by category, a line for each model; a gap where there is no value."""

    def draw(axes: Axes) -> None:
        for at, one in enumerate(series):
            shift = (at - (len(series) - 1) / 2) * min(0.08, 0.4 / len(series))
            _points(axes, one, [x + shift for x in range(len(labels))])
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.5, len(labels) - 0.5)

    return _svg(draw, ident=ident, title=title, scale=scale)


def by_length(ratios: Sequence[float], series: Sequence[Series], *, ident: str, title: str) -> str:
    """The model's share of the verdicts against how much longer its answer is (ratio of characters, log scale)."""

    def draw(axes: Axes) -> None:
        axes.axhline(50, color=_RULE, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        for one in series:
            _points(axes, one, ratios)
        axes.set_xscale("log", base=2)
        low, high = min([*ratios, 0.5]) / 1.15, max([*ratios, 2.0]) * 1.15
        axes.set_xlim(low, high)
        ticks = [t for t in (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16, 64) if low <= t <= high]
        axes.set_xticks(ticks, [f"{t:g}{TIMES}" if t >= 1 else f"1/{1 / t:g}{TIMES}" for t in ticks])
        axes.set_xlabel("length of the model's answer over the other's")

    return _svg(draw, ident=ident, title=title)


def _points(axes: Axes, series: Series, xs: Sequence[float]) -> None:
    colour = f"#f0f0f{series.place % SERIES}"
    shown = [(x, v, i) for x, v, i in zip(xs, series.values, series.intervals, strict=True) if v is not None]
    for x, _, interval in shown:
        if interval is not None:
            axes.plot([x, x], [100 * interval[0], 100 * interval[1]], color=colour, linewidth=1.4, alpha=0.55)
    axes.plot(
        [x for x, _, _ in shown],
        [100 * v for _, v, _ in shown],
        color=colour,
        marker=_MARKERS[series.place % len(_MARKERS)],
        markersize=5.5,
        linewidth=1.2,
    )


def _svg(draw: Callable[[Axes], None], *, ident: str, title: str, scale: Scale = PERCENT) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": ident, "font.size": 9, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(5.0, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_ylim(-3, 103)
        axes.set_yticks([0, 25, 50, 75, 100], list(scale.ticks))
        axes.grid(axis="y", color=_RULE, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_RULE)
        axes.tick_params(colors=_INK, length=0)
        axes.xaxis.label.set_color(_INK)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), ident, title)


def _inline(svg: str, ident: str, title: str) -> str:
    """The `<svg>` element alone, in the page's colours and font, its ids unique in the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="[\d. ]+"', head)
    assert box is not None
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{ident}-", body.replace("xlink:href", "href"))
    body = re.sub(r"#f0f0f(\d)", r"var(--s\1)", body)
    body = body.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--sans)", body)
    label = f'role="img" aria-label="{title}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" {box[0]} {label}>{body}'
