"""How good each policy of a pipeline is on prompts no stage has trained on: reward, length, KL, and an oracle's word.

Each policy answers every prompt once, zero-shot, through its chat template. The reward model's mean is what training
raised; a judge that had no part in training (the nano world's oracle) says whether that was worth anything. KL is
taken against the reference policy on the policy's own answers: mean over answers of log p(answer) - log
p_reference(answer), nats, the estimator of PPO's penalty (paper, RLSF stage).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_eval.engines.base import SamplingParams
from almost_eval.files import Row, RowLog, read_rows
from almost_eval.models.chat import ChatTemplate, load_template
from almost_eval.progress import Progress
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.stats import mean_metric
from almost_eval.types import LoglikelihoodRequest, Message
from almost_train.common.config import option
from almost_train.common.stage import Stage

Judge = Callable[[str, str], Mapping[str, float | None]]
"""(prompt, answer) -> scores from 0 to 1 by name; None where the answer does not bear on it."""


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How the answers are sampled."""

    temperature: float = option(1.0, "0 is greedy.", least=0)
    top_p: float = option(1.0, "Nucleus.", above=0, most=1)
    max_new_tokens: int = option(384, "Tokens of an answer.", least=1)
    stop: tuple[str, ...] = option((), "Strings that end an answer, besides EOS and the template's own.")
    limit: int | None = option(None, "Prompts.", least=1)
    seed: int = option(0, "Of the sampling.", least=0)
    device: str = option("auto", "auto, cpu, cuda, ...")


def evaluate_policies(
    settings: EvaluationSettings,
    prompts: Path,
    policies: Mapping[str, Path | str],
    output: Path,
    *,
    reward_model: Path | str,
    reference: str | None = None,
    judge: Judge | None = None,
    judge_name: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `answers/<policy>.jsonl` and return the result: metrics by policy and name, each with an interval.

    Args:
        settings: how to sample.
        prompts: `prompts.jsonl`.
        policies: label -> checkpoint, in the order of the table.
        output: the stage's folder.
        reward_model: checkpoint whose raw logit is the reward.
        reference: label of the policy that KL is taken against, or None for no KL.
        judge: a judge of single answers.
        judge_name: what tells two judges apart in `stage.json`.
        progress: where to report.

    Raises:
        DataError: malformed prompts.
        ModelError: a checkpoint that cannot be used.
        StoreError: see `Stage`.
    """
    progress = progress or Progress()
    rows = read_rows(prompts, {"id": str, "prompt": str})[: settings.limit]
    inputs: dict[str, Path | str] = {"prompts": prompts, "reward_model": reward_model, "judge": judge_name}
    inputs |= {f"policy/{label}": model for label, model in policies.items()}
    with Stage(output, "evaluation", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result
        answered = {}
        for label, model in policies.items():
            answered[label] = _answer(settings, rows, str(model), output / "answers" / f"{label}.jsonl", progress)
        scorer = HFRewardModel(str(reward_model), device=settings.device)
        scores = {label: _score(answers, scorer, judge) for label, answers in answered.items()}
        if reference is not None:
            for label, model in policies.items():
                if label != reference:
                    scores[label]["kl"] = _kl(settings, answered[label], str(model), str(policies[reference]))
        metrics = {
            label: {name: mean_metric(values).to_dict() for name, values in by_name.items()}
            for label, by_name in scores.items()
        }
        files = {label: output / "answers" / f"{label}.jsonl" for label in policies}
        return stage.finish(metrics, files)


def _engine(model: str, device: str) -> tuple[Any, ChatTemplate]:
    from almost_eval.engines.hf import HFEngine

    engine = HFEngine(model, device=device)
    template = load_template("auto", engine.tokenizer)
    assert template is not None  # only `none` is
    return engine, template


def _answer(settings: EvaluationSettings, rows: Sequence[Row], model: str, file: Path, progress: Progress) -> list[Row]:
    """One answer to each prompt, appended to `file` as they come; what an earlier process wrote is kept."""
    with RowLog(file) as log:
        known = {row["id"] for row in log.rows}
        todo = [row for row in rows if row["id"] not in known]
        if todo:
            engine, template = _engine(model, settings.device)
            texts = [_render(template, row["prompt"]) for row in todo]
            params = SamplingParams(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                stop=(*template.stop, *settings.stop),
                seed=settings.seed,
            )
            with progress.track(f"answers of {file.stem}", len(rows), len(known)) as advance:
                for index, [completion] in engine.stream_completions(texts, params):
                    row = todo[index]
                    log.append(
                        {
                            "id": row["id"],
                            "prompt": row["prompt"],
                            "answer": completion.text.strip(),
                            "finish_reason": completion.finish_reason,
                        }
                    )
                    advance()
        by_id = {row["id"]: row for row in log.rows}
    return [by_id[row["id"]] for row in rows]  # in the order of the prompts, whatever order they came in


def _render(template: ChatTemplate, prompt: str) -> str:
    return template.render((Message("user", prompt),), add_generation_prompt=True)


def _score(answers: Sequence[Row], scorer: HFRewardModel, judge: Judge | None) -> dict[str, list[float | None]]:
    conversations = [(Message("user", row["prompt"]), Message("assistant", row["answer"])) for row in answers]
    found: dict[str, list[float | None]] = {
        "reward": list(scorer.score(conversations)),
        "characters": [float(len(row["answer"])) for row in answers],
        "finished": [float(row["finish_reason"] == "stop") for row in answers],
    }
    for index, row in enumerate(answers if judge else ()):
        assert judge is not None
        # An answer that did not end is not an answer: the oracle would read a beginning as the whole.
        scores = judge(row["prompt"], row["answer"])
        for name, value in scores.items():
            column = found.setdefault(name, [None] * len(answers))
            column[index] = value if value is None or row["finish_reason"] == "stop" else 0.0
    return found


def _kl(settings: EvaluationSettings, answers: Sequence[Row], model: str, reference: str) -> list[float | None]:
    """Log p(answer) - log p_reference(answer) of each answer that is not empty, nats."""
    sums = []
    for name in (model, reference):
        engine, template = _engine(name, settings.device)
        requests = [
            LoglikelihoodRequest(_render(template, row["prompt"]), (" " + row["answer"],))
            for row in answers
            if row["answer"]
        ]
        sums.append([scores[0].logprob for scores in engine.loglikelihood(requests)])
    pairs = iter(zip(*sums, strict=True))
    differences: list[float | None] = []
    for row in answers:
        if row["answer"]:
            policy, base = next(pairs)
            differences.append(policy - base)
        else:
            differences.append(None)
    return differences
