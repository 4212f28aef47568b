"""A judge's certificate for a reader: in a terminal, and as one HTML file in the report's style, without a script.

Both show the same plain values, whose numbers are formatted here. Names come from outside, so in a terminal they are
`Text`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from almost_eval import __version__
from almost_eval.errors import RunError
from almost_eval.files import write_whole
from almost_eval.judge.check import OLD
from almost_eval.report.judge_console import print_remarks
from almost_eval.report.runs import NONE
from almost_eval.report.tables import text_of, titled
from almost_eval.run.validity import counted
from almost_eval.types import JSONMapping, JSONObject

SHARES = {
    "agreement": "same verdict as the archive",
    "agreement/decisive": "same verdict as the archive, neither calls a tie",
    "human/agreement": "same verdict as people",
    "human/agreement/decisive": "same verdict as people, neither calls a tie",
    "self_consistency": "same verdict when asked again",
    "consistency": "same verdict in both orders",
    "flips": "the other answer wins in the other order",
    "first_wins": "Assistant 1 wins a decisive verdict",
    "longer_wins": "the longer answer wins one",
    "human/first_wins": "on voted pairs: Assistant 1 wins one",
    "human/longer_wins": "on voted pairs: the longer answer wins one",
}
"""Metric of a check that is a share -> what it is called."""
NUMBERS = {
    "kappa": "kappa with the archived verdicts",
    "kappa/decisive": "kappa, neither calls a tie",
    "human/kappa": "kappa with people's votes",
    "human/kappa/decisive": "kappa with people, neither calls a tie",
    "brier": "Brier score of its probabilities (0 is best)",
}
DIFFERENCES = {"longer_wins_beyond_archive": "the longer answer wins, beyond the archive"}
BETWEEN = {
    "kappa": "kappa between the two judges",
    "agreement": "same verdict of the two judges",
    "longer_wins_more": "the longer answer wins, more than with the old one",
    "first_wins_more": "Assistant 1 wins, more than with the old one",
}


def title(certificate: JSONMapping) -> str:
    """`NEW in place of OLD`."""
    old = certificate["old"] or certificate["archive_judge"]
    return f"{certificate['new']} in place of {old}" if old else f"{certificate['new']} and people's votes"


def columns(certificate: JSONMapping) -> list[tuple[str, JSONMapping]]:
    """(name, metrics) of the new judge, the old one and the archived one, as far as they are there."""
    results = certificate["results"]
    new = results["new"]["metrics"]
    shown = [(certificate["new"], new)]
    if certificate["old"]:
        shown.append((certificate["old"], results[OLD]["metrics"]))
    if archived := {name.removeprefix("archived/"): new[name] for name in new if name.startswith("archived/")}:
        shown.append((f"{certificate['archive_judge']}, archived", archived))
    if people := {name.replace("people/", "human/"): new[name] for name in new if name.startswith("people/")}:
        shown.append(("people's votes", people))
    return shown


def number(metric: JSONMapping | None, kind: str) -> str:
    """A metric's value: `share`, `number` or `difference` (in points)."""
    if metric is None or metric.get("withheld"):
        return "withheld" if metric else ""
    return _text(metric["value"], kind)


def interval(metric: JSONMapping | None, kind: str) -> str:
    """Its 95 % interval, or nothing."""
    ends = metric and metric["ci95"]
    return f"{_text(ends[0], kind)} to {_text(ends[1], kind)}" if ends else ""


def _text(value: float | None, kind: str) -> str:
    if value is None:
        return NONE
    if kind == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if kind == "number" else f"{100 * value:+.1f}"


def rows(certificate: JSONMapping) -> list[tuple[str, str, list[JSONMapping | None]]]:
    """(what it is called, its kind, the metric of each column), those that some column has."""
    shown = columns(certificate)
    table = [
        (called, kind, [metrics.get(name) for _, metrics in shown])
        for kind, names in (("number", NUMBERS), ("share", SHARES), ("difference", DIFFERENCES))
        for name, called in names.items()
    ]
    return [row for row in table if any(row[2])]


def between_rows(certificate: JSONMapping) -> list[tuple[str, str, JSONMapping]]:
    """(what it is called, its kind, the metric) of the two judges together."""
    kinds = {"kappa": "number", "agreement": "share"}
    return [
        (BETWEEN[name], kinds.get(name, "difference"), metric)
        for name, metric in (certificate["between"] or {}).items()
    ]


def moves(certificate: JSONMapping) -> list[tuple[str, JSONObject]]:
    """(whom the new judge replaces, the move), those of the old judge first."""
    archive = f"{certificate['archive_judge']}, archived"
    return [
        *((str(certificate["old"]), move) for move in certificate["moves"] or ()),
        *((archive, move) for move in certificate["results"]["new"]["judging"].get("moves", ())),
    ]


def prices(certificate: JSONMapping) -> list[tuple[str, str, str, int]]:
    """(judge, USD a verdict, seconds a verdict, verdicts) of each judge that was asked."""
    names = {"new": certificate["new"], OLD: certificate["old"]}
    told = {which: results["timing"].get("verdicts") for which, results in certificate["results"].items()}
    return [
        (names[which], text_of(one["usd_each"], ".6f"), text_of(one["seconds_each"], ".3g"), one["n"])
        for which, one in told.items()
        if one
    ]


# --- the terminal ---


def print_certificate(certificate: JSONMapping, console: Console) -> None:
    """Agreement, biases and price of each judge, then how far the win rates move."""
    shown = columns(certificate)
    table = titled(title(certificate), ["metric"], [Text(name, overflow="fold") for name, _ in shown])
    for called, kind, metrics in rows(certificate):
        table.add_row(called, *(_lines(metric, kind) for metric in metrics))
    console.print(table)
    for called, kind, metric in between_rows(certificate):
        console.print(f"{called}: {number(metric, kind)} ({interval(metric, kind) or '-'}), n {metric['n']}")
    for judge, usd, seconds, n in prices(certificate):
        console.print(Text(f"{judge}: {usd} USD and {seconds} s a verdict, {n} verdicts"))
    for sentence in certificate["sentences"]:
        console.print(Text(sentence), soft_wrap=True)
    several = len(certificate["results"]) > 1
    for results in certificate["results"].values():
        print_remarks(results, console, of=results["model"] if several else "")


def _lines(metric: JSONMapping | None, kind: str) -> str:
    """Value, interval and n, one below the other where there is an interval."""
    if metric is None:
        return ""
    unscored = f", {metric['unscored']} unscored" if metric["unscored"] else ""
    ends = interval(metric, kind)
    return f"{number(metric, kind)}\n{ends + ', ' if ends else ''}n {metric['n']}{unscored}"


# --- the page ---


def write_certificate(certificate: JSONMapping, folder: Path) -> Path:
    """Write `certificate.html` into a folder, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    from almost_eval.report.page import style_sheet, templates

    content = (
        templates()
        .get_template("certificate.html.jinja")
        .render(version=__version__, style=style_sheet(), **page_view(certificate))
    )
    file = folder / "certificate.html"
    try:
        write_whole(file, content.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(f"cannot write {file} ({error.strerror}); certificate.json is kept") from None
    return file


def page_view(certificate: JSONMapping) -> JSONObject:
    """What the page's template reads."""
    shown = columns(certificate)
    table = rows(certificate)
    judges = [certificate["new"], *([certificate["old"]] if certificate["old"] else [])]
    named = list(zip(judges, certificate["results"].values(), strict=True))
    return {
        "title": title(certificate),
        "sentences": certificate["sentences"],
        "legend_of": [{"label": name, "series": at} for at, (name, _) in enumerate(shown)],
        "shares": [
            {"label": called, "bars": _bars(shown, metrics), "strong": False, "muted": False}
            for called, kind, metrics in table
            if kind == "share"
        ],
        "numbers": [
            {"label": called, "cells": [_cell(metric, kind) for metric in metrics]}
            for called, kind, metrics in table
            if kind != "share"
        ],
        "between": [{"label": called, **_cell(metric, kind)} for called, kind, metric in between_rows(certificate)],
        "moves": [_move(old, move) for old, move in moves(certificate)],
        "prices": prices(certificate),
        "notes": [_note(name, results) for name, results in named],
        "runs": [_run(name, results) for name, results in named],
    }


def _bars(shown: Sequence[tuple[str, JSONMapping]], metrics: Sequence[JSONMapping | None]) -> list[JSONObject]:
    bars = []
    for at, ((name, _), metric) in enumerate(zip(shown, metrics, strict=True)):
        if metric is None:
            continue
        value, ends = metric["value"], metric["ci95"]
        bars.append(
            {
                "label": name,
                "series": at,
                "text": number(metric, "share").removesuffix(" %"),
                "interval": interval(metric, "share").replace(" %", ""),
                "at": None if value is None else 100 * value,
                "low": 100 * ends[0] if ends else None,
                "high": 100 * ends[1] if ends else None,
                "n": metric["n"],
                "withheld": bool(metric.get("withheld")),
            }
        )
    return bars


def _cell(metric: JSONMapping | None, kind: str) -> JSONObject:
    n = metric["n"] if metric else ""
    return {"text": number(metric, kind), "interval": interval(metric, kind), "n": n}


def _move(old: str, move: JSONMapping) -> JSONObject:
    systems = move["systems"]
    return {
        "old": old,
        "systems": f"{systems[0]} against {systems[1]}" if systems else "Assistant 2, all pairs of systems",
        "before": _text(move["before"], "share"),
        "after": _text(move["after"], "share"),
        "difference": _text(move["difference"], "difference"),
        "interval": interval(move, "difference"),
        "n": move["n"],
        "unscored": move["unscored"],
    }


def _note(name: str, results: JSONMapping) -> JSONObject:
    withheld = None if results["validity"]["passed"] else results["validity"]["reason"]
    return {
        "label": name,
        "counted": counted(results),
        "withheld": withheld,
        "warnings": [str(warning) for warning in results["engine"]["warnings"]],
    }


def _run(name: str, results: JSONMapping) -> JSONObject:
    known = results["provenance"]
    judge = known["settings"]["judge"]
    facts = {
        "judge": "; ".join(f"{key} {value}" for key, value in judge.items() if isinstance(value, str | int | float)),
        "prompt set": (judge.get("prompt_set") or {}).get("name"),
        "answered as": ", ".join(known["judge_models"]),
        "orders": known["settings"]["orders"],
        "times each pair was judged": known["settings"]["repeats"],
        "questions": f"sha256 {str(known['data']['fingerprint'])[:16]}",
        "pairs": f"sha256 {str(known['data']['pairs_digest'])[:16]}",
        "seed": known["seed"],
        "commit": known["commit"],
    }
    return {
        "label": name,
        "command": shlex.join(known["command"] or []),
        "facts": [(key, str(value)) for key, value in facts.items() if value not in (None, "")],
    }
