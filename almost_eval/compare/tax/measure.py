"""Runs what the alignment tax is made of: for each checkpoint one engine, each measure a run folder that resumes.

`DIR/<checkpoint>/{hhh,truthfulqa,mmlu,answers,rewards,likelihoods,likelihoods-before}`. The policy `before` comes last,
as it also says how likely it finds the others' answers: then every engine is opened once.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from almost_eval.compare.comparison import compare_runs
from almost_eval.compare.tax import tax
from almost_eval.compare.tax.tasks import AnswerLikelihoods, AnswerRewards, Answers, HeldOut, nano_prompts, read_prompts
from almost_eval.compare.tax.training import TrainingRun, as_checkpoint, read_training
from almost_eval.data.sources import DataSource
from almost_eval.engines.build import loglikelihood_engine
from almost_eval.errors import InputError, did_you_mean
from almost_eval.files import write_json
from almost_eval.models.chat import load_template, special_tokens
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano import BUILT_IN, DEFAULT_REWARD_MODEL
from almost_eval.progress import Progress
from almost_eval.rewards.build import reward_model
from almost_eval.run import provenance
from almost_eval.run.request import RunRequest, open_run
from almost_eval.run.runner import Run
from almost_eval.run.store import read_results, read_samples
from almost_eval.stats import mean_metric
from almost_eval.tasks.base import Prompting, Task
from almost_eval.tasks.registry import comparison_presets

_BARE = ("model", "policy", "final")
"""Folder names that say nothing without the one above them."""
_NUMBER = re.compile(r"(?:^|[-_])(\d+)$")


@dataclass(frozen=True, slots=True)
class TaxPlan:
    """What is to be measured, checked as far as it can be with no weights loaded."""

    models: Mapping[str, str]
    """Label -> checkpoint; `before` first."""
    steps: Sequence[float]
    steps_are: str
    base: RunRequest
    """Engine, data, prompts, limit and seed of every run."""
    tasks: Sequence[str]
    shots: int
    prompts: Sequence[HeldOut]
    prompts_are: str
    max_new_tokens: int
    reward_model: str | None
    output: Path
    training: TrainingRun | None = None

    @property
    def labels(self) -> list[str]:
        """Of the checkpoints, `before` first."""
        return list(self.models)

    def folder(self, label: str) -> Path:
        """Where a checkpoint's runs are."""
        return self.output / re.sub(r"[^\w+.-]", "_", label)

    def answers(self, label: str) -> Path:
        """The run folder of its answers."""
        return self.folder(label) / "answers"


def make_plan(
    before: str | None,
    after: Sequence[str],
    run: Path | None,
    output: Path,
    base: RunRequest,
    *,
    tasks: Sequence[str],
    shots: int,
    reward_model: str | None,
    prompts: Path | None,
    n_prompts: int,
    max_new_tokens: int,
) -> TaxPlan:
    """Find the checkpoints, the data, the prompts and the reward model.

    Raises:
        InputError: what is missing, or does not go together.
    """
    for name in tasks:
        if name not in tax.benchmarks():
            raise InputError(f"--tasks: unknown task {name!r}; {did_you_mean(name, tax.benchmarks())}")
    if base.engine.engine == "openai":
        raise InputError("--engine openai: the tax needs the checkpoints themselves; use hf or vllm")
    if (run is None) == (not after):
        raise InputError("give the checkpoints by --after CKPT (once for each), or by --run DIR, and not by both")
    training = read_training(run) if run else None
    if before is None:
        if training is None or training.before is None:
            raise InputError("--before CKPT is missing: the policy that training began with")
        before = str(training.before)
    find_checkpoint(before)
    nano = base.data == "nano" or (not base.data and not base.data_root and before in BUILT_IN)
    if training is not None:
        models, steps, steps_are = _of_training(training, before, output)
    else:
        models, steps, steps_are = _named([before, *after])
    for model in list(models.values())[1:]:
        find_checkpoint(model)
    reward_model = reward_model or (str(training.reward_model) if training and training.reward_model else None)
    if reward_model is None and nano:
        reward_model = DEFAULT_REWARD_MODEL
    file = prompts or (training.prompts if training else None)
    if file is not None:
        held_out, prompts_are = read_prompts(file, n_prompts), str(file)
    elif nano:
        held_out, prompts_are = nano_prompts(n_prompts, base.seed), "the nano world's eval pool"
    elif reward_model:
        raise InputError("--prompts FILE is missing (JSON Lines with id and prompt): the reward is that of answers")
    else:
        held_out, prompts_are = [], "none"
    if not tasks and not held_out:
        raise InputError(f"nothing to measure: name --tasks ({', '.join(tax.benchmarks())}), or give --prompts FILE")
    return TaxPlan(
        models=models,
        steps=steps,
        steps_are=steps_are,
        base=replace(base, data="nano" if nano else base.data or "hub"),
        tasks=tasks,
        shots=shots,
        prompts=held_out,
        prompts_are=prompts_are,
        max_new_tokens=max_new_tokens,
        reward_model=reward_model,
        output=output,
        training=training,
    )


def _of_training(training: TrainingRun, before: str, output: Path) -> tuple[dict[str, str], list[float], str]:
    like = find_checkpoint(before)
    models, steps = {"before": before}, [0.0]
    for step, folder in training.checkpoints:
        label = f"step-{step}"
        models[label] = str(as_checkpoint(folder, like, output / "checkpoints" / label))
        steps.append(float(step))
    return models, steps, "steps of training"


def _named(models: Sequence[str]) -> tuple[dict[str, str], list[float], str]:
    """Labels and steps of checkpoints that were named: the number at the end of the name where each has one."""
    names = [_name(model) for model in models]
    seen: Counter[str] = Counter()
    labelled = {}
    for name, model in zip(names, models, strict=True):
        seen[name] += 1
        labelled[f"{name}-{seen[name]}" if seen[name] > 1 else name] = model
    if len(labelled) < len(models):
        raise InputError(f"the checkpoints cannot be told apart by name ({', '.join(names)}); rename one")
    numbers = [_NUMBER.search(name) for name in names[1:]]
    steps = [float(number[1]) for number in numbers if number]
    if len(steps) == len(numbers) and steps == sorted(set(steps)) and steps[0] > 0:
        return labelled, [0.0, *steps], "numbers in the checkpoints' names, before at 0"
    return labelled, [float(place) for place in range(len(models))], "places in the order given"


def _name(model: str) -> str:
    if model.startswith("nano/"):
        return model
    path = Path(model)
    return f"{path.parent.name}/{path.name}" if path.name in _BARE and path.parent.name else path.name or model


# --- measuring ---


def measure(plan: TaxPlan, progress: Progress | None = None) -> tax.Tax:
    """Run what is missing, compare, judge, and write `tax.json`.

    Raises:
        InputError: what a run refuses; before its weights are loaded.
        RunError: a run could not finish; the same command goes on.
    """
    progress = progress or Progress()
    reward = _reward_model(plan)  # refused early; its weights are loaded when it scores
    plan.output.mkdir(parents=True, exist_ok=True)
    before, *others = plan.labels
    # Ids mean the same to both halves of KL only where the tokens are the same: known before any weight is loaded.
    engine: Any = loglikelihood_engine(plan.models[before], plan.base.engine)
    vocabulary = engine.tokenizer.get_vocab()
    _close(engine)
    setups: dict[str, AnswerSetup] = {}
    for label in [*others, before]:
        progress.note(f"{label}: {plan.models[label]}")
        _policy_runs(plan, label, setups, vocabulary, progress)
        gc.collect()  # the next model needs the memory of the one that is done with
    if reward is not None:
        for label in plan.labels if plan.prompts else ():
            setup = setups[label]
            task = AnswerRewards(plan.prompts, setup.data, setup.prompting, plan.answers(label))
            _execute(task, reward, plan, label, "rewards", progress)
        _close(reward)
    report = summarise(
        plan,
        [
            f"{label} and {before} have other tokens: KL is that of texts"
            for label in setups
            if not setups[label].of_tokens
        ],
    )
    write_json(plan.output / "tax.json", report.to_dict())
    return report


@dataclass(frozen=True, slots=True)
class AnswerSetup:
    """How a policy was prompted for its answers."""

    data: DataSource
    prompting: Prompting
    of_tokens: bool
    """Whether its tokens are those of the policy `before`."""


def _policy_runs(
    plan: TaxPlan, label: str, setups: dict[str, AnswerSetup], vocabulary: Mapping[str, int], progress: Progress
) -> None:
    """All runs that one engine is opened for."""
    engine: Any = loglikelihood_engine(plan.models[label], plan.base.engine)
    try:
        for name in plan.tasks:
            run = open_run(_request(plan, label, name), engine)
            run.execute(plan.folder(label) / name, progress)
        if not plan.prompts:
            return
        setups[label] = _answers(plan, label, engine, vocabulary, progress)
        if label != plan.labels[0]:
            _likelihoods(plan, label, engine, setups[label], "likelihoods", progress)
            return
        for other in plan.labels[1:]:
            _likelihoods(plan, other, engine, setups[other], "likelihoods-before", progress)
    finally:
        _close(engine)


def _request(plan: TaxPlan, label: str, task: str) -> RunRequest:
    preset = comparison_presets()[task]
    settings = {**preset.settings, **({"shots": plan.shots} if "shots" in preset.settings else {})}
    return replace(plan.base, model=plan.models[label], task=task, protocol=preset.protocol, settings=settings)


def _close(engine: Any) -> None:
    if hasattr(engine, "close"):  # vLLM's holds a process
        engine.close()


def _reward_model(plan: TaxPlan) -> Any:
    if plan.reward_model is None:
        return None
    # --max-length is about the policies; what does not fit the reward model's own context is counted.
    return reward_model(plan.reward_model, replace(plan.base.engine, max_length=None))


def _answers(plan: TaxPlan, label: str, engine: Any, vocabulary: Mapping[str, int], progress: Progress) -> AnswerSetup:
    """Have the policy answer every prompt."""
    choice = plan.base.template
    template = load_template(choice if choice != "none" else "auto", engine.tokenizer)
    data = plan.base.source()
    prompting = Prompting(None, template, special_tokens(engine.tokenizer), is_chosen=choice not in ("auto", "none"))
    task = Answers(plan.prompts, data, prompting, max_new_tokens=plan.max_new_tokens)
    _execute(task, engine, plan, label, "answers", progress)
    return AnswerSetup(data, prompting, engine.tokenizer.get_vocab() == vocabulary)


def _likelihoods(plan: TaxPlan, label: str, engine: Any, setup: AnswerSetup, name: str, progress: Progress) -> None:
    answers = plan.answers(label)
    task = AnswerLikelihoods(plan.prompts, setup.data, setup.prompting, answers, of_tokens=setup.of_tokens)
    if task.samples():  # all answers may be empty: then KL has no value
        _execute(task, engine, plan, label, name, progress)


def _execute(task: Task, model: Any, plan: TaxPlan, label: str, name: str, progress: Progress) -> None:
    Run(task, model, seed=plan.base.seed).execute(plan.folder(label) / name, progress)


# --- from runs to figures ---


def summarise(plan: TaxPlan, warnings: Sequence[str] = ()) -> tax.Tax:
    """The figures of finished runs; no model is needed."""
    labels = plan.labels
    policies, notes = [], list(warnings)
    for label, step in zip(labels, plan.steps, strict=True):
        policies.append(_policy(plan, label, step))
    comparisons = tax.adjusted(list(_comparisons(plan, policies, notes)), labels[0])
    findings = tax.findings(comparisons, labels)
    training = plan.training
    log = [asdict(row) for row in training.rows] if training else []
    first = read_results(plan.folder(labels[0]) / (plan.tasks[0] if plan.tasks else "answers"))["provenance"]
    facts = {
        "data": first["data_source"],
        "limit": plan.base.limit,
        "shots": plan.shots,
        "prompts": {"source": plan.prompts_are, "n": len(plan.prompts), "max_new_tokens": plan.max_new_tokens},
        "reward_model": plan.reward_model,
        "seed": plan.base.seed,
        "training_run": str(training.folder) if training else None,
        "warnings": list(dict.fromkeys(notes)),
        "versions": provenance.versions(),
        "command": provenance.command(),
    }
    sentence = tax.sentence(findings, labels)
    return tax.Tax(policies, plan.steps_are, comparisons, findings, sentence, log, facts)


def _policy(plan: TaxPlan, label: str, step: float) -> tax.MeasuredPolicy:
    folder, measures, digest = plan.folder(label), {}, None
    for name in plan.tasks:
        results = read_results(folder / name)
        digest = results["provenance"]["weight_digest"]
        measures[name] = results["metrics"][results["headline"]] | {"metric": results["headline"]}
    if plan.prompts:
        results = read_results(folder / "answers")
        digest = results["provenance"]["weight_digest"]
        measures |= {name: results["metrics"][name] for name in tax.MEASURES if name in results["metrics"]}
        if plan.reward_model is not None:
            measures["reward"] = read_results(folder / "rewards")["metrics"]["reward"]
        if label != plan.labels[0]:
            measures["kl"] = _kl(folder, len(plan.prompts))
    return tax.MeasuredPolicy(label, plan.models[label], step, digest, measures)


def _kl(folder: Path, n: int) -> dict[str, Any]:
    """Mean over the answers of the difference of the two likelihoods; an empty answer is unscored."""
    own, before = (
        {record.sample.id: record.score.value for record in read_samples(folder / name)}
        for name in ("likelihoods", "likelihoods-before")
    )
    values = [
        None if value is None or other is None else value - other
        for value, other in ((value, before.get(id)) for id, value in own.items())
    ]
    return mean_metric([*values, *[None] * (n - len(values))]).to_dict()


def _comparisons(plan: TaxPlan, policies: Sequence[tax.MeasuredPolicy], notes: list[str]) -> Iterator[tax.Paired]:
    """Every measure of every checkpoint against `before`, and against the checkpoint before it."""
    folders = {name: (name, policies[0].measures[name]["metric"]) for name in plan.tasks}
    if plan.prompts:
        folders |= {name: ("answers", name) for name in ("oracle", "characters", "finished")}
        folders["reward"] = ("rewards", "reward")
    for place, policy in enumerate(policies[1:], 1):
        for against in {p.label: p for p in (policies[0], policies[place - 1])}.values():
            for measure, (folder, metric) in folders.items():
                if measure not in policy.measures:
                    continue
                if policy.measures[measure].get("withheld") or against.measures[measure].get("withheld"):
                    yield tax.Paired(
                        measure, policy.label, against.label, 0, 0, None, None, None, note="the headline is withheld"
                    )
                    continue
                comparison = compare_runs(
                    plan.folder(against.label) / folder, plan.folder(policy.label) / folder, seed=plan.base.seed
                )
                notes += [f"{policy.label} against {against.label}, {folder}: {text}" for text in comparison.warnings]
                by_name = {one.name: one for one in comparison.metrics}
                yield tax.paired(measure, policy.label, against.label, by_name[metric])
