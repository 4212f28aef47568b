"""`almost-train`: the command line of the training recipe. No stage has landed yet, and it says so."""

from __future__ import annotations

import click

from almost_eval import __version__


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="almost-train")
def main() -> None:
    """Train with synthetic feedback. No stage has landed in this version; see CHANGELOG.md."""
    raise click.UsageError("no training stage has landed in this version; see CHANGELOG.md for what has")
