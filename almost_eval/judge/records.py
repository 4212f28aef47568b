"""The records of pairwise judging, in the order they travel.

A `Question` and two systems' `Answer`s make a `Pair`; a prompt family renders it as a `JudgeRequest`; a judge (the
client, a reward model, the nano oracle) gives a `Reply` or a `Failure`; the family's parser reads a `Verdict` or an
`Unparsed` from the reply; all of it together is a `Review`, which is what is stored and what aggregation reads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from almost_eval.types import JSONMapping, Message

Order = Literal["forward", "reverse"]
"""`forward` shows the baseline as Assistant 1 and the model as Assistant 2, as the official script does."""

Side = Literal["1", "2", "tie"]
"""Who is better, by the place in the prompt."""


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a question file."""

    id: str
    """As text; FastChat's files hold integers."""
    text: str
    category: str = "general"
    reference: str | None = None
    """The nano world's key to its oracle, or a reference answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of FastChat's answer JSONL."""

    question_id: str
    text: str
    """May be empty: judged as it is."""
    model: str
    """The system's name (`model_id` in the file)."""
    metadata: JSONMapping = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one question in the order they are shown."""

    question: Question
    answer_1: Answer
    answer_2: Answer
    order: Order

    @property
    def id(self) -> str:
        """Unique in a run: `question/order`, and the systems where there are more than two."""
        return f"{self.question.id}/{self.order}"


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
        whole = {
            "judge": self.judge,
            "messages": [message.to_dict() for message in self.messages],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "attempt": self.attempt,
        }
        if self.options:
            whole["options"] = dict(self.options)
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


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

    @property
    def usage(self) -> Usage:
        """Its tokens."""
        return Usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.cached_tokens,
            self.reasoning_tokens,
            self.written_tokens,
        )


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

    winner: Side
    score_1: float | None = None
    """1 to 10; None in a family that names the winner only."""
    score_2: float | None = None


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

    @property
    def model_score(self) -> float | None:
        """1 where the model won, 0 where the baseline did, 0.5 for a tie, None where unscored."""
        if self.verdict is None:
            return None
        if self.verdict.winner == "tie":
            return 0.5
        return float(self.verdict.winner == ("2" if self.order == "forward" else "1"))

    @property
    def scores(self) -> tuple[float, float] | None:
        """(model's, baseline's) score, 1 to 10; None where the family has none."""
        verdict = self.verdict
        if verdict is None or verdict.score_1 is None or verdict.score_2 is None:
            return None
        first, second = verdict.score_1, verdict.score_2
        return (second, first) if self.order == "forward" else (first, second)
