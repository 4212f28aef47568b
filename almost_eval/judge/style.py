"""The win rate at equal style: what a judge says of two systems once length and markdown are taken away.

The model, over all scored reviews (a tie is half a win):

    logit P(model wins) = a + sum over features of b * z + c * (+1/2 if the model is shown first, else -1/2)

A feature compares the two answers as (m - o) / (m + o), m the model's count and o the other's, 0 where both are 0: of
characters, headers, list items and bold passages. z is the feature divided by its root mean square over these reviews.
The rate is the mean of P at z = 0 over both positions. Without both orders there is no c; a feature that never differs
is left out.

Anchors: the style control of arena-hard-auto (`show_result.py`: length and markdown, such differences) and the length
control of AlpacaEval (Dubois et al. 2024, arXiv 2404.04475: the prediction at no difference in length). Departures:

- z is not centred. arena-hard-auto subtracts the mean difference over many systems; of two systems that difference is
  just what has to be taken away.
- Markdown counts are compared as they are, not as counts per token; length is in characters, not in one model's tokens.
- b and c have a ridge of `RIDGE`: a normal prior of standard deviation 1 / sqrt(RIDGE), about 3, on the logit scale. It
  keeps resamples finite and moves little where there is something to estimate. Where the rate without the ridge would
  not be finite on the logit scale there is none, but a reason: the ridge alone would make up the number. A coefficient
  for which this holds (as of headers that stand in two answers, both of which won) is marked, and its reviews say next
  to nothing of the rate.

Intervals are bias-corrected percentile ones over resampled questions (Efron 1987): the plain ones are a little too
narrow here, as a fit to a resample says more than one to the whole.

Style is taken for a cause. Where better answers have to be longer or better ordered, too much is taken away: read the
rate as a bound.

Of several systems the model has strengths in the place of its intercept, as in arena-hard-auto's `show_result` (a
Bradley-Terry model with style features); they are those of the round robin of `aggregate`, length and markdown taken
away:

    logit P(i beats j) = s_i - s_j + sum over features of b * z + c * (+1/2 if i is shown first, else -1/2)

The strengths have no ridge and the mean zero. Where one of them has no finite value (a system that won or lost
everything once style is taken away) there are none, with the reason. Intervals are percentile ones over resampled
questions; there are none where too many resamples have no finite strengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from almost_eval.judge.logistic import fit_ridge, is_unbounded, mean_probability
from almost_eval.judge.records import Review
from almost_eval.stats import Z95, Floats, draw_counts
from almost_eval.types import JSONObject, Metric

RIDGE = 0.1
"""Penalty of a coefficient's square, halved; see the head of this file."""
MIN_QUESTIONS = 20
"""Questions with a verdict, below which nothing is fitted."""
RESAMPLES = 1000
MAX_FAILED = 0.025
"""Share of the resamples that may have no fit; above it, an end of the interval might lie there."""
PLACE = "shown first"
_HUGE = 20.0
"""A log strength beyond it belongs to a resample without finite ones: Newton's steps went on until nothing was left."""


@dataclass(frozen=True, slots=True)
class StyleEffect:
    """What one feature does to the verdicts."""

    name: str
    """`length`, `headers`, `lists`, `bold`, or `shown first`, the place in the prompt."""
    coefficient: float | None
    """Change of the logit for one root mean square more of the feature, or for the first place; None: not fitted."""
    ci95: tuple[float, float] | None
    model: float | None
    """Mean of the model's answers: characters, headers, ...; None for the place."""
    baseline: float | None
    held_by_ridge: bool = False
    """Whether the coefficient is finite because of the ridge alone."""

    def to_dict(self) -> JSONObject:
        """As JSON."""
        return asdict(self) | {"ci95": self.ci95 and list(self.ci95)}


@dataclass(frozen=True, slots=True)
class StyleControl:
    """The model, fitted; or why it was not."""

    win_rate: Metric
    effects: tuple[StyleEffect, ...]
    problem: str | None
    """Why there is no rate, or no interval."""
    ridge: float = RIDGE
    resamples: int = RESAMPLES

    def to_dict(self) -> JSONObject:
        """As JSON; the win rate stands among the metrics."""
        effects = [effect.to_dict() for effect in self.effects]
        return {"effects": effects, "problem": self.problem, "ridge": self.ridge, "resamples": self.resamples}


@dataclass(frozen=True, slots=True)
class _Design:
    """The rows of the model."""

    x: Floats
    """(n, k): the intercept, the features, the place."""
    y: Floats
    """(n,) the model's score."""
    questions: list[str]
    names: list[str]
    """(k - 1,) of the columns after the intercept."""
    at_equal_style: Floats
    """(m, k) rows at which P is averaged."""


def style_control(
    reviews: Sequence[Review],
    *,
    rng: np.random.Generator,
    ties: Literal["half", "drop"] = "half",
    n_resamples: int = RESAMPLES,
) -> StyleControl:
    """Fit the model to the reviews of one pair of systems, each with the style counts of its answers; resampled are
    whole questions. `ties`: `half` counts a tie as half a win; `drop` leaves ties, or their share of the probability,
    out.
    """
    scores = [review.model_score if ties == "half" else review.untied_score for review in reviews]
    scored = [review for review, score in zip(reviews, scores, strict=True) if score is not None]
    y = np.array([score for score in scores if score is not None])
    missing = sum(review.verdict is None for review in reviews)
    if problem := _unfit(scored, y):
        return _without(problem, len(scored), missing, _means(scored))
    design = _design(scored, y)
    if problem := _not_estimable(design):
        return _without(problem, len(scored), missing, _means(scored))
    penalty = np.array([0.0] + [RIDGE] * len(design.names))
    fit = fit_ridge(design.x, design.y, np.ones((1, len(design.y))), penalty)
    rates, draws = _resample(design, penalty, n_resamples, rng)
    value = float(mean_probability(fit, design.at_equal_style)[0])
    failed = int(np.isnan(rates).sum())
    intervals: list[tuple[float, float] | None] = [None] * (len(design.names) + 1)
    stderr, problem = None, None
    if failed > MAX_FAILED * n_resamples:
        problem = f"{failed} of {n_resamples} resamples of the questions have no fit, so there is no interval"
    else:
        stderr = float(np.nanstd(rates, ddof=1))
        values, columns = [value, *fit[0, 1:]], [rates, *draws[:, 1:].T]
        intervals = [bias_corrected(float(v), c[np.isfinite(c)]) for v, c in zip(values, columns, strict=True)]
    coefficients = dict(zip(design.names, zip(fit[0, 1:], intervals[1:], strict=True), strict=True))
    effects = []
    for name, (mine, other) in (_means(scored) | ({PLACE: (None, None)} if PLACE in coefficients else {})).items():
        if name not in coefficients:
            effects.append(StyleEffect(name, None, None, mine, other))
            continue
        coefficient, interval = coefficients[name]
        unit = np.eye(len(design.names) + 1)[1 + design.names.index(name)]
        held = is_unbounded(design.x, design.y, unit)
        effects.append(StyleEffect(name, float(coefficient), interval, mine, other, held))
    rate = Metric(value, stderr, intervals[0], len(scored), missing)
    return StyleControl(rate, tuple(effects), problem, resamples=n_resamples)


def _without(problem: str, n: int, missing: int, means: dict[str, tuple[float | None, float | None]]) -> StyleControl:
    effects = tuple(StyleEffect(name, None, None, mine, other) for name, (mine, other) in means.items())
    return StyleControl(Metric(None, None, None, n, missing), effects, problem)


def _unfit(scored: Sequence[Review], y: Floats) -> str | None:
    """What can be said before there are columns."""
    if bare := sum(review.model_markdown is None or review.baseline_markdown is None for review in scored):
        return f"{bare} of {len(scored)} reviews have no counts of headers, lists and bold"
    n = len({review.question_id for review in scored})
    if n < MIN_QUESTIONS:
        return f"{n} questions have a verdict; the model needs {MIN_QUESTIONS}"
    if (y == y[0]).all():
        says = {1.0: "for the model", 0.0: "for the baseline", 0.5: "a tie"}.get(float(y[0]), "the same")
        return f"every verdict is {says}, so nothing can be told apart"
    return None


def features_of(review: Review) -> dict[str, tuple[float, float]]:
    """Name -> (the model's count, the baseline's)."""
    counts = {"length": (float(review.model_length), float(review.baseline_length))}
    if review.model_markdown is not None and review.baseline_markdown is not None:
        for name, mine in review.model_markdown._asdict().items():
            counts[name] = (float(mine), float(getattr(review.baseline_markdown, name)))
    return counts


def _means(scored: Sequence[Review]) -> dict[str, tuple[float | None, float | None]]:
    """Name -> mean count of the model's answers and of the baseline's; one answer counts once, whatever its orders."""
    once = {review.case: features_of(review) for review in scored}.values()
    names = min(once, key=len, default={})
    return {
        name: (math.fsum(f[name][0] for f in once) / len(once), math.fsum(f[name][1] for f in once) / len(once))
        for name in names
    }


def relative_difference(mine: float, other: float) -> float:
    """(m - o) / (m + o): -1 to 1, and 0 where both are 0."""
    return (mine - other) / (mine + other) if mine + other else 0.0


def style_columns(scored: Sequence[Review]) -> dict[str, Floats]:
    """Name -> (n,) the features that differ anywhere, by their root mean square, and the place where it does."""
    rows = [{name: relative_difference(*both) for name, both in features_of(review).items()} for review in scored]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    scaled = {name: c / math.sqrt(float((c**2).mean())) for name, c in columns.items() if c.any()}
    if len({review.order for review in scored}) == 2:
        scaled[PLACE] = np.array([0.5 if review.order == "reverse" else -0.5 for review in scored])
    return scaled


def _design(scored: Sequence[Review], y: Floats) -> _Design:
    columns = style_columns(scored)
    x = np.column_stack([np.ones(len(scored)), *columns.values()])
    at = np.zeros((2 if PLACE in columns else 1, x.shape[1]))
    at[:, 0] = 1.0
    if PLACE in columns:
        at[:, -1] = 0.5, -0.5
    return _Design(x, y, [review.question_id for review in scored], list(columns), at)


def _not_estimable(design: _Design) -> str | None:
    """Why the rows do not say what would be at equal style."""
    rank = np.linalg.matrix_rank(design.x)
    intercept = np.eye(1, design.x.shape[1])
    if np.linalg.matrix_rank(np.vstack([design.x, intercept])) > rank:
        return "the two systems differ in style by the same on every question, so style cannot be told from the rest"
    if any(is_unbounded(design.x, design.y, row) for row in design.at_equal_style):
        return "style and place tell the won reviews from the lost ones, so nothing is left to say of equal style"
    return None


def _resample(design: _Design, penalty: Floats, n_resamples: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """(R,) rates and (R, k) coefficients of resamples of whole questions; NaN where a fit was not reached.

    A resample in which one system wins every review has the rate 1 or 0 and no coefficients.
    """
    weights = drawn_weights(design.questions, n_resamples, rng)
    draws = fit_ridge(design.x, design.y, weights, penalty)
    share = (weights @ design.y) / weights.sum(axis=1)
    rates = np.where((share > 0) & (share < 1), mean_probability(draws, design.at_equal_style), share)
    return rates, draws


def drawn_weights(questions: Sequence[str], n_resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(R, n) how often each review is in a resample of whole questions."""
    codes = {question: g for g, question in enumerate(dict.fromkeys(questions))}
    place = np.array([codes[question] for question in questions])
    return draw_counts(len(codes), n_resamples, rng)[:, place]


def bias_corrected(value: float, draws: Floats) -> tuple[float, float]:
    """The 95 % interval of a value from its resamples, moved by how many of them lie below it."""
    normal, n = NormalDist(), len(draws)
    below = (float((draws < value).sum()) + 0.5 * float((draws == value).sum())) / n
    shift = normal.inv_cdf(min(max(below, 1 / (n + 1)), n / (n + 1)))
    low, high = np.quantile(draws, [normal.cdf(2 * shift - Z95), normal.cdf(2 * shift + Z95)])
    return float(low), float(high)


# --- several systems


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
    """Fit the model to the reviews of all pairs of several systems, each with the style counts of its answers;
    resampled are whole questions.
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
