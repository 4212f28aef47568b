"""Pairs that somebody has a verdict on already: an archived judge, or people. A judge is checked on them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from almost_eval.judge.archive import Archive, as_review
from almost_eval.judge.records import Answer, Pair, Question, Review, Side, Verdict

if TYPE_CHECKING:
    from almost_eval.judge.prompts import JudgePrompts

VOTES = "votes"
"""Where a case that people voted on comes from."""


@dataclass(frozen=True, slots=True)
class Case:
    """A pair, and what was said of it."""

    source: str
    """Name of the review file, or `VOTES`."""
    pair: Pair
    """In the order of the verdicts, which is taken as forward."""
    verdicts: tuple[Verdict, ...]
    """By place: the archived one, or one of each voter."""

    @property
    def by_people(self) -> bool:
        """Whether people said it."""
        return self.source == VOTES

    @property
    def id(self) -> str:
        """Unique among the cases of a check."""
        return f"{self.source}/{self.pair.question.id}"

    def reviews(self) -> list[Review]:
        """The verdicts as aggregation reads them."""
        baseline, model = self.pair.answer_1.model, self.pair.answer_2.model
        return [as_review(self.pair, baseline, model, verdict) for verdict in self.verdicts]


@dataclass(frozen=True, slots=True)
class HumanVote:
    """One vote of one person on two answers."""

    question: str
    """Text."""
    answer_1: str
    answer_2: str
    winner: Side
    systems: tuple[str, str] = ("side-a", "side-b")


def archived_cases(archives: Sequence[Archive], reader: JudgePrompts) -> tuple[list[Case], int]:
    """A case for each archived review with a verdict, and the number of those without."""
    cases, unreadable = [], 0
    for archive in archives:
        for archived, verdict in zip(archive.reviews, archive.verdicts(reader), strict=True):
            if isinstance(verdict, Verdict):
                cases.append(Case(archive.file.stem, archived.pair, (verdict,)))
            else:
                unreadable += 1
    return cases, unreadable


def voted_cases(votes: Iterable[HumanVote]) -> list[Case]:
    """A case for each pair that was voted on, with all of its votes, in the place in which it was first seen."""
    pairs: dict[tuple[str, frozenset[str]], tuple[HumanVote, list[Verdict]]] = {}
    for vote in votes:
        key = (vote.question, frozenset((vote.answer_1, vote.answer_2)))
        first, verdicts = pairs.setdefault(key, (vote, []))
        other: dict[Side, Side] = {"1": "2", "2": "1", "tie": "tie"}
        turned = vote.answer_1 != first.answer_1
        verdicts.append(Verdict(other[vote.winner] if turned else vote.winner))
    cases = []
    for number, (first, verdicts) in enumerate(pairs.values(), 1):
        question = Question(f"vote-{number}", first.question, VOTES)
        texts = zip((first.answer_1, first.answer_2), first.systems, strict=True)
        one, two = (Answer(question.id, text, system) for text, system in texts)
        cases.append(Case(VOTES, Pair(question, one, two, "forward"), tuple(verdicts)))
    return cases


def drawn(cases: Sequence[Case], limit: int | None, seed: int) -> list[Case]:
    """So many cases, drawn with a seed, in their order; all where there are no more."""
    if limit is None or limit >= len(cases):
        return list(cases)
    return [cases[i] for i in sorted(random.Random(seed).sample(range(len(cases)), limit))]


def reversed_pair(pair: Pair) -> Pair:
    """The same answers with their places changed."""
    return Pair(pair.question, pair.answer_2, pair.answer_1, "reverse" if pair.order == "forward" else "forward")
