"""Judged cases as lines of `samples.jsonl`, and back: what aggregation, `report` and `verify` read with no model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from almost_eval.errors import InputError, StoreError, problem_of
from almost_eval.judge.judges import UNANSWERED, UNPARSED, Judgement
from almost_eval.judge.markdown import MarkdownCounts, count_markdown
from almost_eval.judge.questions import truncate_answers
from almost_eval.judge.records import Answer, Grade, Order, Pair, Question, Review, Solo, Subject, Verdict
from almost_eval.run.validity import Validity, check
from almost_eval.types import JSONMapping, JSONObject, Sample, SampleRecord, Score

ORDERS: dict[str, tuple[Order, ...]] = {
    "both": ("forward", "reverse"),
    "forward": ("forward",),
    "reverse": ("reverse",),
}
"""What `--orders` names."""

SCORING = frozenset({UNPARSED, "non_finite", "context_too_long", *UNANSWERED})
"""Reasons that `validity.check` counts by itself; a review with any other is missing."""


def cases_of(
    questions: Sequence[Question],
    answers: Sequence[Mapping[str, Answer]],
    orders: str | None,
    max_answer_chars: int | None,
) -> tuple[list[str], Sequence[Subject], Sequence[tuple[int, ...]]]:
    """Ids of the lines, what is judged, and the characters cut off: see `couples`; without orders, see `solos`."""
    if orders is None:
        return solos(questions, answers, max_answer_chars)
    return couples(questions, answers, orders, max_answer_chars)


def couples(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Answer]], orders: str, max_answer_chars: int | None
) -> tuple[list[str], list[Pair], list[tuple[int, int]]]:
    """Ids of the lines, what is judged, and the characters cut off its two answers by place; in the questions' order.

    Args:
        questions: in the order of the lines; each turn of a question is a pair of its own.
        answers: of each system, the baseline's before the model's.
        orders: a key of `ORDERS`.
        max_answer_chars: where longer answers are cut; None cuts nothing.
    """
    shown = _shown(answers, max_answer_chars)
    ids, pairs, cuts = [], [], []
    of_two = list(itertools.combinations(range(len(answers)), 2))
    for (baseline, model), (question, turn) in itertools.product(of_two, _turns(questions)):
        n = paired_choices(question, *(len(shown[place][question.id].choices) for place in (baseline, model)))
        for choice, order in itertools.product(range(1, n + 1), ORDERS[orders]):
            places = (baseline, model) if order == "forward" else (model, baseline)
            first, second = (_chosen(shown[place][question.id], choice) for place in places)
            pair = Pair(question, first, second, order, turn, choice)
            named = f"/{shown[baseline][question.id].model} vs {shown[model][question.id].model}"
            ids.append(pair.id + (named if len(of_two) > 1 else ""))
            pairs.append(pair)
            whole = (_chosen(answers[place][question.id], choice) for place in places)
            lost = [_cut_off(uncut, one, turn) for uncut, one in zip(whole, (first, second), strict=True)]
            cuts.append((lost[0], lost[1]))
    return ids, pairs, cuts


def paired_choices(question: Question, one: int, other: int) -> int:
    """Pairs of so many answers to a question: the first with the first, and so on; one alone stands in each of them.

    Raises:
        InputError: both are several, and not as many.
    """
    if one != other and 1 not in (one, other):
        raise InputError(
            f"question {question.id} has {one} answers of one system and {other} of another, so that --choice all "
            "makes no pairs; give as many of both, or one, or --choice N"
        )
    return max(one, other)


def _chosen(answer: Answer, choice: int) -> Answer:
    choices = answer.choices
    return choices[choice - 1] if len(choices) > 1 else choices[0]


def solos(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Answer]], max_answer_chars: int | None
) -> tuple[list[str], list[Solo], list[tuple[int]]]:
    """Ids of the lines, what is graded, and the characters cut off it: each turn of each system's answers.

    Args are those of `couples`.
    """
    shown = _shown(answers, max_answer_chars)
    ids, cases, cuts = [], [], []
    for place, (question, turn) in itertools.product(range(len(answers)), _turns(questions)):
        both = zip(answers[place][question.id].choices, shown[place][question.id].choices, strict=True)
        for choice, (whole, answer) in enumerate(both, 1):
            case = Solo(question, answer, turn, choice)
            ids.append(case.id + (f"/{answer.model}" if len(answers) > 1 else ""))
            cases.append(case)
            cuts.append((_cut_off(whole, answer, turn),))
    return ids, cases, cuts


def _shown(answers: Sequence[Mapping[str, Answer]], max_answer_chars: int | None) -> Sequence[Mapping[str, Answer]]:
    if max_answer_chars is None:
        return answers
    return [truncate_answers(dict(mine), max_answer_chars)[0] for mine in answers]


def _turns(questions: Sequence[Question]) -> list[tuple[Question, int]]:
    return [(question, turn) for question in questions for turn in range(1, len(question.turns) + 1)]


def _cut_off(whole: Answer, shown: Answer, turn: int) -> int:
    return len(whole.turns[turn - 1]) - len(shown.turns[turn - 1])


def record_of(
    case: Subject, judgement: Judgement, *, id: str, cut: Sequence[int] = (0, 0), judge: str | None = None
) -> SampleRecord:
    """The line of a judged pair, or of a graded answer; `cut` is the characters that were cut off the answers, by
    place.
    """
    if isinstance(case, Pair):
        baseline, model = case.by_system
        named = {"order": case.order, "baseline": baseline.model, "model": model.model}
    else:
        named = {"model": case.answer.model}
    sample = Sample(
        id,
        (),
        (),
        0,
        cluster=case.question.id,
        group=case.question.category,
        # A run of one turn and one choice has the lines it had before there were several.
        metadata=named
        | ({"turn": case.turn} if case.question.later or isinstance(case, Solo) else {})
        | ({"choice": case.choice} if case.choice > 1 else {})
        | ({} if judge is None else {"judge": judge}),
    )
    lengths = [len(answer.turns[case.turn - 1]) for answer in case.answers]
    outputs = judgement.outputs | {"lengths": lengths} | style_fields(case)
    made = [about for answer in case.answers for about in answer.turn_metadata[: case.turn]]
    if stripped := sum(about.get("reasoning_characters") or 0 for about in made):
        outputs |= {"reasoning_stripped": stripped}
    if any(cut):
        outputs |= {"cut": list(cut)}
    # A judge's tokenizer is its own: four characters stand for a token.
    return rescored(SampleRecord(sample, outputs, Score(None), -(-sum(cut) // 4)), judgement)


def style_fields(case: Subject) -> JSONObject:
    """Markdown of the two judged answers, by place, as a line stores it; nothing of an answer that stands alone."""
    if isinstance(case, Solo):
        return {}
    first, second = (count_markdown(answer.turns[case.turn - 1]) for answer in case.answers)
    return {"markdown": {name: [getattr(first, name), getattr(second, name)] for name in MarkdownCounts._fields}}


def rescored(record: SampleRecord, judgement: Judgement) -> SampleRecord:
    """The line with another judgement of the same case."""
    if "order" not in record.sample.metadata:
        mark = judgement.verdict.score_1 if judgement.verdict else None
        return replace(record, score=Score(mark, judgement.reason, {"score": mark}))
    review = review_of(replace(record, score=Score(None, judgement.reason)), judgement.verdict)
    metrics = {"win_rate": review.model_score}
    if review.judge:  # a panel's win rate is by majority, and no mean of lines
        metrics = {"win_rate_mean": review.model_score, f"judge_win_rate/{review.judge}": review.model_score}
    if review.scores is not None:
        metrics |= {"score/model": review.scores[0], "score/baseline": review.scores[1]}
    return replace(record, score=Score(review.model_score, judgement.reason, metrics))


def stored_verdict(record: SampleRecord) -> Verdict | None:
    """What the line says."""
    winner, scores = record.outputs.get("winner"), record.outputs.get("scores")
    if winner is None or record.score.value is None:
        return None
    shares = record.outputs.get("shares")
    first, second = scores or (None, None)
    return Verdict(winner, first, second, tuple(shares) if shares else None)


def review_of(record: SampleRecord, verdict: Verdict | None) -> Review:
    """What aggregation reads.

    Raises:
        StoreError: the line is no judged pair.
    """
    stored = record.sample.metadata
    try:
        lengths, markdown = record.outputs["lengths"], _stored_markdown(record.outputs.get("markdown"))
        theirs, ours = (0, 1) if stored["order"] == "forward" else (1, 0)
        return Review(
            question_id=record.sample.cluster,
            category=record.sample.group,
            order=stored["order"],
            baseline=stored["baseline"],
            model=stored["model"],
            baseline_length=lengths[theirs],
            model_length=lengths[ours],
            verdict=verdict,
            reason=record.score.reason,
            turn=stored.get("turn", 1),
            choice=stored.get("choice", 1),
            baseline_markdown=markdown[theirs],
            model_markdown=markdown[ours],
            judge=stored.get("judge", ""),
        )
    except (LookupError, TypeError) as error:
        raise StoreError(
            f"sample {record.sample.id!r} is not a judged pair ({problem_of(error)}); give a run of vicuna"
        ) from None


def _stored_markdown(counts: JSONMapping | None) -> tuple[MarkdownCounts | None, MarkdownCounts | None]:
    """Of the answers in their places."""
    if counts is None:
        return None, None
    first, second = (MarkdownCounts(*(counts[name][side] for name in MarkdownCounts._fields)) for side in (0, 1))
    return first, second


def reviews_of(records: Sequence[SampleRecord]) -> list[Review]:
    """All lines."""
    return [review_of(record, stored_verdict(record)) for record in records]


def grades_of(records: Sequence[SampleRecord]) -> list[Grade]:
    """All lines of graded answers.

    Raises:
        StoreError: a line is none.
    """
    grades = []
    for record in records:
        sample = record.sample
        try:
            turn, system = int(sample.metadata["turn"]), str(sample.metadata["model"])
        except (LookupError, TypeError) as error:
            raise StoreError(f"sample {sample.id!r} is not a graded answer ({problem_of(error)})") from None
        grades.append(Grade(sample.cluster, sample.group, turn, system, record.score.value, record.score.reason))
    return grades


def check_reviews(records: Sequence[SampleRecord], n_samples: int, allowed: dict[str, float]) -> Validity:
    """The gate: as everywhere, and a review that could not be had (a failure of the judge) is missing."""
    gate = check(records, n_samples, allowed)
    failed = sum(r.score.reason is not None and r.score.reason not in SCORING for r in records)
    counts = gate.counts | {"missing": gate.counts["missing"] + failed}
    del counts["all_tied"]  # a tie is a verdict here
    return Validity(gate.n, counts, gate.allowed)


def withheld(reason: str | None) -> JSONObject:
    """What stands in a metric that the gate blocks."""
    return {"value": None, "stderr": None, "ci95": None, "withheld": reason}
