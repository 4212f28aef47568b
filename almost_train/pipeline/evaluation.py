"""How good each policy of a pipeline is on prompts no stage has trained on: reward, length, KL, an oracle's score.

Each policy answers every prompt once, zero-shot, through its chat template. The reward model's mean is what training
raised. A judge that had no part in training (the nano world's oracle) shows whether the answers became better.

KL is measured against the reference policy on the policy's own answers: the mean over answers of log p(answer) - log
p_reference(answer), nats, the estimator of PPO's penalty (paper, RLSF stage). An answer is the token ids that were
sampled after the policy's own prompt, without the end token: its text, encoded anew, may be other tokens.

What cannot be measured is unscored and counted, and the stage goes on: a prompt that leaves no room for an answer, an
answer that the reward model or the reference cannot read whole, a number that is not finite, KL between two tokenizers.

`almost_eval.compare.tax` measures the same of finished runs, KL by the same requests. The rest of it is not used here:
its answers are sampled at temperature 1 alone, and its oracle gives one score of the four in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import cast

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.prefix import EncodedRequest
from almost_eval.errors import InputError
from almost_eval.files import Row, RowLog, read_rows
from almost_eval.models.chat import ChatTemplate, load_template, special_tokens
from almost_eval.progress import Progress
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.stats import mean_metric
from almost_eval.types import Completion, JSONObject, LoglikelihoodRequest, Message
from almost_train.common.config import option
from almost_train.common.stage import Stage

TOO_LONG = "context_too_long"
"""The finish reason of a prompt that leaves no room for an answer: the row has an empty one."""

Column = list[float | None]
"""A metric of every answer, in the order of the prompts; None where it could not be measured."""
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
) -> JSONObject:
    """Write `answers/<policy>.jsonl` and return the result: metrics by policy and name, each with an interval.

    Args:
        settings: how to sample.
        prompts: `prompts.jsonl`.
        policies: label -> checkpoint, in the order of the table.
        output: the stage's folder.
        reward_model: checkpoint whose raw logit is the reward.
        reference: label of the policy that KL is taken against, or None for no KL.
        judge: a judge of single answers.
        judge_name: the name of the judge in `stage.json`.
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
        # 1. Answers, each appended to its file as it comes.
        answers = {
            label: _answer(settings, rows, str(model), output / "answers" / f"{label}.jsonl", progress)
            for label, model in policies.items()
        }
        # 2. Their scores by the reward model and the judge, and their KL to the reference.
        scorer = HFRewardModel(str(reward_model), device=settings.device)
        columns = {label: _score(answers[label], scorer, judge) for label in policies}
        if reference is not None:
            for label, values in _kl(settings, answers, policies, reference, progress).items():
                columns[label]["kl"] = values
        metrics = {
            label: {name: mean_metric([_finite(v) for v in values]).to_dict() for name, values in by_name.items()}
            for label, by_name in columns.items()
        }
        files = {label: output / "answers" / f"{label}.jsonl" for label in policies}
        return stage.finish(metrics, files)


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


# --- answers ---


def _template(engine: HFEngine) -> ChatTemplate:
    template = load_template("auto", engine.tokenizer)
    assert template is not None  # only `none` is
    return template


def _prompt_texts(engine: HFEngine, rows: Sequence[Row]) -> list[str]:
    """Each prompt as a first turn, in the policy's own chat template."""
    template, tokens = _template(engine), special_tokens(engine.tokenizer)
    return [
        template.render((Message("user", row["prompt"]),), add_generation_prompt=True, special_tokens=tokens)
        for row in rows
    ]


def _answer(settings: EvaluationSettings, rows: Sequence[Row], model: str, file: Path, progress: Progress) -> list[Row]:
    """One answer to each prompt, appended to `file` as they come; what an earlier process wrote is kept.

    Raises:
        InputError: no prompt leaves room for an answer.
    """
    with RowLog(file) as log:
        known = {row["id"] for row in log.rows if "token_ids" in row}  # the first versions stored the text alone
        todo = [row for row in rows if row["id"] not in known]
        if todo:
            engine = HFEngine(model, device=settings.device)
            texts = _prompt_texts(engine, todo)
            lengths = [len(ids) + settings.max_new_tokens for ids in engine.encoder.encode_texts(texts)]
            fitting = [index for index, length in enumerate(lengths) if length <= engine.context_length]
            too_long = [row for row, length in zip(todo, lengths, strict=True) if length > engine.context_length]
            if not fitting and not known:
                raise InputError(
                    f"no prompt leaves room for max_new_tokens {settings.max_new_tokens} in the context of "
                    f"{engine.context_length} of {model}; lower it"
                )
            log.append(*(_row(row, Completion("", (), TOO_LONG)) for row in too_long))
            params = SamplingParams(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                stop=(*_template(engine).stop, *settings.stop),
                seed=settings.seed,
            )
            with progress.track(f"answers of {file.stem}", len(rows), len(rows) - len(fitting)) as advance:
                for index, [completion] in engine.stream_completions([texts[i] for i in fitting], params):
                    log.append(_row(todo[fitting[index]], completion))
                    advance()
        by_id = {row["id"]: row for row in log.rows}
    return [by_id[row["id"]] for row in rows]  # in the order of the prompts, whatever order they came in


def _row(row: Row, completion: Completion) -> Row:
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "answer": completion.text.strip(),
        "finish_reason": completion.finish_reason,
        "token_ids": list(completion.token_ids),
    }


# --- scores ---


def _score(answers: Sequence[Row], scorer: HFRewardModel, judge: Judge | None) -> dict[str, Column]:
    """The columns that need no other policy."""
    # 1. Length and end.
    answered = [index for index, row in enumerate(answers) if row["finish_reason"] != TOO_LONG]
    columns: dict[str, Column] = {name: [None] * len(answers) for name in ("reward", "characters", "finished")}
    for index in answered:
        columns["characters"][index] = float(len(answers[index]["answer"]))
        columns["finished"][index] = float(answers[index]["finish_reason"] == "stop")
    # 2. Rewards, of what the reward model can read whole.
    conversations = [(Message("user", row["prompt"]), Message("assistant", row["answer"])) for row in answers]
    lengths = scorer.lengths(conversations)
    readable = [index for index in answered if lengths[index] <= scorer.context_length]
    for index, reward in zip(readable, scorer.score([conversations[i] for i in readable]), strict=True):
        columns["reward"][index] = reward
    # 3. The judge. An answer that did not end scores 0: the judge would read a beginning as the whole.
    if judge is not None:
        for index in answered:
            row = answers[index]
            for name, value in judge(row["prompt"], row["answer"]).items():
                column = columns.setdefault(name, [None] * len(answers))
                column[index] = value if value is None or row["finish_reason"] == "stop" else 0.0
    return columns


def _kl(
    settings: EvaluationSettings,
    answers: Mapping[str, Sequence[Row]],
    policies: Mapping[str, Path | str],
    reference: str,
    progress: Progress,
) -> dict[str, Column]:
    """Label -> log p(answer) - log p_reference(answer) of each answer, nats; for all but the reference."""
    base = HFEngine(str(policies[reference]), device=settings.device)
    vocabulary = base.tokenizer.get_vocab()

    def of_policy(label: str) -> tuple[list[EncodedRequest | None], Column]:
        engine = HFEngine(str(policies[label]), device=settings.device)
        if engine.tokenizer.get_vocab() != vocabulary:
            progress.note(f"evaluation: no KL of {label}, which has another tokenizer than {reference}")
            return [None] * len(answers[label]), [None] * len(answers[label])
        requests = _requests(engine, answers[label])
        return requests, _logprobs(engine, requests)

    # One model's weights are in memory at a time: all policies first, then the reference.
    measured = {label: of_policy(label) for label in policies if label != reference}
    return {
        label: [None if p is None or q is None else p - q for p, q in zip(own, _logprobs(base, requests), strict=True)]
        for label, (requests, own) in measured.items()
    }


def _requests(engine: HFEngine, answers: Sequence[Row]) -> list[EncodedRequest | None]:
    """The sampled ids of each answer after its prompt; None for an answer without a token."""
    encoded = iter(
        engine.encode(
            [
                LoglikelihoodRequest(text, (row["answer"],), token_ids=(tuple(row["token_ids"]),))
                for row, text in zip(answers, _prompt_texts(engine, answers), strict=True)
                if row["token_ids"]
            ]
        )
    )
    return [next(encoded) if row["token_ids"] else None for row in answers]


def _logprobs(engine: HFEngine, requests: Sequence[EncodedRequest | None]) -> Column:
    """Nats; None for what the engine's model cannot read whole."""
    readable = {i: r for i, r in enumerate(requests) if r is not None and r.n_positions <= engine.context_length}
    places, column = list(readable), cast(Column, [None] * len(requests))
    for index, [score] in engine.stream(list(readable.values())):
        column[places[index]] = score.logprob
    return column
