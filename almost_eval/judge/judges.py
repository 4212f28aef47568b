"""What a judge is to a run: a name, what decides its verdicts, and a stream of judgements.

Three kinds: a model behind an API (`model_judge.py`), the nano world's oracle and a reward model (`local.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from almost_eval.judge.api.endpoint import THOUGHT_ONLY
from almost_eval.judge.records import TOO_LONG, Question, Subject, Unparsed, Verdict
from almost_eval.run.interview import CUT, REFUSED
from almost_eval.types import JSONObject, Message, SampleRecord

UNANSWERED = frozenset({CUT, REFUSED, TOO_LONG})
"""The reasons of a case that is not judged, as an answer is not there: thoughts leave it out, or a full context."""
UNPARSED = "unparsed"
"""The reason of a review whose verdict cannot be read."""

LASTING = frozenset(
    {"content_filter", "refusal", "too_long", "context_too_long", "non_finite", THOUGHT_ONLY, UNPARSED, *UNANSWERED}
)
"""Reasons that would come again. A review with another one is requested anew when the command is repeated."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of one pair."""

    verdict: Verdict | None
    """None: unscored, with `reason`."""
    reason: str | None
    """`unparsed`, or why there is no review: `timeout`, `http_500`, `context_too_long`, ..."""
    outputs: JSONObject
    """The review and how it came about, as JSON."""


def without_answer(case: Subject) -> Judgement | None:
    """What becomes of a case that lacks an answer, to the judged turn or one before it; None where all are there."""
    reasons = [about.get("unscored") for answer in case.answers for about in answer.turn_metadata[: case.turn]]
    reason = next((reason for reason in reasons if reason in UNANSWERED), None)
    return None if reason is None else Judgement(None, reason, {})


class Judge(Protocol):
    """Says which of two answers is better. What is not abstract is of one that needs no key: nothing to open or pay."""

    name: str
    """As `--judge` names it."""
    kind: str
    """`model`, `reward` or `oracle`."""

    @abstractmethod
    def spec(self) -> JSONObject:
        """What decides its verdicts, as JSON."""
        ...

    @abstractmethod
    def check(self, questions: Sequence[Question]) -> None:
        """Refuse what can never be judged. Loads no weights, sends nothing.

        Raises:
            InputError: see each judge.
        """
        ...

    def plan(self, pairs: Sequence[Subject], folder: Path | None, repeats: int = 1) -> JSONObject:
        """What judging these takes, at most, and what the first prompt is. Loads no weights, sends nothing."""
        return {"requests": 0, "price_usd_at_most": 0.0, "prompt": pairs[0].question.text}

    def open(self, folder: Path, notice: Callable[[str], None] | None = None) -> AbstractContextManager[object]:
        """Ready to judge inside; what it must remember is kept in the run folder.

        `notice` takes a line that the user must see at once.
        """
        return nullcontext()

    def asks_again(self, record: SampleRecord) -> bool:
        """Whether a stored review that has no verdict should be requested anew: not where it would be the same."""
        return False

    @abstractmethod
    def stream(
        self, pairs: Sequence[Subject], wanted: Sequence[int], attempt: int = 0
    ) -> Iterator[tuple[int, Judgement]]:
        """(index, judgement) of each wanted pair as soon as it is known, in any order.

        `attempt` k is the k-th time on purpose; a judge that always says the same ignores it.
        """
        ...

    def report(self) -> JSONObject:
        """What the `stream`s of this process took, as JSON; it belongs beside the times."""
        return {}

    def warnings(self) -> Sequence[str]:
        """What the reader of the results must know of how they came about."""
        return ()


def is_open(record: SampleRecord, judge: Judge) -> bool:
    """Whether the review of a stored line is to be requested anew."""
    reason = record.score.reason
    return reason is not None and (reason not in LASTING or judge.asks_again(record))


def shown(messages: Sequence[Message]) -> str:
    """A conversation for people to read."""
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in messages)


def verdict_fields(verdict: Verdict | Unparsed) -> JSONObject:
    """`winner`, `scores` and, where there are any, `shares`, by place in the prompt, as a line stores them."""
    if isinstance(verdict, Unparsed):
        return {"winner": None, "scores": None}
    if verdict.winner is None:
        return {"score": verdict.score_1}
    scored = verdict.score_1 is not None and verdict.score_2 is not None
    shares = {} if verdict.shares is None else {"shares": list(verdict.shares)}
    return {"winner": verdict.winner, "scores": [verdict.score_1, verdict.score_2] if scored else None, **shares}
