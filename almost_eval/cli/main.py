"""`almost-eval`: all its commands. Each imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

from typing import NoReturn

import click

from almost_eval import __version__
from almost_eval.cli.all import all_tasks
from almost_eval.cli.arena import arena
from almost_eval.cli.command_line import Commands, run_command_line
from almost_eval.cli.compare import compare
from almost_eval.cli.config_file import add_config
from almost_eval.cli.judge import judge, vicuna
from almost_eval.cli.list import completion, list_all
from almost_eval.cli.merge import merge
from almost_eval.cli.parity import parity
from almost_eval.cli.plan import plan
from almost_eval.cli.report import report
from almost_eval.cli.tasks import TaskCommand
from almost_eval.cli.tax import tax
from almost_eval.cli.verify import verify
from almost_eval.tasks.registry import TASKS


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="almost-eval")
@click.pass_context
def cli(context: click.Context) -> None:
    """Evaluate language models: numbers that can be trusted, fast.

    \b
    Example:
      almost-eval all                                      built-in models and data, nothing to download
      almost-eval hhh --model ./my-checkpoint --data-root ./hub
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    all_tasks,
    plan,
    *(TaskCommand(name, path) for name, path in TASKS.items()),
    vicuna,
    judge,
    merge,
    compare,
    parity,
    verify,
    report,
    tax,
    arena,
    list_all,
    completion,
):
    cli.add_command(command)
add_config(cli, leave_out=TASKS)


def main() -> NoReturn:
    """Run the command line."""
    run_command_line(cli, "almost-eval")


if __name__ == "__main__":
    main()
