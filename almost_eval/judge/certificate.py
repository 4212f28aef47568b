"""What a judge's reviews of known cases say of the judge: agreement, biases, and how far it moves a win rate. Pure.

Agreement is chance-corrected (Cohen 1960), with an interval clustered by question. Differences between two judges are
taken on the pairs that both have a verdict on, in the same order, and are resampled by whole questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from almost_eval.compare.paired import paired_bootstrap
from almost_eval.judge.calibration import biases, brier, first_won, longer_won
from almost_eval.judge.cases import Case
from almost_eval.judge.records import Order, Review
from almost_eval.stats import cohen_kappa, draw_counts, mean_metric, wilson
from almost_eval.types import JSONObject, Metric

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Checked:
    """A case, and a judge's reviews of it."""

    case: Case
    reviews: dict[Order, tuple[Review, ...]]
    """Order -> one for each time that the judge was asked."""

    def first(self, order: Order = "forward") -> Review:
        """Of the first time."""
        return self.reviews[order][0]


@dataclass(frozen=True, slots=True)
class Move:
    """How far one judge in the place of another moves a win rate."""

    systems: tuple[str, str] | None
    """(the model, the baseline); None: of the second system, over all pairs of systems."""
    before: float
    after: float
    difference: float
    """after - before, on the same pairs and orders."""
    ci95: tuple[float, float] | None
    """None where there is one question only."""
    n: int
    """Reviews that both have a verdict on."""
    unscored: int
    """Reviews that one of them or both have none on."""

    def to_dict(self) -> JSONObject:
        """As JSON."""
        return asdict(self) | {
            "systems": self.systems and list(self.systems),
            "ci95": self.ci95 and list(self.ci95),
        }


# --- one judge


def check_metrics(checked: Sequence[Checked], *, seed: int) -> dict[str, Metric]:
    """Everything of one judge: with the archive, with people, with itself, and its biases beside the archive's."""
    archived = [one for one in checked if not one.case.by_people]
    voted = [one for one in checked if one.case.by_people]
    metrics: dict[str, Metric] = {}
    if archived:
        metrics |= _agreement(archived, ("forward",), seed)  # the archive knows no other order
        metrics |= _probabilities(archived)
    if voted:
        orders = tuple(voted[0].reviews)
        metrics |= {f"human/{name}": metric for name, metric in _agreement(voted, orders, seed).items()}
    metrics |= _consistency(checked) | _orders(checked)
    if archived:
        theirs = [review for one in archived for review in one.case.reviews()]
        metrics |= biases(_first_reviews(archived))
        metrics |= {f"archived/{name}": metric for name, metric in biases(theirs).items()}
        mine = [one.first() for one in archived]
        metrics["longer_wins_beyond_archive"] = _share_beyond(longer_won(mine), longer_won(theirs), seed)
    if voted:
        people = [review for one in voted for review in one.case.reviews()]
        metrics |= {f"human/{name}": metric for name, metric in biases(_first_reviews(voted)).items()}
        metrics |= {f"people/{name}": metric for name, metric in biases(people).items()}
    return metrics


def _probabilities(archived: Sequence[Checked]) -> dict[str, Metric]:
    """Brier's score of the judge's probabilities against the archived verdicts, where it told some."""
    mine = [(one.first().verdict, one.case) for one in archived]
    told = brier(
        [
            (verdict, winner, case.pair.question.id)
            for verdict, case in mine
            if verdict is not None and (winner := case.verdicts[0].winner) is not None
        ]
    )
    lost = sum(verdict is None for verdict, _ in mine)
    return {} if told is None else {"brier": replace(told, unscored=lost)}


def _first_reviews(checked: Sequence[Checked]) -> list[Review]:
    """Of the first time, in all orders."""
    return [one.first(order) for one in checked for order in one.reviews]


def _agreement(checked: Sequence[Checked], orders: Sequence[Order], seed: int) -> dict[str, Metric]:
    """With the verdicts of the cases; a decisive one is one where neither calls a tie."""
    pairs: list[tuple[str, str, str]] = []  # (their winner, the judge's, the case)
    unscored = 0
    for one in checked:
        for order in orders:
            mine = one.first(order).outcome
            for theirs in (review.outcome for review in one.case.reviews()):
                if mine is None or theirs is None:
                    unscored += 1
                else:
                    pairs.append((theirs, mine, one.case.id))
    decisive = [pair for pair in pairs if "tie" not in pair[:2]]
    every = len(pairs) + unscored
    metrics = _kappa_and_agreement(pairs, every, seed)
    return metrics | {f"{name}/decisive": m for name, m in _kappa_and_agreement(decisive, every, seed).items()}


def _kappa_and_agreement(pairs: Sequence[tuple[str, str, str]], every: int, seed: int) -> dict[str, Metric]:
    """Of pairs of outcomes, each with its cluster; `every` counts those too that are left out."""
    clusters = [id for _, _, id in pairs]
    kappa = cohen_kappa([(theirs, mine) for theirs, mine, _ in pairs], clusters, rng=np.random.default_rng(seed))
    same = mean_metric([float(theirs == mine) for theirs, mine, _ in pairs], clusters)
    lost = every - len(pairs)
    return {"kappa": replace(kappa, unscored=lost), "agreement": replace(same, unscored=lost)}


def _consistency(checked: Sequence[Checked]) -> dict[str, Metric]:
    """With itself: the same pair judged again."""
    clusters, same = [], []
    for one in checked:
        for first, *again in one.reviews.values():
            for other in again:
                clusters.append(one.case.pair.question.id)
                both = (first.outcome, other.outcome)
                same.append(None if None in both else float(both[0] == both[1]))
    return {"self_consistency": mean_metric(same, clusters)} if same else {}


def _orders(checked: Sequence[Checked]) -> dict[str, Metric]:
    """Whether the same answer wins in both places, and how often the other does."""
    both = [one for one in checked if len(one.reviews) == 2]
    if not both:
        return {}
    winners = [(one.first("forward").outcome, one.first("reverse").outcome) for one in both]
    clusters = [one.case.pair.question.id for one in both]
    same = [None if None in pair else float(pair[0] == pair[1]) for pair in winners]
    flips = [None if None in pair else float({*pair} == {"model", "baseline"}) for pair in winners]
    return {"consistency": mean_metric(same, clusters), "flips": mean_metric(flips, clusters)}


def _share_beyond(mine: Sequence[tuple[str, float]], theirs: Sequence[tuple[str, float]], seed: int) -> Metric:
    """The difference of two shares over partly the same questions, with a percentile interval by question."""
    if not mine or not theirs:
        return Metric(None, None, None, len(mine))
    place = {question: g for g, question in enumerate(dict.fromkeys(q for q, _ in (*mine, *theirs)))}
    sums = np.zeros((4, len(place)))  # won and decided, of mine and of theirs
    for row, shares in ((0, mine), (2, theirs)):
        for question, won in shares:
            sums[row, place[question]] += won
            sums[row + 1, place[question]] += 1
    total = sums.sum(axis=1)
    value = float(total[0] / total[1] - total[2] / total[3])
    if len(place) < 2:
        return Metric(value, None, None, len(mine))
    drawn = draw_counts(len(place), RESAMPLES, np.random.default_rng(seed)) @ sums.T  # (R, 4)
    with np.errstate(invalid="ignore"):
        differences = drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3]
    low, high = np.nanquantile(differences, [0.025, 0.975])
    return Metric(value, float(np.nanstd(differences, ddof=1)), (float(low), float(high)), len(mine))


# --- one judge in the place of another


def moves_from_archive(checked: Sequence[Checked], *, seed: int) -> list[Move]:
    """From the archived verdicts to the judge's, in the archived order: over all pairs of systems, then of each."""
    archived = [one for one in checked if not one.case.by_people]
    return _moves([(one.case, one.case.reviews()[0], one.first()) for one in archived], seed)


def moves_between(new: Sequence[Checked], old: Sequence[Checked], *, seed: int) -> list[Move]:
    """From the old judge's verdicts to the new one's, in all orders that both saw; archived pairs only."""
    theirs = {one.case.id: one for one in old if not one.case.by_people}
    return _moves(
        [
            (one.case, theirs[one.case.id].first(order), one.first(order))
            for one in new
            if one.case.id in theirs
            for order in one.reviews
            if order in theirs[one.case.id].reviews
        ],
        seed,
    )


def _moves(reviews: Sequence[tuple[Case, Review, Review]], seed: int) -> list[Move]:
    """(case, before, after) to a move of all and one of each source; those without a pair of verdicts are left out."""
    sources = list(dict.fromkeys(case.source for case, _, _ in reviews))
    parts = [_move(reviews, None, seed)]
    for source in sources:
        mine = [row for row in reviews if row[0].source == source]
        parts.append(_move(mine, (mine[0][1].model, mine[0][1].baseline), seed))
    return [part for part in parts if part is not None and (part.systems or len(sources) > 1)]


def _move(reviews: Sequence[tuple[Case, Review, Review]], systems: tuple[str, str] | None, seed: int) -> Move | None:
    both = [
        (case.pair.question.id, before.model_score, after.model_score)
        for case, before, after in reviews
        if before.model_score is not None and after.model_score is not None
    ]
    if not both:
        return None
    before, after = [x for _, x, _ in both], [y for _, _, y in both]
    moved = paired_bootstrap(
        before, after, [q for q, _, _ in both], n_resamples=RESAMPLES, rng=np.random.default_rng(seed)
    )
    n, interval = len(both), moved.ci95
    if interval is not None and before == after:
        # No resample can show a change that is in none of the pairs: what Wilson allows of 0 in so many.
        most = wilson(0.0, len({question for question, _, _ in both}))[1]
        interval = (-most, most)
    rates = math.fsum(before) / n, math.fsum(after) / n
    return Move(systems, *rates, moved.difference, interval, n, len(reviews) - n)


def sentence(move: Move, new: str, old: str) -> str:
    """`NEW in place of OLD moves this win rate by d (interval)`."""
    if move.systems is None:
        rate = "the win rates of Assistant 2, all pairs of systems together,"
    else:
        rate = f"the win rate of {move.systems[0]} against {move.systems[1]}"
    interval = (
        f"95 % interval {100 * move.ci95[0]:+.1f} to {100 * move.ci95[1]:+.1f}"
        if move.ci95
        else "no interval: one question only"
    )
    return (
        f"{new} in place of {old} moves {rate} by {100 * move.difference:+.1f} points ({interval}): from "
        f"{100 * move.before:.1f} % to {100 * move.after:.1f} % over {move.n} verdicts of each."
    )


def between(new: Sequence[Checked], old: Sequence[Checked], *, seed: int) -> dict[str, Metric]:
    """Two judges on the same cases: how far they agree, and what the new one has more of."""
    theirs = {one.case.id: one for one in old}
    shared = [(one, theirs[one.case.id]) for one in new if one.case.id in theirs]
    rows = [(a.case.id, a.first(order), b.first(order)) for a, b in shared for order in a.reviews if order in b.reviews]
    winners = [(b.outcome, a.outcome, id) for id, a, b in rows]
    scored = [(old, new, id) for old, new, id in winners if old is not None and new is not None]
    metrics = _kappa_and_agreement(scored, len(rows), seed)
    of_new, of_old = [a for _, a, _ in rows], [b for _, _, b in rows]
    metrics["longer_wins_more"] = _share_beyond(longer_won(of_new), longer_won(of_old), seed)
    metrics["first_wins_more"] = _share_beyond(first_won(of_new), first_won(of_old), seed)
    return metrics
