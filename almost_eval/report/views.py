"""Content of the page as plain values. Numbers are formatted here; the template escapes every name."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from almost_eval.judge.names import STYLE_CONTROLLED
from almost_eval.report import judge_tables, judged, plots
from almost_eval.report.matrix import Cell, Matrix
from almost_eval.report.runs import NONE, Benchmark, LoadedRun, RunSet, Unit, shown, unit_of
from almost_eval.run.validity import counted, gate_counts, readable
from almost_eval.tasks.facts import MetricGroup
from almost_eval.tasks.registry import stated_by
from almost_eval.types import JSONObject

MARKS = {
    "better": ("▲", "better than the baseline"),
    "worse": ("▼", "worse than the baseline"),
    "same": ("≈", "not distinguishable from the baseline"),
    "unknown": ("?", "cannot be judged"),
}
"""How a comparison is shown, and what the sign means (5 % for the table as a whole, after Holm)."""

MINUS = "\u2212"
View = JSONObject
"""What the template reads of one part of the page."""


def headline_rows(run_set: RunSet) -> list[View]:
    """One row a run: the headline with its interval, the validity checks, and the trivial baselines."""
    rows = []
    for place, benchmark in enumerate(run_set.benchmarks):
        for at, run in enumerate(benchmark.runs):
            rows.append(
                {
                    "rows": len(benchmark.runs) if at == 0 else 0,
                    "benchmark": benchmark.label,
                    "anchor": f"b{place}",
                    "model": run.label,
                    "metric": _metric_title(run.task, run.headline, whole=True).split(",")[0],
                    "bar": bar(run, run.headline),
                    "n": f"{run.metrics[run.headline]['n']:,}",
                    "unscored": run.metrics[run.headline]["unscored"],
                    "baselines": [bar(run, name, baseline=True) for name in run.results["baselines"]],
                    "withheld": run.withheld,
                    "counted": gate_counts(run.results),
                }
            )
    return rows


def bar(run: LoadedRun, name: str, *, baseline: bool = False) -> View:
    """A metric of a run as a dot with its interval; `low`, `high`, `at` in percent of the track, None off it."""
    metric = (run.results["baselines"] if baseline else run.metrics)[name]
    unit: Unit = stated_by(run.task).unit if baseline else unit_of(run.task, name)
    return _dot(metric, unit) | {
        "label": run.label,
        "name": readable(name),
        "series": run.series % plots.SERIES,
        "unit": " %" if unit == "share" and metric["value"] is not None else "",
        "unscored": metric["unscored"],
        "withheld": bool(metric.get("withheld")),
    }


def _dot(metric: JSONObject, unit: Unit) -> View:
    """A value with its interval: what every mark on a track has."""
    value, interval = metric["value"], metric["ci95"]
    on_track = unit == "share"
    return {
        "text": shown(value, unit),
        "interval": f"{shown(interval[0], unit)} to {shown(interval[1], unit)}" if interval else "",
        "at": 100 * value if on_track and value is not None else None,
        "low": 100 * interval[0] if on_track and interval else None,
        "high": 100 * interval[1] if on_track and interval else None,
        "n": metric["n"],
    }


def matrix_view(matrix: Matrix) -> View:
    """The table of several models."""
    rows = []
    for model in matrix.models:
        cells = [matrix.cell(model, place) for place in range(len(matrix.benchmarks))]
        rows.append({"model": model, "cells": [_cell(cell) if cell else None for cell in cells]})
    return {
        "benchmarks": [{"label": b.label, "anchor": f"b{place}"} for place, b in enumerate(matrix.benchmarks)],
        "rows": rows,
        "baseline": matrix.baseline,
        "family": sum(delta.p_holm is not None for delta in matrix.deltas),
        "marks": MARKS,
        "deltas": [_delta(cell) for cell in matrix.cells.values() if cell.delta],
    }


def _cell(cell: Cell) -> View:
    view = {"bar": bar(cell.run, cell.run.headline), "withheld": cell.run.withheld, "delta": None}
    if cell.delta:
        view["delta"] = _delta(cell)
    return view


def _delta(cell: Cell) -> View:
    delta = cell.delta
    assert delta is not None
    metric, unit = delta.metric, delta.benchmark.unit
    scale = 100 if unit == "share" else 1
    form = "+.1f" if unit == "share" else "+.4g"

    def signed(value: float | None) -> str:
        return NONE if value is None else format(scale * value + 0.0, form).replace("-", MINUS)

    flips = delta.comparison.flipped
    return {
        "benchmark": delta.benchmark.label,
        "model": delta.run.label,
        "mark": delta.mark,
        "sign": MARKS[delta.mark][0],
        "says": MARKS[delta.mark][1],
        "text": signed(metric.difference),
        "interval": f"{signed(metric.ci95[0])} to {signed(metric.ci95[1])}" if metric.ci95 else "",
        "n": metric.n,
        "left_out": metric.unscored + delta.comparison.only_in_a + delta.comparison.only_in_b,
        "p": p_value(metric.p_value),
        "p_holm": p_value(delta.p_holm),
        "gained": sum(flip.b > flip.a for flip in flips),
        "lost": sum(flip.b < flip.a for flip in flips),
        "warnings": list(delta.comparison.warnings),
    }


def p_value(p: float | None) -> str:
    """As text; small ones as a bound."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def sections(run_set: RunSet) -> list[View]:
    """One section a benchmark."""
    return [_section(benchmark, f"b{place}") for place, benchmark in enumerate(run_set.benchmarks)]


def _section(benchmark: Benchmark, anchor: str) -> View:
    runs = benchmark.runs
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    groups = _metric_groups(runs, names)
    panels = [_panel(run) for run in runs if run.judged and "panel" in (run.results.get("judging") or {})]
    return {
        "anchor": anchor,
        "title": benchmark.label,
        "legend": [{"label": run.label, "series": run.series % plots.SERIES} for run in runs],
        "notes": [{"label": run.label, "counted": counted(run.results), "warnings": _warnings(run)} for run in runs],
        "metrics": [
            {"name": name, "bars": [bar(run, name) if name in run.metrics else None for run in runs]} for name in names
        ],
        "forests": [{"title": g.title, "rows": _group_rows(runs, g), "compact": g.compact} for g in groups],
        "plots": [_profile(runs, g, f"{anchor}p{at}" if at else anchor) for at, g in enumerate(groups) if g.profile],
        "judged": [
            _judged(run, f"{anchor}r{place}") for place, run in enumerate(runs) if run.judged and run.baseline_system
        ],
        **({"turns": tables} if (tables := [view for run in runs if run.judged for view in _turns(run)]) else {}),
        **({"panels": panels} if panels else {}),
    }


def _metric_groups(runs: Sequence[LoadedRun], names: Sequence[str]) -> list[MetricGroup]:
    if runs[0].judged:
        title, profile = "Score" if judge_tables.MARKS in names else "Win rate", judge_tables.profile_of(names)
        by_category = tuple(profile) if len(profile) > 1 else ()
        names = [name for name in names if not judge_tables.is_of_turn_and_category(name)]  # the table has them
        return [MetricGroup(title, tuple(names), profile=by_category, profile_title=f"{title} by category")]
    values = {name: [run.metrics[name]["value"] for run in runs if name in run.metrics] for name in names}
    known = {name: [value for value in of if value is not None] for name, of in values.items()}
    means = {name: sum(of) / len(of) for name, of in known.items() if of}
    records = [record for run in runs for record in run.records]
    return stated_by(runs[0].task).metric_groups(names, means, records)


def _warnings(run: LoadedRun) -> list[str]:
    withheld = [f"headline withheld: {run.withheld}"] if run.withheld else []
    return withheld + [str(warning) for warning in run.results["engine"].get("warnings", ())]


def _group_rows(runs: Sequence[LoadedRun], group: MetricGroup) -> list[View]:
    """Rows of a forest plot: a metric each, and the rules with no model in their place."""
    at = len(group.metrics) if group.baselines_at is None else group.baselines_at
    before, after = ([_row(runs, name, group) for name in names] for names in (group.metrics[:at], group.metrics[at:]))
    rules = [] if group.baselines_at is None else _baseline_rows(runs)
    return [row for row in (*before, *rules, *after) if row]


def _row(runs: Sequence[LoadedRun], name: str, group: MetricGroup) -> View | None:
    """A dot for each run that has the metric. Only shares have a place on the track."""
    bars = [bar(run, name) for run in runs if name in run.metrics]
    if not bars or unit_of(runs[0].task, name) != "share":
        return None
    label = _metric_title(runs[0].task, name, whole=group.full_names)
    return {"label": label, "bars": bars, "strong": name == runs[0].headline, "muted": False}


def _baseline_rows(runs: Sequence[LoadedRun]) -> list[View]:
    """The rules with no model, from the first run that has them: all runs scored the same samples."""
    names = dict.fromkeys(name for run in runs for name in run.results["baselines"])
    rows = []
    for name in names:
        run = next(run for run in runs if name in run.results["baselines"])
        rows.append({"label": readable(name), "bars": [bar(run, name, baseline=True)], "strong": False, "muted": True})
    return rows


def _metric_title(task: str, name: str, *, whole: bool) -> str:
    if name.startswith(judge_tables.JUDGE_RATE):
        return f"judge {name.removeprefix(judge_tables.JUDGE_RATE)}"
    title = stated_by(task).metric_titles.get(name)
    return title or readable(name if whole else name.rpartition("/")[2])


def _profile(runs: Sequence[LoadedRun], group: MetricGroup, ident: str) -> View:
    is_share = unit_of(runs[0].task, group.profile[0]) == "share"
    scale = plots.PERCENT if is_share else plots.TO_TEN
    series = [
        plots.Series(
            run.series,
            [scale.share(run.metrics.get(name, {}).get("value")) for name in group.profile],
            [_pair(run.metrics.get(name, {}).get("ci95"), scale) for name in group.profile],
        )
        for run in runs
    ]
    labels = [name.partition("/")[2] for name in group.profile]
    svg = plots.profile(labels, series, ident=ident, title=group.profile_title, scale=scale)
    return {"title": "Profile", "caption": f"{group.profile_title}, with 95 % intervals", "svg": svg}


def _pair(ends: Sequence[float] | None, scale: plots.Scale) -> tuple[float, float] | None:
    return (ends[0] / scale.top, ends[1] / scale.top) if ends else None


def _turns(run: LoadedRun) -> list[View]:
    """Categories by turns, a table for each system whose answers were graded, or one for a pair."""
    graded = (run.results.get("judging") or {}).get("systems")
    head = judge_tables.MARKS if graded else "win_rate"
    if not graded and not any(map(judge_tables.is_of_turn, run.metrics)):
        return []
    views = []
    for name, metrics in (graded or {run.label: run.metrics}).items():
        laid_out = judge_tables.turn_table(metrics, head)
        if laid_out is None:
            continue
        rows = [
            {
                "label": readable(label),
                "cells": [
                    {"text": judge_tables.figure(cell, head), "interval": judge_tables.interval(cell, head)}
                    for cell in cells
                ],
                "n": cells[-1]["n"] if cells[-1] else 0,
                "unscored": cells[-1]["unscored"] if cells[-1] else 0,
            }
            for label, cells in laid_out.rows
        ]
        what = "Marks from 1 to 10" if graded else "Win rate"
        views.append({"label": name, "what": what, "columns": laid_out.columns, "rows": rows})
    return views


def _judged(run: LoadedRun, ident: str) -> View:
    bins, by_length = judged.length_bins(run), None
    if bins:
        series = plots.Series(run.series, [b.share.value for b in bins], [b.share.ci95 for b in bins])
        title = "share of verdicts won, by length of the answer"
        by_length = plots.by_length([b.ratio for b in bins], [series], ident=ident, title=title)
    parts, judging = judged.outcomes(run), run.results.get("judging") or {}
    style = judging.get("style") or {}
    votes = [_bias(run.votes["metrics"][name], called, "") for name, called in judged.VOTE_ROWS.items() if run.votes]
    return {
        "label": run.label,
        "baseline": run.baseline_system,
        "series": run.series % plots.SERIES,
        "outcomes": [
            {
                "label": readable(part.label),
                "wins": part.wins,
                "ties": part.ties,
                "losses": part.losses,
                "unscored": part.unscored,
                "shares": [100 * count / part.n for count in (part.wins, part.ties, part.losses)] if part.n else None,
            }
            for part in parts
        ],
        "bias": [_bias(judging.get(key), *words) for key, words in BIAS.items() if judging]
        + ([_bias(run.metrics[STYLE_CONTROLLED], "win rate at equal style", "by a logistic model")] if style else []),
        "by_length": by_length,
        **({"style": judged.style_rows(run), "style_problem": style["problem"]} if style else {}),
        **({"votes": votes, "vote_words": judged.vote_words(run.votes["votes"])} if run.votes else {}),
    }


def _panel(run: LoadedRun) -> View:
    return {
        "label": run.label,
        "series": run.series % plots.SERIES,
        "tables": judge_tables.panel_tables(run.results),
        "notes": judge_tables.panel_notes(run.results),
    }


BIAS = {
    "first_wins": ("first shown preferred", "of the decisive verdicts; one half is fair"),
    "longer_wins": ("longer answer preferred", "of the decisive verdicts"),
    "consistency": ("both orders agree", "of the questions"),
    "length_controlled": ("win rate at equal length", "by a logistic model"),
}
"""Entry of a judged run's `judging` -> what it is called, and what it is a share of."""


def _bias(metric: JSONObject | None, name: str, of: str) -> View:
    return {"name": name, "of": of} | _dot(metric or {"value": None, "ci95": None, "n": 0}, "share")


def provenance(run_set: RunSet) -> list[View]:
    """Origin of each run, and the command that repeats it."""
    return [_provenance(run, f"command-{place}") for place, run in enumerate(run_set.runs)]


def _provenance(run: LoadedRun, ident: str) -> View:
    spec, results = run.spec, run.results
    template, prompts = spec.get("template") or {}, spec.get("prompt_set") or {}
    facts = {
        "run folder": str(run.folder),
        "model": spec.get("model_name"),
        "architecture": spec.get("architecture"),
        "weights": _digest(spec.get("weight_digest")),
        "engine": _short(spec["engine"]),
        "settings": _short(spec["settings"]),
        "baseline": run.baseline_system,
        "judge": _short(spec["settings"].get("judge") or {}),
        "data": f"{spec['data']['source']}, {_digest(spec['data']['fingerprint'])}",
        "prompt set": prompts and f"{prompts['name']}, {_digest(prompts.get('digest'))}",
        "template": template and f"{template['name']}, {_digest(template['digest'])}",
        "prompt tokens": _digest(spec.get("prompt_ids_digest")),
        "samples": f"{spec['n_samples']:,}, {_digest(results['provenance'].get('samples_digest'))}",
        "seed": spec.get("seed"),
        "commit": spec.get("commit"),
        "versions": _short(spec.get("versions") or {}),
        "time": _time(results.get("timing") or {}),
    }
    return {
        "ident": ident,
        "label": run.label,
        "task": f"{run.task}, {results['protocol']}",
        "command": shlex.join(spec.get("command") or []),
        "facts": [(name, str(value)) for name, value in facts.items() if value not in (None, "", {})],
        "template": template.get("text"),
    }


def _digest(value: object) -> str:
    return f"sha256 {str(value)[:16]}" if value else ""


def _short(value: JSONObject) -> str:
    """Settings in one line. Objects inside them are left out: they have a line or a file of their own."""
    parts = []
    for name, item in value.items():
        if isinstance(item, list) and not any(isinstance(inner, dict) for inner in item):
            item = ", ".join(map(str, item))
        if item is not None and not isinstance(item, dict | list):
            parts.append(f"{readable(name)} {item}")
    return "; ".join(parts)


def _time(timing: JSONObject) -> str:
    seconds = timing.get("seconds")
    return "" if seconds is None else f"{seconds:,.1f} s, {timing.get('samples_computed_now', 0):,} samples computed"
