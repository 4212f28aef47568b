"""`almost-serve` and `almost-chat`: the command lines of serving. Neither has landed yet, and both say so."""

from __future__ import annotations

import click

from almost_eval import __version__


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="almost-serve")
def serve() -> None:
    """Serve a policy or a reward model. Not in this version; see CHANGELOG.md."""
    raise click.UsageError("serving has not landed in this version; `vllm serve CHECKPOINT` serves a checkpoint")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="almost-chat")
def chat() -> None:
    """Chat with a model in the browser. Not in this version; see CHANGELOG.md."""
    raise click.UsageError("the chat demo has not landed in this version; see CHANGELOG.md for what has")
