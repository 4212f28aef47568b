"""A judged run as the page shows it: wins, ties and losses in its parts, and against the length of the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from almost_eval.judge.names import CORRECTED, HUMAN
from almost_eval.report.runs import LoadedRun
from almost_eval.report.tables import span_of, text_of
from almost_eval.stats import mean_metric
from almost_eval.types import JSONMapping, JSONObject, Metric, SampleRecord

BINS = 5
"""Of the length ratio, each with as many verdicts."""
FEWEST = 10
"""Verdicts in a bin, at least: fewer say nothing."""


@dataclass(frozen=True, slots=True)
class VerdictCounts:
    """Verdicts of a part of the reviews, as the model sees them."""

    label: str
    wins: int
    ties: int
    losses: int
    unscored: int

    @property
    def n(self) -> int:
        """Verdicts."""
        return self.wins + self.ties + self.losses


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Reviews in which the model's answer is about so much longer than the other."""

    ratio: float
    """Geometric mean of model's over baseline's characters."""
    share: Metric
    """Of the verdicts that the model wins, a tie as half."""


def outcomes(run: LoadedRun) -> list[VerdictCounts]:
    """All reviews, then each judge of a panel, then each order, turn and category where there are several."""
    parts: list[tuple[str, Callable[[SampleRecord], bool]]] = [("all reviews", lambda _: True)]
    judges = dict.fromkeys(str(r.sample.metadata["judge"]) for r in run.records if "judge" in r.sample.metadata)
    parts += [(f"judge {judge}", _stated("judge", judge)) for judge in judges]
    parts += [(label, _stated("order", order)) for order, label in ORDERS.items()]
    turns = sorted({record.sample.metadata.get("turn", 1) for record in run.records})
    parts += [(f"turn {turn}", _stated("turn", turn, 1)) for turn in turns if len(turns) > 1]
    groups = list(dict.fromkeys(record.sample.group for record in run.records))
    parts += [(group, _in_group(group)) for group in groups if len(groups) > 1]
    counts = [_counts(label, [record for record in run.records if keep(record)]) for label, keep in parts]
    return [part for part in counts if part.n + part.unscored]


ORDERS = {"forward": "model shown second", "reverse": "model shown first"}


def _stated(key: str, value: object, default: object = None) -> Callable[[SampleRecord], bool]:
    """Whether the metadata of a record have this value."""
    return lambda record: record.sample.metadata.get(key, default) == value


def _in_group(group: str) -> Callable[[SampleRecord], bool]:
    return lambda record: record.sample.group == group


def _counts(label: str, records: Sequence[SampleRecord]) -> VerdictCounts:
    scores = [record.score.value for record in records if record.score.value is not None]
    # A judge's probability is a win above one half.
    wins, losses = sum(score > 0.5 for score in scores), sum(score < 0.5 for score in scores)
    return VerdictCounts(label, wins, len(scores) - wins - losses, losses, len(records) - len(scores))


def length_bins(run: LoadedRun) -> list[LengthBin]:
    """Verdicts in order of the length ratio, cut into bins of one size; empty where there are too few."""
    scored = [(r, *_lengths(r)) for r in run.records if r.score.value is not None]
    # An empty answer has no ratio.
    ordered = sorted(((math.log(mine / other), r) for r, mine, other in scored if mine and other), key=lambda x: x[0])
    n_bins = min(BINS, len(ordered) // FEWEST)
    bins = []
    for number in range(n_bins):
        part = ordered[number * len(ordered) // n_bins : (number + 1) * len(ordered) // n_bins]
        ratio = math.exp(math.fsum(log for log, _ in part) / len(part))
        share = mean_metric([r.score.value for _, r in part], [r.sample.cluster for _, r in part])
        bins.append(LengthBin(ratio, share))
    return bins


def style_rows(run: LoadedRun) -> list[JSONObject]:
    """The features of the style model with their coefficients as text; empty for a run without one."""
    style = (run.results.get("judging") or {}).get("style") or {}
    return [
        {
            "name": effect["name"],
            "coefficient": text_of(effect["coefficient"], "+.2f"),
            "interval": span_of(effect["ci95"], "+.2f"),
            "held": effect["held_by_ridge"],
            "model": text_of(effect["model"], ",.4g"),
            "baseline": text_of(effect["baseline"], ",.4g"),
        }
        for effect in style.get("effects", ())
    ]


VOTE_ROWS = {
    "win_rate": "the judge alone",
    HUMAN: "the votes alone, a tie half",
    CORRECTED: "the judge corrected by the votes",
}
"""Metric -> what it is called beside people's votes."""


def vote_words(votes: JSONMapping) -> list[str]:
    """How many votes there are, which have no part, and what the judge adds to them."""
    lost = [f"{n} {reason}" for reason, n in votes["unmatched"].items()]
    if missing := votes["questions_with_votes_and_no_verdict"]:
        lost.append(f"{missing} questions with votes have no verdict")
    counts = (
        f"{votes['matched']} of {votes['votes']} votes of {votes['sessions']} sessions, on "
        f"{votes['questions_with_votes']} questions; {votes['questions_without_votes']} more have a verdict alone"
    )
    worth = (
        f"the judge's scores count with power {votes['power']:.2f}: as narrow an interval takes votes on "
        f"{votes['worth'] or 0:.0f} questions without it"
    )
    return [counts + (f"; not used: {', '.join(lost)}" if lost else ""), votes["problem"] or worth]


def _lengths(record: SampleRecord) -> tuple[int, int]:
    """(the model's, the other's) characters."""
    first, second = record.outputs["lengths"]
    return (second, first) if record.sample.metadata["order"] == "forward" else (first, second)
