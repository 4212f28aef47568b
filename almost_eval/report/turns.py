"""Figures of a judged run by category and turn, laid out once for the terminal and for the page.

Metrics are named `win_rate`, `win_rate/<category>`, `win_rate/turn_<n>` and `win_rate/turn_<n>/<category>`; where
answers were graded by themselves, `score` stands in the place of `win_rate`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from almost_eval.types import JSONMapping

MARKS = "score"
"""Beginning of the names of marks from 1 to 10; all other figures here are shares."""
_TURN = re.compile(r"turn_(\d+)(?:/(.+))?")
WHOLE = "all"
"""The row over all categories, and the column over all turns."""


@dataclass(frozen=True, slots=True)
class TurnTable:
    """Categories by turns."""

    columns: list[str]
    """`turn 1`, `turn 2`, ..., `all`; `all` alone where there is one turn."""
    rows: list[tuple[str, list[JSONMapping | None]]]
    """(category, its metric in each column), `all` last."""


def turn_table(metrics: Mapping[str, JSONMapping], head: str) -> TurnTable | None:
    """The table of the metrics whose names begin with `head`; None where there is nothing to lay out.

    Args:
        metrics: as `results.json` has them.
        head: `win_rate` or `score`.
    """
    names = [name.removeprefix(f"{head}/") for name in metrics if name.startswith(f"{head}/")]
    turns = sorted({int(match[1]) for name in names if (match := _TURN.fullmatch(name))})
    categories = [name for name in names if not _TURN.fullmatch(name)]
    if not turns and not categories:
        return None

    def cell(turn: int | None, category: str | None) -> JSONMapping | None:
        parts = [head, *([f"turn_{turn}"] if turn else []), *([category] if category else [])]
        return metrics.get("/".join(parts))

    columns: list[int | None] = [*turns, None]
    rows = [
        (category or WHOLE, [cell(turn, category) for turn in columns])
        for category in (*(categories if len(categories) > 1 else ()), None)
    ]
    return TurnTable([f"turn {turn}" if turn else WHOLE for turn in columns], rows)


def is_of_turn(name: str) -> bool:
    """Whether a metric is about one turn."""
    return _TURN.fullmatch(name.partition("/")[2]) is not None


def is_of_turn_and_category(name: str) -> bool:
    """Whether a metric is about one category in one turn."""
    match = _TURN.fullmatch(name.partition("/")[2])
    return match is not None and match[2] is not None


def figure(metric: JSONMapping | None, head: str) -> str:
    """A metric's value as text."""
    if metric is None or (metric["value"] is None and not metric.get("withheld")):
        return "-"
    if metric.get("withheld"):
        return "withheld"
    return f"{metric['value']:.2f}" if head == MARKS else f"{metric['value']:.1%}"


def interval(metric: JSONMapping | None, head: str) -> str:
    """Its interval as text, or nothing."""
    if metric is None or not metric["ci95"]:
        return ""
    return " to ".join(f"{bound:.2f}" if head == MARKS else f"{100 * bound:.1f}" for bound in metric["ci95"])


def print_turn_table(metrics: Mapping[str, JSONMapping], head: str, console: Console, *, title: str) -> None:
    """One line a category, one column a turn, each with its interval; nothing where there is nothing to lay out."""
    laid_out = turn_table(metrics, head)
    if laid_out is None:
        return
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    table.add_column("category", overflow="fold")
    for column in laid_out.columns:
        table.add_column(column, justify="right")
    table.add_column("n", justify="right")
    table.add_column("unscored", justify="right")
    for category, cells in laid_out.rows:
        texts = [_with_interval(cell, head) for cell in cells]
        whole = cells[-1]
        counts = [str(whole["n"]), str(whole["unscored"] or "")] if whole else ["-", ""]
        if category == WHOLE and len(laid_out.rows) > 1:
            table.add_section()
        table.add_row(Text(category), *texts, *counts, style="bold" if category == WHOLE else None)
    console.print(table)


def print_grades(results: JSONMapping, console: Console, *, title: str) -> None:
    """Marks of each system: the score over all, by turn and by category, and how the last differs from the others."""
    judging = results["judging"]
    for name, metrics in judging["systems"].items():
        print_turn_table(metrics, MARKS, console, title=f"{name} · marks from 1 to 10 · {title}")
    for name, reasons in judging["reasons"].items():
        if reasons:
            low, high = judging["bounds"][name]
            why = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
            text = f" {sum(reasons.values())} of {name} ({why}); with the lowest or the highest mark for all of them "
            console.print(Text.assemble(("unscored:", "yellow"), f"{text}its score would be {low:.2f} or {high:.2f}"))
    last = list(judging["systems"])[-1:]
    for name, metric in judging["differences"].items():
        bounds = f" ({interval(metric, MARKS)})" if metric["ci95"] else ""
        console.print(Text(f"{last[0]} minus {name}: {metric['value']:+.2f}{bounds}, paired, n {metric['n']}"))


def _with_interval(metric: JSONMapping | None, head: str) -> str:
    bounds = interval(metric, head)
    return figure(metric, head) + (f"\n{bounds}" if bounds else "")


def profile_of(names: Iterable[str]) -> Sequence[str]:
    """The metrics of the categories, where a run has several turns or marks: what a picture by category shows."""
    names = list(names)
    head = MARKS if MARKS in names else "win_rate"
    if head != MARKS and not any(map(is_of_turn, names)):
        return ()
    return [name for name in names if name.startswith(f"{head}/") and not is_of_turn(name)]
