"""`results.json` of judged runs in a terminal. Everything is read from the results; nothing is computed here.

Names come from outside, so they are `Text`: "[b]x" is no markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from almost_eval.judge.aggregate import Combined, JudgeResults, RoundRobin, SignTest
from almost_eval.judge.calibration import Calibration, CalibrationBin
from almost_eval.judge.names import CORRECTED, STYLE_CONTROLLED, STYLE_STRENGTH
from almost_eval.report.judge_tables import is_of_turn, print_grades, print_turn_table
from almost_eval.report.judged import VOTE_ROWS, vote_words
from almost_eval.report.tables import METRIC, span_of, text_of, titled
from almost_eval.types import JSONMapping, JSONObject, Metric

ORDERS_IN_WORDS = {
    "both": ("both orders",),
    "forward": ("forward order only, the baseline is Assistant 1",),
    "reverse": ("reverse order only, the model is Assistant 1",),
}

ELO = 400 / math.log(10)
"""Points per unit of log strength: 400 points are odds of 10 to 1."""
ELO_MEAN = 1000


def print_judged(results: JSONMapping, console: Console) -> None:
    """The table of a run of `vicuna`."""
    title = " · ".join([f"judge {results['protocol']}", *ORDERS_IN_WORDS.get(results.get("orders", ""), ())])
    if results["judging"].get("mode") == "single":
        print_grades(results, console, title=title)
    elif "names" in results["judging"]:
        at_equal_style = _metrics_of(results, STYLE_STRENGTH)
        style = results["judging"].get("style")
        print_round_robin(_round_robin(results), console, title=title, style=style, at_equal_style=at_equal_style)
    else:
        print_judge_results(_two(results), console, title=title, style=results["judging"].get("style"))
        if any(map(is_of_turn, results["metrics"])):
            print_turn_table(results["metrics"], "win_rate", console, title="win rate by category and turn")
        if votes := results.get("votes"):
            _print_votes(results["metrics"], votes, console)
    if "panel" in results["judging"]:
        from almost_eval.report.judge_tables import print_panel

        print_panel(results, console)
    print_remarks(results, console)


def print_remarks(results: JSONMapping, console: Console, *, of: str = "") -> None:
    """What was counted, why the headline is withheld, and the warnings; `of` is whose they are, among several."""
    whose = f"{of}: " if of else ""
    if details := ", ".join(f"{name} {count:,}" for name, count in results["details"].items() if count):
        console.print(Text(f"{whose}counted: {details}"))
    _print_cost(results.get("timing") or {}, console, of=whose)
    if not results["validity"]["passed"]:
        console.print(Text.assemble(whose, ("headline withheld:", "red"), f" {results['validity']['reason']}"))
    for warning in results["engine"]["warnings"]:
        console.print(Text.assemble(whose, ("warning:", "yellow"), f" {warning}"))


def _print_cost(timing: JSONMapping, console: Console, *, of: str) -> None:
    """What all runs in the folder were billed, and what is counted at its most, as nobody says for how much."""
    cost = timing.get("cost_usd_all_runs")
    unsure, n = timing.get("of_it_uncertain_usd"), timing.get("cost_uncertain_requests_all_runs")
    if not cost and not n:
        return
    told = f" {cost:.4f} USD for all runs in this folder" if cost is not None else " unknown"
    if n:
        most = f" up to {unsure:.4f} USD" if unsure is not None else ""
        told += f"; of it{most} for {n} requests whose bill nobody states (a timeout, a kill, a batch under way)"
    console.print(Text.assemble(of, ("cost:", "yellow" if n else "dim"), told), soft_wrap=True)


def _two(results: JSONMapping) -> JudgeResults:
    stored: JSONObject = {k: v for k, v in results["judging"].items() if k not in ("panel", "style")}
    stored["metrics"] = {name: _metric(metric) for name, metric in results["metrics"].items()}
    for name in ("consistency", "first_wins", "longer_wins", "length_controlled"):
        stored[name] = stored[name] and _metric(stored[name])
    stored["combined"] = Combined(**stored["combined"])
    stored["sign_test"] = SignTest(**stored["sign_test"])
    if calibration := stored.get("calibration"):
        metrics = {name: _metric(calibration[name]) for name in ("confidence", "agreed", "overconfidence")}
        bins = tuple(CalibrationBin(**one) for one in calibration["bins"])
        stored["calibration"] = Calibration(**metrics, error=calibration["error"], bins=bins)
    return JudgeResults(**stored)


def _round_robin(results: JSONMapping) -> RoundRobin:
    stored = results["judging"]
    strengths = _metrics_of(results, "strength/")
    wins = tuple(tuple(row) for row in stored["wins"])
    return RoundRobin(tuple(stored["names"]), strengths, wins, stored["unscored"], stored["problem"])


def _metrics_of(results: JSONMapping, beginning: str) -> dict[str, Metric]:
    """System -> the metric whose name begins so."""
    return {
        name.removeprefix(beginning): _metric(metric)
        for name, metric in results["metrics"].items()
        if name.startswith(beginning)
    }


def _metric(stored: JSONMapping) -> Metric:
    interval = (stored["ci95"][0], stored["ci95"][1]) if stored["ci95"] else None
    return Metric(stored["value"], stored["stderr"], interval, stored["n"], stored["unscored"])


def _print_votes(metrics: JSONMapping, votes: JSONMapping, console: Console) -> None:
    """The win rate of judge, votes and both; then how many votes there are, and which have no part in it."""
    table = titled("win rate by people's votes", ["by"], METRIC[:-1])
    for name, called in VOTE_ROWS.items():
        metric = metrics[name]
        value = "withheld" if metric.get("withheld") else text_of(metric["value"])
        cells = (value, span_of(metric["ci95"]), str(metric["n"]))
        table.add_row(called, *cells, style="bold" if name == CORRECTED else None)
    console.print(table)
    for words in vote_words(votes):
        console.print(Text(words))


def print_archives(rows: Sequence[JSONMapping], console: Console) -> None:
    """One line for each archived review file."""
    table = titled("archived reviews, aggregated anew", ())
    for column in ("Assistant 1", "Assistant 2"):
        table.add_column(column, overflow="fold")  # a name that is cut short may be another's
    of_2 = ("win rate\nof 2", "at equal\nlength", "at equal\nstyle")
    for column in ("totals", "2 won,\ntied, lost", *of_2, "longer\nwins", "unparsed"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        metrics, judging = row["metrics"], row["judging"]
        totals = [metrics.get(f"total_score/{row[side]}", {"value": None})["value"] for side in ("baseline", "model")]
        counts = (f"{metrics[name]['value']:g}" for name in ("wins", "ties", "losses"))
        table.add_row(
            Text(row["baseline"].partition(":")[0]),
            Text(row["model"].partition(":")[0]),
            " : ".join(text_of(total, ".6g") for total in totals),
            ", ".join(counts),
            _with_interval(metrics["win_rate"]),
            _with_interval(judging["length_controlled"]),
            _with_interval(metrics[STYLE_CONTROLLED]),
            text_of(judging["longer_wins"]["value"]),
            f"{metrics['unparsed']['value']:g}",
        )
    console.print(table)
    reviews = sum(row["reviews"] for row in rows)
    console.print(Text(f"{reviews} reviews, scores read from their text"))
    for row in rows:
        for other in row["other_scores_than_stored"]:
            read, stored = (" ".join(f"{x:g}" for x in other[key] or ()) or "none" for key in ("read", "stored"))
            where = f"{row['file']}, question {other['question']}"
            console.print(Text(f"{where}: the text says {read}, the file's own score is {stored}"), soft_wrap=True)
        if row["other_scores_than_stored"] and row["recorded_totals"]:
            recorded = " : ".join(text_of(total, ".6g") for total in row["recorded_totals"])
            console.print(Text(f"{row['file']}: by its own scores, the totals are {recorded}"), soft_wrap=True)
    decisive = [row["judging"]["longer_wins"] for row in rows]
    n = sum(metric["n"] for metric in decisive)
    if n:
        share = sum(metric["value"] * metric["n"] for metric in decisive if metric["n"]) / n
        console.print(Text(f"the longer answer wins {share:.1%} of all {n} decisive verdicts between unequal lengths"))


def _with_interval(metric: JSONMapping | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    bounds = f"\n{'-'.join(f'{100 * bound:.1f}' for bound in metric['ci95'])}" if metric["ci95"] else ""
    return text_of(metric["value"]) + bounds


# --- tables ---


def print_judge_results(
    results: JudgeResults, console: Console, *, title: str = "", style: JSONMapping | None = None
) -> None:
    """Wins, win rate, categories, scores, biases, and what was not scored. `title` is put behind the names; `style` is
    the style model of `judge.style` as JSON, where there is one.
    """
    heading = f"{results.model} against {results.baseline}" + (f" · {title}" if title else "")
    table = titled(heading, ["metric"], METRIC)
    ties = "half" if results.ties == "half" else "dropped"
    _add(table, f"win rate, ties {ties}", results.metrics["win_rate"], "bold")
    _add(table, "win rate at equal length", results.length_controlled)
    if style is not None:
        _add(table, "win rate at equal style", results.metrics[STYLE_CONTROLLED])
    categories = [name for name in results.metrics if name.startswith("win_rate/")]
    if len(categories) > 1 and not any(map(is_of_turn, categories)):  # those of several turns have a table
        table.add_section()
        for name in categories:
            _add(table, f"  {name.removeprefix('win_rate/')}", results.metrics[name])
    table.add_section()
    one_order = not results.consistency.n
    if not one_order:
        _add(table, "both orders agree", results.consistency, "dim")
    confounded = " (one order: the place or the system)" if one_order else ""
    _add(table, f"Assistant 1 wins a decisive verdict{confounded}", results.first_wins, "dim")
    _add(table, "the longer answer wins one", results.longer_wins, "dim")
    console.print(table)
    for line in _notes(results) + (_style_notes(style) if style else []):
        console.print(line)


def _notes(results: JudgeResults) -> list[Text]:
    wins, ties, losses, unparsed = (results.metrics[name] for name in ("wins", "ties", "losses", "unparsed"))
    reviews = f"{unparsed.n} reviews of {results.n_questions} questions, orders: {results.orders}"
    lines = [Text(f"{_count(wins)} wins, {_count(ties)} ties, {_count(losses)} losses in {reviews}")]
    totals = [name for name in results.metrics if name.startswith("total_score/")]
    if totals:  # FastChat prints the baseline, its Assistant 1, first
        baseline, model = (results.metrics[name].value or 0.0 for name in reversed(totals))
        lines.append(Text(f"total score: {results.baseline} {baseline:g} : {model:g} {results.model}"))
    both = results.combined
    if conflicts := both.conflict_first + both.conflict_second:
        what = "turns" if any(map(is_of_turn, results.metrics)) else "questions"
        twice = f"Assistant 1 twice on {both.conflict_first}, Assistant 2 twice on {both.conflict_second}"
        lines.append(Text(f"the two orders contradict each other on {conflicts} {what}: {twice}"))
    sign = results.sign_test
    lines.append(Text(f"sign test over questions: {sign.model} against {sign.baseline}, p = {sign.p_value:.2g}"))
    if (calibration := results.calibration) is not None:
        lines.append(Text(calibration_words(calibration)))
    if unparsed.value and results.bounds:
        low, high = results.bounds
        why = ", ".join(f"{reason} {count}" for reason, count in results.reasons.items())
        rates = f"were all of them losses or all wins, the win rate would be {low:.1%} or {high:.1%}"
        lines.append(Text.assemble(("unscored:", "yellow"), f" {_count(unparsed)} ({why}); {rates}"))
    return lines


def _style_notes(style: JSONMapping) -> list[Text]:
    """The coefficients of the style model, and why there is no rate or no interval."""
    notes = [Text.assemble(("equal style:", "yellow"), f" {style['problem']}")] if style["problem"] else []
    fitted = [effect for effect in style["effects"] if effect["coefficient"] is not None]
    if fitted:
        notes.append(Text(f"style, logit per root mean square: {', '.join(map(_effect, fitted))}"))
    return notes


def _effect(effect: JSONMapping) -> str:
    """A feature of the style model with its coefficient."""
    interval = f" ({span_of(effect['ci95'], '+.2f')})" if effect["ci95"] else ""
    held = ", held by the ridge alone" if effect["held_by_ridge"] else ""
    return f"{effect['name']} {effect['coefficient']:+.2f}{interval}{held}"


def calibration_words(calibration: Calibration) -> str:
    """How far a judge's probabilities hold in the swapped order, in a sentence."""
    confidence, agreed, gap = calibration.confidence, calibration.agreed, calibration.overconfidence
    interval = f" ({span_of(gap.ci95, '+.1f', 100)})" if gap.ci95 else ""
    return (
        f"calibration: its winners have a probability of {confidence.value:.1%} and win in the swapped order in "
        f"{agreed.value:.1%} of {agreed.n} reviews; difference {100 * (gap.value or 0.0):+.1f} points{interval}, "
        f"expected calibration error {100 * (calibration.error or 0.0):.1f} points"
    )


def print_round_robin(
    results: RoundRobin,
    console: Console,
    *,
    title: str = "",
    style: JSONMapping | None = None,
    at_equal_style: Mapping[str, Metric] | None = None,
) -> None:
    """Ratings on a scale where 400 points are odds of 10 to 1 and the mean is 1,000, then who beat whom how often.
    `style` is the style model as JSON, where there is one, and `at_equal_style` the strengths by it.
    """
    beaten = [Text(f"beats {name}") for name in results.names]
    heading = f"round robin{f' · {title}' if title else ''}"
    table = titled(heading, ["system"], ["rating", "95 % interval", "games", *beaten])
    for i, name in enumerate(results.names):
        strength = results.strengths.get(name)
        rating, games = (_points(strength.value), str(strength.n)) if strength else ("-", "-")
        against = [_won(results.wins, i, j) for j in range(len(results.names))]
        table.add_row(Text(name), rating, _points_interval(strength), games, *against)
    console.print(table)
    for line in _ratings_at_equal_style(at_equal_style or {}) + (_style_notes(style) if style else []):
        console.print(line)
    if results.problem:
        lacking = "no intervals:" if results.strengths else "not ranked:"
        console.print(Text.assemble((lacking, "yellow"), " "), end="")
        console.print(Text(results.problem))
    if results.unscored:
        told = f" {results.unscored} reviews, which are in no figure here"
        console.print(Text.assemble(("unscored:", "yellow"), told))


def _won(wins: Sequence[Sequence[float]], i: int, j: int) -> str:
    games = wins[i][j] + wins[j][i]
    return f"{wins[i][j] / games:.1%}" if games else "-"


def _points(strength: float | None) -> str:
    return "-" if strength is None else f"{ELO_MEAN + ELO * strength:.0f}"


def _ratings_at_equal_style(strengths: Mapping[str, Metric]) -> list[Text]:
    """One line, the strongest first."""
    ranked = sorted(strengths.items(), key=lambda item: -(item[1].value or 0.0))
    ratings = ", ".join(f"{name} {_points(metric.value)} ({_points_interval(metric)})" for name, metric in ranked)
    return [Text(f"rating at equal style: {ratings}")] if ratings else []


def _points_interval(strength: Metric | None) -> str:
    if strength is None or strength.ci95 is None:
        return "-"
    return f"{_points(strength.ci95[0])} to {_points(strength.ci95[1])}"


def _add(table: Table, name: str, metric: Metric | None, style: str | None = None) -> None:
    if metric is None or metric.value is None:
        table.add_row(Text(name), "-", "-", str(metric.n) if metric else "-", "", style=style)
        return
    cells = (f"{metric.value:.1%}", span_of(metric.ci95), str(metric.n), str(metric.unscored or ""))
    table.add_row(Text(name), *cells, style=style)


def _count(metric: Metric) -> str:
    return f"{metric.value:g}"
