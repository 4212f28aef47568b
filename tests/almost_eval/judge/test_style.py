"""Style control: counts and fits that can be checked by hand, planted styles, and the real archive."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from almost_eval.judge.aggregate import round_robin
from almost_eval.judge.lines import style_fields
from almost_eval.judge.logistic import fit_ridge, is_unbounded
from almost_eval.judge.markdown import MarkdownCounts, count_markdown, without_code_blocks
from almost_eval.judge.records import Answer, AnswerTurn, Pair, Question, QuestionTurn, Review, Solo, Verdict
from almost_eval.judge.style import MIN_QUESTIONS, StyleControl, relative_difference, style_control, style_ranking
from almost_eval.stats import fit_logistic

Command = Callable[..., Any]
NONE = MarkdownCounts(0, 0, 0)


# --- counts


def test_markdown_by_hand() -> None:
    text = "# One\n\n## Two **bold** and __bold__\n\n- a\n  * b\n3. c\n4) d\n#no header\n**not\nbold**\n2.5 is no item"
    assert count_markdown(text) == MarkdownCounts(headers=2, lists=4, bold=2)
    assert count_markdown("") == NONE


def test_code_holds_no_markdown() -> None:
    text = "Run `__init__` and ``**x**``:\n```python\n# a comment\n- 1\n**kwargs**\n```\n- an item\n"
    text += "~~~\n# more\n```\n~~~\n"
    assert without_code_blocks(text) == "Run `__init__` and ``**x**``:\n- an item\n"
    assert count_markdown(text) == MarkdownCounts(0, 1, 0)
    # A block that nothing closes runs to the end, as a page would show it.
    assert count_markdown("- item\n````\n# code\n```\n# still code") == MarkdownCounts(0, 1, 0)


def test_a_hostile_text_takes_no_time() -> None:
    assert count_markdown("*" * 200_000) == NONE
    assert count_markdown("`" * 200_000) == NONE
    assert count_markdown("**a" * 100_000).bold == 50_000


def test_relative_differences_by_hand() -> None:
    assert relative_difference(300, 100) == 0.5  # 200 / 400
    assert relative_difference(0, 7) == -1.0
    assert relative_difference(0, 0) == 0.0


# --- the fit


def test_fits_by_hand() -> None:
    # Three wins of four: the logit is log 3.
    y = np.array([1.0, 1, 1, 0])
    one = np.ones((4, 1))
    assert fit_ridge(one, y, np.ones((1, 4)), np.zeros(1))[0, 0] == pytest.approx(math.log(3))
    # The same row drawn three times is the same as three rows.
    assert fit_ridge(one[:2], np.array([1.0, 0]), np.array([[3, 1]]), np.zeros(1))[0, 0] == pytest.approx(math.log(3))
    # All are wins: there is no maximum.
    assert np.isnan(fit_ridge(one, np.ones(4), np.ones((1, 4)), np.zeros(1))).all()
    # At a maximum the gradient is zero: sum of x (y - p) = penalty * b.
    x = np.column_stack([np.ones(6), [-1.0, -1, 0, 0, 1, 1]])
    y = np.array([0.0, 0.5, 1, 0, 1, 1])
    b = fit_ridge(x, y, np.ones((1, 6)), np.array([0.0, 2.0]))[0]
    p = 1 / (1 + np.exp(-x @ b))
    assert x.T @ (y - p) == pytest.approx(np.array([0.0, 2.0]) * b, abs=1e-6)


def test_without_a_ridge_it_is_the_other_fit() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    y = rng.choice([0.0, 0.5, 1.0], size=60)
    other = fit_logistic(x, list(y), [str(i) for i in range(60)])
    assert other is not None
    mine = fit_ridge(np.column_stack([np.ones(60), x]), y, np.ones((3, 60)), np.zeros(3))
    assert mine == pytest.approx(np.tile(other.coefficients, (3, 1)), abs=1e-4)


def test_what_has_no_finite_fit() -> None:
    x = np.column_stack([np.ones(4), [-2.0, -1, 1, 2]])
    intercept, slope = np.eye(2)
    assert is_unbounded(x, np.array([0.0, 0, 1, 1]), slope)  # the larger always wins
    assert not is_unbounded(x, np.array([0.0, 1, 0, 1]), slope)
    assert not is_unbounded(x, np.array([0.5, 0.5, 0.5, 0.5]), intercept)
    # The last column stands in one row, which won: its coefficient has no end, the intercept has.
    rare = np.column_stack([np.ones(5), [0.0, 0, 0, 0, 1]])
    won = np.array([1.0, 0, 1, 0, 1])
    assert is_unbounded(rare, won, slope)
    assert not is_unbounded(rare, won, intercept)
    # The column is the intercept itself: only their sum is known.
    assert is_unbounded(np.ones((4, 2)), np.array([1.0, 0, 1, 0]), intercept)


# --- the rate


def reviews(
    rows: Sequence[tuple[int, int, float | None]], markdown: tuple[MarkdownCounts, MarkdownCounts] = (NONE, NONE)
) -> list[Review]:
    """One order; rows are (the model's length, the baseline's, the model's score)."""
    verdicts = {1.0: Verdict("2"), 0.0: Verdict("1"), 0.5: Verdict("tie"), None: None}
    return [
        Review(str(i), "general", "forward", "b", "m", other, mine, verdicts[score], None, "", 1, 1, *markdown[::-1])
        for i, (mine, other, score) in enumerate(rows)
    ]


def control(rows: Sequence[Review]) -> StyleControl:
    return style_control(rows, rng=np.random.default_rng(0))


def test_a_rate_by_hand() -> None:
    """Three times as long, the model wins 9 of 10; a third as long, 5 of 10. Half of both logits: log(9) / 2, P .75."""
    rows = [(300, 100, float(i != 0)) for i in range(10)] + [(100, 300, float(i < 5)) for i in range(10)]
    rate = control(reviews(rows * 4)).win_rate
    assert rate.value == pytest.approx(0.75, abs=0.003)  # what the ridge moves
    assert rate.ci95 is not None
    assert rate.ci95[0] < 0.75 < rate.ci95[1]
    assert (rate.n, rate.unscored) == (80, 0)
    # Always as long as the other: nothing to control for, so it is the plain rate.
    assert control(reviews([(100, 100, float(i % 4 > 0)) for i in range(40)])).win_rate.value == pytest.approx(0.75)


def test_the_larger_side_makes_no_difference() -> None:
    """Model and baseline exchanged: the rate is one less the rate."""
    rng = np.random.default_rng(1)
    lengths, scores = rng.integers(1, 500, (50, 2)), rng.integers(0, 2, 50)
    rows = [(int(a), int(b), float(score)) for (a, b), score in zip(lengths, scores, strict=True)]
    mirrored = [(b, a, 1 - s) for a, b, s in rows]
    one, other = control(reviews(rows)).win_rate.value, control(reviews(mirrored)).win_rate.value
    assert one is not None
    assert other == pytest.approx(1 - one, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(1, 2, 1.0)] * (MIN_QUESTIONS - 1), "19 questions have a verdict; the model needs 20"),
        ([(1, 2, 1.0)] * 30, "every verdict is for the model"),
        ([(1, 2, 0.5)] * 30, "every verdict is a tie"),
        ([(200, 100, float(i % 2)) for i in range(30)], "differ in style by the same on every question"),
        ([(100 + i, 115, float(i > 15)) for i in range(30)], "nothing is left to say of equal style"),
    ],
)
def test_no_rate_but_a_reason(rows: list[tuple[int, int, float]], problem: str) -> None:
    outcome = control(reviews(rows))
    assert outcome.win_rate.value is None
    assert outcome.win_rate.ci95 is None
    assert problem in (outcome.problem or "")


def test_reviews_without_counts_have_a_reason() -> None:
    bare = [Review(str(i), "g", "forward", "b", "m", 1 + i, 5, Verdict("1")) for i in range(30)]
    assert "30 of 30 reviews have no counts of headers" in (control(bare).problem or "")


def test_a_feature_that_only_winners_have_is_marked() -> None:
    rows = [(100 + 7 * (i % 9), 130, float(i % 3 > 0)) for i in range(60)]
    taken = reviews(rows)
    first = next(i for i, review in enumerate(taken) if review.model_score == 1.0)
    bold = taken[: first + 1] + taken[first + 1 :]
    fields = {name: getattr(bold[first], name) for name in Review.__slots__}
    bold[first] = Review(**fields | {"model_markdown": MarkdownCounts(0, 0, 4)})
    with_it, without = control(bold), control(taken)
    effects = {effect.name: effect for effect in with_it.effects}
    assert effects["bold"].held_by_ridge
    assert not effects["length"].held_by_ridge
    assert effects["headers"].coefficient is None
    assert effects["bold"].model == pytest.approx(4 / 60)
    assert with_it.win_rate.value == pytest.approx(without.win_rate.value, abs=0.01)  # one review of sixty


def test_ties_may_be_dropped() -> None:
    rows = [(100 + i, 120, (1.0, 0.5, 0.0, 0.5)[i % 4]) for i in range(60)]
    dropped = style_control(reviews(rows), rng=np.random.default_rng(0), ties="drop").win_rate
    assert (dropped.n, control(reviews(rows)).win_rate.n) == (30, 60)


def planted(seed: int, n: int, quality: float, lengths: tuple[float, float] = (6.6, 6.2)) -> list[Review]:
    """Both orders of `n` questions by a judge to whom style is all, `quality` (a logit) and the first place aside."""
    rng = np.random.default_rng(seed)
    taken = []
    for question in range(n):
        mine, other = (int(rng.lognormal(mean, 0.5)) + 1 for mean in lengths)
        markdown = MarkdownCounts(*rng.poisson([1, 5, 3])), MarkdownCounts(*rng.poisson([0.3, 2, 1]))
        logit = quality + 3 * relative_difference(mine, other) + relative_difference(markdown[0][1], markdown[1][1])
        for order in ("forward", "reverse"):
            won = rng.random() < 1 / (1 + math.exp(-logit - (0.3 if order == "reverse" else -0.3)))
            winner = Verdict("2" if won == (order == "forward") else "1")
            taken.append(
                Review(str(question), "g", order, "b", "m", other, mine, winner, None, "", 1, 1, *markdown[::-1])
            )
    return taken


@pytest.mark.parametrize(("quality", "truth"), [(0.0, 0.5), (1.0, 0.7277)])
def test_planted_style_is_taken_away(quality: float, truth: float) -> None:
    """Where style alone decides, the rate is one half, and the interval holds it; a better model stays better.

    The truth at quality 1: the mean of 1 / (1 + exp(-1.3)) and 1 / (1 + exp(-0.7)) is 0.7277.
    """
    rates, raw, held = [], [], 0
    for seed in range(50):
        taken = planted(seed, 80, quality)
        rate = style_control(taken, rng=np.random.default_rng(seed), n_resamples=200).win_rate
        assert rate.value is not None
        assert rate.ci95 is not None
        rates.append(rate.value)
        raw.append(np.mean([review.model_score for review in taken if review.model_score is not None]))
        held += rate.ci95[0] <= truth <= rate.ci95[1]
    assert np.mean(raw) > truth + 0.08
    assert np.mean(rates) == pytest.approx(truth, abs=0.025)
    assert held >= 44


# --- several systems


def games(rng: np.random.Generator, n: int, strengths: dict[str, float], lengths: dict[str, float]) -> list[Review]:
    """Every pair of systems on `n` questions in both orders, by a judge of strength and of length."""
    taken = []
    for question, (baseline, model) in itertools.product(range(n), itertools.combinations(strengths, 2)):
        mine, other = (int(rng.lognormal(lengths[name], 0.5)) + 1 for name in (model, baseline))
        z = strengths[model] - strengths[baseline] + 3 * relative_difference(mine, other)
        for order in ("forward", "reverse"):
            won = rng.random() < 1 / (1 + math.exp(-z))
            winner = Verdict("2" if won == (order == "forward") else "1")
            taken.append(
                Review(str(question), "g", order, baseline, model, other, mine, winner, None, "", 1, 1, NONE, NONE)
            )
    return taken


def test_a_planted_length_is_taken_out_of_a_ranking() -> None:
    """`wordy` is as good as `plain` and longer: ahead by games, level with it at equal style; `good` stays ahead."""
    rng = np.random.default_rng(0)
    taken = games(rng, 150, {"plain": 0.0, "wordy": 0.0, "good": 1.0}, {"plain": 6.0, "wordy": 6.8, "good": 6.0})
    raw = round_robin(taken, rng=rng, n_resamples=200).strengths
    ranking = style_ranking(taken, rng=rng, n_resamples=300)
    values = {name: metric.value or 0.0 for name, metric in ranking.strengths.items()}
    assert (raw["wordy"].value or 0.0) - (raw["plain"].value or 0.0) > 0.6
    assert abs(values["wordy"] - values["plain"]) < 0.3
    assert values["good"] - values["plain"] == pytest.approx(1.0, abs=0.35)
    assert sum(values.values()) == pytest.approx(0.0, abs=1e-9)
    for name, truth in (("plain", -1 / 3), ("wordy", -1 / 3), ("good", 2 / 3)):
        ends = ranking.strengths[name].ci95
        assert ends is not None
        assert ends[0] < truth < ends[1]
    assert {effect.name for effect in ranking.effects} == {"length", "shown first"}


def test_two_systems_in_a_ranking_are_the_two_of_the_win_rate() -> None:
    rng = np.random.default_rng(1)
    taken = games(rng, 40, {"a": 0.0, "b": 0.5}, {"a": 6.0, "b": 6.3})
    strengths = style_ranking(taken, rng=rng, n_resamples=50).strengths
    difference = (strengths["b"].value or 0.0) - (strengths["a"].value or 0.0)
    rate = control(taken).win_rate.value
    # The rate is a mean over both places, which the other is not: they are the same within what the place does.
    assert 1 / (1 + math.exp(-difference)) == pytest.approx(rate, abs=0.02)


def test_a_system_that_always_loses_has_no_strength() -> None:
    rng = np.random.default_rng(2)
    taken = games(rng, 30, {"a": 0.0, "b": 0.0, "hopeless": -60.0}, {"a": 6.0, "b": 6.1, "hopeless": 6.0})
    ranking = style_ranking(taken, rng=rng, n_resamples=20)
    assert ranking.strengths == {}
    assert "no finite strength once style is taken away: hopeless" in (ranking.problem or "")
    assert "model needs 20" in (style_ranking(taken[:6], rng=rng).problem or "")


def test_a_round_robin_states_ratings_at_equal_style(almost_eval: Command, tmp_path: Path) -> None:
    systems = ["nano/almost", "nano/sft", "nano/vanilla-small"]
    given = ["vicuna", "--models", *systems, "--limit", 24, "--output", tmp_path / "run"]
    code, out, err = almost_eval(*given)
    assert code == 0, err
    assert "rating at equal style: nano/" in out
    results = json.loads((tmp_path / "run/results.json").read_text())
    strengths = [results["metrics"][f"strength_style_controlled/{name}"]["value"] for name in systems]
    assert sum(strengths) == pytest.approx(0.0, abs=1e-9)
    assert results["judging"]["style"]["effects"][0]["name"] == "length"
    assert almost_eval("verify", tmp_path / "run").code == 0
    assert almost_eval("report", tmp_path / "run", "--output", tmp_path / "page.html").code == 0


# --- a run


def test_a_run_states_it_and_recomputes_it_without_a_model(almost_eval: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert almost_eval("vicuna", "--limit", 24, "--output", run).code == 0
    results = json.loads((run / "results.json").read_text())
    rate = results["metrics"]["win_rate_style_controlled"]
    assert rate["value"] is not None
    assert rate["ci95"][0] < rate["value"] < rate["ci95"][1]
    line = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert line["outputs"]["markdown"] == {"headers": [0, 0], "lists": [0, 0], "bold": [0, 0]}
    assert [effect["name"] for effect in results["judging"]["style"]["effects"]] == [
        *("length", "headers", "lists", "bold", "shown first")
    ]
    again = json.loads(almost_eval("judge", "report", run, "--json").out)
    assert again["metrics"] == results["metrics"]
    assert again["judging"]["style"] == results["judging"]["style"]
    shown = almost_eval("judge", "report", run).out
    assert "win rate at equal style" in shown
    assert "style, logit per root mean square: length" in shown
    assert almost_eval("verify", run).code == 0
    page = tmp_path / "page.html"
    assert almost_eval("report", run, "--output", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert "win rate at equal style" in text
    assert "what length and markdown do to the verdicts" in text


def test_an_older_run_is_verified_as_it_is_and_redrawn_with_its_style(almost_eval: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    almost_eval("vicuna", "--limit", 24, "--output", run)
    new = json.loads((run / "results.json").read_text())
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        del line["outputs"]["markdown"]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = json.loads(json.dumps(new))
    del old["metrics"]["win_rate_style_controlled"], old["judging"]["style"]
    (run / "results.json").write_text(json.dumps(old))
    verified = almost_eval("verify", run)
    assert "markdown" not in verified.out + verified.err
    assert "style" not in verified.out + verified.err
    again = json.loads(almost_eval("judge", "report", run, "--json").out)
    assert again["metrics"] == new["metrics"]


def test_every_turn_and_choice_has_its_answers() -> None:
    """A mean is over answers: each turn's and choice's once, whatever the orders."""
    first = Review("1", "g", "forward", "b", "m", 10, 20, Verdict("1"), None, "", 1, 1, NONE, MarkdownCounts(2, 0, 0))
    reviews = [
        first,
        replace(first, order="reverse"),
        replace(first, turn=2, model_length=50, model_markdown=MarkdownCounts(0, 4, 0)),
        replace(first, choice=2, model_length=80, baseline_length=40),
    ]
    means = {effect.name: (effect.model, effect.baseline) for effect in control(reviews).effects}
    assert means == {
        "length": (50.0, 20.0),
        "headers": (pytest.approx(4 / 3), 0.0),
        "lists": (pytest.approx(4 / 3), 0.0),
        "bold": (0.0, 0.0),
    }


def test_counts_are_of_the_judged_turn() -> None:
    question = Question("1", "q", later=(QuestionTurn("and?"),))
    one, two = (Answer("1", f"# {name}", name, later=(AnswerTurn(f"- {name}\n- so"),)) for name in ("b", "m"))
    assert style_fields(Pair(question, one, two, "forward")) == {
        "markdown": {"headers": [1, 1], "lists": [0, 0], "bold": [0, 0]}
    }
    assert style_fields(Pair(question, one, two, "forward", turn=2)) == {
        "markdown": {"headers": [0, 0], "lists": [2, 2], "bold": [0, 0]}
    }
    assert style_fields(Solo(question, one, 2)) == {}


# --- real answers


@pytest.fixture
def outputs(data_root: Path) -> dict[str, list[str]]:
    """AlpacaEval's outputs of two real models."""
    folder = data_root.parent / "alpaca_eval"
    if not folder.is_dir():
        pytest.skip(f"no outputs at {folder}")
    return {
        name: [row["output"] for row in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))]
        for name in ("llama-2-7b-chat-hf", "alpaca-7b")
    }


def test_real_answers_and_a_judge_of_style(outputs: dict[str, list[str]]) -> None:
    """Real texts of two models, judged by their length and lists alone: raw, the wordy one wins; controlled, half."""
    rng = np.random.default_rng(0)
    taken = []
    for at, (mine, other) in enumerate(zip(*outputs.values(), strict=True)):
        markdown = count_markdown(mine), count_markdown(other)
        z = 3 * relative_difference(len(mine), len(other)) + relative_difference(markdown[0].lists, markdown[1].lists)
        winner = Verdict("2" if rng.random() < 1 / (1 + math.exp(-z)) else "1")
        taken.append(
            Review(str(at), "g", "forward", "b", "m", len(other), len(mine), winner, None, "", 1, 1, *markdown[::-1])
        )
    assert np.mean([review.model_score for review in taken if review.model_score is not None]) > 0.8
    rate = control(taken).win_rate
    assert rate.ci95 is not None
    assert rate.ci95[0] < 0.5 < rate.ci95[1]
    assert rate.ci95[1] - rate.ci95[0] < 0.25


def test_the_real_archive(almost_eval: Command, data_root: Path) -> None:
    data = data_root.parent
    if not (data / "vicuna/review").is_dir():
        pytest.skip(f"no archived reviews at {data / 'vicuna'}")
    rows = json.loads(
        almost_eval("judge", "report", "--archive", data / "vicuna", "--data-root", data_root, "--json").out
    )
    rates = {
        (row["baseline"].partition(":")[0], row["model"].partition(":")[0]): (
            row["metrics"]["win_rate"]["value"],
            row["metrics"]["win_rate_style_controlled"]["value"],
        )
        for row in rows
    }
    raw, controlled = rates["alpaca-13b", "vicuna-13b"]  # three times as long on average
    assert raw == pytest.approx(0.956, abs=0.001)
    assert controlled == pytest.approx(0.598, abs=0.005)
    assert all(abs(raw - controlled) < 0.07 for pair, (raw, controlled) in rates.items() if pair[0] != "alpaca-13b")
