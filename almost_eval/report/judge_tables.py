"""Figures of a judged run by category and turn, and of a panel's judges, laid out once for the terminal and the page.

Metrics are named `win_rate`, `win_rate/<category>`, `win_rate/turn_<n>` and `win_rate/turn_<n>/<category>`; where
answers were graded by themselves, `score` stands in the place of `win_rate`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from almost_eval.report.tables import span_of, text_of, titled
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
    """The table of the metrics whose names begin with `head` (`win_rate`, `score`); None where there are none."""
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
    table = titled(title, ["category"], [*laid_out.columns, "n", "unscored"])
    table.columns[0].overflow = "fold"
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


# --- a panel of judges

JUDGE_RATE = "judge_win_rate/"
"""Beginning of the name of one judge's win rate."""


@dataclass(frozen=True, slots=True)
class PanelTable:
    """A table with its heading."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def panel_tables(results: JSONMapping) -> list[PanelTable]:
    """Each judge by itself, every two judges, and self-preference, from the `panel` of `results.json`."""
    panel = results["judging"]["panel"]
    is_round = "all" in panel
    tables = [_rates(panel), _rankings(panel)] if is_round else [_judges(results, panel)]
    if len(panel["judges"]) > 1:
        tables.append(_agreement(panel))
    if panel["self_preference"]:
        tables.append(_self_preference(panel))
    return tables


def panel_notes(results: JSONMapping) -> list[str]:
    """How the verdicts came together, in sentences."""
    panel = results["judging"]["panel"]
    counts = panel["counts"]
    notes = [
        f"majority of {len(panel['judges'])} judges on {counts['pairs']:,} pairs in an order: "
        f"{counts['unanimous']:,} unanimous, {counts['split']:,} without a majority (a tie)"
    ]
    if counts["incomplete"] or counts["empty"]:
        lacking = f"judges are missing on {counts['incomplete']:,} of them"
        notes.append(f"{lacking}, and nobody has a verdict on {counts['empty']:,}")
    for judge in panel["judges"]:
        if problem := judge.get("round_robin", {}).get("problem"):
            notes.append(f"judge {judge['name']}: {problem}")
        if judge["unscored"]:
            why = ", ".join(f"{reason} {count}" for reason, count in judge["reasons"].items())
            notes.append(f"judge {judge['name']}: {judge['unscored']:,} of {judge['reviews']:,} unscored ({why})")
    if problem := panel.get("all", {}).get("problem"):
        notes.append(f"all judges: {problem}")
    return notes


def print_panel(results: JSONMapping, console: Console) -> None:
    """The tables and sentences of a panel, under those of its majority."""
    for content in panel_tables(results):
        table = titled(content.title, ())
        for place, column in enumerate(content.columns):
            table.add_column(Text(column), justify="right" if place else "left", overflow="fold")
        for row in content.rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for note in panel_notes(results):
        console.print(Text(note))


def _judges(results: JSONMapping, panel: JSONMapping) -> PanelTable:
    rows = []
    for judge in panel["judges"]:
        rate = results["metrics"][JUDGE_RATE + judge["name"]]
        name = judge["name"] + (f" (of {judge['family']})" if judge["family"] else "")
        biases = [text_of(judge[key]["value"]) for key in ("consistency", "first_wins", "longer_wins")]
        rows.append((name, *_rate(rate), *biases, str(judge["unscored"] or "")))
    for name, metric in (("majority", "win_rate"), ("mean", "win_rate_mean")):
        rows.append((name, *_rate(results["metrics"][metric]), "", "", "", ""))
    columns = ("judge", "win rate", "95 % interval", "orders agree", "first wins", "longer wins", "unscored")
    return PanelTable("each judge by itself", columns, tuple(rows))


def _rates(panel: JSONMapping) -> PanelTable:
    """Each system's win rate over all its games, by each judge."""
    systems = panel["all"]["names"]
    rows = []
    for judge in panel["judges"]:
        rates = [_rate(judge["win_rates"][system]) for system in systems]
        rows.append((judge["name"], *(value if value == "withheld" else f"{value}\n{span}" for value, span in rates)))
    return PanelTable("win rate over all games, by each judge", ("judge", *systems), tuple(rows))


def _rankings(panel: JSONMapping) -> PanelTable:
    """Log strengths of each system by each judge, and by all games of all judges."""
    rankings = [(judge["name"], judge["round_robin"]) for judge in panel["judges"]] + [("all judges", panel["all"])]
    systems = rankings[-1][1]["names"]
    rows = []
    for name, ranking in rankings:
        strengths = [ranking["strengths"].get(system) for system in systems]
        rows.append((name, *(_strength(one) for one in strengths)))
    title = "Bradley-Terry log strengths by each judge, and by all games of all judges"
    return PanelTable(title, ("judge", *systems), tuple(rows))


def _agreement(panel: JSONMapping) -> PanelTable:
    rows: list[tuple[str, ...]] = []
    for both in panel["agreement"]:
        names = f"{both['a']}, {both['b']}"
        if both["problem"]:
            rows.append((names, "-", "-", "-", "-", "0"))
            continue
        kappa = both["kappa"]
        beyond_chance = text_of(kappa["value"], ".3f"), span_of(kappa["ci95"], ".3f")
        same = [text_of(both[name]["value"]) for name in ("agreement", "decisive")]
        rows.append((names, *beyond_chance, *same, str(kappa["n"])))
    columns = ("two judges", "kappa", "95 % interval", "same verdict", "where neither ties", "n")
    return PanelTable("agreement beyond chance (Cohen's kappa)", columns, tuple(rows))


def _self_preference(panel: JSONMapping) -> PanelTable:
    rows: list[tuple[str, ...]] = []
    for one in panel["self_preference"]:
        about = f"{one['judge']} on {', '.join(one['systems'])} (of {one['family']})"
        if one["problem"]:
            rows.append((about, "-", "-", "-", one["problem"], "0"))
            continue
        difference = one["difference"]
        points = f"{100 * difference['value']:+.1f}", span_of(difference["ci95"], "+.1f", 100)
        rates = [text_of(one[name]["value"]) for name in ("own", "others")]
        rows.append((about, *rates, *points, str(difference["n"])))
    columns = ("judge on its own family", "win rate by it", "by the others", "difference, points", "95 % interval", "n")
    return PanelTable("self-preference", columns, tuple(rows))


def _rate(metric: JSONMapping) -> tuple[str, str]:
    if metric.get("withheld"):
        return "withheld", "-"
    return text_of(metric["value"]), span_of(metric["ci95"])


def _strength(metric: JSONMapping | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    interval = f" ({span_of(metric['ci95'], '+.2f')})" if metric["ci95"] else ""
    return f"{metric['value']:+.2f}{interval}"
