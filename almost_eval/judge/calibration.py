"""What reviews say of their judge: its biases, and whether its probabilities mean what they say. Pure and offline.

Of probabilities there are two measures. Without any truth at hand, the swapped order is one more vote of the same
judge: a review that gives its winner the probability c should see this answer win in the other order too in the share c
of all cases. With verdicts of others (an archive, votes), it is Brier's: the mean of (probability - outcome)^2, 0 at
best, 0.25 for a judge that always says one half where there are no ties.

The expected calibration error (Naeini et al. 2015) is the mean over bins of the confidence, weighted by their reviews,
of |confidence - share that agreed|. It is above 0 by chance alone where bins are small, and has no interval here; the
difference of the two means (`overconfidence`), positive for a judge that is too sure, has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from almost_eval.judge.records import Review, Side, Verdict
from almost_eval.stats import mean_difference, mean_metric
from almost_eval.types import Metric

BINS = 5
"""Of equal width, from 0.5 to 1: a winner has one half at least."""


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Reviews of about the same confidence."""

    low: float
    """The bin's lower end; its width is 0.1."""
    n: int
    confidence: float
    agreed: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A judge's probabilities against its own verdicts in the swapped order."""

    confidence: Metric
    """Mean probability of the winner, a tie's as half."""
    agreed: Metric
    """Share of these winners that win in the swapped order too, a tie there as half."""
    overconfidence: Metric
    """Mean of the differences."""
    error: float | None
    """Expected calibration error."""
    bins: tuple[CalibrationBin, ...]


def biases(reviews: Sequence[Review]) -> dict[str, Metric]:
    """Shares of decisive verdicts: for Assistant 1, and for the longer of two unequal answers."""
    shares = {"first_wins": first_won(reviews), "longer_wins": longer_won(reviews)}
    return {name: mean_metric([won for _, won in rows], [id for id, _ in rows]) for name, rows in shares.items()}


def first_won(reviews: Sequence[Review]) -> list[tuple[str, float]]:
    """(question, whether Assistant 1 won) of the decisive reviews."""
    return [(r.question_id, float(r.model_won == (r.order == "reverse"))) for r in reviews if r.model_won is not None]


def longer_won(reviews: Sequence[Review]) -> list[tuple[str, float]]:
    """(question, whether the longer answer won) of the decisive reviews of unequal answers."""
    return [
        (review.question_id, float((review.model_length > review.baseline_length) == review.model_won))
        for review in reviews
        if review.model_won is not None and review.model_length != review.baseline_length
    ]


def swap_calibration(reviews: Sequence[Review]) -> Calibration | None:
    """See the head of this file; None where no question has probabilities in both orders."""
    by_pair: dict[tuple[str, ...], list[Review]] = {}
    for review in reviews:
        if review.verdict is not None and review.verdict.shares is not None:
            by_pair.setdefault(review.case, []).append(review)
    clusters: list[str] = []
    confidences: list[float] = []
    agreed: list[float] = []
    for couple in by_pair.values():
        if len(couple) != 2:
            continue
        for review, other in (couple, couple[::-1]):
            score = review.model_score
            if score is None or review.is_tie:
                continue
            clusters.append(review.question_id)
            confidences.append(max(score, 1 - score))
            agreed.append(0.5 if other.is_tie else float(review.model_won == other.model_won))
    if not clusters:
        return None
    bins = _bins(confidences, agreed)
    return Calibration(
        confidence=mean_metric(confidences, clusters),
        agreed=mean_metric(agreed, clusters),
        overconfidence=mean_difference([c - y for c, y in zip(confidences, agreed, strict=True)], clusters),
        error=math.fsum(one.n * abs(one.confidence - one.agreed) for one in bins) / len(clusters),
        bins=bins,
    )


def _bins(confidences: Sequence[float], agreed: Sequence[float]) -> tuple[CalibrationBin, ...]:
    width = 0.5 / BINS
    members: dict[int, list[int]] = {}
    for i, confidence in enumerate(confidences):
        # The small part keeps 0.6, which is 0.1 in no float, in the bin that begins there.
        members.setdefault(min(BINS - 1, int((confidence - 0.5) / width + 1e-9)), []).append(i)
    return tuple(
        CalibrationBin(
            round(0.5 + number * width, 3),
            len(mine),
            math.fsum(confidences[i] for i in mine) / len(mine),
            math.fsum(agreed[i] for i in mine) / len(mine),
        )
        for number, mine in sorted(members.items())
    )


def brier(verdicts: Sequence[tuple[Verdict, Side, str]]) -> Metric | None:
    """Brier's score of verdicts with probabilities.

    Args:
        verdicts: (the judge's, the other's winner by place in the same order, the cluster); a tie's outcome is 0.5.

    Returns:
        None where no verdict has probabilities.
    """
    outcomes = {"1": 0.0, "2": 1.0, "tie": 0.5}
    told = [(v.shares, outcomes[side], cluster) for v, side, cluster in verdicts if v.shares is not None]
    if not told:
        return None
    errors = [(shares[1] + shares[2] / 2 - outcome) ** 2 for shares, outcome, _ in told]
    return mean_metric(errors, [cluster for _, _, cluster in told])
