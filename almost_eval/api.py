"""What `almost_eval` offers to a program: five names, each a thin way to what the commands use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from almost_eval.compare.comparison import Comparison, compare_runs
from almost_eval.engines.build import EngineOptions
from almost_eval.engines.hf import HFEngine as HFEngine
from almost_eval.errors import InputError, did_you_mean
from almost_eval.rewards.hf import HFRewardModel as RewardModel
from almost_eval.run.store import read_results, read_samples, read_spec
from almost_eval.tasks.facts import Preset
from almost_eval.tasks.registry import TASKS, task_class, task_classes
from almost_eval.types import SampleRecord

__all__ = ["FinishedRun", "HFEngine", "RewardModel", "compare", "evaluate", "load_run"]


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run folder, read."""

    folder: Path
    spec: Mapping[str, Any]
    """Everything that decided the numbers: `spec.json`."""
    samples: Sequence[SampleRecord]
    """One record a sample, without the texts: `samples.jsonl`."""
    results: Mapping[str, Any]
    """Metrics with their intervals, validity and provenance: `results.json`."""


def evaluate(
    model: Any,
    task: str,
    *,
    output: str | Path | None = None,
    engine: str = "hf",
    data: str | None = None,
    data_root: str | Path | None = None,
    prompt_set: str | None = None,
    template: str = "auto",
    limit: int | None = None,
    seed: int = 0,
    allow: Mapping[str, float] | None = None,
    **more: Any,
) -> FinishedRun:
    """Run a benchmark, or go on with it, as the command of that name does.

    Args:
        model: a checkpoint directory, hub id or built-in name; or an engine or reward model that is open already,
            which several tasks may then share.
        task: a name of the registry, or one of `all` that stands for a protocol (`hhh-likelihood`).
        output: the run folder; the default is named by the run, under `runs`.
        engine: `hf`, `vllm` or `openai`.
        data: `hub` or `nano`; built-in models default to nano.
        data_root: a folder laid out like the hub, looked in first.
        prompt_set: `official` or `builtin`.
        template: see `load_template`.
        limit: samples of each category, subject or task.
        seed: of whatever is drawn.
        allow: check -> share of samples that it may flag, as in `--allow`.
        more: settings of the task (see its `task_settings`) and fields of `EngineOptions` (`dtype`, `device`, ...).

    Raises:
        InputError: an unknown task or setting; whatever the model, the data or the folder refuse.
        RunError: the run could not finish; the same call goes on.
    """
    from almost_eval.progress import progress_for
    from almost_eval.run.runner import RunRequest, open_run
    from almost_eval.run.validity import parse_allowed

    presets = {preset.name: (cls.name, preset) for cls in task_classes() for preset in cls.presets}
    if task not in presets and task not in TASKS:
        raise InputError(f"unknown task {task!r}; {did_you_mean(task, {**presets, **TASKS})}")
    name, preset = presets.get(task, (task, Preset(task)))
    stated = {setting.name: setting for setting in task_class(name).task_settings}
    if task in presets and preset.protocol:
        del stated["protocol"]
    options = {field.name for field in fields(EngineOptions)}
    if unknown := next((key for key in more if key not in stated.keys() | options), None):
        raise InputError(f"{task} has no setting {unknown!r}; {did_you_mean(unknown, stated.keys() | options)}")
    settings = {**preset.settings, **{key: value for key, value in more.items() if key in stated}}
    protocol = str(settings.pop("protocol", preset.protocol))
    if lacking := next((key for key, setting in stated.items() if setting.required and not settings.get(key)), None):
        raise InputError(f"{task}: name {lacking}, as in {lacking}=[...]: {stated[lacking].help}")
    is_open = not isinstance(model, str | Path)
    reward = protocol == "reward"
    if is_open:
        _check_open(model, task, {*more} | ({"template"} if template != "auto" else set()), options, reward=reward)
    request = RunRequest(
        task=name,
        protocol=protocol,
        settings=settings,
        model=model.checkpoint.name if is_open else str(model),
        engine=EngineOptions(
            "hf" if is_open else engine, **{key: value for key, value in more.items() if key in options}
        ),
        data=data,
        data_root=None if data_root is None else str(data_root),
        prompt_set=prompt_set,
        template=template,
        limit=limit,
        seed=seed,
        allowed=parse_allowed([f"{check}={share}" for check, share in (allow or {}).items()]),
        output=Path(output) if output else None,
    )
    run = open_run(request, model if is_open else None)
    folder = request.output or run.default_folder()
    run.execute(folder, progress_for())
    return load_run(folder)


def _check_open(model: Any, task: str, named: set[str], options: set[str], *, reward: bool) -> None:
    """Refuse what belongs to a model that is yet to be opened, and a model of the wrong kind."""
    opened_with = options | ({"template"} if reward else set())
    if at := next(iter(sorted(named & opened_with)), None):
        raise InputError(f"{at} belongs to a model that is yet to be opened; give it where you open it")
    if not hasattr(model, "score" if reward else "loglikelihood"):
        wanted = "a RewardModel" if reward else "an engine"
        raise InputError(f"{task} asks {wanted}, and was given a {type(model).__name__}")


def load_run(folder: str | Path) -> FinishedRun:
    """Read a run folder that a command or `evaluate` has finished.

    Raises:
        StoreError: not a run folder, or not finished.
    """
    folder = Path(folder)
    results = read_results(folder)
    return FinishedRun(folder, read_spec(folder), tuple(read_samples(folder)), results)


def compare(run_a: FinishedRun | str | Path, run_b: FinishedRun | str | Path, *, seed: int = 0) -> Comparison:
    """Is B better than A? Paired on the samples that both scored.

    Args:
        run_a: what `evaluate` or `load_run` gave, or a run folder.
        run_b: the other.
        seed: of the bootstrap.

    Raises:
        InputError: the runs are of two tasks, or share no sample.
    """
    a, b = (run.folder if isinstance(run, FinishedRun) else Path(run) for run in (run_a, run_b))
    return compare_runs(a, b, seed=seed)
