"""The alignment tax as one plot (SVG and PNG) and as a page with the plot, the sentence and the table in it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.compare.tax.tax import LOG_IS, MeasuredPolicy, Tax, benchmarks, shown
from almost_eval.errors import RunError
from almost_eval.files import write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Axes], None]

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;"
    "background:#fff}table{border-collapse:collapse;font-size:.87rem}th,td{padding:.25rem .7rem;text-align:right;"
    "border-bottom:1px solid #d8dde3}th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto}"
    ".scroll{overflow-x:auto}.sentence{font-weight:600;font-size:1.1rem}"
)
_LOOKS = (("#0b62a4", "o"), ("#b5522b", "s"), ("#3b7d3a", "^"), ("#a3781f", "v"), ("#2a7f8e", "P"), ("#8a3b5c", "X"))
"""Colour and marker of the benchmarks, in their order; they repeat after the last."""
_ORACLE_LOOK = ("#7a4fa3", "D")
_LOGGED_APART = {"reward": "Reward in training, by its own model", "kl": "KL in training, to its own start"}
_POINT, _LOG = "#0b62a4", "#9aa4ae"


def write_page(tax: Tax, folder: Path) -> list[Path]:
    """Write `tax.svg`, `tax.png` and `tax.html` into a folder.

    Raises:
        RunError: it cannot be written.
    """
    svg, png = draw(tax)
    files = {"tax.svg": svg.encode(), "tax.png": png, "tax.html": html(tax, svg).encode()}
    try:
        for name, content in files.items():
            write_whole(folder / name, content)
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}); tax.json is kept") from None
    return [folder / name for name in files]


def html(tax: Tax, svg: str) -> str:
    """One page in one file; every text that comes from a run is escaped."""
    head = "".join(f"<th>{escape(text)}</th>" for text in ("checkpoint", "step", *tax.columns.values()))
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(text)}</td>"
            for text in (policy.label, f"{policy.step:g}", *(shown(policy, name) for name in tax.columns))
        )
        + "</tr>"
        for policy in tax.policies
    )
    grey = [f"Grey is {LOG_IS}."] if tax.log else []
    notes = "".join(f"<p>{escape(str(text))}</p>" for text in (*grey, *tax.facts.get("warnings", ())))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Alignment tax</title>'
        f"<style>{_STYLE}</style><h1>Alignment tax</h1>"
        f'<p class="sentence">{escape(tax.sentence)}</p>{svg[svg.index("<svg") :]}'
        f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
        f"<p>Means with 95 % half-widths; steps are {escape(tax.steps_are)}; "
        f"KL is {escape(tax.kl_source)}.</p>{notes}</html>\n"
    )


def draw(tax: Tax) -> tuple[str, bytes]:
    """One figure as SVG and PNG: a panel for the benchmarks, and one for each measure, all against the step."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(tax)
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tax", "font.size": 9, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(3.6 * columns, 2.7 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        for place, (title, panel) in enumerate(panels):
            axes = figure.add_subplot(lines, columns, place + 1)
            panel(axes)
            axes.set_title(title, fontsize=9, loc="left")
            _frame(axes, tax)
        _legend(figure)
        text, image = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        figure.savefig(image, format="png", dpi=130)
    return text.getvalue(), image.getvalue()


def _panels(tax: Tax) -> list[tuple[str, Draw]]:
    measured = tax.columns
    panels: list[tuple[str, Draw]] = []
    looks = dict(zip(benchmarks(), cycle(_LOOKS), strict=False)) | {"oracle": _ORACLE_LOOK}
    shares = {name: look for name, look in looks.items() if name in measured}
    if shares:
        panels.append(("Benchmarks, %", partial(_shares, tax=tax, looks=shares)))
    titles = {
        "reward": "Mean reward, raw logit",
        "kl": "KL to before, nats an answer",
        "characters": "Length, characters",
    }
    for name, title in titles.items():
        if name in measured:
            panels.append((title, partial(_measure, tax=tax, name=name)))
    # Logits of two reward models have no axis in common, nor have distances from two policies.
    for name in tax.log_apart:
        panels.append((_LOGGED_APART[name], partial(_logged, tax=tax, name=name, label=None)))
    if tax.log:
        panels.append(("Length in training, tokens", partial(_logged, tax=tax, name="length", label=None)))
    return panels


def _shares(axes: Axes, tax: Tax, looks: Mapping[str, tuple[str, str]]) -> None:
    for place, (name, (colour, marker)) in enumerate(looks.items()):
        label = benchmarks().get(name, "oracle, of the answers")
        shift = (place - (len(looks) - 1) / 2) * 0.012 * _span(tax)
        _points(axes, tax.policies, name, colour, marker, 100, shift, label)


def _measure(axes: Axes, tax: Tax, name: str) -> None:
    if tax.log and name in tax.log[0] and name not in tax.log_apart:
        _logged(axes, tax, name, label="in training, each step's batch")
    # Without a log there is nothing to be told apart from.
    _points(axes, tax.policies, name, _POINT, "o", 1, 0.0, "held-out prompts" if tax.log else None)


def _logged(axes: Axes, tax: Tax, name: str, *, label: str | None) -> None:
    axes.plot([row["step"] for row in tax.log], [row[name] for row in tax.log], color=_LOG, lw=1, label=label)


def _points(
    axes: Axes,
    policies: Sequence[MeasuredPolicy],
    name: str,
    colour: str,
    marker: str,
    scale: float,
    shift: float,
    label: str | None,
) -> None:
    known = [(p.step + shift, p.measures[name]) for p in policies if p.measures.get(name, {}).get("value") is not None]
    if name == "kl":  # before is at no distance from itself
        known.insert(0, (policies[0].step, {"value": 0.0, "ci95": None}))
    for x, metric in known:
        if metric["ci95"]:
            axes.plot([x, x], [scale * end for end in metric["ci95"]], color=colour, lw=1.4, alpha=0.55)
    ys = [scale * metric["value"] for _, metric in known]
    axes.plot([x for x, _ in known], ys, color=colour, marker=marker, ms=5, lw=1.2, label=label)


def _legend(figure: Figure) -> None:
    """One for all panels, below them: inside a panel it would hide points."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=6, fontsize=8, frameon=False)


def _span(tax: Tax) -> float:
    last = max([policy.step for policy in tax.policies] + [row["step"] for row in tax.log])
    return float(last or 1.0)


def _frame(axes: Axes, tax: Tax) -> None:
    if tax.log:
        axes.set_xlabel("step", fontsize=8)
    else:
        steps = [policy.step for policy in tax.policies]
        # Names come from outside: a "$" in one is no formula.
        axes.set_xticks(steps, [policy.label for policy in tax.policies], parse_math=False)
        if len(steps) > 4:
            axes.tick_params(axis="x", rotation=30)
    span = _span(tax)
    axes.set_xlim(-0.08 * span, 1.08 * span)
    axes.grid(axis="y", color="#dfe3e8", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
