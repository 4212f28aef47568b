"""The options of a run, and the run that they ask for: one way for the commands, for `all` and for Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.engine_options import ENGINE_OPTIONS, engine_options
from almost_eval.cli.startup import import_transformers
from almost_eval.errors import InputError
from almost_eval.run.trackers import LOG_TO

if TYPE_CHECKING:
    from almost_eval.run.runner import Run
    from almost_eval.tasks.base import Task

MODEL_OPTIONS = [
    click.option("--model", help="Checkpoint directory, hub id, built-in or served name."),
    *ENGINE_OPTIONS,
]
DATA_ROOT = click.option("--data-root", help="Folder laid out like the hub, looked in first. [env: ALMOST_DATA_ROOT]")
DATA_OPTIONS = [
    click.option("--data", help="Data: hub (the real sets) or nano (built in; the default for built-in models)."),
    DATA_ROOT,
    click.option("--prompt-set", help="official (the default on real data) or builtin (our own wording)."),
    click.option(
        "--template",
        default="auto",
        show_default=True,
        help="auto, none, almost, alpaca, vicuna, dolly, oasst, a FILE.",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Samples of each category, subject or task."),
]
RUN_OPTIONS = [
    click.option("--output", type=click.Path(path_type=Path), help="Run folder; the default is named by the run."),
    click.option("--seed", default=0, show_default=True, help="Of whatever is drawn."),
    click.option("--allow", multiple=True, metavar="CHECK=SHARE", help="Share of samples a validity check may flag."),
    LOG_TO,
    click.option("--dry-run", is_flag=True, help="Show the first prompt and the lengths; load no weights."),
    click.option("--json", "as_json", is_flag=True, help="Print results.json instead of the table."),
]


def prepare_run(
    build: Callable[[Any, Any], Task],
    given: Mapping[str, Any],
    *,
    reward: bool = False,
    own_prompts: bool = False,
    allowed: Mapping[str, float] | None = None,
    model: Any = None,
) -> Run:
    """Model (without weights), data, prompts, task: everything that can be refused early, in that order.

    Args:
        build: makes the task of a data source and its prompting.
        given: values of `MODEL_OPTIONS` and `DATA_OPTIONS`, and `seed`.
        reward: the task asks a reward model.
        own_prompts: all prompts are few-shot documents; see `resolve_prompting`.
        allowed: shares for the validity gate, or None for the defaults.
        model: an engine or reward model that is open already, instead of the one that `given` names.

    Raises:
        InputError: whatever one of them refuses.
    """
    from almost_eval.data.sources import find_data
    from almost_eval.nano import BUILT_IN, DEFAULT_MODEL, DEFAULT_REWARD_MODEL
    from almost_eval.run.runner import Run
    from almost_eval.tasks.base import Prompting, resolve_prompting

    name = given["model"] or (DEFAULT_REWARD_MODEL if reward else DEFAULT_MODEL)
    chosen = engine_options(given)
    # What an endpoint serves is a built-in model only where somebody says so.
    built_in = name in BUILT_IN and (chosen.engine != "openai" or given["model"] is not None)
    data = find_data(given["data"], given["data_root"], built_in_model=built_in)
    import_transformers()
    if reward:
        if given["prompt_set"]:
            raise InputError("--prompt-set: a reward model reads the dialogue itself, so it takes no prompts")
        served = chosen.engine == "openai"  # a server has one, whatever its name
        from almost_eval.rewards.build import reward_model

        template = _reward_template(given["template"])
        scorer = model or reward_model(given["model"] if served else name, chosen, template)
        return Run(build(data, Prompting()), scorer, seed=given["seed"], allowed=allowed)
    from almost_eval.engines.build import loglikelihood_engine

    engine: Any = model or loglikelihood_engine(name, chosen)
    prompting = resolve_prompting(
        data, given["prompt_set"], given["template"], engine.tokenizer, own_prompts=own_prompts
    )
    return Run(build(data, prompting), engine, seed=given["seed"], allowed=allowed)


def _reward_template(choice: str) -> Any:
    from almost_eval.models.chat import load_template

    if choice == "none":
        raise InputError("--template none: a reward model reads a conversation, so it needs a template; use auto")
    return None if choice == "auto" else load_template(choice)
