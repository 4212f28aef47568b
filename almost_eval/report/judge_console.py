"""`results.json` of judged runs in a terminal. Everything is read from the results; nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from almost_eval.judge.aggregate import Combined, JudgeResults, RoundRobin, SignTest
from almost_eval.judge.calibration import Calibration, CalibrationBin
from almost_eval.judge.names import CORRECTED, STYLE_CONTROLLED, STYLE_STRENGTH
from almost_eval.report.judge_tables import print_judge_results, print_round_robin
from almost_eval.report.judged import VOTE_ROWS, vote_words
from almost_eval.report.turns import is_of_turn, print_grades, print_turn_table
from almost_eval.types import JSONMapping, JSONObject, Metric

ORDERS_IN_WORDS = {
    "both": ("both orders",),
    "forward": ("forward order only, the baseline is Assistant 1",),
    "reverse": ("reverse order only, the model is Assistant 1",),
}


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
        from almost_eval.report.panel_tables import print_panel

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
    left_out = ("panel", "style")
    stored: JSONObject = {name: value for name, value in results["judging"].items() if name not in left_out}
    stored["metrics"] = {name: _metric(metric) for name, metric in results["metrics"].items()}
    for name in ("consistency", "first_wins", "longer_wins", "length_controlled"):
        stored[name] = stored[name] and _metric(stored[name])
    stored["combined"] = Combined(**stored["combined"])
    stored["sign_test"] = SignTest(**stored["sign_test"])
    if calibration := stored.get("calibration"):
        stored["calibration"] = Calibration(
            confidence=_metric(calibration["confidence"]),
            agreed=_metric(calibration["agreed"]),
            overconfidence=_metric(calibration["overconfidence"]),
            error=calibration["error"],
            bins=tuple(CalibrationBin(**one) for one in calibration["bins"]),
        )
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
    interval = stored["ci95"]
    return Metric(
        stored["value"],
        stored["stderr"],
        (interval[0], interval[1]) if interval else None,
        stored["n"],
        stored["unscored"],
    )


def _print_votes(metrics: JSONMapping, votes: JSONMapping, console: Console) -> None:
    """The win rate of judge, votes and both; then how many votes there are, and which have no part in it."""
    table = Table(title=Text("win rate by people's votes"), title_justify="left", title_style="bold")
    table.add_column("by")
    for column in ("value", "95 % interval", "n"):
        table.add_column(column, justify="right")
    for name, called in VOTE_ROWS.items():
        metric = metrics[name]
        value = "withheld" if metric.get("withheld") else _share(metric["value"])
        interval = " to ".join(map(_share, metric["ci95"])) if metric["ci95"] else "-"
        table.add_row(called, value, interval, str(metric["n"]), style="bold" if name == CORRECTED else None)
    console.print(table)
    for words in vote_words(votes):
        console.print(Text(words))


def print_archives(rows: Sequence[JSONMapping], console: Console) -> None:
    """One line for each archived review file."""
    table = Table(title=Text("archived reviews, aggregated anew"), title_justify="left", title_style="bold")
    for column in ("Assistant 1", "Assistant 2"):
        table.add_column(column, overflow="fold")  # a name that is cut short may be another's
    for column in (
        "totals",
        "2 won,\ntied, lost",
        "win rate\nof 2",
        "at equal\nlength",
        "at equal\nstyle",
        "longer\nwins",
        "unparsed",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        metrics, judging = row["metrics"], row["judging"]
        totals = [metrics.get(f"total_score/{row[side]}", {"value": None})["value"] for side in ("baseline", "model")]
        counts = (f"{metrics[name]['value']:g}" for name in ("wins", "ties", "losses"))
        table.add_row(
            Text(row["baseline"].partition(":")[0]),
            Text(row["model"].partition(":")[0]),
            " : ".join(_number(total, ".6g") for total in totals),
            ", ".join(counts),
            _with_interval(metrics["win_rate"]),
            _with_interval(judging["length_controlled"]),
            _with_interval(metrics[STYLE_CONTROLLED]),
            _share(judging["longer_wins"]["value"]),
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
            recorded = " : ".join(_number(total, ".6g") for total in row["recorded_totals"])
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
    return _share(metric["value"]) + bounds


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"
