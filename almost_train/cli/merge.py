"""`almost-train merge`."""

from __future__ import annotations

from pathlib import Path

import click

from almost_eval.cli.command_line import import_transformers
from almost_train.cli.options import path_option


@click.command()
@click.argument("adapter")
@path_option("--output", "The new checkpoint's folder.")
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16")),
    default="float32",
    show_default=True,
    help="Of the weights; they are merged in float32.",
)
def merge(adapter: str, output: Path, dtype: str) -> int:
    """Write a PEFT adapter and its base as one whole checkpoint.

    \b
    Example:
      almost-train merge runs/lora --output runs/merged
    """
    from almost_train.common.merge import merge as merge_adapter

    import_transformers()
    click.echo(str(merge_adapter(adapter, output, dtype)))
    return 0
