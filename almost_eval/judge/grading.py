"""What marks of single answers say: the MT-Bench score, by turn and by category. Pure and offline.

The score of a system is the mean of its marks over turns and questions, as FastChat shows it, with an interval
clustered by question: the turns of a question are not independent. An answer without a mark is in no mean (FastChat
writes -1, and leaves it out when it shows results); it is counted, and widens the bounds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from almost_eval.judge.records import Grade
from almost_eval.judge.structured import HIGHEST, LOWEST
from almost_eval.stats import mean_metric
from almost_eval.types import JSONMapping, JSONObject, Metric

SCORE = "score"
"""The headline, and the beginning of the names of its parts."""


def score_metrics(grades: Sequence[Grade]) -> dict[str, Metric]:
    """`score`, `score/turn_<n>`, `score/<category>`, `score/turn_<n>/<category>` and `unparsed` of one system.

    Parts are there where there are several. `unparsed` counts every answer without a mark, for whatever reason.
    """
    turns = sorted({grade.turn for grade in grades})
    categories = list(dict.fromkeys(grade.category for grade in grades))
    parts: list[tuple[int | None, str | None]] = [(None, None)]
    parts += [(turn, None) for turn in turns if len(turns) > 1]
    parts += [(None, category) for category in categories if len(categories) > 1]
    parts += [(t, c) for t in turns for c in categories if len(turns) > 1 and len(categories) > 1]
    metrics = {}
    for turn, category in parts:
        mine = [g for g in grades if turn in (None, g.turn) and category in (None, g.category)]
        name = "/".join([SCORE, *([f"turn_{turn}"] if turn else []), *([category] if category else [])])
        if mine:
            metrics[name] = mean_mark([g.mark for g in mine], [g.question_id for g in mine])
    unscored = sum(grade.mark is None for grade in grades)
    return metrics | {"unparsed": Metric(float(unscored), None, None, len(grades), 0)}


def mean_mark(marks: Sequence[float | None], questions: Sequence[str]) -> Metric:
    """The mean of marks from 1 to 10, with an interval that stays on the scale.

    The interval is that of the marks as shares of the way from 1 to 10: `mean_metric` cuts it there, and gives one of
    some width where all marks are the same.
    """
    mean = mean_metric(marks, questions)
    span = HIGHEST - LOWEST
    ends = mean_metric([None if mark is None else (mark - LOWEST) / span for mark in marks], questions).ci95
    interval = (LOWEST + span * ends[0], LOWEST + span * ends[1]) if ends else None
    return Metric(mean.value, mean.stderr, interval, mean.n, mean.unscored)


def bounds(grades: Sequence[Grade]) -> tuple[float, float]:
    """The score if every answer without a mark had the lowest, and the highest."""
    marks = [grade.mark for grade in grades]
    total = math.fsum(mark for mark in marks if mark is not None)
    missing = marks.count(None)
    return (total + LOWEST * missing) / len(marks), (total + HIGHEST * missing) / len(marks)


def difference(a: Sequence[Grade], b: Sequence[Grade]) -> Metric:
    """The mean of b's mark minus a's over turns and questions, paired; unscored where one of the two is.

    Several answers to one question (`--choice all`) are one mark here: their mean.
    """
    of_a, of_b = _by_turn(a), _by_turn(b)
    differences = []
    for key, mark in of_b.items():
        other = of_a[key]
        differences.append(None if mark is None or other is None else mark - other)
    return mean_metric(differences, [question for question, _ in of_b])


def _by_turn(grades: Sequence[Grade]) -> dict[tuple[str, int], float | None]:
    marks: dict[tuple[str, int], list[float]] = {}
    for grade in grades:
        mine = marks.setdefault((grade.question_id, grade.turn), [])
        if grade.mark is not None:
            mine.append(grade.mark)
    return {key: math.fsum(mine) / len(mine) if mine else None for key, mine in marks.items()}


def summarise(grades: Sequence[Grade], spec: JSONMapping) -> tuple[str, dict[str, Metric], JSONObject]:
    """Headline, metrics and the rest of a run. The metrics are those of the system that was named last."""
    names = [system["name"] for system in spec["settings"]["systems"].values()]
    of = {name: [grade for grade in grades if grade.system == name] for name in names}
    metrics = {name: score_metrics(mine) for name, mine in of.items()}
    last = names[-1]
    judging: JSONObject = {
        "mode": "single",
        "systems": {name: _plain(mine) for name, mine in metrics.items()},
        # The rest: the last system minus each other.
        "differences": {name: difference(of[name], of[last]).to_dict() for name in names[:-1]},
        "bounds": {name: list(bounds(mine)) for name, mine in of.items() if mine},
        "reasons": {
            name: dict(Counter(grade.reason or "unparsed" for grade in mine if grade.mark is None))
            for name, mine in of.items()
        },
        "n_questions": len({grade.question_id for grade in grades}),
    }
    return SCORE, metrics[last], judging


def _plain(metrics: Mapping[str, Metric]) -> JSONObject:
    return {name: metric.to_dict() for name, metric in metrics.items()}
