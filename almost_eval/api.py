"""What `almost_eval` offers to a program: five names, each a thin way to what the commands use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from almost_eval.cli.run_options import prepare_run
from almost_eval.compare.comparison import Comparison, compare_runs
from almost_eval.engines.build import EngineOptions
from almost_eval.engines.hf import HFEngine as HFEngine
from almost_eval.errors import InputError, did_you_mean
from almost_eval.rewards.hf import HFRewardModel as RewardModel
from almost_eval.run.store import read_results, read_samples, read_spec
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
        task: `hhh` (or `hhh-choice`, `hhh-likelihood`, `hhh-reward`), `truthfulqa`, `mmlu` or `harness`.
        output: the run folder; the default is named by the run, under `runs`.
        engine: `hf`, `vllm` or `openai`.
        data: `hub` or `nano`; built-in models default to nano.
        data_root: a folder laid out like the hub, looked in first.
        prompt_set: `official` or `builtin`.
        template: see `load_template`.
        limit: samples of each category, subject or task.
        seed: of whatever is drawn.
        allow: check -> share of samples that it may flag, as in `--allow`.
        more: settings of the task (`metrics`, `shots`, `subjects`, `tasks`, `normalise`) and fields of
            `EngineOptions` (`dtype`, `device`, `base_url`, ...).

    Raises:
        InputError: an unknown task or setting; whatever the model, the data or the folder refuse.
        RunError: the run could not finish; the same call goes on.
    """
    from almost_eval.progress import progress_for
    from almost_eval.run.validity import parse_allowed
    from almost_eval.suite.plan import PARTS, Part

    parts = {**PARTS, "hhh": PARTS["hhh-choice"], "harness": Part("harness", {"tasks": (), "shots": None})}
    if task not in parts:
        raise InputError(f"unknown task {task!r}; {did_you_mean(task, parts)}")
    part = parts[task]
    taken = set(part.settings) | ({"normalise"} if task == "hhh-likelihood" else set())
    known = {field.name for field in fields(EngineOptions)}
    if unknown := next((name for name in more if name not in taken | known), None):
        raise InputError(f"{task} has no setting {unknown!r}; {did_you_mean(unknown, taken | known)}")
    settings = dict(part.settings) | {name: value for name, value in more.items() if name in taken}
    if task == "harness" and not settings["tasks"]:
        raise InputError("harness: name lm-eval's tasks, as in tasks=['arc_easy']")
    is_open = not isinstance(model, str | Path)
    opened_with = known | ({"template"} if part.reward else set())
    asked = {*more} | ({"template"} if template != "auto" else set())
    if is_open and (at := next((name for name in sorted(asked & opened_with)), None)):
        raise InputError(f"{at} belongs to a model that is yet to be opened; give it where you open it")
    if is_open and not hasattr(model, "score" if part.reward else "loglikelihood"):
        wanted = "a RewardModel" if part.reward else "an engine"
        raise InputError(f"{task} asks {wanted}, and was given a {type(model).__name__}")
    given = {
        "model": model.checkpoint.name if is_open else str(model),
        "engine": "hf" if is_open else engine,
        "data": data,
        "data_root": data_root,
        "prompt_set": prompt_set,
        "template": template,
        "seed": seed,
        **{name: value for name, value in more.items() if name in known},
    }
    run = prepare_run(
        Part(part.task, settings, protocol=part.protocol).builder(limit),
        given,
        reward=part.reward,
        own_prompts=Part(part.task, settings).own_prompts,
        allowed=parse_allowed([f"{check}={share}" for check, share in (allow or {}).items()]),
        model=model if is_open else None,
    )
    folder = Path(output) if output else run.default_folder()
    run.execute(folder, progress_for())
    return load_run(folder)


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
