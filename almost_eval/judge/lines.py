"""Judged pairs as lines of `samples.jsonl`, and back: what aggregation, `report` and `verify` read with no model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from almost_eval.errors import StoreError, problem_of
from almost_eval.judge.judges import UNANSWERED, UNPARSED, Judgement
from almost_eval.judge.questions import truncate_answers
from almost_eval.judge.records import Answer, Order, Pair, Question, Review, Verdict
from almost_eval.run.validity import Validity, check
from almost_eval.types import Sample, SampleRecord, Score

ORDERS: dict[str, tuple[Order, ...]] = {
    "both": ("forward", "reverse"),
    "forward": ("forward",),
    "reverse": ("reverse",),
}
"""What `--orders` names."""

SCORING = frozenset({UNPARSED, "non_finite", "context_too_long", *UNANSWERED})
"""Reasons that `validity.check` counts by itself; a review with any other is missing."""


def couples(
    questions: Sequence[Question],
    answers: Sequence[Mapping[str, Answer]],
    orders: str,
    max_answer_chars: int | None,
) -> tuple[list[str], list[Pair], list[tuple[int, int]]]:
    """Ids of the lines, what is judged, and the characters cut off its two answers by place; in the questions' order.

    Args:
        questions: in the order of the lines.
        answers: of each system, the baseline's before the model's.
        orders: a key of `ORDERS`.
        max_answer_chars: where longer answers are cut; None cuts nothing.
    """
    shown = answers
    if max_answer_chars is not None:
        shown = [truncate_answers(dict(mine), max_answer_chars)[0] for mine in answers]
    ids, pairs, cuts = [], [], []
    of_two = list(itertools.combinations(range(len(answers)), 2))
    for (baseline, model), question, order in itertools.product(of_two, questions, ORDERS[orders]):
        places = (baseline, model) if order == "forward" else (model, baseline)
        first, second = (shown[place][question.id] for place in places)
        pair = Pair(question, first, second, order)
        named = f"/{shown[baseline][question.id].model} vs {shown[model][question.id].model}"
        ids.append(pair.id + (named if len(of_two) > 1 else ""))
        pairs.append(pair)
        lost = [len(answers[place][question.id].text) - len(shown[place][question.id].text) for place in places]
        cuts.append((lost[0], lost[1]))
    return ids, pairs, cuts


def by_system(pair: Pair) -> tuple[Answer, Answer]:
    """(the baseline's answer, the model's answer)."""
    first, second = pair.answer_1, pair.answer_2
    return (first, second) if pair.order == "forward" else (second, first)


def record_of(
    pair: Pair, judgement: Judgement, *, id: str, cut: Sequence[int] = (0, 0), judge: str | None = None
) -> SampleRecord:
    """The line of a judged pair.

    Args:
        pair: what was judged.
        judgement: what became of it.
        id: of the line.
        cut: characters that were cut off the two answers, by place.
        judge: who judged it, in a panel.
    """
    baseline, model = by_system(pair)
    sample = Sample(
        id,
        (),
        (),
        0,
        cluster=pair.question.id,
        group=pair.question.category,
        metadata={"order": pair.order, "baseline": baseline.model, "model": model.model}
        | ({} if judge is None else {"judge": judge}),
    )
    outputs = judgement.outputs | {"lengths": [len(pair.answer_1.text), len(pair.answer_2.text)]}
    if stripped := sum(answer.metadata.get("reasoning_characters") or 0 for answer in (pair.answer_1, pair.answer_2)):
        outputs |= {"reasoning_stripped": stripped}
    if any(cut):
        outputs |= {"cut": list(cut)}
    # A judge's tokenizer is its own: four characters stand for a token.
    return rescored(SampleRecord(sample, outputs, Score(None), -(-sum(cut) // 4)), judgement)


def rescored(record: SampleRecord, judgement: Judgement) -> SampleRecord:
    """The line with another judgement of the same pair."""
    whole = SampleRecord(record.sample, record.outputs, Score(None, judgement.reason), record.prompt_tokens_truncated)
    review = review_of(whole, judgement.verdict)
    metrics = {"win_rate": review.model_score}
    if review.judge:  # a panel's win rate is by majority, and no mean of lines
        metrics = {"win_rate_mean": review.model_score, f"judge_win_rate/{review.judge}": review.model_score}
    if review.scores is not None:
        metrics |= {"score/model": review.scores[0], "score/baseline": review.scores[1]}
    score = Score(review.model_score, judgement.reason, metrics)
    return SampleRecord(record.sample, record.outputs, score, record.prompt_tokens_truncated)


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
        lengths = record.outputs["lengths"]
        forward = stored["order"] == "forward"
        return Review(
            question_id=record.sample.cluster,
            category=record.sample.group,
            order=stored["order"],
            baseline=stored["baseline"],
            model=stored["model"],
            baseline_length=lengths[0 if forward else 1],
            model_length=lengths[1 if forward else 0],
            verdict=verdict,
            reason=record.score.reason,
            judge=stored.get("judge", ""),
        )
    except (LookupError, TypeError) as error:
        raise StoreError(
            f"sample {record.sample.id!r} is not a judged pair ({problem_of(error)}); give a run of vicuna"
        ) from None


def reviews_of(records: Sequence[SampleRecord]) -> list[Review]:
    """All lines."""
    return [review_of(record, stored_verdict(record)) for record in records]


def check_reviews(records: Sequence[SampleRecord], n_samples: int, allowed: dict[str, float]) -> Validity:
    """The gate: as everywhere, and a review that could not be had (a failure of the judge) is missing."""
    gate = check(records, n_samples, allowed)
    failed = sum(r.score.reason is not None and r.score.reason not in SCORING for r in records)
    counts = gate.counts | {"missing": gate.counts["missing"] + failed}
    del counts["all_tied"]  # a tie is a verdict here
    return Validity(gate.n, counts, gate.allowed)
