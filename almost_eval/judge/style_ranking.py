"""Strengths at equal style: the round robin of `aggregate` with length and markdown taken away.

The model is that of `style` with the systems' strengths in the place of its intercept, as in arena-hard-auto's
`show_result` (a Bradley-Terry model with style features):

    logit P(i beats j) = s_i - s_j + sum over features of b * z + c * (+1/2 if i is shown first, else -1/2)

The strengths have no ridge and the mean zero. Where one of them has no finite value (a system that won or lost
everything once style is taken away) there are none, with the reason. Intervals are percentile ones over resampled
questions; there are none where too many resamples have no finite strengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from almost_eval.judge.logistic import fit_ridge, is_unbounded
from almost_eval.judge.records import Review
from almost_eval.judge.style import (
    MAX_FAILED,
    MIN_QUESTIONS,
    RESAMPLES,
    RIDGE,
    StyleEffect,
    drawn_weights,
    style_columns,
)
from almost_eval.stats import Floats
from almost_eval.types import JSONObject, Metric

_HUGE = 20.0
"""A log strength beyond it belongs to a resample without finite ones: Newton's steps went on until nothing was left."""


@dataclass(frozen=True, slots=True)
class StyleRanking:
    """The strengths at equal style, or why there are none."""

    strengths: dict[str, Metric]
    """System -> log strength, mean zero; empty where there is no finite estimate."""
    effects: tuple[StyleEffect, ...]
    """Coefficients of the features; means of the answers are not given, as every system has its own."""
    problem: str | None

    def to_dict(self) -> JSONObject:
        """As JSON; the strengths stand among the metrics."""
        effects = [
            {"name": e.name, "coefficient": e.coefficient, "ci95": e.ci95 and list(e.ci95), "held_by_ridge": False}
            for e in self.effects
        ]
        return {"effects": effects, "problem": self.problem, "ridge": RIDGE, "resamples": RESAMPLES}


def style_ranking(reviews: Sequence[Review], *, rng: np.random.Generator, n_resamples: int = RESAMPLES) -> StyleRanking:
    """Fit the model to the reviews of several systems.

    Args:
        reviews: of all pairs of systems, each with the style counts of its answers.
        rng: of the resamples.
        n_resamples: of whole questions.
    """
    scored = [review for review in reviews if review.model_score is not None]
    n_questions = len({review.question_id for review in scored})
    if any(review.model_markdown is None for review in scored):
        return StyleRanking({}, (), "some reviews have no counts of headers, lists and bold")
    if n_questions < MIN_QUESTIONS:
        return StyleRanking({}, (), f"{n_questions} questions have a verdict; the model needs {MIN_QUESTIONS}")
    names = list(dict.fromkeys(name for review in scored for name in (review.model, review.baseline)))
    x, columns = _columns(scored, names)
    y = np.array([review.model_score for review in scored], dtype=np.float64)
    k = len(names) - 1
    units = np.eye(x.shape[1])
    if unbounded := [names[at + 1] for at in range(k) if is_unbounded(x, y, units[at])]:
        return StyleRanking({}, (), f"no finite strength once style is taken away: {', '.join(unbounded)}")
    penalty = np.array([0.0] * k + [RIDGE] * len(columns))
    fit = fit_ridge(x, y, np.ones((1, len(y))), penalty)[0]
    draws = fit_ridge(x, y, drawn_weights([review.question_id for review in scored], n_resamples, rng), penalty)
    finite = draws[(np.abs(np.nan_to_num(draws[:, :k], nan=math.inf)) < _HUGE).all(axis=1)]
    problem, ends = None, None
    if (failed := n_resamples - len(finite)) > MAX_FAILED * n_resamples:
        problem = f"{failed} of {n_resamples} resamples of the questions have no finite strengths, so no intervals"
    else:
        ends = np.quantile(np.hstack([_centred(finite[:, :k]), finite[:, k:]]), [0.025, 0.975], axis=0).T
    values = [*_centred(fit[None, :k])[0], *fit[k:]]
    intervals: list[tuple[float, float] | None] = [None] * len(values)
    if ends is not None:
        intervals = [(float(low), float(high)) for low, high in ends]
    games = [sum(name in (review.model, review.baseline) for review in scored) for name in names]
    strengths = {
        name: Metric(float(value), None, interval, n)
        for name, value, interval, n in zip(names, values, intervals, games, strict=False)
    }
    effects = tuple(
        StyleEffect(name, float(value), interval, None, None)
        for name, value, interval in zip(columns, values[k + 1 :], intervals[k + 1 :], strict=True)
    )
    return StyleRanking(strengths, effects, problem)


def _centred(contrasts: Floats) -> Floats:
    """(R, k) strengths against the first system to (R, k + 1) with mean zero."""
    every = np.hstack([np.zeros((len(contrasts), 1)), contrasts])
    centred: Floats = every - every.mean(axis=1, keepdims=True)
    return centred


def _columns(scored: Sequence[Review], names: Sequence[str]) -> tuple[Floats, list[str]]:
    """(n, k + features) which systems played, then the features and the place; and the names of the latter."""
    places = {name: at for at, name in enumerate(names)}
    played = np.zeros((len(scored), len(names)))
    for at, review in enumerate(scored):
        played[at, places[review.model]] += 1
        played[at, places[review.baseline]] -= 1
    columns = style_columns(scored)
    return np.column_stack([played[:, 1:], *columns.values()]), list(columns)
