"""What a set of reviews says about two systems, or about several: pure and offline, so any of it can be redrawn.

Everything is from the model's side: a win is a review that prefers the model to the baseline. Intervals are clustered
by question, since the two orders of one question are not independent. What could not be scored is counted, is in no
mean, and widens the bounds: the win rate if every such review were a loss, and if every one were a win.

Two biases of judges are measured (Zheng et al. 2023, arXiv 2306.05685, section 3.3). Position: the share of decisive
verdicts for Assistant 1, and of the questions judged both ways those where the place and not the answer won. Verbosity:
the share of decisive verdicts for the longer answer, and a win rate at equal length from the model

    logit P(model wins) = a + b * (model's length - baseline's length) / sd + c * (+1/2 if shown first, else -1/2)

over all scored reviews (a tie is half a win), fitted by maximum likelihood without a penalty; sd is the standard
deviation of the length differences, in characters, about zero, and the rate is the mean of P at difference 0 over both
positions. Without both orders there is no c. It is None where the likelihood has no maximum, as when the longer answer
always wins. It takes length for a cause; where better answers have to be longer, it takes away too much.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from almost_eval.compare.paired import mcnemar_exact
from almost_eval.errors import InputError
from almost_eval.judge.calibration import Calibration, biases, swap_calibration
from almost_eval.judge.records import Outcome, Review
from almost_eval.stats import Floats, bradley_terry, bradley_terry_bootstrap, cohen_kappa, fit_logistic, mean_metric
from almost_eval.types import JSONObject, Metric

Ties = Literal["half", "drop"]
Orders = Literal["both", "forward", "reverse"]

MIN_FOR_LENGTH = 10
"""Scored reviews below which no length model is fitted."""


@dataclass(frozen=True, slots=True)
class Combined:
    """The turns of the questions, each with its two orders taken together."""

    model: int
    """Both orders prefer the model."""
    baseline: int
    tie: int
    """Both orders are ties."""
    conflict_first: int
    """Assistant 1 wins both ways: the place won."""
    conflict_second: int
    """Assistant 2 wins both ways."""
    one_tie: int
    """One order is a tie, the other is not."""
    incomplete: int
    """Not scored in both orders."""


@dataclass(frozen=True, slots=True)
class SignTest:
    """Questions, not reviews: those whose scored reviews favour one system on average."""

    model: int
    baseline: int
    undecided: int
    p_value: float
    """Exact binomial, two-sided, over the decided ones."""


@dataclass(frozen=True, slots=True)
class JudgeResults:
    """Two systems compared."""

    baseline: str
    model: str
    ties: Ties
    orders: Orders
    n_questions: int
    metrics: dict[str, Metric]
    """`win_rate`, `wins`, `ties`, `losses`, `unparsed`, `total_score/<name>`, `win_rate/<category>`; where questions
    have several turns `win_rate/turn_1`, `win_rate/turn_1/<category>` and so on. `unparsed` counts every review without
    a verdict, for whatever reason."""
    reasons: dict[str, int]
    """Why reviews have no verdict."""
    bounds: tuple[float, float] | None
    """The win rate if every unscored review were a loss, and a win; None where there are no reviews."""
    combined: Combined
    consistency: Metric
    """Share of the questions scored both ways whose two verdicts are the same."""
    first_wins: Metric
    """Share of decisive verdicts for Assistant 1. Without both orders the place and the system are one."""
    longer_wins: Metric
    """Share of decisive verdicts for the longer answer, equal lengths left out."""
    length_controlled: Metric | None
    """Win rate at equal length."""
    sign_test: SignTest
    calibration: Calibration | None = None
    """Of probabilities, where the judge told any, in both orders."""

    def to_dict(self) -> JSONObject:
        """As JSON; `calibration` only where there is one."""
        plain = _plain(self)
        return plain if self.calibration is not None else {k: v for k, v in plain.items() if k != "calibration"}


def aggregate(reviews: Sequence[Review], *, ties: Ties = "half", orders: Orders = "both") -> JudgeResults:
    """Everything that the reviews of two systems say.

    Args:
        reviews: of one pair of systems, each question at most once in each order.
        ties: `half` counts a tie as half a win; `drop` leaves ties out of win rates, and the share of a tie out of
            probabilities.
        orders: which reviews to take.

    Raises:
        InputError: no reviews, more than two systems, or a question twice in one order.
    """
    taken = [review for review in reviews if orders in ("both", review.order)]
    baseline, model = _systems(taken, orders)
    keys = Counter((review.question_id, review.order, review.turn, review.choice) for review in taken)
    if twice := next((key for key, count in keys.items() if count > 1), None):
        raise InputError(f"question {twice[0]} has {keys[twice]} reviews in order {twice[1]}; keep one of each")
    questions = [review.question_id for review in taken]
    values = [review.model_score if ties == "half" else review.untied_score for review in taken]
    kept = [i for i, value in enumerate(values) if value is not None or taken[i].verdict is None]
    metrics = {"win_rate": mean_metric([values[i] for i in kept], [questions[i] for i in kept])}
    outcomes = [review.outcome for review in taken]
    unscored = outcomes.count(None)
    named: tuple[tuple[str, Outcome | None], ...]
    named = (("wins", "model"), ("ties", "tie"), ("losses", "baseline"), ("unparsed", None))
    for name, outcome in named:
        n = len(outcomes) if outcome is None else len(outcomes) - unscored
        metrics[name] = Metric(float(outcomes.count(outcome)), None, None, n, 0 if outcome is None else unscored)
    metrics |= _totals(taken, baseline, model)
    for category in dict.fromkeys(review.category for review in taken):
        of_it = [i for i in kept if taken[i].category == category]
        metrics[f"win_rate/{category}"] = mean_metric([values[i] for i in of_it], [questions[i] for i in of_it])
    metrics |= _by_turn([taken[i] for i in kept], [values[i] for i in kept])
    combined, consistency = _combined(taken)
    return JudgeResults(
        baseline=baseline,
        model=model,
        ties=ties,
        orders=orders,
        n_questions=len(set(questions)),
        metrics=metrics,
        reasons=dict(Counter(review.reason or "unparsed" for review in taken if review.verdict is None)),
        bounds=_bounds([values[i] for i in kept]),
        combined=combined,
        consistency=consistency,
        **biases(taken),
        length_controlled=_length_controlled(taken),
        sign_test=_sign_test(taken),
        calibration=swap_calibration(taken),
    )


def _by_turn(reviews: Sequence[Review], values: Sequence[float | None]) -> dict[str, Metric]:
    """Win rates of each turn, and of each category in it; none where there is one turn only. `values` is what each
    review is worth.
    """
    turns = sorted({review.turn for review in reviews})
    categories = list(dict.fromkeys(review.category for review in reviews))
    parts: list[str | None] = [None, *(categories if len(categories) > 1 else [])]
    rates = {}
    for turn, category in itertools.product(turns if len(turns) > 1 else [], parts):
        pairs = zip(reviews, values, strict=True)
        of_it = [(r.question_id, value) for r, value in pairs if r.turn == turn and category in (None, r.category)]
        if of_it:
            name = f"win_rate/turn_{turn}" + (f"/{category}" if category else "")
            rates[name] = mean_metric([value for _, value in of_it], [question for question, _ in of_it])
    return rates


def _systems(reviews: Sequence[Review], orders: str) -> tuple[str, str]:
    if not reviews:
        raise InputError(f"there are no reviews to aggregate in orders {orders!r}; choose others or judge first")
    pairs = list(dict.fromkeys((review.baseline, review.model) for review in reviews))
    if len(pairs) > 1:
        raise InputError(f"these reviews compare {len(pairs)} pairs of systems, not one: rank them in a round robin")
    return pairs[0]


def _totals(reviews: Sequence[Review], baseline: str, model: str) -> dict[str, Metric]:
    """Sums of the scores, over reviews that have them; FastChat would add -1 for the others."""
    scores = [review.scores for review in reviews if review.scores is not None]
    if not scores:
        return {}
    names = (model, baseline if baseline != model else f"{baseline} (baseline)")
    unscored = len(reviews) - len(scores)
    return {
        f"total_score/{name}": Metric(math.fsum(pair[side] for pair in scores), None, None, len(scores), unscored)
        for side, name in enumerate(names)
    }


def _bounds(values: Sequence[float | None]) -> tuple[float, float] | None:
    if not values:
        return None
    won = math.fsum(value for value in values if value is not None)
    return won / len(values), (won + values.count(None)) / len(values)


def _combined(reviews: Sequence[Review]) -> tuple[Combined, Metric]:
    """The two orders of each question together, and how often they agree."""
    by_turn: dict[tuple[str, int, int], dict[str, Outcome]] = {}
    for review in reviews:
        outcomes = by_turn.setdefault((review.question_id, review.turn, review.choice), {})
        if review.outcome is not None:
            outcomes[review.order] = review.outcome
    counts: Counter[str] = Counter()
    same: list[float] = []
    clusters: list[str] = []
    for (question, _, _), outcomes in by_turn.items():
        if len(outcomes) < 2:
            counts["incomplete"] += 1
            continue
        forward, reverse = outcomes["forward"], outcomes["reverse"]
        same.append(float(forward == reverse))
        clusters.append(question)
        if forward == reverse:
            counts[forward] += 1
        elif "tie" in (forward, reverse):
            counts["one_tie"] += 1
        else:  # in forward order the model is Assistant 2
            counts["conflict_second" if forward == "model" else "conflict_first"] += 1
    return Combined(**{field.name: counts[field.name] for field in dataclasses.fields(Combined)}), mean_metric(
        same, clusters
    )


def _length_controlled(reviews: Sequence[Review]) -> Metric | None:
    """See the head of this file."""
    scored = [(review, review.model_score) for review in reviews if review.model_score is not None]
    difference = np.array([float(review.model_length - review.baseline_length) for review, _ in scored])
    if len(scored) < MIN_FOR_LENGTH or not difference.any():
        return None
    columns = [difference / math.sqrt(float((difference**2).mean()))]
    at_zero = np.zeros((1, 1))
    if len({review.order for review, _ in scored}) == 2:
        columns.append(np.array([0.5 if review.order == "reverse" else -0.5 for review, _ in scored]))
        at_zero = np.array([[0.0, 0.5], [0.0, -0.5]])
    clusters = [review.question_id for review, _ in scored]
    fit = fit_logistic(np.column_stack(columns), [value for _, value in scored], clusters)
    if fit is None:
        return None
    return dataclasses.replace(fit.mean_probability(at_zero), n=len(scored), unscored=len(reviews) - len(scored))


def mean_scores(reviews: Sequence[Review]) -> dict[str, float]:
    """Question -> the mean of the model's scores in its two orders; questions without a score are left out."""
    by_question: dict[str, list[float]] = {}
    for review in reviews:
        if review.model_score is not None:
            by_question.setdefault(review.question_id, []).append(review.model_score)
    return {question: math.fsum(scores) / len(scores) for question, scores in by_question.items()}


def _sign_test(reviews: Sequence[Review]) -> SignTest:
    means = mean_scores(reviews).values()
    model, baseline = sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means)
    return SignTest(model, baseline, len(means) - model - baseline, mcnemar_exact(model, baseline))


# --- several systems


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Several systems ranked by their games against each other."""

    names: tuple[str, ...]
    """Strongest first; as they came where they could not be ranked."""
    strengths: dict[str, Metric]
    """Bradley-Terry log strengths, mean zero: P(i beats j) = 1 / (1 + exp(s_j - s_i)). `n` counts a system's games.
    Empty where there is no finite estimate."""
    wins: tuple[tuple[float, ...], ...]
    """[i][j]: how often names[i] beat names[j], a tie as half."""
    unscored: int
    problem: str | None
    """Why there are no strengths, or no intervals."""

    def to_dict(self) -> JSONObject:
        """As JSON."""
        return _plain(self)


def round_robin(reviews: Sequence[Review], *, rng: np.random.Generator, n_resamples: int = 1000) -> RoundRobin:
    """Bradley-Terry over all systems that the reviews name, intervals by resampling questions.

    Raises:
        InputError: no reviews.
    """
    if not reviews:
        raise InputError("there are no reviews to rank systems by; judge first")
    names = list(dict.fromkeys(name for review in reviews for name in (review.model, review.baseline)))
    place = {name: i for i, name in enumerate(names)}
    questions = {id: g for g, id in enumerate(dict.fromkeys(review.question_id for review in reviews))}
    wins = np.zeros((len(questions), len(names), len(names)))
    for review in reviews:
        if review.model_score is not None:
            g, m, b = questions[review.question_id], place[review.model], place[review.baseline]
            wins[g, m, b] += review.model_score
            wins[g, b, m] += 1 - review.model_score
    total = wins.sum(axis=0)
    unscored = sum(review.model_score is None for review in reviews)
    try:
        strengths = bradley_terry(total)
    except ValueError as error:
        return RoundRobin(tuple(names), {}, _rows(total), unscored, str(error))
    bootstrapped = bradley_terry_bootstrap(wins, n_resamples=n_resamples, rng=rng)
    problem = None if bootstrapped else "too many resamples of the questions have no finite strengths for an interval"
    order = sorted(range(len(names)), key=lambda i: -strengths[i])
    games = total + total.T
    ranked = {}
    for i in order:
        interval = (float(bootstrapped[0][i, 0]), float(bootstrapped[0][i, 1])) if bootstrapped else None
        ranked[names[i]] = Metric(float(strengths[i]), None, interval, round(games[i].sum()))
    return RoundRobin(tuple(ranked), ranked, _rows(total[np.ix_(order, order)]), unscored, problem)


def _rows(matrix: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(x) for x in row) for row in matrix)


# --- two judges


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two judges on the same pairs in the same order."""

    kappa: Metric
    """Cohen's, over three outcomes: model, baseline, tie."""
    agreement: Metric
    """Share of pairs with the same outcome."""
    decisive: Metric
    """The same, of the pairs that neither calls a tie."""
    unscored: int
    """Shared pairs that one of them or both have no verdict on."""
    only_one: int
    """Reviews whose pair the other judge has not seen."""

    def to_dict(self) -> JSONObject:
        """As JSON."""
        return _plain(self)


def agreement(a: Sequence[Review], b: Sequence[Review], *, rng: np.random.Generator) -> Agreement:
    """How far two judges agree; reviews are paired on question, turn, order, systems, intervals clustered by question.

    Raises:
        InputError: they share no pair.
    """
    of_a, of_b = ({(*r.case, r.order): r for r in reviews} for reviews in (a, b))
    shared = [key for key in of_a if key in of_b]
    if not shared:
        raise InputError("the two judges share no pair: judge the same questions, systems and order with both")
    both = [(key[0], of_a[key].outcome, of_b[key].outcome) for key in shared]
    scored = [(question, x, y) for question, x, y in both if x is not None and y is not None]
    clusters = [question for question, _, _ in scored]
    decisive = [(question, x, y) for question, x, y in scored if "tie" not in (x, y)]
    return Agreement(
        kappa=cohen_kappa([(x, y) for _, x, y in scored], clusters, rng=rng),
        agreement=mean_metric([float(x == y) for _, x, y in scored], clusters),
        decisive=mean_metric([float(x == y) for _, x, y in decisive], [question for question, _, _ in decisive]),
        unscored=len(shared) - len(scored),
        only_one=len(of_a) + len(of_b) - 2 * len(shared),
    )


def _plain(record: JudgeResults | RoundRobin | Agreement) -> JSONObject:
    """A record of this file as JSON; tuples become lists."""
    plain: JSONObject = json.loads(json.dumps(dataclasses.asdict(record)))
    return plain
