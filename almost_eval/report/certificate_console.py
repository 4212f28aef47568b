"""A judge's certificate in a terminal. Names come from outside, so they are `Text`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from almost_eval.report.certificate_views import between_rows, columns, interval, number, prices, rows, title
from almost_eval.report.judge_console import print_remarks
from almost_eval.types import JSONMapping


def print_certificate(certificate: JSONMapping, console: Console) -> None:
    """Agreement, biases and price of each judge, then how far the win rates move.

    Args:
        certificate: what `judge.succession.certify` returned.
        console: where to.
    """
    shown = columns(certificate)
    table = Table(title=Text(title(certificate)), title_justify="left", title_style="bold")
    table.add_column("metric")
    for name, _ in shown:
        table.add_column(Text(name, overflow="fold"), justify="right")
    for called, kind, metrics in rows(certificate):
        table.add_row(called, *(_cell(metric, kind) for metric in metrics))
    console.print(table)
    if lines := between_rows(certificate):
        for called, kind, metric in lines:
            console.print(f"{called}: {number(metric, kind)} ({interval(metric, kind) or '-'}), n {metric['n']}")
    for judge, usd, seconds, n in prices(certificate):
        console.print(Text(f"{judge}: {usd} USD and {seconds} s a verdict, {n} verdicts"))
    for sentence in certificate["sentences"]:
        console.print(Text(sentence), soft_wrap=True)
    several = len(certificate["results"]) > 1
    for results in certificate["results"].values():
        print_remarks(results, console, of=results["model"] if several else "")


def _cell(metric: JSONMapping | None, kind: str) -> str:
    """Value, interval and n, one below the other where there is an interval."""
    if metric is None:
        return ""
    unscored = f", {metric['unscored']} unscored" if metric["unscored"] else ""
    ends = interval(metric, kind)
    return f"{number(metric, kind)}\n{ends + ', ' if ends else ''}n {metric['n']}{unscored}"
