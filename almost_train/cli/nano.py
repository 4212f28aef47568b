"""`almost-train nano`: the built-in scale model."""

from __future__ import annotations

from pathlib import Path

import click

from almost_eval.cli.command_line import Commands, import_transformers, open_console
from almost_eval.errors import InputError, RunError, did_you_mean
from almost_train.cli.options import CONTEXT, UserPath, path_option


@click.group(cls=Commands, context_settings=CONTEXT)
def nano() -> None:
    """The built-in scale model: pre-train its language models from scratch."""


@nano.command()
@click.option("--output", required=True, type=UserPath(), help="Folder of the family.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of weights and order.")
@click.option("--sizes", default="small,medium,large", show_default=True, help="Which, by commas.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=1), help="Models at a time.")
def pretrain(output: Path, seed: int, sizes: str, workers: int) -> int:
    """Pre-train the vanilla models on the nano world, from scratch.

    \b
    Example:
      almost-train nano pretrain --output runs/family --seed 0
    """
    from rich.table import Table

    from almost_train.nano.pretrain import SIZES, pretrain_family

    names = [name.strip() for name in sizes.split(",") if name.strip()]
    for name in names:
        if name not in SIZES:
            raise InputError(f"unknown size {name!r}; {did_you_mean(name, SIZES)}")
    import_transformers()
    table = Table("model", "parameters", "tokens", "seconds", "loss, nats", "facts known")
    try:
        results = pretrain_family(output, seed=seed, sizes=names, workers=workers)
    except KeyboardInterrupt:  # the usual line says that the same command goes on: here a model is made in one go
        raise RunError("interrupted; models that were not finished are lost: begin again in another --output") from None
    for result in results:
        table.add_row(
            f"vanilla-{result.size}",
            f"{result.parameters:,}",
            f"{result.tokens:,}",
            f"{result.seconds:.0f}",
            f"{result.loss:.3f}",
            f"{result.fact_accuracy:.0%}",
        )
    open_console().print(table)
    return 0


@nano.command()
@path_option("--pipeline", "The folder of a finished `almost-train run nano`.")
@path_option("--output", "Where to write reward, sft and almost.")
def collect(pipeline: Path, output: Path) -> int:
    """Make the shipped models of a finished nano pipeline: fp16, each with a card.

    \b
    Example:
      almost-train nano collect --pipeline runs/nano --output runs/family
    """
    from almost_train.nano.family import collect as collect_family

    import_transformers()
    for folder in collect_family(pipeline, output):
        click.echo(str(folder))
    return 0
