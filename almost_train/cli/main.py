"""`almost-train`: the command line of the recipe. A command imports what it needs when it runs: `--help` is instant."""

from __future__ import annotations

import os
from typing import NoReturn

import click

from almost_eval import __version__
from almost_eval.cli.command_line import Commands, run_command_line
from almost_train.cli.merge import merge, merge_shards
from almost_train.cli.nano import nano
from almost_train.cli.options import CONTEXT
from almost_train.cli.plan import plan
from almost_train.cli.run import run
from almost_train.cli.stages import dpo, online_dpo, reward, rlsf, self_play, sft
from almost_train.cli.synthesize import synthesize


@click.group(cls=Commands, invoke_without_command=True, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="almost-train")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train with synthetic feedback (ALMoST): comparisons, reward model, self-play, SFT, RLSF.

    \b
    Example:
      almost-train run nano --output runs/nano        the whole recipe on the built-in world
      almost-train reward --comparisons comparisons.jsonl --model ./my-model --output runs/reward
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# The order of `--help`.
for command in (synthesize, reward, self_play, sft, rlsf, dpo, online_dpo, run, plan, merge, merge_shards, nano):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line."""
    # torch asks Linux for large pages: a step of SFT on a CPU had 20 million page faults, and takes a fifth less now.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    run_command_line(cli, "almost-train")


if __name__ == "__main__":
    main()
