"""What a panel of judges says: each judge by itself, all together, and how far they agree. Pure and offline.

Together, a pair in one order has two values:

- *majority*: who has more than half of the verdicts that there are; where nobody has, it is a tie. Two judges that
  disagree are a tie, and so are one vote for each side and one tie.
- *mean*: the mean of the judges' scores (1, 0.5, 0, or a probability).

A judge without a verdict on the pair is left out of both, and counted. All intervals are clustered by question.

Self-preference (Panickssery et al. 2024, arXiv 2404.13076): what a judge gives the systems of its own family, less what
the judges of other families give the same answers on average. Families are stated by the user.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from almost_eval import stats
from almost_eval.errors import InputError
from almost_eval.judge.aggregate import Orders, Ties, aggregate, agreement, round_robin
from almost_eval.judge.panel import Families
from almost_eval.judge.records import Outcome, Review, Side, Verdict
from almost_eval.stats import mean_difference, mean_metric
from almost_eval.types import JSONObject, Metric

MISSING = "no_judge"
"""The reason of a pair on which no judge has a verdict."""


@dataclass(frozen=True, slots=True)
class PanelCounts:
    """How the verdicts on each pair in each order came together."""

    pairs: int
    unanimous: int
    """All judges say the same."""
    split: int
    """Nobody has more than half: a tie of the panel, not of the judges."""
    incomplete: int
    """Some judges have no verdict."""
    empty: int
    """None has."""


@dataclass(frozen=True, slots=True)
class SelfPreference:
    """A judge on the systems of its own family."""

    judge: str
    family: str
    systems: tuple[str, ...]
    own: Metric
    """Win rate of these systems, by this judge."""
    others: Metric
    """The same pairs, by the mean of the judges of other families."""
    difference: Metric
    problem: str | None = None
    """Why there is none."""

    def to_dict(self) -> JSONObject:
        """As JSON."""
        metrics = {name: getattr(self, name).to_dict() for name in ("own", "others", "difference")}
        return asdict(self) | metrics | {"systems": list(self.systems)}


def by_case(reviews: Sequence[Review]) -> list[list[Review]]:
    """The reviews of each pair in each order together."""
    cases: dict[tuple[str, ...], list[Review]] = {}
    for review in reviews:
        cases.setdefault((*review.case, review.order), []).append(review)
    return list(cases.values())


def majority(reviews: Sequence[Review]) -> list[Review]:
    """One review of each pair in each order: the panel's."""
    return [_together(case) for case in by_case(reviews)]


def _together(case: Sequence[Review]) -> Review:
    first = case[0]
    outcome = majority_outcome([review.outcome for review in case])
    verdict = None if outcome is None else Verdict(_side(outcome, forward=first.order == "forward"))
    return replace(first, verdict=verdict, reason=None if verdict else MISSING, judge="")


_SCORES: dict[Outcome, float] = {"model": 1.0, "tie": 0.5, "baseline": 0.0}


def majority_outcome(outcomes: Sequence[Outcome | None]) -> Outcome | None:
    """Who has more than half of the verdicts, else a tie; None where there is no verdict."""
    together = stats.majority([None if outcome is None else _SCORES[outcome] for outcome in outcomes])
    return next((outcome for outcome, score in _SCORES.items() if score == together), None)


def _side(outcome: Outcome, *, forward: bool) -> Side:
    if outcome == "tie":
        return "tie"
    return "2" if (outcome == "model") == forward else "1"


def counts_of(reviews: Sequence[Review]) -> PanelCounts:
    """See `PanelCounts`."""
    said = [[review.outcome for review in case] for case in by_case(reviews)]
    told = [[outcome for outcome in outcomes if outcome is not None] for outcomes in said]
    return PanelCounts(
        pairs=len(said),
        unanimous=sum(len(whole) == len(mine) and len(set(mine)) == 1 for whole, mine in zip(said, told, strict=True)),
        split=sum(bool(mine) and 2 * Counter(mine).most_common(1)[0][1] <= len(mine) for mine in told),
        incomplete=sum(0 < len(mine) < len(whole) for whole, mine in zip(said, told, strict=True)),
        empty=sum(not mine for mine in told),
    )


def mean_win_rate(reviews: Sequence[Review], ties: Ties, system: str | None = None) -> Metric:
    """Of the model (or of a system of a round robin): the mean over pairs of the mean over judges."""
    values, clusters = [], []
    for case in by_case(reviews):
        scores = [score_of(review, system, ties) for review in case]
        told = [score for score in scores if score is not None]
        if not told and any(review.verdict is not None for review in case):
            continue  # ties alone, which are dropped
        values.append(math.fsum(told) / len(told) if told else None)
        clusters.append(case[0].question_id)
    return mean_metric(values, clusters)


def score_of(review: Review, system: str | None = None, ties: Ties = "half") -> float | None:
    """What a review gives the model, or a system that it is about."""
    score = review.model_score if ties == "half" else review.untied_score
    return score if score is None or system in (None, review.model) else 1 - score


def summarise_panel(
    reviews: Sequence[Review],
    judges: Sequence[str],
    systems: Sequence[str],
    families: Families,
    seed: int,
    *,
    ties: Ties = "half",
    orders: Orders = "both",
) -> tuple[dict[str, Metric], JSONObject]:
    """The metrics of a panel, and the entry `panel` of its results. `reviews` are of all judges; `systems` are baseline
    and model, or all of a round robin.
    """
    mine = {judge: [review for review in reviews if review.judge == judge] for judge in judges}
    is_round = len(systems) > 2
    metrics = {} if is_round else {"win_rate_mean": mean_win_rate(reviews, ties)}
    rows = []
    for judge in judges:
        row: JSONObject = {
            "name": judge,
            "family": families.judges.get(judge),
            "reviews": len(mine[judge]),
            "unscored": sum(review.verdict is None for review in mine[judge]),
            "reasons": dict(Counter(r.reason or "unparsed" for r in mine[judge] if r.verdict is None)),
        }
        if is_round:
            ranking = round_robin(mine[judge], rng=np.random.default_rng(seed))
            row["round_robin"] = ranking.to_dict()
            row["win_rates"] = {
                system: mean_win_rate(
                    [r for r in mine[judge] if system in (r.baseline, r.model)], ties, system
                ).to_dict()
                for system in systems
            }
        else:
            alone = aggregate(mine[judge], ties=ties, orders=orders)
            metrics[f"judge_win_rate/{judge}"] = alone.metrics["win_rate"]
            row |= {name: getattr(alone, name).to_dict() for name in ("consistency", "first_wins", "longer_wins")}
            if alone.calibration is not None:
                row["calibration"] = alone.to_dict()["calibration"]
        rows.append(row)
    panel: JSONObject = {
        "judges": rows,
        "counts": asdict(counts_of(reviews)),
        "agreement": _agreements(mine, seed),
        "self_preference": [one.to_dict() for one in self_preferences(reviews, systems, families, ties)],
    }
    if families.systems:
        panel["system_families"] = dict(families.systems)
    if is_round:
        panel["all"] = round_robin(reviews, rng=np.random.default_rng(seed)).to_dict()
    return metrics, panel


def _agreements(mine: Mapping[str, Sequence[Review]], seed: int) -> list[JSONObject]:
    """Cohen's kappa and the share of same verdicts of every two judges."""
    rows = []
    for a, b in itertools.combinations(mine, 2):
        row: JSONObject = {"a": a, "b": b}
        try:
            both = agreement(mine[a], mine[b], rng=np.random.default_rng(seed))
        except InputError as error:
            rows.append(row | {"problem": str(error)})
            continue
        named = {name: getattr(both, name).to_dict() for name in ("kappa", "agreement", "decisive")}
        rows.append(row | named | {"unscored": both.unscored, "problem": None})
    return rows


def self_preferences(
    reviews: Sequence[Review], systems: Sequence[str], families: Families, ties: Ties = "half"
) -> list[SelfPreference]:
    """Of every judge that is of a system's family."""
    preferences = []
    for judge, family in families.judges.items():
        kin = tuple(system for system in systems if families.systems.get(system) == family)
        if kin:
            preferences.append(_self_preference(reviews, judge, family, kin, families, ties))
    return preferences


def _self_preference(
    reviews: Sequence[Review], judge: str, family: str, kin: tuple[str, ...], families: Families, ties: Ties
) -> SelfPreference:
    own: list[float | None] = []
    others: list[float | None] = []
    clusters = []
    for case in by_case(reviews):
        about = [name for name in (case[0].baseline, case[0].model) if name in kin]
        if len(about) != 1:
            continue  # without kin, or kin among themselves
        scores = {review.judge: score_of(review, about[0], ties) for review in case}
        told = [s for name, s in scores.items() if families.judges.get(name) != family and s is not None]
        own.append(scores.get(judge))
        others.append(math.fsum(told) / len(told) if told else None)
        clusters.append(case[0].question_id)
    differences = [None if None in (x, y) else (x or 0.0) - (y or 0.0) for x, y in zip(own, others, strict=True)]
    problem = None
    if not clusters:
        problem = "its family plays against itself alone"
    elif all(value is None for value in others):
        problem = "no judge of another family has a verdict"
    elif all(value is None for value in differences):
        problem = "it has no verdict where the others have one"
    paired = [difference is not None for difference in differences]
    both = [[value if keep else None for value, keep in zip(values, paired, strict=True)] for values in (own, others)]
    return SelfPreference(
        judge,
        family,
        kin,
        mean_metric(both[0], clusters),
        mean_metric(both[1], clusters),
        mean_difference(differences, clusters),
        problem,
    )
