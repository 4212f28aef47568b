"""Judges that need no key and no network: the nano world's oracle, and any reward model.

Both score each answer on its own, so they have no position bias and always say the same. Of several turns the oracle
reads the judged one alone, the reward model the dialogue up to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from almost_eval.errors import InputError, TemplateError
from almost_eval.judge.judges import Judge, Judgement, verdict_fields
from almost_eval.judge.records import Pair, Question, Side, Subject, Verdict
from almost_eval.types import Conversation, JSONMapping, JSONObject, Message

if TYPE_CHECKING:
    from almost_eval.models.chat import ChatTemplate
    from almost_eval.rewards.hf import HFRewardModel

TIE_MARGIN = 0.05
"""The oracle's marks are multiples of 0.1 before it counts repetition and length: closer answers are equally good."""


class NanoJudge(Judge):
    """The ground truth of the nano world, which is no model: the oracle's 0 to 1 as 1 to 10.

    An answer has the score 1 + 9 x oracle; two whose oracle values are within `TIE_MARGIN` tie.
    """

    name = "nano"
    kind = "oracle"

    def spec(self) -> JSONObject:
        """The world's digest: its facts decide."""
        from almost_eval.nano.tables import digest
        from almost_eval.nano.world import World

        return {"name": self.name, "kind": self.kind, "world": digest(World()), "tie_margin": TIE_MARGIN}

    def check(self, questions: Sequence[Question]) -> None:
        """Refuse questions that are none of the world's.

        Raises:
            InputError: there is no ground truth for one of them.
        """
        from almost_eval.nano.oracle import score_text

        if unknown := next((q for q in questions if any(score_text(turn, "") is None for turn in q.turns)), None):
            raise InputError(
                f"question {unknown.id} is not of the nano world, and --judge nano knows no other; use --data nano, or "
                "another --judge (reward:CKPT needs no key)"
            )

    def stream(
        self, pairs: Sequence[Subject], wanted: Sequence[int], attempt: int = 0
    ) -> Iterator[tuple[int, Judgement]]:
        """See `Judge.stream`; `attempt` changes nothing."""
        for index in wanted:
            yield index, judge_by_oracle(pairs[index])


def judge_by_oracle(case: Subject) -> Judgement:
    """The oracle's judgement; needs nothing but the texts."""
    from almost_eval.nano.oracle import score_text

    at = case.turn - 1
    scores = [score_text(case.question.turns[at], answer.turns[at]) for answer in case.answers]
    values = [score.overall if score else 0.0 for score in scores]  # `check` has refused what has none
    if not isinstance(case, Pair):
        verdict = Verdict(None, round(1 + 9 * values[0], 2))
        review = f"[[{verdict.score_1:g}]]\nBy the facts of the nano world."
        return Judgement(verdict, None, {"review": review, **verdict_fields(verdict), "oracle": values})
    first, second = values
    winner: Side = "tie" if abs(first - second) < TIE_MARGIN else "1" if first > second else "2"
    verdict = Verdict(winner, round(1 + 9 * first, 2), round(1 + 9 * second, 2))
    review = f"{verdict.score_1:g} {verdict.score_2:g}\nBy the facts of the nano world, each answer on its own."
    return Judgement(verdict, None, {"review": review, **verdict_fields(verdict), "oracle": [first, second]})


class RewardJudge(Judge):
    """A reward model: of two answers to a question the one with the larger raw logit. Weights load on first use."""

    kind = "reward"

    def __init__(self, model: HFRewardModel, name: str) -> None:
        self._model = model
        self.name = name
        self._spec = {
            "name": self.name,
            "kind": self.kind,
            "weight_digest": model.checkpoint.weight_digest(),
            "model_files": model.checkpoint.file_digests(),
            "template": _template_part(model.template),
            "engine": model.settings(),
        }

    def spec(self) -> JSONObject:
        """Weights, template and engine."""
        return self._spec

    def adopt_date(self, stored: JSONMapping) -> None:
        """Let the template write the time that it wrote when the run began, of whose spec `stored` is the part."""
        part, template = stored.get("template"), self._model.template
        now = part.get("now") if isinstance(part, Mapping) else None
        if template.now and now:
            self._model.template = replace(template, now=now)
            self._spec["template"] = _template_part(self._model.template)

    def check(self, questions: Sequence[Question]) -> None:
        """Refuse a template that cannot write a question and its answer; beyond the context they are unscored.

        Raises:
            TemplateError: see `HFRewardModel.encode`.
        """
        try:
            self._model.encode([(Message("user", q.text), Message("assistant", "a")) for q in questions])
        except TemplateError as error:
            raise TemplateError(f"--judge {self.name}: {error} (it is read with its own chat template)") from None

    def stream(
        self, pairs: Sequence[Subject], wanted: Sequence[int], attempt: int = 0
    ) -> Iterator[tuple[int, Judgement]]:
        """See `Judge.stream`; `attempt` changes nothing.

        The batches depend on all pairs and never on `wanted`: a resumed run ends in the same bits.
        """
        conversations = list(dict.fromkeys(c for pair in pairs for c in _conversations(pair)))
        lengths = self._model.lengths(conversations)
        fits = [c for c, n in zip(conversations, lengths, strict=True) if n <= self._model.context_length]
        place = {conversation: at for at, conversation in enumerate(fits)}
        waiting: dict[int, list[int]] = {}  # place of a conversation -> the wanted pairs that it is part of
        for index in wanted:
            mine = _conversations(pairs[index])
            if all(c in place for c in mine):
                for c in set(mine):
                    waiting.setdefault(place[c], []).append(index)
            else:
                yield index, Judgement(None, "context_too_long", {"review": None, "rewards": None})
        known: dict[Conversation, float] = {}
        for at, reward in self._model.stream(fits, waiting):
            known[fits[at]] = reward
            for index in waiting[at]:
                mine = _conversations(pairs[index])
                if all(c in known for c in mine):
                    yield index, judge_by_reward(known[mine[0]], known[mine[1]])

    def warnings(self) -> Sequence[str]:
        """What the reward model had to do otherwise than planned."""
        return self._model.warnings


def _template_part(template: ChatTemplate) -> str | JSONObject:
    """What a judge's spec holds of its template: the digest, and the time that it writes where it writes one."""
    return template.digest if template.now is None else {"digest": template.digest, "now": template.now}


def judge_by_reward(first: float, second: float) -> Judgement:
    """The judgement of two raw logits; one that is not finite is no number to compare."""
    outputs: JSONObject = {"review": None, "winner": None, "scores": None}
    if not (math.isfinite(first) and math.isfinite(second)):
        rewards = [r if math.isfinite(r) else None for r in (first, second)]
        return Judgement(None, "non_finite", outputs | {"rewards": rewards})
    verdict = Verdict(Verdict.of_scores(first, second).winner)  # a raw logit is no score from 1 to 10
    return Judgement(verdict, None, outputs | {"winner": verdict.winner, "rewards": [first, second]})


def _conversations(case: Subject) -> list[Conversation]:
    """The dialogue with each system, up to the judged turn."""
    return [
        tuple(
            Message(role, text)
            for asked, answered in zip(case.question.turns[: case.turn], answer.turns, strict=False)
            for role, text in (("user", asked), ("assistant", answered))
        )
        for answer in case.answers
    ]
