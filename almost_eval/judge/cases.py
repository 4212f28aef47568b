"""Pairs that somebody has a verdict on already: an archived judge, or people. A judge is checked on them.

An archive is FastChat's review JSONL. A review file names its two answers by id; the answers stand in a folder `answer`
beside the folder `review`. Verdicts are read from the reviews' text by this toolkit's parser; what the file says of
itself (`score`) is compared, not used.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from almost_eval.errors import DataError, problem_of
from almost_eval.files import read_rows
from almost_eval.judge.aggregate import Orders, Ties, aggregate
from almost_eval.judge.markdown import count_markdown
from almost_eval.judge.names import STYLE_CONTROLLED
from almost_eval.judge.records import Answer, Pair, Question, Review, Side, Unparsed, Verdict
from almost_eval.judge.style import style_control
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from almost_eval.judge.prompts import JudgePrompts

VOTES = "votes"
"""Where a case that people voted on comes from."""


@dataclass(frozen=True, slots=True)
class ArchivedReview:
    """One review, and what it is about."""

    pair: Pair
    """In the order it was shown, which is taken as forward: Assistant 1 is the baseline."""
    text: str
    score: tuple[float, float] | None
    """What the file says the two scores are."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One review file."""

    file: Path
    baseline: str
    """The name of Assistant 1."""
    model: str
    reviews: tuple[ArchivedReview, ...]

    def verdicts(self, prompts: JudgePrompts) -> list[Verdict | Unparsed]:
        """What our parser reads in each review."""
        return [prompts.parse(review.text, review.pair) for review in self.reviews]

    def differing(self, verdicts: Sequence[Verdict | Unparsed]) -> list[JSONObject]:
        """Reviews whose own `score` is another one than the parser's, with both."""
        differing = []
        for review, verdict in zip(self.reviews, verdicts, strict=True):
            read = (verdict.score_1, verdict.score_2) if isinstance(verdict, Verdict) else None
            if review.score is not None and review.score != read:
                differing.append(
                    {"question": review.pair.question.id, "stored": list(review.score), "read": read and [*read]}
                )
        return differing

    def recorded_totals(self) -> list[float] | None:
        """The sums of the file's own scores, of Assistant 1 and 2; None where a review has none."""
        scores = [review.score for review in self.reviews]
        if any(score is None for score in scores):
            return None
        return [sum(side) for side in zip(*(score for score in scores if score), strict=True)]


def as_review(pair: Pair, baseline: str, model: str, verdict: Verdict | Unparsed | None) -> Review:
    """A pair and its verdict as aggregation reads them."""
    theirs, ours = (answer.text for answer in pair.by_system)
    return Review(
        question_id=pair.question.id,
        category=pair.question.category,
        order=pair.order,
        baseline=baseline,
        model=model,
        baseline_length=len(theirs),
        model_length=len(ours),
        verdict=verdict if isinstance(verdict, Verdict) else None,
        reason=None if isinstance(verdict, Verdict) else "unparsed" if verdict else "missing",
        baseline_markdown=count_markdown(theirs),
        model_markdown=count_markdown(ours),
    )


def find_archives(paths: Sequence[Path], questions: Sequence[Question]) -> list[Archive]:
    """The review files in folders that hold `answer/*.jsonl` and `review/**/*.jsonl`, or named one by one below such a
    folder; with the questions that they answer.

    Raises:
        DataError: no such files, a line that is no review, or one that names an answer or a question nobody has.
    """
    by_id = {question.id: question for question in questions}
    archives = []
    for path in paths:
        files = sorted((path / "review").rglob("*.jsonl")) if path.is_dir() else [path]
        root = path if path.is_dir() else next((p for p in path.parents if (p / "answer").is_dir()), None)
        if root is None or not (root / "answer").is_dir() or not files:
            raise DataError(f"{path} is no archive; give a folder with answer/*.jsonl and review/*.jsonl in it")
        answers = _answers(root / "answer")
        archives += [_archive(file, answers, by_id) for file in files]
    return archives


def _archive(file: Path, answers: Mapping[str, Answer], questions: Mapping[str, Question]) -> Archive:
    reviews: dict[str, ArchivedReview] = {}
    for number, row in enumerate(read_rows(file), 1):
        where = f"{file}, line {number}"
        try:
            question = str(row["question_id"])
            ids, text = (str(row["answer1_id"]), str(row["answer2_id"])), str(row["text"])
            stated = row.get("score")
            score = (float(stated[0]), float(stated[1])) if stated else None
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(f"malformed data: {where} is not a review ({problem_of(error)})") from None
        if lost := next((id for id in ids if id not in answers), None):
            raise DataError(f"{where} is about answer {lost!r}, which no file of the archive's answer folder holds")
        if question not in questions:
            raise DataError(f"{where} is about question {question}, which was not asked; give its --questions FILE")
        if question in reviews:
            raise DataError(f"{where}: a second review of question {question}; remove one")
        first, second = (answers[id] for id in ids)
        if not first.question_id == second.question_id == question:
            raise DataError(f"{where} is about question {question}, its answers are to another")
        reviews[question] = ArchivedReview(Pair(questions[question], first, second, "forward"), text, score)
    if not reviews:
        raise DataError(f"{file} holds no review")
    pairs = [review.pair for review in reviews.values()]
    names = {(pair.answer_1.model, pair.answer_2.model) for pair in pairs}
    if len(names) > 1:
        raise DataError(f"{file} compares several pairs of systems ({len(names)}); split it into one file for each")
    ((baseline, model),) = names
    return Archive(file, baseline, model, tuple(reviews.values()))


def _answers(folder: Path) -> dict[str, Answer]:
    """Answer id -> answer, of every file of the folder; lines without an id cannot be named by a review."""
    answers = {}
    for file in sorted(folder.glob("*.jsonl")):
        for number, row in enumerate(read_rows(file), 1):
            if "answer_id" not in row:
                continue
            try:
                answer = Answer(str(row["question_id"]), str(row["text"]), str(row["model_id"]))
            except KeyError as error:
                raise DataError(f"malformed data: {file}, line {number} is not an answer: it lacks {error}") from None
            answers[str(row["answer_id"])] = answer
    return answers


def aggregate_archives(
    archives: Sequence[Archive], prompts: JudgePrompts, *, ties: Ties = "half", orders: Orders = "both"
) -> list[JSONObject]:
    """Each review file by our parser and our aggregation, as JSON."""
    rows = []
    for archive in archives:
        verdicts = archive.verdicts(prompts)
        judged = zip(archive.reviews, verdicts, strict=True)
        reviews = [as_review(review.pair, archive.baseline, archive.model, verdict) for review, verdict in judged]
        results = aggregate(reviews, ties=ties, orders=orders)
        style = style_control(reviews, ties=ties, rng=np.random.default_rng(0))
        metrics = results.metrics | {STYLE_CONTROLLED: style.win_rate}
        rows.append(
            {
                "file": archive.file.name,
                "baseline": archive.baseline,
                "model": archive.model,
                "reviews": len(archive.reviews),
                "other_scores_than_stored": archive.differing(verdicts),
                "recorded_totals": archive.recorded_totals(),
                "metrics": {name: metric.to_dict() for name, metric in metrics.items()},
                "judging": results.to_dict() | {"style": style.to_dict()},
            }
        )
    return rows


# --- cases


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
