"""Groups of flags that several commands share, the `RunRequest` that they add up to, and how a run is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import SEED, FiniteRange, open_console, print_json
from almost_eval.engines.build import EngineOptions, Flag

if TYPE_CHECKING:
    from almost_eval.run.runner import RunRequest
    from almost_eval.run.shards import Mark, Shard
    from almost_eval.types import JSONMapping, JSONObject

Values = dict[str, Any]
"""Values of a command's flags by name, as click checked them."""


def engine_flag(
    option: Field[Any], help: str = "", default: object = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The flag of a field of `EngineOptions`; `help` and `default` instead of its own."""
    flag: Flag = option.metadata["flag"]
    flag = replace(flag, help=help or flag.help)
    name = f"--{option.name.replace('_', '-')}"
    make = partial(click.option, help=flag.help, show_default=flag.is_shown)
    if flag.kind is bool:
        return make(f"{name}/--no-{name[2:]}", default=True) if option.default else make(name, is_flag=True)
    if flag.is_repeatable:
        return make(name, multiple=True, callback=joined)
    if flag.bare is not None:
        return make(name, is_flag=False, flag_value=flag.bare, metavar="[ADDRESS]")
    if flag.is_auto:
        return make(name, default="auto", callback=_count_or_auto)
    return make(name, default=default or (option.default if flag.is_shown else None), type=_type(flag))


def joined(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> str | None:
    """A flag that may be repeated, as one string with commas; None where it is absent."""
    return ",".join(values) or None


def _type(flag: Flag) -> click.ParamType | None:
    if flag.kind is str:
        return None
    if flag.kind is int:
        return click.IntRange(min=flag.least)
    return FiniteRange(flag.above, flag.most, min_open=flag.above is not None)


def _count_or_auto(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of at least 1")
    return int(value)


ENGINE_FIELDS = {option.name: option for option in fields(EngineOptions) if option.metadata["flag"].help}
"""Name of an option of the engine -> its field, of those that have a flag."""
GENERATION_FIELDS = {
    name: option for name, option in ENGINE_FIELDS.items() if option.metadata["engines"] or name == "engine"
}
"""The same where text is generated and nothing is scored."""
ENGINE_OPTIONS = [engine_flag(option) for option in ENGINE_FIELDS.values()]
"""Everything but the model itself."""


def engine_options(values: Mapping[str, Any]) -> EngineOptions:
    """The options that a command's flags describe; what is None is the engine's own choice."""
    names = {field.name for field in fields(EngineOptions)}
    return EngineOptions(**{name: value for name, value in values.items() if name in names and value is not None})


def _trackers(context: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        return ()
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
TEMPLATE = click.option(
    "--template",
    default="auto",
    show_default=True,
    help="auto, none, tokenizer, almost, alpaca, vicuna, dolly, oasst, a FILE.",
)
DATA_OPTIONS = [DATA, DATA_ROOT, PROMPT_SET, TEMPLATE, LIMIT]


def _shard(context: click.Context, param: click.Parameter, value: str | None) -> Shard | None:
    if value is None:
        return None
    from almost_eval.run.shards import Shard

    return Shard.parse(value)


_SHARD = click.option(
    "--shard",
    metavar="K/N",
    callback=_shard,
    help="Compute part K of N alone, in a folder inside --output; almost-eval merge joins the parts.",
)


def _slurm(context: click.Context, param: click.Parameter, value: int | None) -> None:
    if value is not None and not context.resilient_parsing:
        from almost_eval.cli.slurm import print_script

        print_script(context, str(param.name), value)


_SLURM = click.option(
    "--slurm",
    type=click.IntRange(min=1),
    metavar="N",
    expose_value=False,
    callback=_slurm,
    help="Print a script for Slurm: an array job of N shards of this command, then the merge.",
)


def SHARD(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command whose samples can be divided among processes that know nothing of each other."""
    return _SHARD(_SLURM(command))


RUN_OPTIONS = [
    click.option("--output", type=click.Path(path_type=Path), help="Run folder; the default is named by the run."),
    click.option("--seed", default=0, show_default=True, type=SEED, help="Of whatever is drawn."),
    click.option("--allow", multiple=True, metavar="CHECK=SHARE", help="Share of samples a validity check may flag."),
    LOG_TO,
    click.option("--dry-run", is_flag=True, help="Show the first prompt and the lengths; load no weights."),
    click.option("--json", "as_json", is_flag=True, help="Print results.json instead of the table."),
]


def run_request(
    values: Mapping[str, Any], task: str, protocol: str = "", settings: Mapping[str, Any] = {}
) -> RunRequest:
    """The request that the flags of `MODEL_OPTIONS`, `DATA_OPTIONS` and `RUN_OPTIONS` describe, as far as the command
    has them.

    Raises:
        InputError: `--allow` names an unknown check, or no share.
    """
    from almost_eval.run.runner import RunRequest
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


# --- what is shown ---


def show_shard(mark: Mark, *, as_json: bool) -> int:
    """Say what a finished shard is, and what is to be done with it; returns the exit code."""
    if as_json:
        facts = {"shard": str(mark.shard), "folder": str(mark.folder), "samples": len(mark.ids)}
        print_json(facts | (mark.finished or {}))
    else:
        click.echo(
            f"shard {mark.shard} is done: {len(mark.ids)} of {mark.total} samples, in {mark.folder}\n"
            f"no results yet; once all {mark.shard.of} are done: almost-eval merge {mark.folder.parent}"
        )
    return 0


def show_plan(facts: JSONMapping, *, as_json: bool) -> int:
    """Print what `--dry-run` tells; returns the exit code."""
    if as_json:
        print_json(facts)
    else:
        from almost_eval.report.console import print_preflight

        print_preflight(facts, open_console())
    return 0


def show_results(results: JSONObject, folder: Path | None, *, as_json: bool) -> int:
    """Print `results.json`, or its table; returns the exit code: 3 where the headline is withheld."""
    if as_json:
        print_json(results)
    else:
        from almost_eval.report.console import print_results

        print_results(results, open_console(), folder=str(folder) if folder else None)
    return 0 if results["validity"]["passed"] else 3
