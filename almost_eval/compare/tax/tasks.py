"""What the alignment tax asks beside the benchmarks: answers to held-out prompts, their reward, their likelihood.

Each is a task like any other, so its run is a run folder like any other: it resumes, and two of them compare.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from almost_eval.data.sources import DataSource, fingerprint
from almost_eval.engines.base import SamplingParams
from almost_eval.errors import DataError
from almost_eval.files import iterate_lines
from almost_eval.run.store import read_samples
from almost_eval.stats import mean_metric
from almost_eval.tasks.base import GenerationRequest, Prompting, Task
from almost_eval.types import Conversation, LoglikelihoodRequest, Message, Metric, Outputs, Sample, SampleRecord, Score

_PATIENCE = 10_000
"""Fruitless draws in a row after which the nano world counts as exhausted."""


@dataclass(frozen=True, slots=True)
class AnswerJudge:
    """A judge of single answers that had no part in training."""

    name: str
    """Recorded with the answers."""
    scores: Callable[[str, str], Mapping[str, float | None]]
    """(prompt, answer) -> scores from 0 to 1 by name; None where the answer does not bear on it."""


def nano_oracle() -> AnswerJudge:
    """The nano world's ground truth."""
    from almost_eval.nano.oracle import scores_by_dimension

    return AnswerJudge("nano oracle", scores_by_dimension)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A prompt that no policy was trained on."""

    id: str
    text: str


def read_prompts(file: Path, limit: int | None = None) -> list[HeldOut]:
    """The first `limit` prompts of a JSON Lines file with `id` and `prompt`.

    Raises:
        DataError: absent, malformed, empty, or an id that is there twice.
    """
    prompts: dict[str, HeldOut] = {}
    for number, row in iterate_lines(file, absent="give JSON Lines with id and prompt"):
        prompt = row if isinstance(row, dict) else {}
        id, text = prompt.get("id"), prompt.get("prompt")
        if not isinstance(id, str) or not isinstance(text, str):
            raise DataError(f"malformed data: {file}, row {number}: a prompt is an object with the texts id and prompt")
        if id in prompts:
            raise DataError(f"malformed data: {file}, row {number}: the id {id!r} is there twice")
        prompts[id] = HeldOut(id, text)
    if not prompts:
        raise DataError(f"{file} holds no prompts")
    return list(prompts.values())[:limit]


def nano_prompts(count: int, seed: int) -> list[HeldOut]:
    """Up to `count` different queries of the nano world's `eval` pool, which alignment never trains on."""
    from almost_eval.nano.world import World

    world, rng = World(), random.Random(f"{seed}/tax/prompts")
    texts: dict[str, None] = {}
    fruitless = 0
    while len(texts) < count and fruitless < _PATIENCE:
        query = world.query(rng, "eval").text
        fruitless = fruitless + 1 if query in texts else 0
        texts[query] = None
    return [HeldOut(f"eval-{number:04d}", text) for number, text in enumerate(texts)]


class _OverPrompts(Task):
    """What the three have in common: the prompts, which are all the data there is."""

    protocol = "held-out"

    def __init__(self, prompts: Sequence[HeldOut], data: DataSource, prompting: Prompting) -> None:
        self.prompts = prompts
        self.data = data
        self.prompting = prompting

    def data_fingerprint(self) -> str:
        """Of the prompts."""
        return fingerprint([[prompt.id, prompt.text] for prompt in self.prompts])

    def metrics(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        """The mean of each per-sample metric over the samples that have it; a prompt without a sample is unscored."""
        names = dict.fromkeys(name for record in records for name in record.score.metrics)
        names[self.headline] = None  # also where nothing could be scored
        absent = [None] * (len(self.prompts) - len(records))
        return {name: mean_metric([*(r.score.metrics.get(name) for r in records), *absent]) for name in names}

    def _render(self, prompt: HeldOut) -> str:
        template = self.prompting.template
        assert template is not None  # a policy reads a dialogue
        return template.render(
            (Message("user", prompt.text),), add_generation_prompt=True, special_tokens=self.prompting.special_tokens
        )


class Answers(_OverPrompts):
    """One answer to each prompt, zero-shot: how long, whether it ends, and how good.

    An answer is stored as it was written, and measured without the space around it. The template of `prompting` brings
    stop strings beside those of `params`; the seed is the run's. The judge gives each answer more scores.
    """

    name = "answers"
    version = 2  # 1 kept no token ids
    keeps_tokens = True
    requires = "generation"
    headline = "characters"

    def __init__(
        self,
        prompts: Sequence[HeldOut],
        data: DataSource,
        prompting: Prompting,
        params: SamplingParams,
        judge: AnswerJudge | None = None,
    ) -> None:
        super().__init__(prompts, data, prompting)
        self.params = params
        self.judge = judge

    def samples(self) -> list[Sample]:
        """A sample for each prompt."""
        return [
            Sample(p.id, (Message("user", p.text),), (), 0, p.id, metadata={"prompt": p.text}) for p in self.prompts
        ]

    def generation(self, sample: Sample, shots: int) -> GenerationRequest:
        """The prompt as a first turn."""
        template = self.prompting.template
        stop = (*(template.stop if template else ()), *self.params.stop)
        prompt = self._render(HeldOut(sample.id, sample.metadata["prompt"]))
        return GenerationRequest(prompt, replace(self.params, stop=stop))

    def score(self, sample: Sample, outputs: Outputs) -> Score:
        """`characters`, `finished` (0 or 1) and the judge's scores, which are 0 for an answer that did not end."""
        text, finished = outputs["completions"][0].strip(), outputs["finish_reasons"][0] == "stop"
        metrics: dict[str, float | None] = {"characters": float(len(text)), "finished": float(finished)}
        if self.judge is not None:
            for name, value in self.judge.scores(sample.metadata["prompt"], text).items():
                # A beginning is not an answer: the judge would read it as the whole.
                metrics[name] = value if value is None or finished else 0.0
        return Score(metrics["characters"], None, metrics)

    def metrics(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        """The means, and `cut`: how many answers the limit of new tokens cut."""
        reasons = [r.outputs["finish_reasons"][0] for r in records if "finish_reasons" in r.outputs]
        cut = Metric(reasons.count("length"), None, None, len(reasons), len(self.prompts) - len(reasons))
        return super().metrics(records) | {"cut": cut}

    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        names = ("max_new_tokens", "temperature", "top_p", "stop")
        sampling = {name: getattr(self.params, name) for name in names}
        return sampling | {"judge": self.judge.name if self.judge else None, "n_prompts": len(self.prompts)}


class OfAnswers(_OverPrompts):
    """What somebody says of the answers in a finished `Answers` run, whose folder is `answers`."""

    unfit_is_unscored = True

    def __init__(self, prompts: Sequence[HeldOut], data: DataSource, prompting: Prompting, answers: Path) -> None:
        super().__init__(prompts, data, prompting)
        outputs = {record.sample.id: record.outputs for record in read_samples(answers)}
        self.answers: Mapping[str, str] = {id: o["completions"][0] for id, o in outputs.items() if "completions" in o}
        self.tokens: Mapping[str, tuple[int, ...]] = {
            id: tuple(o["token_ids"][0]) for id, o in outputs.items() if "token_ids" in o
        }

    def samples(self) -> list[Sample]:
        """A sample for each answer that can be read."""
        return [
            Sample(p.id, (Message("user", p.text),), (self.answers[p.id],), 0, p.id)
            for p in self.prompts
            if p.id in self.answers and self.is_readable(p.id)
        ]

    def is_readable(self, id: str) -> bool:
        """Whether there is anything to judge; an answer that has none is counted by who compares."""
        return True

    def settings(self) -> dict[str, Any]:
        """The answers belong to the spec: others are another run."""
        return {"answers_digest": fingerprint(sorted(self.answers.items()))}


class AnswerRewards(OfAnswers):
    """The reward model's raw logit of each answer, an empty one too."""

    name = "answer-rewards"
    requires = "reward"
    headline = "reward"

    def conversations(self, sample: Sample) -> list[Conversation]:
        """The prompt and its answer."""
        return [(*sample.context, Message("assistant", sample.choices[0].strip()))]

    def score(self, sample: Sample, outputs: Outputs) -> Score:
        """The logit; unscored where it is not finite."""
        value = outputs["rewards"][0]
        return Score(value, "non_finite" if value is None else None, {"reward": value})


class AnswerLikelihoods(OfAnswers):
    """log p(answer | prompt) in nats, after the prompt of the policy that wrote the answer: the two halves of KL.

    The ids that were sampled are scored, without the end token: the text, encoded anew, may be other tokens.
    """

    name = "answer-likelihoods"
    version = 2  # 1 always encoded the text
    headline = "nats"

    def is_readable(self, id: str) -> bool:
        """Whether the answer has a token."""
        return bool(self.tokens.get(id))

    def settings(self) -> dict[str, Any]:
        """See `OfAnswers.settings`, and the tokens."""
        return super().settings() | {"tokens_digest": fingerprint(sorted(self.tokens.items()))}

    def requests(self, sample: Sample, shots: int) -> list[LoglikelihoodRequest]:
        """The answer as it was sampled."""
        prompt = self._render(HeldOut(sample.id, sample.context[0].content))
        return [LoglikelihoodRequest(prompt, sample.choices, token_ids=(self.tokens[sample.id],))]

    def score(self, sample: Sample, outputs: Outputs) -> Score:
        """The sum over the answer's tokens."""
        value = outputs["loglikelihoods"][0][0]
        return Score(value, "non_finite" if value is None else None, {"nats": value})
