"""Runs what the alignment tax is made of: benchmarks, and what `policies` measures of answers to held-out prompts.

Each measure is a run folder that resumes: `DIR/<checkpoint>/<benchmark>` beside those of `policies`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from almost_eval.compare.comparison import compare_runs
from almost_eval.compare.tax import tax
from almost_eval.compare.tax.policies import PolicyPlan, measure_policies, policy_measures
from almost_eval.compare.tax.tasks import nano_oracle, nano_prompts, read_prompts
from almost_eval.compare.tax.training import TrainingRun, as_checkpoint, read_training
from almost_eval.engines.base import SamplingParams
from almost_eval.errors import InputError, did_you_mean
from almost_eval.files import write_json
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano import BUILT_IN, DEFAULT_REWARD_MODEL
from almost_eval.progress import Progress
from almost_eval.run import provenance
from almost_eval.run.runner import RunRequest, open_run
from almost_eval.run.store import read_results
from almost_eval.tasks.registry import comparison_presets
from almost_eval.types import JSONObject

_BARE = ("model", "policy", "final")
"""Folder names that say nothing without the one above them."""
_NUMBER = re.compile(r"(?:^|[-_])(\d+)$")


@dataclass(frozen=True, slots=True)
class TaxPlan:
    """What is to be measured, checked as far as it can be with no weights loaded."""

    policies: PolicyPlan
    """The checkpoints, `before` first, and the held-out prompts."""
    steps: Sequence[float]
    steps_are: str
    base: RunRequest
    """Engine, data, prompts, limit and seed of every run."""
    tasks: Sequence[str]
    exam: JSONObject
    """`shots` and `words`: how the tasks that have such settings are put."""
    prompts_are: str
    training: TrainingRun | None = None

    @property
    def labels(self) -> list[str]:
        """Of the checkpoints, `before` first."""
        return list(self.policies.models)

    @property
    def first_run(self) -> str:
        """Folder of a run that every checkpoint has."""
        return self.tasks[0] if self.tasks else "answers"


def make_plan(
    before: str | None,
    after: Sequence[str],
    run: Path | None,
    output: Path,
    base: RunRequest,
    *,
    tasks: Sequence[str],
    shots: int,
    words: bool | None,
    reward_model: str | None,
    prompts: Path | None,
    n_prompts: int,
    max_new_tokens: int,
) -> TaxPlan:
    """Find the checkpoints, the data, the prompts and the reward model.

    `words` None is True on the nano world, whose models are at chance by letters, and else False.

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
    base = replace(base, data="nano" if nano else base.data or "hub")
    policies = PolicyPlan(
        models=models,
        before=next(iter(models)),
        prompts=held_out,
        data=base.source(),
        sampling=SamplingParams(max_new_tokens, temperature=1.0, seed=base.seed),
        reward_model=reward_model,
        output=output,
        judge=nano_oracle() if nano else None,
        engine=base.engine,
        template=base.template,
    )
    exam = {"shots": shots, "words": nano if words is None else words}
    return TaxPlan(policies, steps, steps_are, base, tasks, exam, prompts_are, training)


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

    def benchmarks(label: str, engine: Any) -> None:
        for name in plan.tasks:
            run = open_run(_request(plan, label, name), engine)
            run.execute(plan.policies.folder(label) / name, progress)

    warnings = measure_policies(plan.policies, progress, benchmarks)
    report = summarise(plan, warnings)
    write_json(plan.policies.output / "tax.json", report.to_dict())
    return report


def _request(plan: TaxPlan, label: str, task: str) -> RunRequest:
    preset = comparison_presets()[task]
    settings = {**preset.settings, **{name: value for name, value in plan.exam.items() if name in preset.settings}}
    model = plan.policies.models[label]
    return replace(plan.base, model=model, task=task, protocol=preset.protocol, settings=settings)


# --- from runs to figures ---


def summarise(plan: TaxPlan, warnings: Sequence[str] = ()) -> tax.Tax:
    """The figures of finished runs; no model is needed."""
    labels, measured, sampling = plan.labels, plan.policies, plan.policies.sampling
    policies, notes = [], list(warnings)
    for label, step in zip(labels, plan.steps, strict=True):
        policies.append(_policy(plan, label, step))
        notes += _missing(policies[-1])
    comparisons = tax.adjusted(list(_comparisons(plan, policies, notes)), labels[0])
    findings = tax.findings(comparisons, labels)
    training = plan.training
    log = [asdict(row) for row in training.rows] if training else []
    by_models = {"reward": ("reward_model", measured.reward_model), "kl": ("policy", measured.models[labels[0]])}
    apart = [key for key, (name, model) in by_models.items() if training and model and not training.read(name, model)]
    first = read_results(measured.folder(labels[0]) / plan.first_run)["provenance"]
    facts = {
        "data": first["data_source"],
        "limit": plan.base.limit,
        **plan.exam,
        "prompts": {"source": plan.prompts_are, "n": len(measured.prompts), "max_new_tokens": sampling.max_new_tokens},
        "reward_model": measured.reward_model,
        "seed": plan.base.seed,
        "training_run": str(training.folder) if training else None,
        "warnings": list(dict.fromkeys(notes)),
        "versions": provenance.versions(),
        "command": provenance.command(),
    }
    sentence = tax.sentence(findings, labels)
    kl_source = tax.kl_source(sampling)
    return tax.Tax(policies, plan.steps_are, comparisons, findings, sentence, kl_source, log, apart, facts)


def _policy(plan: TaxPlan, label: str, step: float) -> tax.MeasuredPolicy:
    folder, measures = plan.policies.folder(label), {}
    for name in plan.tasks:
        results = read_results(folder / name)
        measures[name] = results["metrics"][results["headline"]] | {"metric": results["headline"]}
    measures |= policy_measures(plan.policies, label)
    digest = read_results(folder / plan.first_run)["provenance"]["weight_digest"]
    return tax.MeasuredPolicy(label, plan.policies.models[label], step, digest, measures)


def _missing(policy: tax.MeasuredPolicy) -> Iterator[str]:
    """What a policy's figures leave out, in words."""
    for name, heading in (tax.benchmarks() | tax.MEASURES).items():
        metric = policy.measures.get(name, {})
        if reason := metric.get("withheld"):
            yield f"{policy.label}, {heading}: withheld, as {reason}"
        elif metric.get("unscored") and name in tax.MEASURES:
            yield f"{policy.label}, {heading}: {metric['unscored']} of {metric['n'] + metric['unscored']} not measured"


def _comparisons(plan: TaxPlan, policies: Sequence[tax.MeasuredPolicy], notes: list[str]) -> Iterator[tax.Paired]:
    """Every measure of every checkpoint against `before`, and against the checkpoint before it."""
    folders = {name: (name, policies[0].measures[name]["metric"]) for name in plan.tasks}
    if plan.policies.prompts:
        folders |= {name: ("answers", name) for name in ("oracle", "characters", "finished")}
        folders["reward"] = ("rewards", "reward")
    for place, policy in enumerate(policies[1:], 1):
        for against in {p.label: p for p in (policies[0], policies[place - 1])}.values():
            for measure, (folder, metric) in folders.items():
                if measure not in policy.measures:
                    continue
                if policy.measures[measure].get("withheld") or against.measures[measure].get("withheld"):
                    yield tax.Paired(measure, policy.label, against.label, 0, 0, note="the headline is withheld")
                    continue
                one, other = (plan.policies.folder(which.label) / folder for which in (against, policy))
                comparison = compare_runs(one, other, seed=plan.base.seed)
                notes += [f"{policy.label} against {against.label}, {folder}: {text}" for text in comparison.warnings]
                by_name = {one.name: one for one in comparison.metrics}
                yield tax.paired(measure, policy.label, against.label, by_name[metric])
