"""Several runs in a terminal: headlines in one table, and differences between models in another."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from almost_eval.report.matrix import Matrix
from almost_eval.report.runs import NONE, RunSet, shown
from almost_eval.report.tables import titled
from almost_eval.report.views import matrix_view


def print_overview(run_set: RunSet, matrix: Matrix | None, console: Console) -> None:
    """Headlines, differences from the first model where there are several, and what is withheld or not finished."""
    console.print(_headlines(run_set))
    if matrix and matrix.deltas:
        _print_differences(matrix, console)
    for run in run_set.runs:
        if run.withheld:
            console.print(Text.assemble(("headline withheld:", "red"), f" {run.label}, {run.task}: {run.withheld}"))
    for folder in run_set.unfinished:
        console.print(Text.assemble(("not finished:", "yellow"), f" {folder}"), soft_wrap=True)


def _headlines(run_set: RunSet) -> Table:
    table = Table()
    for heading in ("benchmark", "model", "score", "95 % interval", "n"):
        table.add_column(heading, justify="left" if heading in ("benchmark", "model") else "right")
    for benchmark in run_set.benchmarks:
        for run in benchmark.runs:
            metric, unit = run.metrics[run.headline], benchmark.unit
            bounds = " to ".join(shown(bound, unit) for bound in metric["ci95"] or ())
            value = "withheld" if run.withheld else shown(metric["value"], unit)
            table.add_row(Text(benchmark.label), Text(run.label), value, bounds or NONE, str(metric["n"]))
    return table


def _print_differences(matrix: Matrix, console: Console) -> None:
    view = matrix_view(matrix)
    figures = ("difference", "95 % interval", "p, Holm", "flipped")
    table = titled(f"differences from {matrix.baseline}", ["benchmark", "model"], figures)
    table.add_column("")
    for row in view["deltas"]:
        flips = f"+{row['gained']} -{row['lost']}"
        says = f"{row['sign']} {row['says'].split(' the ')[0]}"
        cells = (row["text"], row["interval"], row["p_holm"], flips, says)
        table.add_row(Text(row["benchmark"]), Text(row["model"]), *cells)
    console.print(table)
    for warning in dict.fromkeys(warning for row in view["deltas"] for warning in row["warnings"]):
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"), soft_wrap=True)
    console.print(Text(f"marks hold at 5 % over {view['family']} comparisons (Holm)", style="dim"))
