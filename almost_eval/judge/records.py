"""The records of judging, in the order they travel.

A `Question` and two systems' `Answer`s make a `Pair`, one system's a `Solo`; a prompt family renders it as a
`JudgeRequest`; a judge (the client, a reward model, the nano oracle) gives a `Reply` or a `Failure`; the family's
parser reads a `Verdict` or an `Unparsed` from the reply; all of it together is a `Review` (a `Grade` of one answer),
which is what is stored and what aggregation reads.

A question has one turn or more. Turns count from 1; a case (`Pair` or `Solo`) is about one of them, in the light of
those before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from almost_eval.judge.markdown import MarkdownCounts
from almost_eval.types import JSONMapping, JSONObject, Message

Order = Literal["forward", "reverse"]
"""`forward` shows the baseline as Assistant 1 and the model as Assistant 2, as the official script does."""

TOO_LONG = "context_too_long"
"""Why an answer to a later turn is not there: what was said before leaves no room for it in the model's context."""

Side = Literal["1", "2", "tie"]
"""Who is better, by the place in the prompt."""

Outcome = Literal["model", "baseline", "tie"]
"""Who is better, by system."""

TokenAlternatives = tuple[str, Sequence[tuple[str, float]]]
"""A token of a reply, and the most probable tokens at its place with their log-probabilities in nats, itself too."""


class QuestionTurn(NamedTuple):
    """A turn after the first."""

    text: str
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerTurn:
    """The answer to one turn."""

    text: str
    metadata: JSONMapping = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a question file."""

    id: str
    """As text; FastChat's files hold integers."""
    text: str
    """The first turn."""
    category: str = "general"
    reference: str | None = None
    """The nano world's key to its oracle, or a reference answer to the first turn."""
    later: tuple[QuestionTurn, ...] = ()
    """The turns after the first, with their reference answers."""

    @property
    def turns(self) -> tuple[str, ...]:
        """What is asked, turn by turn."""
        return (self.text, *(turn.text for turn in self.later))

    @property
    def references(self) -> tuple[str | None, ...]:
        """The reference answer to each turn; None or empty where there is none."""
        return (self.reference, *(turn.reference for turn in self.later))

    def with_references(self, references: Sequence[str | None]) -> Question:
        """The same with one reference answer, or None, for each turn."""
        later = tuple(QuestionTurn(turn.text, r) for turn, r in zip(self.later, references[1:], strict=True))
        return replace(self, reference=references[0], later=later)


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of FastChat's answer JSONL."""

    question_id: str
    text: str
    """To the first turn. May be empty: judged as it is."""
    model: str
    """The system's name (`model_id` in the file)."""
    metadata: JSONMapping = field(default_factory=dict)
    """How the first turn's answer came about."""
    later: tuple[AnswerTurn, ...] = ()
    """To the turns after the first."""
    others: tuple[Answer, ...] = ()
    """The same system's other answers to the same question, where all of them are judged; these have none."""

    @property
    def choices(self) -> tuple[Answer, ...]:
        """The answer itself and the others, each alone."""
        return (replace(self, others=()), *self.others) if self.others else (self,)

    @property
    def turns(self) -> tuple[str, ...]:
        """The answers, turn by turn."""
        return (self.text, *(turn.text for turn in self.later))

    @property
    def answered(self) -> tuple[AnswerTurn, ...]:
        """The answers with how each came about, turn by turn."""
        return (AnswerTurn(self.text, self.metadata), *self.later)

    @property
    def turn_metadata(self) -> tuple[JSONMapping, ...]:
        """How each turn's answer came about."""
        return (self.metadata, *(turn.metadata for turn in self.later))

    def of_turns(self, turns: Sequence[AnswerTurn]) -> Answer:
        """The same system's answer to the same question, with these answers to its turns."""
        first, *later = turns
        return replace(self, text=first.text, metadata=first.metadata, later=tuple(later))


Answers = dict[str, Answer]
"""Question id -> answer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one turn of a question in the order they are shown."""

    question: Question
    answer_1: Answer
    answer_2: Answer
    order: Order
    turn: int = 1
    """Which is judged, from 1. Those before it are shown; those after it are not."""
    choice: int = 1
    """Which of a system's answers to the question this is, from 1."""

    @property
    def id(self) -> str:
        """Unique in a run: `question/order`, a later turn's and choice's number, the systems if more than two."""
        turn = f"/turn {self.turn}" if self.turn > 1 else ""
        return f"{self.question.id}/{self.order}{turn}" + (f"/choice {self.choice}" if self.choice > 1 else "")

    @property
    def answers(self) -> tuple[Answer, ...]:
        """By place in the prompt."""
        return self.answer_1, self.answer_2

    @property
    def by_system(self) -> tuple[Answer, Answer]:
        """(the baseline's answer, the model's answer)."""
        return (self.answer_1, self.answer_2) if self.order == "forward" else (self.answer_2, self.answer_1)


@dataclass(frozen=True, slots=True)
class Solo:
    """One answer to one turn of a question, graded by itself."""

    question: Question
    answer: Answer
    turn: int = 1
    choice: int = 1

    @property
    def id(self) -> str:
        """Unique for a system: `question/turn`, and a later choice's number."""
        return f"{self.question.id}/turn {self.turn}" + (f"/choice {self.choice}" if self.choice > 1 else "")

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The one."""
        return (self.answer,)


Subject = Pair | Solo
"""What a judge is shown at a time."""


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """What is sent, whole: its digest is the key under which the reply is kept."""

    judge: str
    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int
    attempt: int = 0
    """0, or k for the k-th time the same thing is sent on purpose (a re-ask, a repeat)."""
    options: JSONMapping = field(default_factory=dict)
    """More fields of the request's body: a reasoning effort, and what `--judge-options` states."""

    @property
    def digest(self) -> str:
        """sha256 over every field."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> JSONObject:
        """As JSON."""
        return {
            "judge": self.judge,
            "messages": [message.to_dict() for message in self.messages],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "attempt": self.attempt,
            **({"options": dict(self.options)} if self.options else {}),  # as it was before there were any
        }


class Usage(NamedTuple):
    """Tokens of one sending, as the provider bills them."""

    prompt: int
    """All of them, cached ones too."""
    completion: int
    """All of them, those spent on thinking too."""
    cached: int = 0
    """Of the prompt: read from the provider's cache."""
    reasoning: int = 0
    """Of the completion: spent on thinking."""
    written: int = 0
    """Of the prompt: written to the provider's cache, which some bill above the rest."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge answered."""

    text: str
    finish_reason: str
    """`stop` or `length`, as the provider says."""
    model: str
    """The model the provider says has answered (`gpt-4-0613`), which is seldom the one that was requested."""
    prompt_tokens: int
    completion_tokens: int
    """Billed tokens as the provider counts them; 0 where it does not say."""
    cached_tokens: int = 0
    """Of the prompt's, those read from the provider's cache."""
    reasoning_tokens: int = 0
    """Of the completion's, those spent on thinking."""
    thinking: str = ""
    """What came in a field or a part of its own for thoughts. Never read for a verdict."""
    parameters: JSONMapping = field(default_factory=dict)
    """What was sent beside the messages: the bound on tokens, the temperature, the options."""
    written_tokens: int = 0
    """Of the prompt's, those written to the provider's cache."""
    cost: float | None = None
    """USD that the host says it billed; None where it states tokens alone."""
    cached: bool = False
    """True where the journal had it: nothing was paid now."""
    logprobs: Sequence[TokenAlternatives] | None = None
    """Of its last tokens, thinking included; None where they were not requested, or not told."""

    @property
    def usage(self) -> Usage:
        """Its tokens."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return Usage(prompt, completion, self.cached_tokens, self.reasoning_tokens, self.written_tokens)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no reply. Counted and shown; never a tie, never a number."""

    reason: str
    """`timeout`, `connection`, `http_500`, `rate_limited`, `content_filter`, `empty`, `malformed`, `budget`, ..."""
    message: str
    """One line, without the key."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a review says, by place in the prompt."""

    winner: Side | None
    """None where one answer was graded by itself; `score_1` is then its mark."""
    score_1: float | None = None
    """1 to 10; None in a family that names the winner only."""
    score_2: float | None = None
    shares: tuple[float, float, float] | None = None
    """Probabilities of Assistant 1, Assistant 2 and a tie, with a sum of 1; None where the judge told none."""

    @classmethod
    def of_scores(cls, first: float, second: float) -> Verdict:
        """For the higher of two scores."""
        return cls("tie" if first == second else "1" if first > second else "2", first, second)


@dataclass(frozen=True, slots=True)
class Unparsed:
    """A review without a verdict that can be read."""

    reason: str
    """`no_scores`, `out_of_range`, `ambiguous`, `empty`, ..."""


@dataclass(frozen=True, slots=True)
class Review:
    """One judged pair as it is stored: everything aggregation needs, and nothing that needs a model."""

    question_id: str
    category: str
    order: Order
    baseline: str
    model: str
    """Names of the two systems; in a round robin, of the first and the second of the pair."""
    baseline_length: int
    model_length: int
    """Characters of the two answers."""
    verdict: Verdict | None
    """None: unscored, with `reason`."""
    reason: str | None = None
    judge: str = ""
    """Whose it is, in a panel."""
    turn: int = 1
    """Of the question, from 1."""
    choice: int = 1
    """Of the systems' answers to it, from 1."""
    baseline_markdown: MarkdownCounts | None = None
    """Of the answers as they were judged; None in lines of runs that did not count it."""
    model_markdown: MarkdownCounts | None = None

    @property
    def case(self) -> tuple[str, ...]:
        """Which two answers it is about, in either order."""
        return self.question_id, self.baseline, self.model, str(self.turn), str(self.choice)

    @property
    def model_score(self) -> float | None:
        """1 where the model won, 0 where the baseline did, 0.5 for a tie, None where unscored.

        Where the judge told probabilities: that of the model, and half of that of a tie.
        """
        if self.verdict is None or self.verdict.winner is None:
            return None
        if (shares := self._shares) is not None:
            return shares[0] + shares[2] / 2
        return 0.5 if self.is_tie else float(bool(self.model_won))

    @property
    def untied_score(self) -> float | None:
        """`model_score` without ties: None for one; of probabilities, the model's share of what is not a tie's."""
        if (shares := self._shares) is not None:
            decided = shares[0] + shares[1]
            return shares[0] / decided if decided else None
        return None if self.is_tie else self.model_score

    @property
    def model_won(self) -> bool | None:
        """Who is better by the verdict, in whole; None for a tie, and where unscored."""
        if self.verdict is None or self.verdict.winner == "tie":
            return None
        return self.verdict.winner == ("2" if self.order == "forward" else "1")

    @property
    def is_tie(self) -> bool:
        """Whether the verdict is a tie."""
        return self.verdict is not None and self.verdict.winner == "tie"

    @property
    def outcome(self) -> Outcome | None:
        """Who won, in whole; None where unscored."""
        if self.verdict is None:
            return None
        return "tie" if self.is_tie else "model" if self.model_won else "baseline"

    @property
    def _shares(self) -> tuple[float, float, float] | None:
        """Probabilities of the model, the baseline and a tie."""
        if self.verdict is None or self.verdict.shares is None:
            return None
        first, second, tie = self.verdict.shares
        return (second, first, tie) if self.order == "forward" else (first, second, tie)

    @property
    def scores(self) -> tuple[float, float] | None:
        """(model's, baseline's) score, 1 to 10; None where the family has none."""
        verdict = self.verdict
        if verdict is None or verdict.score_1 is None or verdict.score_2 is None:
            return None
        first, second = verdict.score_1, verdict.score_2
        return (second, first) if self.order == "forward" else (first, second)


@dataclass(frozen=True, slots=True)
class Grade:
    """One answer graded by itself, as it is stored."""

    question_id: str
    category: str
    turn: int
    """Of the question, from 1."""
    system: str
    mark: float | None
    """1 to 10; None where unscored, with `reason`."""
    reason: str | None = None
