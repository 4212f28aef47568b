"""A judge's win rate corrected by votes: by hand, by 1,000 simulations, and on a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from almost_eval.arena.correction import match_votes
from almost_eval.arena.ppi import MIN_VOTED, corrected_mean
from almost_eval.arena.votes import Vote, VoteStore, read_votes
from almost_eval.errors import StoreError
from almost_eval.judge.records import Answer, Pair, Question

Command = Callable[..., Any]


# --- the arithmetic


def test_a_corrected_mean_by_hand() -> None:
    """Ten voted questions of twenty; the judge says 1 where people do, and once more."""
    human = [1.0] * 5 + [0.0] * 5
    judge = [1.0] * 6 + [0.0] * 4
    elsewhere = [1.0] * 8 + [0.0] * 2
    both = corrected_mean(human, judge, elsewhere)
    # All sums are of (y - .5)(f - .6): five times .2, once -.2, four times .3: 2. Without one of the first five:
    # 2 - .2 * 10 / 9; of nine, so over 8. var of all twenty, 14 of them ones: 20 * .7 * .3 / 19.
    spread = 20 * 0.7 * 0.3 / 19 * (1 + 10 / 10)
    powers = [(2 - product * 10 / 9) / 8 / spread for product in [0.2] * 5 + [-0.2] + [0.3] * 4]
    assert both.power == pytest.approx(sum(powers) / 10)
    without = np.cov(human[1:], judge[1:])[0, 1]
    assert powers[0] == pytest.approx(without / spread)  # as said: of the other nine
    assert both.human.value == pytest.approx(0.5)
    corrected = [y - power * (f - 0.8) for y, power, f in zip(human, powers, judge, strict=True)]
    assert both.corrected.value == pytest.approx(sum(corrected) / 10)
    # Seven wins and seven losses: 14 values with mean .5 and a sum of squares of 3.5, and 12 degrees of freedom.
    assert both.human.stderr == pytest.approx((3.5 / 12 / 14) ** 0.5)
    assert both.human.ci95 is not None
    assert both.human.ci95[1] - 0.5 == pytest.approx(2.1788 * (3.5 / 12 / 14) ** 0.5, abs=1e-4)


def test_a_judge_without_a_say_changes_nothing() -> None:
    human = [1.0, 0.0] * 10
    for judge, elsewhere in (([0.5] * 20, [0.5] * 50), ([0.0, 1.0] * 10, [1.0, 0.0] * 30), ([1.0, 0.0] * 10, [])):
        both = corrected_mean(human, judge, elsewhere)
        assert both.power == 0.0
        assert both.corrected == both.human
        assert both.worth == pytest.approx(20)


def test_a_shift_of_the_judge_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    f = rng.random(80) * 0.5
    y = (rng.random(30) < f[:30] + 0.2).astype(float)
    one, other = (corrected_mean(list(y), list(f[:30] + bias), list(f[30:] + bias)) for bias in (0.0, 0.4))
    assert one.corrected.value == pytest.approx(other.corrected.value)
    assert one.corrected.ci95 == pytest.approx(other.corrected.ci95)


def test_few_votes_have_no_interval() -> None:
    few = corrected_mean([1.0] * (MIN_VOTED - 1), [1.0] * (MIN_VOTED - 1), [0.0] * 40)
    assert (few.human.value, few.corrected.value, few.power) == (1.0, 1.0, 0.0)
    assert (few.human.ci95, few.corrected.ci95, few.worth) == (None, None, None)
    assert corrected_mean([1.0] * MIN_VOTED, [1.0] * MIN_VOTED, [1.0] * 40).human.ci95[0] < 0.95  # type: ignore[index]


@pytest.mark.parametrize(
    ("n", "n_all", "truth", "bias", "good"),
    [
        (10, 80, 0.5, 0.15, 0.9),  # few votes, a biased judge
        (20, 80, 0.85, 0.1, 0.9),  # a lopsided pair
        (40, 80, 0.7, 0.15, 0.95),
        (40, 400, 0.6, 0.2, 0.0),  # a judge that knows nothing
        (40, 805, 0.6, -0.2, 0.97),
    ],
)
def test_the_interval_holds_the_truth_in_94_of_100(n: int, n_all: int, truth: float, bias: float, good: float) -> None:
    """1,000 simulations each. People and judge look at one quality of a pair, `good` being the judge's share of it."""
    from scipy.stats import norm

    rng = np.random.default_rng(7)
    held = human_held = 0
    widths, errors, raw = [], [], []
    for _ in range(1000):
        quality, noise = rng.normal(size=(2, n_all))
        people = norm.cdf(quality)
        seen = norm.cdf(good * quality + (1 - good**2) ** 0.5 * noise)
        y = np.where(people < truth - 0.025, 1.0, np.where(people < truth + 0.025, 0.5, 0.0))  # some ties
        f = (seen < truth + bias).astype(float)
        both = corrected_mean(list(y[:n]), list(f[:n]), list(f[n:]))
        ends, human = both.corrected.ci95, both.human.ci95
        assert ends is not None
        assert human is not None
        assert both.corrected.value is not None
        held += ends[0] <= truth <= ends[1]
        human_held += human[0] <= truth <= human[1]
        widths.append((ends[1] - ends[0]) / (human[1] - human[0]))
        errors.append(both.corrected.value - truth)
        raw.append(f.mean() - truth)
    assert held >= 940
    assert human_held >= 940
    assert abs(np.mean(raw)) > 0.08  # the judge alone is wrong
    assert abs(np.mean(errors)) < 0.01
    # The gain grows with the votes and with what the judge knows; one that knows nothing costs next to nothing.
    assert np.mean(widths) < 1.03
    if n >= 40 and good:
        assert np.mean(widths) < (0.8 if n_all > 100 else 0.95)


# --- matching


def pair(id: str, text: str, first: str, second: str) -> Pair:
    return Pair(Question(id, text), Answer(id, first, "base"), Answer(id, second, "model"), "forward")


def vote(text: str, a: str, b: str, verdict: str, session: str = "s") -> Vote:
    prompt = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": text})
    return Vote(f"{text}{a}{verdict}{session}", session, prompt, "typed", "model", "base", a, b, verdict)


def test_votes_find_their_pairs_by_text() -> None:
    pairs = [pair("1", "Why?", "so", "thus"), pair("2", "Why?", "no", "yes"), pair("3", "Same?", "x", "x")]
    votes = [
        vote("Why?", " thus\n", "so", "a"),  # the model, shown as A, wins
        vote("Why?", "so", "thus", "a", "t"),  # the baseline does
        vote("Why?", "no", "yes", "both_bad"),  # another answer to the same words
        vote("Same?", "x", "x", "a"),  # a tie, whatever was clicked
        vote("Why?", "so", "never seen", "a"),
        vote("How?", "so", "thus", "a"),
    ]
    matched = match_votes(votes, pairs)
    assert matched.scores == {"1": 0.5, "2": 0.5, "3": 0.5}
    assert (matched.matched, matched.sessions) == (4, 2)
    assert matched.unmatched == {"on other answers to a judged question": 1, "on another question": 1}


def test_an_export_is_read_as_the_file_it_is_of(tmp_path: Path) -> None:
    from almost_eval.arena.report import export

    store = VoteStore(tmp_path / "votes.db")
    for at, verdict in enumerate(("a", "b", "tie")):
        store.append(vote(f"q{at}", "x", "y", verdict))
    file = export(store.votes(), tmp_path)[0]
    assert read_votes(file) == read_votes(store.path) == store.votes()
    file.write_text('{"id": 1}\n')
    with pytest.raises(StoreError, match="line 1 is no vote"):
        read_votes(file)


# --- a run


@pytest.fixture
def judged(almost_eval: Command, tmp_path: Path) -> Path:
    """A judged run, and votes on the first 24 of its 40 questions by people who agree with the judge on most."""
    run = tmp_path / "run"
    assert almost_eval("vicuna", "--limit", 40, "--output", run).code == 0
    questions = [json.loads(line) for line in (run / "questions.jsonl").read_text().splitlines()]
    texts: list[dict[str, str]] = []
    for name in ("nano+almost", "nano+vanilla-medium"):
        files = [f for f in (run / "answers").iterdir() if name.split("+")[1] in f.name]
        rows = [json.loads(line) for line in files[0].read_text().splitlines()]
        texts.append({str(row["question_id"]): row["text"] for row in rows})
    store = VoteStore(tmp_path / "votes.db")
    for at, question in enumerate(questions[:24]):
        id = str(question["question_id"])
        prompt = ({"role": "user", "content": question["text"]},)
        verdict = "b" if at % 6 == 0 else "a"
        store.append(Vote(id, f"s{at % 4}", prompt, "typed", "x", "y", texts[0][id], texts[1][id], verdict))
    store.append(vote("Who?", "x", "y", "a"))
    return run


def test_a_run_corrected_on_the_command_line(judged: Path, almost_eval: Command) -> None:
    votes = judged.parent / "votes.db"
    before = sorted(file.name for file in judged.iterdir())
    code, out, _ = almost_eval("judge", "report", judged, "--votes", votes, "--json")
    assert code == 0
    results = json.loads(out)
    metrics, facts = results["metrics"], results["votes"]
    assert (facts["votes"], facts["matched"], facts["questions_with_votes"]) == (25, 24, 24)
    assert facts["unmatched"] == {"on another question": 1}
    assert facts["questions_without_votes"] == 16
    assert metrics["win_rate_human"]["n"] == metrics["win_rate_human_corrected"]["n"] == 24
    assert metrics["win_rate"] == json.loads((judged / "results.json").read_text())["metrics"]["win_rate"]
    for name in ("win_rate_human", "win_rate_human_corrected"):
        low, high = metrics[name]["ci95"]
        assert low < metrics[name]["value"] < high
    shown = almost_eval("judge", "report", judged, "--votes", votes).out
    for text in ("the judge alone", "the votes alone", "corrected by the votes", "1 on another question"):
        assert text in " ".join(shown.split())
    assert sorted(file.name for file in judged.iterdir()) == before  # nothing is written
    assert "By people's votes" not in page_of(judged, almost_eval)
    assert almost_eval("judge", "report", judged, "--votes", votes, "--keep").out == shown
    page = page_of(judged, almost_eval)
    assert "By people's votes" in page
    assert "24 of 25 votes of 4 sessions" in page
    assert almost_eval("verify", judged).code == 0


def page_of(run: Path, almost_eval: Command) -> str:
    almost_eval("report", run, "--output", run.parent / "page.html")
    return (run.parent / "page.html").read_text(encoding="utf-8").replace("&#39;", "'")


def test_refused_in_one_line(judged: Path, almost_eval: Command, tmp_path: Path) -> None:
    other = VoteStore(tmp_path / "other.db")
    other.append(vote("Who?", "x", "y", "a"))
    text = tmp_path / "text.db"
    text.write_text("no votes")
    three = tmp_path / "three"
    almost_eval("vicuna", "--models", "nano/almost", "nano/sft", "nano/vanilla-small", "--limit", 2, "--output", three)
    for arguments, expected in (
        ([judged, "--votes", other.path], "none of 1 votes is on a judged pair"),
        ([judged, "--votes", text], "is no file of votes"),
        ([judged, "--votes", tmp_path / "none.db"], "no votes at"),
        ([three, "--votes", tmp_path / "votes.db"], "judged 3 systems; give a run of two"),
        ([judged, "--keep"], "--keep keeps what --votes say"),
        (["--archive", "x", "--votes", text], "give the folder of a run, not --archive"),
    ):
        code, out, err = almost_eval("judge", "report", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert expected in err
