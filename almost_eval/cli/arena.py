"""`almost-eval arena`: what the votes of the blind arena say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from almost_eval.cli.command_line import SEED, Commands, open_console, print_json

if TYPE_CHECKING:
    from almost_eval.arena.report import ArenaReport

PATH = click.Path(path_type=Path)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def arena() -> None:
    """Votes of the blind arena (the Arena tab of almost-chat): report and export."""


@arena.command()
@click.argument("db", type=PATH)
@click.option("--judge", "judges", multiple=True, type=PATH, help="A judge's run over the files of `arena export`.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of the resamples behind the intervals.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def report(db: Path, judges: tuple[Path, ...], seed: int, as_json: bool) -> int:
    """Win rates, strengths, position bias, and agreement with the reward model and with judges.

    \b
    Example:
      almost-eval arena report runs/arena.db
      almost-eval arena report runs/arena.db --judge runs/judged
    """
    from almost_eval.arena.report import judge_verdicts
    from almost_eval.arena.report import report as report_votes
    from almost_eval.arena.votes import VoteStore

    results = report_votes(VoteStore(db).votes(), {str(run): judge_verdicts(run) for run in judges}, seed=seed)
    if as_json:
        print_json(results.to_dict())
    else:
        _print(results, db)
    return 0


@arena.command()
@click.argument("db", type=PATH)
@click.option("--output", type=PATH, required=True, help="Folder to write.")
def export(db: Path, output: Path) -> int:
    """All votes as JSONL, and their pairs as question and answer files for a judge.

    \b
    Example:
      almost-eval arena export runs/arena.db --output runs/arena
      almost-eval vicuna --questions runs/arena/questions.jsonl --answers runs/arena/answers-b.jsonl \\
          --baseline runs/arena/answers-a.jsonl --judge gpt-6.1-terra --output runs/judged
    """
    from almost_eval.arena.report import export as export_votes
    from almost_eval.arena.votes import VoteStore

    for file in export_votes(VoteStore(db).votes(), output):
        click.echo(file)
    return 0


def _print(results: ArenaReport, db: Path) -> None:
    from rich.text import Text

    from almost_eval.report.tables import titled

    console = open_console()
    figures = ("wins", "losses", "ties", "both bad", "win rate", "95 % interval")
    table = titled(f"arena · {db.name}", ["system", "against"], figures)
    for pair in results.pairs:
        counts = (pair.wins, pair.losses, pair.ties, pair.both_bad)
        rate = pair.win_rate
        table.add_row(Text(pair.system), Text(pair.other), *map(str, counts), _share(rate.value), _interval(rate.ci95))
    table.add_section()
    for name, rate in results.systems.items():
        table.add_row(Text(name), "all", *[""] * 4, _share(rate.value), _interval(rate.ci95), style="dim")
    console.print(table)
    console.print(
        f"{results.votes} votes of {results.sessions} sessions; intervals are clustered by session; a tie counts half"
    )
    if results.named:
        console.print(f"{results.named} votes more were not blind, as a system named itself: they are in no figure")
    strengths = results.strengths.values
    if strengths is None:
        console.print(f"Bradley-Terry: {results.strengths.reason}")
    else:
        ranked = sorted(strengths, key=lambda name: -strengths[name])
        ends = results.strengths.ci95 or {}
        parts = [
            f"{name} {strengths[name]:+.2f}"
            + (f" [{ends[name][0]:+.2f}, {ends[name][1]:+.2f}]" if name in ends else "")
            for name in ranked
        ]
        console.print(Text(f"Bradley-Terry log strength: {', '.join(parts)}"), soft_wrap=True)
    position = results.position
    console.print(f"position: side A won {_share(position.value)} of {position.n} decided {_interval(position.ci95)}")
    for one in results.agreement:
        kappa = "not defined" if one.kappa is None else f"{one.kappa:.2f}"
        interval = "" if one.kappa_ci95 is None else f" [{one.kappa_ci95[0]:.2f}, {one.kappa_ci95[1]:.2f}]"
        same = f"{_share(one.rate.value)} of {one.decisive} decided {_interval(one.rate.ci95)}"
        line = f"agreement with {one.source}: kappa {kappa}{interval} over {one.n} pairs, same winner {same}"
        console.print(Text(line))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
