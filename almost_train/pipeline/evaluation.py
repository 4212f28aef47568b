"""How good each policy of a pipeline is on prompts no stage has trained on: reward, length, KL, a judge's scores.

Each policy answers every prompt once, zero-shot, through its chat template. The reward model's mean is what training
raised. A judge that had no part in training (the nano world's oracle) shows whether the answers became better. KL is
that of the sampled answers to the reference policy, the estimator of PPO's penalty (paper, RLSF stage).

The measures are those of `almost-eval tax`: see `almost_eval.compare.tax.policies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from almost_eval.compare.tax.policies import PolicyPlan, measure_policies, policy_measures
from almost_eval.compare.tax.tasks import AnswerJudge, read_prompts
from almost_eval.data.sources import DataSource
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.build import EngineOptions
from almost_eval.errors import InputError
from almost_eval.progress import Progress
from almost_eval.run.store import RunChanged
from almost_eval.types import JSONObject
from almost_train.common.config import MOST_SEED, option, settings_from
from almost_train.common.stage import Stage, StageChanged
from almost_train.pipeline.recipe import Recipe


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How the answers are sampled."""

    temperature: float = option(1.0, "0 is greedy.", least=0)
    top_p: float = option(1.0, "Nucleus.", above=0, most=1)
    max_new_tokens: int = option(384, "Tokens of an answer.", least=1)
    stop: tuple[str, ...] = option((), "Strings that end an answer, besides EOS and the template's own.")
    limit: int | None = option(None, "Prompts.", least=1)
    seed: int = option(0, "Of the sampling.", least=0, most=MOST_SEED)
    device: str = option("auto", "auto, cpu, cuda, ...")


@dataclass(frozen=True, slots=True)
class EvaluationPrompts:
    """What a recipe's evaluation asks; one of the two."""

    prompts: str | None = option(None, "prompts.jsonl, which no stage trains on.")
    nano_prompts: int | None = option(None, "So many held-out queries of the nano world, with its oracle.", least=1)


def prompts_of(recipe: Recipe) -> EvaluationPrompts:
    """What the section `evaluation` of a recipe asks.

    Raises:
        InputError: neither a file nor a number, or both.
    """
    section = recipe.sections["evaluation"]
    names = (field.name for field in fields(EvaluationPrompts))
    values = {name: section[name] for name in names if name in section}
    pool = settings_from(EvaluationPrompts, values, f"recipe {recipe.name}, evaluation")
    if (pool.prompts is None) == (pool.nano_prompts is None):
        raise InputError(f"recipe {recipe.name}, evaluation: give either prompts (a file) or nano_prompts (how many)")
    return pool


def evaluate_policies(
    settings: EvaluationSettings,
    prompts: Path,
    policies: Mapping[str, Path | str],
    output: Path,
    *,
    reward_model: Path | str,
    reference: str | None = None,
    judge: AnswerJudge | None = None,
    progress: Progress | None = None,
) -> JSONObject:
    """Write the runs of each policy and return the result: metrics by policy and name, each with an interval.

    Args:
        settings: how to sample.
        prompts: `prompts.jsonl`.
        policies: label -> checkpoint, in the order of the table.
        output: the stage's folder.
        reward_model: checkpoint whose raw logit is the reward.
        reference: label of the policy that KL is taken against, or None for no KL.
        judge: a judge of single answers; its name is in `stage.json`.
        progress: where to report.

    Raises:
        DataError: malformed prompts.
        InputError: no prompt leaves room for an answer.
        ModelError: a checkpoint that cannot be used.
        StoreError: see `Stage`.
    """
    progress = progress or Progress()
    inputs: dict[str, Path | str] = {"prompts": prompts, "reward_model": reward_model}
    inputs |= {"judge": judge.name if judge else ""} | {f"policy/{label}": model for label, model in policies.items()}
    with Stage(output, "evaluation", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result
        plan = PolicyPlan(
            models={label: str(model) for label, model in policies.items()},
            before=reference,
            prompts=read_prompts(prompts, settings.limit),
            data=DataSource(prompts.name, None),
            sampling=SamplingParams(
                settings.max_new_tokens,
                settings.temperature,
                settings.top_p,
                stop=settings.stop,
                seed=settings.seed,
            ),
            reward_model=str(reward_model),
            output=output,
            judge=judge,
            engine=EngineOptions(device=settings.device),
        )
        try:
            for warning in measure_policies(plan, progress):
                progress.note(f"evaluation: {warning}")
        except RunChanged as changed:  # by another device, or other versions of packages
            raise StageChanged(output, f"settings ({changed.change})") from None
        metrics = {label: policy_measures(plan, label) for label in policies}
        return stage.finish(metrics, {label: plan.answers(label) / "samples.jsonl" for label in policies})
