"""`almost-eval compare`: is B better than A?"""

from __future__ import annotations

from pathlib import Path

import click

from almost_eval.cli.command_line import SEED, open_console, print_json


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
