"""Policies on prompts that none was trained on: their answers, what these earn, and how far each policy has moved.

`almost-eval tax` and the evaluation at the end of a training recipe both measure by this file.

`DIR/<policy>/{answers,rewards,likelihoods,likelihoods-before}` are run folders that resume. The policy that the others
are compared with comes last, as it also says how likely it finds the others' answers: each engine is opened once.

What cannot be measured is unscored and counted: a prompt that leaves no room for an answer, an answer that the reward
model or a policy cannot read whole, KL where an answer has no token or where two policies have other tokens. The
validity gate withholds a mean of which too much is missing, as in every run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from almost_eval.compare.tax.tasks import AnswerJudge, AnswerLikelihoods, AnswerRewards, Answers, HeldOut
from almost_eval.data.sources import DataSource
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.build import EngineOptions, loglikelihood_engine
from almost_eval.models.chat import load_template, special_tokens
from almost_eval.models.loading import release_memory
from almost_eval.progress import Progress
from almost_eval.rewards.build import reward_model
from almost_eval.run.runner import Run
from almost_eval.run.store import read_results, read_samples
from almost_eval.stats import mean_metric
from almost_eval.tasks.base import Prompting, Task
from almost_eval.types import JSONObject


@dataclass(frozen=True, slots=True)
class PolicyPlan:
    """Which policies, on which prompts, measured by what."""

    models: Mapping[str, str]
    """Label -> checkpoint, in the order of the table."""
    before: str | None
    """Label of the policy that KL is taken against; None takes no KL."""
    prompts: Sequence[HeldOut]
    """May be empty: then nothing is measured here."""
    data: DataSource
    """Where the prompts are from."""
    sampling: SamplingParams
    """Of the answers; its seed is that of every run."""
    reward_model: str | None
    output: Path
    judge: AnswerJudge | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    template: str = "auto"
    """See `load_template`; `none` is `auto` here, as a policy reads a dialogue."""

    def folder(self, label: str) -> Path:
        """Where a policy's runs are."""
        return self.output / re.sub(r"[^\w+.-]", "_", label)

    def answers(self, label: str) -> Path:
        """The run folder of its answers."""
        return self.folder(label) / "answers"


def measure_policies(
    plan: PolicyPlan, progress: Progress, with_engine: Callable[[str, Any], None] = lambda label, engine: None
) -> list[str]:
    """Run what is missing; what to warn of. `with_engine` gets each policy's label and engine before its answers.

    Raises:
        InputError: what a run refuses; before its weights are loaded.
        RunChanged: a folder holds a run with other settings.
        RunError: a run could not finish; calling this again goes on.
    """
    # 1. What can be refused early: the weights of a reward model are loaded when it scores. `max_length` is about the
    #    policies; what does not fit the reward model's own context is counted.
    scorer: Any = plan.reward_model and reward_model(plan.reward_model, replace(plan.engine, max_length=None))
    # 2. The tokens of the policy before: ids mean the same to both halves of KL only where the tokens are the same.
    vocabulary: Mapping[str, int] = {}
    if plan.before is not None:
        engine: Any = loglikelihood_engine(plan.models[plan.before], plan.engine)
        vocabulary = engine.tokenizer.get_vocab()
        _close(engine)
    # 3. Answers and likelihoods, one engine at a time.
    comparable: dict[str, Prompting] = {}
    warnings = []
    for label in sorted(plan.models, key=lambda label: label == plan.before):
        progress.note(f"{label}: {plan.models[label]}")
        engine = loglikelihood_engine(plan.models[label], plan.engine)
        try:
            with_engine(label, engine)
            if plan.prompts:
                prompting = _write_answers(plan, label, engine, progress)
                if label == plan.before:
                    for other, others in comparable.items():
                        _weigh_answers(plan, other, engine, others, "likelihoods-before", progress)
                elif engine.tokenizer.get_vocab() == vocabulary:
                    comparable[label] = prompting
                    _weigh_answers(plan, label, engine, prompting, "likelihoods", progress)
                elif plan.before is not None:
                    warnings.append(f"no KL of {label}: its tokens are not those of {plan.before}")
        finally:
            _close(engine)
        release_memory()  # the next model needs it
    # 4. Rewards.
    if scorer is not None:
        for label in plan.models if plan.prompts else ():
            task = AnswerRewards(plan.prompts, plan.data, Prompting(), plan.answers(label))
            _execute(task, scorer, plan, label, "rewards", progress)
        _close(scorer)
    return warnings


def _close(engine: Any) -> None:
    if hasattr(engine, "close"):  # vLLM's holds a process
        engine.close()


def _write_answers(plan: PolicyPlan, label: str, engine: Any, progress: Progress) -> Prompting:
    template = load_template("auto" if plan.template == "none" else plan.template, engine.tokenizer)
    is_chosen = plan.template not in ("auto", "none")
    prompting = Prompting(None, template, special_tokens(engine.tokenizer), is_chosen=is_chosen)
    task = Answers(plan.prompts, plan.data, prompting, plan.sampling, plan.judge)
    _execute(task, engine, plan, label, "answers", progress)
    return prompting


def _weigh_answers(
    plan: PolicyPlan, label: str, engine: Any, prompting: Prompting, name: str, progress: Progress
) -> None:
    task = AnswerLikelihoods(plan.prompts, plan.data, prompting, plan.answers(label))
    if task.samples():  # all answers may be empty: then KL has no value
        _execute(task, engine, plan, label, name, progress)


def _execute(task: Task, model: Any, plan: PolicyPlan, label: str, name: str, progress: Progress) -> None:
    Run(task, model, seed=plan.sampling.seed).execute(plan.folder(label) / name, progress)


# --- figures of finished runs ---


def policy_measures(plan: PolicyPlan, label: str) -> dict[str, JSONObject]:
    """Measure -> entry as in `results.json`: `reward`, the judge's scores, `characters`, `finished`, `cut`, `kl`."""
    if not plan.prompts:
        return {}
    measures: dict[str, JSONObject] = {}
    if plan.reward_model is not None:
        measures["reward"] = read_results(plan.folder(label) / "rewards")["metrics"]["reward"]
    measures |= read_results(plan.answers(label))["metrics"]
    if plan.before not in (None, label):
        measures["kl"] = _kl(plan.folder(label), len(plan.prompts))
    return measures


def _kl(folder: Path, n: int) -> JSONObject:
    """Mean over the answers of the difference of the two likelihoods, nats."""
    own, before = (
        {record.sample.id: record.score.value for record in read_samples(folder / name)}
        for name in ("likelihoods", "likelihoods-before")
    )
    values = [
        None if value is None or other is None else value - other
        for value, other in ((value, before.get(id)) for id, value in own.items())
    ]
    return mean_metric([*values, *[None] * (n - len(values))]).to_dict()
