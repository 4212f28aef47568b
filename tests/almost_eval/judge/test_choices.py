"""Answer files with several choices to a question; `--choice all` judges each, and a question is one cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from replay_server import ReplayServer

from almost_eval.arena.ppi import CorrectedMean, corrected_mean
from almost_eval.arena.votes import Vote, VoteStore
from almost_eval.errors import DataError, InputError
from almost_eval.judge.aggregate import aggregate
from almost_eval.judge.grading import difference
from almost_eval.judge.lines import paired_choices
from almost_eval.judge.questions import answer_line, read_answers
from almost_eval.judge.records import Grade, Question, Review, Verdict
from almost_eval.stats import mean_metric

Command = Callable[..., Any]


def jsonl(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def several(model: str, *texts: list[str]) -> list[dict[str, Any]]:
    """One row a question, in the shape of FastChat's `gen_model_answer.py --num-choices`."""
    return [
        {"question_id": i, "model_id": model, "choices": [{"index": k, "turns": [t]} for k, t in enumerate(mine)]}
        for i, mine in enumerate(texts)
    ]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALMOST_API_KEY", "sk-test")
    jsonl("q.jsonl", [{"question_id": i, "text": f"question {i}?"} for i in range(3)])
    jsonl(
        "two.jsonl", several("two", ["zgood a", "bad a"], ["zgood b", "<think>hm</think>zgood bb"], ["bad c", "bad cc"])
    )
    jsonl("one.jsonl", [{"question_id": i, "text": f"zplain {i}", "model_id": "one"} for i in range(3)])


@pytest.fixture
def server() -> Iterator[ReplayServer]:
    """A judge that likes what is called zgood, wherever it stands."""
    served = ReplayServer([])

    def review(prompt: str) -> str:
        good, plain = prompt.find("zgood"), prompt.find("zplain")
        return "5 5\nEqual." if good < 0 else "9 2\nThe first." if good < plain else "2 9\nThe second."

    served.review = review  # type: ignore[method-assign]
    yield served
    served.close()


@pytest.fixture
def vicuna(almost_eval: Command, server: ReplayServer) -> Callable[..., Any]:
    flags = ["--questions", "q.jsonl", "--data", "hub", "--judge", "j", "--judge-base-url", server.url]
    flags += ["--prompt-set", "builtin", "--output", "run"]
    return lambda *more: almost_eval("vicuna", *flags, *more)


def test_each_choice_is_judged_and_a_question_is_one_cluster(
    vicuna: Callable[..., Any], server: ReplayServer, almost_eval: Command
) -> None:
    code, out, err = vicuna("--answers", "two.jsonl", "--baseline", "one.jsonl", "--choice", "all")
    assert code == 0, err
    assert server.count == 3 * 2 * 2
    lines = {row["id"]: row for row in map(json.loads, Path("run/samples.jsonl").read_text().splitlines())}
    assert {"0/forward", "0/reverse", "0/forward/choice 2", "0/reverse/choice 2"} <= lines.keys()
    assert {id: row["score"] for id, row in lines.items() if "forward" in id} == {
        "0/forward": 1.0,
        "0/forward/choice 2": 0.5,
        "1/forward": 1.0,
        "1/forward/choice 2": 1.0,
        "2/forward": 0.5,
        "2/forward/choice 2": 0.5,
    }
    assert {row["sample"]["cluster"] for row in lines.values()} == {"0", "1", "2"}
    assert lines["1/forward/choice 2"]["outputs"]["reasoning_stripped"] > 0
    assert "reasoning_stripped" not in lines["1/forward"]["outputs"]
    results = json.loads(Path("run/results.json").read_text())
    rate = results["metrics"]["win_rate"]
    # 8 of 12 half points: (1 + 0.5 + 1 + 1 + 0.5 + 0.5) / 6 in each order, three clusters.
    assert rate["value"] == pytest.approx(0.75)
    values = [1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert rate["stderr"] == pytest.approx(mean_metric(values, ["0"] * 4 + ["1"] * 4 + ["2"] * 4).stderr)
    assert results["judging"]["n_questions"] == 3
    assert results["judging"]["consistency"]["n"] == 6
    spec = json.loads(Path("run/spec.json").read_text())
    assert (spec["settings"]["choice"], spec["n_samples"]) == ("all", 12)
    assert "each is judged (--choice)" in out
    verified = almost_eval("verify", "run")
    assert verified.code == 0, verified.out
    assert almost_eval("report", "run").out == out
    assert vicuna("--answers", "two.jsonl", "--baseline", "one.jsonl", "--choice", "all").out == out
    assert server.count == 12
    code, _, err = vicuna("--answers", "two.jsonl", "--baseline", "one.jsonl")
    assert code == 2
    assert "settings.choice was 'all', is None" in err or "holds another run" in err


def test_a_panel_and_votes_on_choices(
    vicuna: Callable[..., Any], server: ReplayServer, almost_eval: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A panel's majority is of one choice; a vote is on the first of them."""
    code, _, err = vicuna("--answers", "two.jsonl", "--baseline", "one.jsonl", "--choice", "all", "--judge", "k")
    assert code == 0, err
    results = json.loads(Path("run/results.json").read_text())
    assert results["metrics"]["win_rate"]["value"] == pytest.approx(0.75)
    assert results["judging"]["consistency"]["n"] == 6
    store = VoteStore(Path("votes.db"))
    for answer in ("zgood a", "bad a"):
        prompt = ({"role": "user", "content": "question 0?"},)
        store.append(Vote(answer, "s", prompt, "typed", "one", "two", "zplain 0", answer, "a"))
    taken = []

    def taking(*scores: list[float]) -> CorrectedMean:
        taken.append(scores)
        return corrected_mean(*scores)

    monkeypatch.setattr("almost_eval.arena.correction.corrected_mean", taking)
    code, out, err = almost_eval("judge", "report", "run", "--votes", store.path, "--json")
    assert code == 0, err
    assert taken == [([0.0], [1.0], [1.0, 0.5])]
    assert json.loads(out)["votes"]["unmatched"] == {"on other answers to a judged question": 1}


def test_as_many_choices_are_paired_one_by_one_and_others_are_refused(
    vicuna: Callable[..., Any], server: ReplayServer
) -> None:
    assert [paired_choices(Question("1", "?"), *n) for n in ((1, 1), (3, 1), (1, 3), (2, 2))] == [1, 3, 3, 2]
    jsonl("three.jsonl", several("three", *[["zplain"] * 3] * 3))
    code, _, err = vicuna("--answers", "two.jsonl", "--baseline", "three.jsonl", "--choice", "all")
    assert (code, err.count("\n")) == (2, 1)
    assert "question 0 has 3 answers of one system and 2 of another, so that --choice all makes no pairs" in err
    assert server.count == 0
    for wrong in ("0", "x", "-1"):
        code, _, err = vicuna("--answers", "two.jsonl", "--baseline", "one.jsonl", "--choice", wrong)
        assert (code, err.count("\n")) == (2, 1)
        assert f"--choice is '{wrong}'; give a number from 1, or all" in err
    assert vicuna("--answers", "two.jsonl", "--baseline", "one.jsonl", "--choice", "2").code == 0
    assert server.count == 6


def test_a_line_with_all_choices_comes_back_as_it_was() -> None:
    questions = [Question(str(i), f"question {i}?") for i in range(3)]
    name, answers = read_answers("two.jsonl", questions, choice=None)
    assert name == "two"
    assert [len(answer.choices) for answer in answers.values()] == [2, 2, 2]
    assert answers["0"].choices[1].text == "bad a"
    jsonl("again.jsonl", [answer_line(answers[q.id], q) for q in questions])
    assert read_answers("again.jsonl", questions, choice=None)[1] == answers
    assert read_answers("again.jsonl", questions, choice=2)[1]["0"].text == "bad a"
    with pytest.raises(DataError, match="no number 3"):
        read_answers("two.jsonl", questions, choice=3)


def test_a_choice_twice_in_one_order_is_still_refused() -> None:
    review = Review("1", "general", "forward", "a", "b", 3, 4, Verdict("1"), choice=2)
    with pytest.raises(InputError, match="has 2 reviews in order forward"):
        aggregate([review, review])


def test_marks_of_several_answers_are_one_mark_where_systems_are_compared() -> None:
    def grades(system: str, *marks: float | None) -> list[Grade]:
        return [Grade("1", "general", 1, system, mark) for mark in marks]

    one = difference(grades("a", 4.0), grades("b", 6.0, 9.0))
    assert (one.value, one.n) == (3.5, 1)  # (6 + 9) / 2 - 4
    assert difference(grades("a", None), grades("b", 6.0)).unscored == 1
