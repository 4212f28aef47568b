"""What reviews add up to, worked by hand, and drawn."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from almost_eval.errors import InputError
from almost_eval.judge.aggregate import aggregate, agreement, round_robin
from almost_eval.judge.records import Order, Review, Verdict
from almost_eval.report.judge_console import print_judge_results, print_round_robin
from almost_eval.stats import bradley_terry_bootstrap, cohen_kappa, fit_logistic

FORWARD: Order = "forward"
REVERSE: Order = "reverse"


def review(
    question: int,
    order: Order,
    scores: tuple[float, float] | str,
    *,
    category: str = "generic",
    lengths: tuple[int, int] = (100, 200),
    names: tuple[str, str] = ("base", "ours"),
) -> Review:
    """Scores by place; lengths and names of baseline and model."""
    verdict, reason = None, None
    if isinstance(scores, str):
        reason = scores
    else:
        one, two = scores
        verdict = Verdict("tie" if one == two else "1" if one > two else "2", one, two)
    return Review(str(question), category, order, *names, *lengths, verdict, reason)


# Question 1: the model wins both ways. 2: Assistant 1 wins both ways. 3: a tie, then the model. 4: unparsed, then the
# baseline. 5: the model, then a time-out.
REVIEWS = [
    review(1, FORWARD, (7, 9)),
    review(1, REVERSE, (9, 8)),
    review(2, FORWARD, (8, 6), lengths=(300, 200)),
    review(2, REVERSE, (8, 7), lengths=(300, 200)),
    review(3, FORWARD, (5, 5), category="math"),
    review(3, REVERSE, (10, 1), category="math"),
    review(4, FORWARD, "unparsed", lengths=(50, 50)),
    review(4, REVERSE, (2, 4), lengths=(50, 50)),
    review(5, FORWARD, (3, 8.5)),
    review(5, REVERSE, "timeout"),
]


def test_counts_and_win_rate() -> None:
    results = aggregate(REVIEWS)
    metrics = results.metrics
    assert [metrics[name].value for name in ("wins", "ties", "losses", "unparsed")] == [5, 1, 2, 2]
    assert (results.baseline, results.model, results.n_questions) == ("base", "ours", 5)
    # 5 wins and half a tie of 8 scored: 5.5 / 8.
    rate = metrics["win_rate"]
    assert (rate.value, rate.n, rate.unscored) == (5.5 / 8, 8, 2)
    # Residuals from 0.6875 by question: 0.625, -0.375, 0.125, -0.6875, 0.3125; squares sum to 1.117188;
    # sqrt(5/4 * 1.117188) / 8 = 0.147716
    assert rate.stderr == pytest.approx(0.147716, abs=1e-6)
    # Unscored as losses: 5.5 / 10; as wins: 7.5 / 10.
    assert results.bounds == (0.55, 0.75)
    assert results.reasons == {"unparsed": 1, "timeout": 1}
    assert metrics["win_rate/math"].value == 0.75
    assert metrics["win_rate/generic"].value == pytest.approx(4 / 6)


def test_total_scores() -> None:
    metrics = aggregate(REVIEWS).metrics
    # The model's: 9 + 9 + 6 + 8 + 5 + 10 + 2 + 8.5; the baseline's: 7 + 8 + 8 + 7 + 5 + 1 + 4 + 3.
    assert metrics["total_score/ours"].value == 57.5
    assert metrics["total_score/base"].value == 43
    assert metrics["total_score/ours"].unscored == 2
    letters = [Review("1", "generic", FORWARD, "base", "ours", 1, 2, Verdict("1"))]
    assert not [name for name in aggregate(letters).metrics if name.startswith("total_score")]


def test_ties_dropped_and_orders() -> None:
    dropped = aggregate(REVIEWS, ties="drop")
    assert dropped.metrics["win_rate"].value == 5 / 7
    assert dropped.metrics["ties"].value == 1
    assert dropped.bounds == (5 / 9, 7 / 9)
    forward = aggregate(REVIEWS, orders="forward")
    # Win, loss, tie, -, win.
    assert forward.metrics["win_rate"].value == 2.5 / 4
    assert forward.consistency.n == 0
    assert forward.combined.incomplete == 5
    reverse = aggregate(REVIEWS, orders="reverse")
    # Win, win?: question 2 in reverse shows the model first, and Assistant 1 wins: win, win, win, loss, -.
    assert reverse.metrics["win_rate"].value == 3 / 4


def test_orders_together() -> None:
    results = aggregate(REVIEWS)
    combined = results.combined
    assert (combined.model, combined.baseline, combined.tie) == (1, 0, 0)
    assert (combined.conflict_first, combined.conflict_second, combined.one_tie, combined.incomplete) == (1, 0, 1, 2)
    assert results.consistency.value == pytest.approx(1 / 3)
    # Decisive: 1f second, 1r first, 2f first, 2r first, 3r first, 4r second, 5f second: 4 of 7 for Assistant 1.
    assert results.first_wins.value == pytest.approx(4 / 7)


def test_verbosity() -> None:
    results = aggregate(REVIEWS)
    # Decisive and of unequal length: 1f and 1r the longer (model), 2f the longer (baseline), 2r the shorter (model),
    # 3r the longer, 5f the longer: 5 of 6.
    assert results.longer_wins.value == pytest.approx(5 / 6)
    assert results.longer_wins.n == 6
    assert results.length_controlled is None  # 8 scored reviews are too few


def test_sign_test() -> None:
    # By question: 1, 0.5, 0.75, 0, 1. Three for the model, one against, one undecided.
    sign = aggregate(REVIEWS).sign_test
    assert (sign.model, sign.baseline, sign.undecided) == (3, 1, 1)
    # Three or more of four, either way: 2 * (4 + 1) / 16 = 0.625
    assert sign.p_value == pytest.approx(0.625)


def test_length_controlled_win_rate() -> None:
    # The longer answer wins 3 of 4, whoever wrote it; the model writes the longer one in 8 of 12 questions.
    reviews = []
    for question in range(12):
        lengths = (100, 200) if question < 8 else (200, 100)
        longer_wins = question % 4 != 0
        model_wins = (lengths[1] > lengths[0]) == longer_wins
        reviews.append(review(question, FORWARD, (1, 2) if model_wins else (2, 1), lengths=lengths))
    results = aggregate(reviews)
    # Model wins: 6 of the 8 where it is longer, 1 of the other 4.
    assert results.metrics["win_rate"].value == pytest.approx(7 / 12)
    assert results.longer_wins.value == 0.75
    # Saturated: logit P = logit(3/4) = 1.0986 where longer, logit(1/4) = -1.0986 where shorter, so 0 between them.
    assert results.length_controlled is not None
    assert results.length_controlled.value == pytest.approx(0.5, abs=1e-6)
    # Where the longer answer always wins there is no maximum.
    always = [
        review(q, FORWARD, (1, 2) if q % 2 else (2, 1), lengths=(100, 200) if q % 2 else (200, 100)) for q in range(12)
    ]
    assert aggregate(always).length_controlled is None


def test_length_control_averages_over_positions() -> None:
    # Equal lengths on average within each position; Assistant 1 wins 3 of 4: half of all verdicts are the model's.
    reviews = [
        review(q, order, (2, 1) if q % 4 else (1, 2), lengths=(100, 200) if q < 8 else (200, 100))
        for q in range(16)
        for order in (FORWARD, REVERSE)
    ]
    found = aggregate(reviews).length_controlled
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=1e-6)
    assert found.ci95 is not None
    assert found.n == 32


def test_logistic_fit_and_its_clustered_variance() -> None:
    # Saturated: 3 of 4 win at x = 0, 1 of 4 at x = 1, so logit 3/4 = log 3 and a slope of -2 log 3.
    x, y, names = np.array([[0.0]] * 4 + [[1.0]] * 4), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0], list("abcdefgh")
    fit = fit_logistic(x, y, names)
    assert fit is not None
    assert fit.coefficients == pytest.approx([math.log(3), -2 * math.log(3)], abs=1e-6)
    mean = fit.mean_probability(np.array([[0.0]]))
    assert mean.value == pytest.approx(0.75)
    # The mean at x = 0 has residuals 0.25 three times and -0.75: sqrt(8/7 * 0.75) / 4 = 0.231455
    assert mean.stderr == pytest.approx(0.231455, abs=1e-6)
    # Half a win is half of each outcome: all at 0.5 is a fit, and a flat one.
    flat = fit_logistic(x, [0.5] * 8, names)
    assert flat is not None
    assert flat.coefficients == pytest.approx([0.0, 0.0], abs=1e-6)
    assert fit_logistic(np.ones((8, 1)), y, names) is None  # the column is the intercept
    assert fit_logistic(x, [1.0] * 8, names) is None
    assert fit_logistic(x, [0.0] * 4 + [1.0] * 4, names) is None  # separated
    assert fit_logistic(x, y, ["a"] * 8) is None


def test_kappa_worked() -> None:
    # a says yes 3 of 4, b 2 of 4; they agree on 3. p_o = .75, p_e = .75 * .5 + .25 * .5 = .5; kappa = .25 / .5 = .5
    pairs = [("y", "y"), ("y", "y"), ("y", "n"), ("n", "n")]
    kappa = cohen_kappa(pairs, list("abcd"), rng=np.random.default_rng(0))
    assert kappa.value == pytest.approx(0.5)
    assert kappa.ci95 is not None
    assert kappa.ci95[0] < 0.5 <= kappa.ci95[1] <= 1
    assert cohen_kappa([("y", "n"), ("n", "y")], list("ab"), rng=np.random.default_rng(0)).value == pytest.approx(-1)
    assert cohen_kappa([("y", "y")] * 3, list("abc"), rng=np.random.default_rng(0)).value is None
    assert cohen_kappa(pairs, list("aaaa"), rng=np.random.default_rng(0)).ci95 is None
    assert cohen_kappa([], [], rng=np.random.default_rng(0)).n == 0
    wide = cohen_kappa(pairs * 10, list("abcd") * 10, rng=np.random.default_rng(0))
    narrow = cohen_kappa(pairs * 10, [str(i) for i in range(40)], rng=np.random.default_rng(0))
    assert wide.stderr is not None
    assert narrow.stderr is not None
    assert wide.stderr > 2 * narrow.stderr


def test_agreement_of_two_judges() -> None:
    other = [
        review(1, FORWARD, (1, 2)),
        review(1, REVERSE, (1, 2)),
        review(3, FORWARD, (5, 5)),
        review(9, FORWARD, (1, 2)),
    ]
    found = agreement(REVIEWS, other, rng=np.random.default_rng(0))
    # 1f the same, 1r not, 3f both a tie.
    assert found.agreement.value == pytest.approx(2 / 3)
    assert found.decisive.value == 0.5
    # p_o = 2/3; REVIEWS says model twice and tie once, the other model, baseline, tie once each:
    # p_e = 2/3 * 1/3 + 1/3 * 1/3 = 1/3; kappa = (1/3) / (2/3)
    assert found.kappa.value == pytest.approx(0.5)
    assert (found.unscored, found.only_one) == (0, 8)
    assert agreement(REVIEWS, REVIEWS, rng=np.random.default_rng(0)).unscored == 2
    with pytest.raises(InputError, match="share no pair"):
        agreement(REVIEWS, other[3:], rng=np.random.default_rng(0))


def games(first: str, second: str, wins: int, losses: int) -> list[Review]:
    """`second` (the model) wins so often, question by question."""
    return [review(q, FORWARD, (1, 2) if q < wins else (2, 1), names=(first, second)) for q in range(wins + losses)]


def test_round_robin() -> None:
    # b beats a 30 : 10, and that is all there is: s_b - s_a = log 3, so ±0.5493.
    results = round_robin(games("a", "b", 30, 10), rng=np.random.default_rng(0), n_resamples=200)
    assert results.names == ("b", "a")
    assert results.strengths["b"].value == pytest.approx(math.log(3) / 2)
    assert results.wins == ((0.0, 30.0), (10.0, 0.0))
    low, high = results.strengths["b"].ci95 or (0, 0)
    # p = .75 ± 1.96 * sqrt(.75 * .25 / 40) = .616 to .884; half the logit of it: .236 to 1.016
    assert low == pytest.approx(0.236, abs=0.12)
    assert high == pytest.approx(1.016, abs=0.2)
    again = round_robin(games("a", "b", 30, 10), rng=np.random.default_rng(0), n_resamples=200)
    assert again == results
    three = games("a", "b", 30, 10) + games("b", "c", 30, 10) + games("a", "c", 36, 4)
    # 3 to 1 twice is 9 to 1: the strengths fit all three pairs at once.
    strengths = round_robin(three, rng=np.random.default_rng(0), n_resamples=20).strengths
    assert [strengths[name].value for name in "cba"] == pytest.approx([math.log(3), 0.0, -math.log(3)], abs=1e-6)


def test_round_robin_without_strengths() -> None:
    results = round_robin(
        [*games("a", "b", 3, 0), review(9, FORWARD, "timeout", names=("a", "b"))], rng=np.random.default_rng(0)
    )
    assert results.strengths == {}
    assert results.problem is not None
    assert "no finite strengths" in results.problem
    assert results.unscored == 1
    # One loss in 5: a third of the resamples have none, so an interval would be a guess.
    few = round_robin(games("a", "b", 4, 1), rng=np.random.default_rng(0), n_resamples=100)
    assert few.strengths["b"].ci95 is None
    assert few.problem is not None
    assert bradley_terry_bootstrap(np.array([[[0, 1], [1, 0]]]), rng=np.random.default_rng(0)) is None


def test_refusals() -> None:
    with pytest.raises(InputError, match="no reviews to aggregate"):
        aggregate([])
    with pytest.raises(InputError, match="in orders 'reverse'"):
        aggregate(REVIEWS[:1], orders="reverse")
    with pytest.raises(InputError, match="question 1 has 2 reviews in order forward"):
        aggregate(REVIEWS[:1] * 2)
    with pytest.raises(InputError, match="2 pairs of systems"):
        aggregate([REVIEWS[0], review(1, FORWARD, (1, 2), names=("base", "other"))])
    with pytest.raises(InputError, match="no reviews to rank"):
        round_robin([], rng=np.random.default_rng(0))


def test_nothing_scored() -> None:
    results = aggregate([review(1, FORWARD, "unparsed"), review(1, REVERSE, "unparsed")])
    assert results.metrics["win_rate"].value is None
    assert results.bounds == (0.0, 1.0)
    assert results.sign_test.p_value == 1.0
    assert "0.0% or 100.0%" in drawn(lambda console: print_judge_results(results, console))


def test_json() -> None:
    for found in (
        aggregate(REVIEWS),
        round_robin(REVIEWS, rng=np.random.default_rng(0), n_resamples=20),
        agreement(REVIEWS, REVIEWS, rng=np.random.default_rng(0)),
    ):
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    assert aggregate(REVIEWS).to_dict()["metrics"]["win_rate"]["value"] == 5.5 / 8


def drawn(draw: object) -> str:
    stream = io.StringIO()
    draw(Console(file=stream, width=160))  # type: ignore[operator]
    return stream.getvalue()


def test_tables() -> None:
    named = [
        review(1, order, scores, names=("[red]base", "[b]ours"))
        for order, scores in ((FORWARD, (7, 9)), (REVERSE, (9, 9)))
    ]
    text = drawn(lambda console: print_judge_results(aggregate(named), console, title="gpt-4"))
    assert "[b]ours against [red]base · gpt-4" in text
    assert "total score: [red]base 16 : 18 [b]ours" in text
    assert "1 wins, 1 ties, 0 losses in 2 reviews of 1 questions" in text
    assert "unscored:" not in text
    text = drawn(lambda console: print_judge_results(aggregate(REVIEWS), console))
    assert "unscored: 2 (unparsed 1, timeout 1)" in text
    assert "55.0% or 75.0%" in text
    assert "Assistant 1 twice on 1, Assistant 2 twice on 0" in text
    results = round_robin(games("[b]a", "b", 30, 10), rng=np.random.default_rng(0), n_resamples=20)
    text = drawn(lambda console: print_round_robin(results, console, title="gpt-4"))
    # 400 / log(10) * 0.5493 = 95
    assert "1095" in text
    assert "905" in text
    assert "beats [b]a" in text
    assert "75.0%" in text
