"""Options that several commands share, and how a stage's result is shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from almost_eval.cli.command_line import open_console, print_json
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from click.decorators import FC

    from almost_eval.data.sources import DataSource

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""click's settings of every group."""


class UserPath(click.Path):
    """A path, as the shell writes it: of `--output=~/runs` many shells leave the `~`, and so does a `--config` file."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """With the home folder for `~`."""
        return super().convert(os.path.expanduser(value), param, ctx)


def path_option(name: str, help: str) -> Callable[[FC], FC]:
    """A required option that takes a path."""
    return click.option(name, required=True, type=UserPath(), help=help)


OUTPUT = path_option("--output", "The stage's folder; made if absent, and gone on with if it holds the same stage.")
HELD_OUT = click.option("--held-out", type=UserPath(), help="prompts.jsonl of an evaluation: kept out, word for word.")
PUSH_TO_HUB = click.option(
    "--push-to-hub", metavar="ORG/NAME", help="Upload the checkpoint to this repository of the hub. [env: HF_TOKEN]"
)
DATA_ROOT = click.option("--data-root", help="Folder with the official prompt files. [env: ALMOST_DATA_ROOT]")


def _places(context: click.Context, option: click.Parameter, items: tuple[str, ...]) -> dict[str, str]:
    for item in items:
        if not all(item.partition("=")):
            raise click.BadParameter(f"{item!r} is not NAME=PATH", context, option)
    return dict(item.split("=", 1) for item in items)


RECIPE_OPTIONS = [
    click.option(
        "--set",
        "values",
        multiple=True,
        metavar="SECTION.SETTING=VALUE",
        help="In place of the recipe's own; repeat it. SECTION=null leaves a section out.",
    ),
    click.option(
        "--place",
        "places",
        multiple=True,
        metavar="NAME=PATH",
        callback=_places,
        help="The folder or file to take where the recipe names a model or a file: org/model=./folder; repeat it.",
    ),
    click.option(
        "--scale",
        type=click.Choice(["full", "tiny"]),
        default="full",
        show_default=True,
        help="tiny: the recipe's stages and code paths with small numbers and one small model, in minutes.",
    ),
    click.option(
        "--scale-model",
        help="tiny: stands for every model.  [smollm2-135m-instruct in the folder of env ALMOST_REAL_MODELS]",
    ),
]
"""Of the commands that take a recipe."""


def data_for(prompt_set: str, data_root: str | None) -> DataSource:
    """Where the files of a prompt set are looked for."""
    from almost_eval.data.sources import find_data

    return find_data("nano" if prompt_set == "nano" else None, None if prompt_set == "nano" else data_root)


def show(result: JSONObject, as_json: bool) -> None:
    """Print a stage's result as a table or as JSON."""
    from almost_train.common.processes import is_main

    if not is_main():  # under `accelerate launch` the result is printed once
        return
    if as_json:
        print_json(result)
        return
    from rich.table import Table

    from almost_eval.run.store import flat

    table = Table("metric", "value", title=result["stage"], title_justify="left")
    for name, value in flat(result["metrics"], joint="/").items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console = open_console()
    console.print(table)
    for name, output in result["outputs"].items():
        console.print(f"{name}: {output['path']}", soft_wrap=True)
