"""Groups of flags that several commands share, and the `RunRequest` that they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.engine_options import ENGINE_OPTIONS, engine_options

if TYPE_CHECKING:
    from almost_eval.run.request import RunRequest

Values = dict[str, Any]
"""Values of a command's flags by name, as click checked them."""


def _trackers(context: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    from almost_eval.run.trackers import check_trackers

    return check_trackers([name.strip() for item in value for name in item.split(",") if name.strip()])


LOG_TO = click.option(
    "--log-to",
    multiple=True,
    callback=_trackers,
    metavar="TRACKER",
    help="tensorboard, wandb or jsonl, by commas or repeated: figures go there too.  [none]",
)
"""The option of every command that trains or evaluates; refused before anything is loaded."""
MODEL_OPTIONS = [
    click.option("--model", help="Checkpoint directory, hub id, built-in or served name."),
    *ENGINE_OPTIONS,
]
DATA_ROOT = click.option("--data-root", help="Folder laid out like the hub, looked in first. [env: ALMOST_DATA_ROOT]")
LIMIT = click.option("--limit", type=click.IntRange(min=1), help="Samples of each category, subject or task.")
DATA = click.option("--data", help="Data: hub (the real sets) or nano (built in; the default for built-in models).")
PROMPT_SET = click.option("--prompt-set", help="official (the default on real data) or builtin (our own wording).")
DATA_OPTIONS = [
    DATA,
    DATA_ROOT,
    PROMPT_SET,
    click.option(
        "--template",
        default="auto",
        show_default=True,
        help="auto, none, almost, alpaca, vicuna, dolly, oasst, a FILE.",
    ),
    LIMIT,
]
RUN_OPTIONS = [
    click.option("--output", type=click.Path(path_type=Path), help="Run folder; the default is named by the run."),
    click.option("--seed", default=0, show_default=True, help="Of whatever is drawn."),
    click.option("--allow", multiple=True, metavar="CHECK=SHARE", help="Share of samples a validity check may flag."),
    LOG_TO,
    click.option("--dry-run", is_flag=True, help="Show the first prompt and the lengths; load no weights."),
    click.option("--json", "as_json", is_flag=True, help="Print results.json instead of the table."),
]


def run_request(
    values: Mapping[str, Any], task: str, protocol: str = "", settings: Mapping[str, Any] = {}
) -> RunRequest:
    """The request that the flags of `MODEL_OPTIONS`, `DATA_OPTIONS` and `RUN_OPTIONS` describe.

    Args:
        values: of these flags, as far as the command has them; others are not read.
        task: see `RunRequest`.
        protocol: see `RunRequest`.
        settings: see `RunRequest`.

    Raises:
        InputError: `--allow` names an unknown check, or no share.
    """
    from almost_eval.run.request import RunRequest
    from almost_eval.run.validity import parse_allowed

    names = ("model", "data", "data_root", "prompt_set", "template", "limit", "seed", "output")
    return RunRequest(
        task=task,
        protocol=protocol,
        settings=settings,
        engine=engine_options(values),
        allowed=parse_allowed(values["allow"]) if "allow" in values else None,
        **{name: values[name] for name in names if name in values},
    )
