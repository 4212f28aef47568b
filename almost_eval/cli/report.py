"""`almost-eval report`: finished runs as a table, a page or a table elsewhere; `compare`: one against another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from almost_eval.cli.command_line import SEED, open_console, print_json
from almost_eval.errors import InputError
from almost_eval.files import write_whole
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from almost_eval.report.matrix import Matrix
    from almost_eval.report.runs import RunSet

FORMATS = {".md": "markdown", ".csv": "csv", ".tex": "latex", ".yaml": "model_index", ".yml": "model_index"}
"""Suffix of a file -> what is written into it; `.html` is the page."""
PAGES = (".html", ".htm")


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File to write: .html is the page; .md, .csv, .tex, .yaml a table. May be repeated.",
)
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@click.option("--csv", is_flag=True, help="Print every metric as CSV.")
@click.option("--latex", is_flag=True, help="Print a LaTeX table (booktabs).")
@click.option("--model-index", is_flag=True, help="Print the model-index block of a Hugging Face model card.")
@click.option("--baseline", metavar="MODEL", help="Model that the others are compared with.  [the first]")
@click.option("--samples/--no-samples", default=True, help="Put every sample into the page.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json; of several runs, all and their comparison.")
def report(
    folders: tuple[Path, ...],
    outputs: tuple[Path, ...],
    baseline: str | None,
    samples: bool,
    seed: int,
    as_json: bool,
    **printed: bool,
) -> int:
    """Show finished runs: in the terminal, as one HTML page, as a table for a paper or a model card.

    \b
    DIR is a run folder, or a folder of run folders. Several models are compared with the first on the samples both
    scored; marks hold at 5 % for the whole table (Holm).

    \b
    Example:
      almost-eval report runs/my-run
      almost-eval report runs/base runs/tuned -o report.html -o table.tex
      almost-eval report runs/all-of-my-model --model-index
    """
    from almost_eval.report.runs import load_runs

    for file in outputs:
        if file.suffix.lower() not in (*PAGES, *FORMATS):
            raise InputError(f"--output {file}: what it should hold is told by its suffix: .html, {', '.join(FORMATS)}")
    formats = [name for name in dict.fromkeys(FORMATS.values()) if printed[name]]
    if as_json and formats:
        raise InputError("--json and a table would both go to the standard output; ask for one, or use --output")
    run_set = load_runs(folders, prompts=samples and any(f.suffix.lower() in PAGES for f in outputs))
    if not run_set.runs:
        raise InputError(f"{folders[0]} holds no finished run; unfinished: {', '.join(run_set.unfinished) or 'none'}")
    if baseline and not run_set.comparable:
        raise InputError(f"--baseline {baseline}: no two models have a run of the same benchmark")
    matrix = None
    if run_set.comparable:
        from almost_eval.report.matrix import build_matrix

        matrix = build_matrix(run_set, baseline=baseline, seed=seed)
    for file in outputs:
        _write(file, run_set, matrix, samples=samples)
    for name in formats:
        click.echo(_table(name, run_set, matrix), nl=False)
    if as_json:
        print_json(_as_json(run_set, matrix))
    elif not formats:
        _print(run_set, matrix)
    return 0 if all(run.withheld is None for run in run_set.runs) else 3


def _table(name: str, run_set: RunSet, matrix: Matrix | None) -> str:
    from almost_eval.report import exports

    if name == "model_index":
        return exports.to_model_index(run_set)
    make: dict[str, Callable[[RunSet, Matrix | None], str]] = {
        "markdown": exports.to_markdown,
        "csv": exports.to_csv,
        "latex": exports.to_latex,
    }
    return make[name](run_set, matrix)


def _write(file: Path, run_set: RunSet, matrix: Matrix | None, *, samples: bool) -> None:
    if file.suffix.lower() in PAGES:
        from almost_eval.report.page import write_report

        page = write_report(run_set, matrix, file, samples=samples)
        size = f"{page.size / 1e6:.1f} MB" if page.size >= 1e5 else f"{page.size / 1e3:.0f} kB"
        click.echo(f"page: {file} ({size}, {page.n_samples:,} samples)", err=True)
        return
    text = _table(FORMATS[file.suffix.lower()], run_set, matrix)
    try:
        write_whole(file, text.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"cannot write {file} ({error.strerror}); choose another --output") from None
    click.echo(f"table: {file}", err=True)


def _as_json(run_set: RunSet, matrix: Matrix | None) -> JSONObject:
    if len(run_set.runs) == 1:
        return run_set.runs[0].results
    comparisons = [
        {
            "benchmark": delta.benchmark.label,
            "model": delta.run.label,
            "baseline": delta.baseline.label,
            "metric": delta.metric.name,
            "mark": delta.mark,
            "p_holm": delta.p_holm,
            **delta.comparison.to_dict(),
        }
        for delta in (matrix.deltas if matrix else ())
    ]
    runs = [{"folder": str(run.folder), "label": run.label, **run.results} for run in run_set.runs]
    return {"runs": runs, "comparisons": comparisons}


def _print(run_set: RunSet, matrix: Matrix | None) -> None:
    from almost_eval.report.console import print_results
    from almost_eval.report.overview import print_overview

    console = open_console()
    if len(run_set.runs) == 1:
        print_results(run_set.runs[0].results, console, folder=str(run_set.runs[0].folder))
    else:
        print_overview(run_set, matrix, console)


@click.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(run_a: Path, run_b: Path, seed: int, as_json: bool) -> int:
    """Is B better than A? Paired on the samples both runs scored.

    \b
    Example:
      almost-eval compare runs/before runs/after
    """
    from almost_eval.compare.comparison import compare_runs, render

    comparison = compare_runs(run_a, run_b, seed=seed)
    if as_json:
        print_json(comparison.to_dict())
    else:
        render(comparison, open_console())
    return 0
