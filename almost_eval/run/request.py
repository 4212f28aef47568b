"""What a run is to do: one record that the command line, Python, `all`, `tax`, `parity` and `verify` all build.

`open_run` makes a run of it: data, task, model (without weights), prompts, in that order, so that whatever cannot work
is refused before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from almost_eval.data.sources import DataSource, find_data
from almost_eval.engines.build import EngineOptions, loglikelihood_engine
from almost_eval.errors import InputError, did_you_mean
from almost_eval.models.chat import ChatTemplate, load_template
from almost_eval.nano import BUILT_IN, DEFAULT_MODEL, DEFAULT_REWARD_MODEL
from almost_eval.rewards.build import reward_model
from almost_eval.run.runner import Run
from almost_eval.tasks.base import Task, resolve_prompting
from almost_eval.tasks.facts import SettingValue
from almost_eval.tasks.registry import build_task, task_class


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A task, the model it is put to, and how."""

    task: str
    """A name of `tasks.registry.TASKS`."""
    protocol: str = ""
    """Empty is the task's default."""
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    """The task's own (`Task.task_settings`); what is left out has its default."""
    model: str | None = None
    """Checkpoint directory, hub id, built-in or served name; None is the built-in model for the task."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    data: str | None = None
    """`hub` or `nano`; None is nano for built-in models and the hub for others."""
    data_root: str | None = None
    """A folder laid out like the hub, looked in first."""
    prompt_set: str | None = None
    """`official` or `builtin`; None is by the data."""
    template: str = "auto"
    """See `load_template`; `none` sends prompts as they are."""
    limit: int | None = None
    """Samples of each category, subject or task."""
    seed: int = 0
    """Recorded, and of whatever is drawn."""
    allowed: Mapping[str, float] | None = None
    """Shares of samples for the validity gate; None is the defaults."""
    output: Path | None = None
    """The run folder; None is named by the run, under `runs`."""

    @property
    def built_in(self) -> bool:
        """Whether the model is a built-in one. What an endpoint serves is one only where it is named."""
        return (self.model or DEFAULT_MODEL) in BUILT_IN and (self.engine.engine != "openai" or self.model is not None)

    def source(self) -> DataSource:
        """Where the data comes from.

        Raises:
            InputError: an unknown name, or a root that is not there.
        """
        return find_data(self.data, self.data_root, built_in_model=self.built_in)


def complete_settings(request: RunRequest) -> dict[str, Any]:
    """The task's settings with defaults where the request has none.

    Raises:
        InputError: an unknown task, or a setting it does not have.
    """
    stated = {setting.name: setting for setting in task_class(request.task).task_settings}
    if unknown := next((name for name in request.settings if name not in stated), None):
        raise InputError(f"{request.task} has no setting {unknown!r}; {did_you_mean(unknown, stated)}")
    defaults = {name: setting.default for name, setting in stated.items() if name != "protocol"}
    return {**defaults, **request.settings}


def open_run(request: RunRequest, model: Any = None) -> Run:
    """The run that a request describes, checked and ready; no weight is loaded.

    Args:
        request: what is to be done.
        model: an engine or reward model that is open already, instead of the one that the request names.

    Raises:
        InputError: whatever data, task, model or prompts refuse.
    """
    settings = complete_settings(request)
    task = build_task(request.task, request.protocol, {**settings, "limit": request.limit}, request.source())
    return open_task(task, request, model)


def open_task(task: Task, request: RunRequest, model: Any = None) -> Run:
    """The same for a task that is built already; the request's task, settings and data are not read.

    Raises:
        InputError: whatever model or prompts refuse.
    """
    if task.requires == "reward":
        return Run(task, _scorer(request, model), seed=request.seed, allowed=request.allowed)
    if model is None and task.requires == "loglikelihood" and request.engine.speculative_config:
        raise InputError(
            f"{request.task} scores given texts, so there is no token to guess: leave out --speculative-config"
        )
    engine: Any = model or loglikelihood_engine(request.model or DEFAULT_MODEL, request.engine)
    task.prompting = resolve_prompting(
        task.data, request.prompt_set, request.template, engine.tokenizer, own_prompts=task.own_prompts
    )
    task.check_prompting()
    return Run(task, engine, seed=request.seed, allowed=request.allowed)


def _scorer(request: RunRequest, model: Any) -> Any:
    if request.prompt_set:
        raise InputError("--prompt-set: a reward model reads the dialogue itself, so it takes no prompts")
    template = _reward_template(request.template)
    if model is not None:
        return model
    served = request.engine.engine == "openai"  # a server has one, whatever its name
    return reward_model(request.model if served else request.model or DEFAULT_REWARD_MODEL, request.engine, template)


def _reward_template(choice: str) -> ChatTemplate | str | None:
    if choice == "none":
        raise InputError("--template none: a reward model reads a conversation, so it needs a template; use auto")
    if choice == "tokenizer":
        raise InputError("--template tokenizer: auto is the tokenizer's own for a reward model; leave it out")
    if choice.startswith("tokenizer:"):
        return choice  # one of several: known where the tokenizer is
    return None if choice == "auto" else load_template(choice, None)
