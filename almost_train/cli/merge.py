"""`almost-train merge` (an adapter and its base become one checkpoint) and `merge-shards` (shards, their stage)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from almost_eval.cli.command_line import import_transformers
from almost_eval.errors import InputError
from almost_train.cli.options import UserPath, path_option, show

MERGERS = {
    "synthesize-responses": "almost_train.synthetic.responses:merge_responses",
    "self_play": "almost_train.self_play.run:merge_self_play",
}
"""Stage -> what joins its shards."""


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


@click.command("merge-shards")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...", type=UserPath())
@click.option("--output", type=UserPath(), help="Folder of the whole stage; the default is that of the shards.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json instead of the table.")
def merge_shards(folders: tuple[Path, ...], output: Path | None, as_json: bool) -> int:
    """Join the shards of a stage (--shard K/N) to the whole stage. Loads no model.

    \b
    DIR is the folder of a shard, or one that holds shards. A shard that is missing, there twice, not finished or of
    another stage is named, and nothing is written. (merge joins an adapter and its base.)

    \b
    Example:
      almost-train self-play --prompts runs/prompts/prompts.jsonl --reward-model runs/reward/model \\
        --output runs/self-play --shard 1/2
      almost-train self-play --prompts runs/prompts/prompts.jsonl --reward-model runs/reward/model \\
        --output runs/self-play --shard 2/2
      almost-train merge-shards runs/self-play
    """
    from almost_eval.run.shards import find_marks, whole_folder
    from almost_train.common.shards import check_stages, read_stage

    marks = find_marks(folders)
    stage = read_stage(marks[0].folder)["stage"]
    if stage not in MERGERS:
        raise InputError(f"{marks[0].folder} is of the stage {stage!r}; stages with shards: {', '.join(MERGERS)}")
    check_stages(marks)
    module, _, name = MERGERS[stage].partition(":")
    show(getattr(import_module(module), name)(marks, whole_folder(marks, output)), as_json)
    return 0
