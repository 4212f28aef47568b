"""A panel of judges: its arithmetic on numbers to check by hand, and whole runs against endpoints that differ."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from replay_server import Call, Fault, ReplayServer

from almost_eval.judge.panel import Families
from almost_eval.judge.panel_results import (
    counts_of,
    majority,
    majority_outcome,
    mean_win_rate,
    self_preferences,
    summarise_panel,
)
from almost_eval.judge.records import Order, Outcome, Review, Side, Verdict
from almost_eval.stats import mean_difference

Command = Callable[..., Any]

# --- by hand


def review(
    judge: str,
    question: str,
    winner: Outcome | None,
    order: Order = "forward",
    *,
    baseline: str = "b",
    model: str = "m",
) -> Review:
    """A verdict by system; forward, the model is Assistant 2."""
    sides: dict[Outcome, Side] = {"model": "2", "baseline": "1", "tie": "tie"}
    if order == "reverse":
        sides |= {"model": "1", "baseline": "2"}
    verdict = None if winner is None else Verdict(sides[winner])
    return Review(question, "g", order, baseline, model, 5, 5, verdict, None if verdict else "unparsed", judge)


M: Outcome = "model"
B: Outcome = "baseline"
T: Outcome = "tie"


@pytest.mark.parametrize(
    ("outcomes", "together"),
    [
        ([M, M, B], M),
        ([B, B, T], B),
        ([M, B], T),
        ([M, B, T], T),
        ([M, M, B, T], T),  # two of four are no more than half
        ([M, None, None], M),
        ([M, M, B, B, None], T),
        ([T, T, M], T),
        ([None, None], None),
    ],
)
def test_a_majority_is_more_than_half_of_the_verdicts(outcomes: list[Outcome | None], together: Outcome | None) -> None:
    assert majority_outcome(outcomes) == together


PANEL = [
    # Judge x, y and z on three questions: M M B, then M T none, then none.
    *(review(judge, "1", winner) for judge, winner in zip("xyz", (M, M, B), strict=True)),
    *(review(judge, "2", winner, "reverse") for judge, winner in zip("xyz", (M, T, None), strict=True)),
    *(review(judge, "3", None) for judge in "xyz"),
]


def test_majority_and_mean() -> None:
    assert [one.outcome for one in majority(PANEL)] == ["model", "tie", None]
    assert [one.reason for one in majority(PANEL)] == [None, None, "no_judge"]
    mean = mean_win_rate(PANEL, "half")
    assert mean.value == pytest.approx(((1 + 1 + 0) / 3 + (1 + 0.5) / 2) / 2)
    assert (mean.n, mean.unscored) == (2, 1)
    # Without ties the second pair is judge x's alone.
    assert mean_win_rate(PANEL, "drop").value == pytest.approx((2 / 3 + 1) / 2)
    counts = counts_of([*PANEL, *(review(judge, "4", B) for judge in "xyz")])
    assert (counts.pairs, counts.unanimous, counts.split, counts.incomplete, counts.empty) == (4, 1, 1, 1, 1)


def test_two_judges_agree_beyond_chance() -> None:
    # x: M M B B, y: M B B B. Agreement 3/4; by chance 1/2 * 1/4 + 1/2 * 3/4 = 1/2. Kappa (3/4 - 1/2) / (1/2) = 1/2.
    said = {"x": (M, M, B, B), "y": (M, B, B, B)}
    reviews = [review(j, str(q), w) for j, winners in said.items() for q, w in enumerate(winners)]
    metrics, panel = summarise_panel(reviews, ["x", "y"], ["b", "m"], Families(), 0)
    [both] = panel["agreement"]
    assert (both["a"], both["b"], both["kappa"]["value"], both["agreement"]["value"]) == ("x", "y", 0.5, 0.75)
    assert both["kappa"]["ci95"] is not None
    assert metrics["judge_win_rate/x"].value == 0.5
    assert metrics["judge_win_rate/y"].value == 0.25
    assert metrics["win_rate_mean"].value == pytest.approx(0.375)
    assert panel["self_preference"] == []


def test_self_preference_is_against_the_judges_of_other_families() -> None:
    # x and y are of the model's family. x gives it 1, 1, 0.5; z gives 0, 1, 0: differences 1, 0, 0.5.
    said = {"x": (M, M, T), "y": (B, B, B), "z": (B, M, B)}
    reviews = [review(j, str(q), w) for j, winners in said.items() for q, w in enumerate(winners)]
    families = Families({"x": "acme", "y": "acme"}, {"m": "acme"})
    of_x, of_y = self_preferences(reviews, ["b", "m"], families)
    assert (of_x.judge, of_x.systems, of_x.problem) == ("x", ("m",), None)
    assert of_x.own.value == pytest.approx(2.5 / 3)
    assert of_x.others.value == pytest.approx(1 / 3)
    assert of_x.difference.value == pytest.approx(0.5)
    assert of_y.difference.value == pytest.approx(-1 / 3)
    # Residuals 0.5, -0.5, 0: sd 0.5, stderr 0.5 / sqrt(3).
    assert of_x.difference.stderr == pytest.approx(0.5 / 3**0.5)
    # The baseline of a judge's family: its score is one less the model's.
    [turned] = self_preferences(reviews, ["b", "m"], Families({"x": "other"}, {"b": "other"}))
    assert turned.own.value == pytest.approx(0.5 / 3)


def test_self_preference_that_cannot_be_told() -> None:
    reviews = [review("x", "1", M), review("y", "1", M)]
    [alone] = self_preferences(reviews, ["b", "m"], Families({"x": "f", "y": "g"}, {"b": "f", "m": "f"}))
    assert alone.problem == "its family plays against itself alone"
    kin = Families({"x": "f", "y": "f"}, {"m": "f"})
    assert {one.problem for one in self_preferences(reviews, ["b", "m"], kin)} == {
        "no judge of another family has a verdict"
    }


def test_a_mean_difference_reaches_below_zero() -> None:
    # 0.2 and stderr 0.2 give -0.19 to 0.59; `mean_metric` would cut it at 0, as all values are in [0, 1].
    metric = mean_difference([0.0, 0.0, 0.0, 0.0, 1.0])
    assert (metric.value, metric.stderr) == (pytest.approx(0.2), pytest.approx(0.2))
    assert metric.ci95 == (pytest.approx(0.2 - 1.96 * 0.2), pytest.approx(0.2 + 1.96 * 0.2))


def test_a_round_robin_by_each_judge() -> None:
    games = [("a", "b"), ("a", "c"), ("b", "c")]
    reviews = [
        review(judge, str(q), M if (q + at) % 3 else B, baseline=x, model=y)
        for judge in "xy"
        for q in range(6)
        for at, (x, y) in enumerate(games)
    ]
    metrics, panel = summarise_panel(reviews, ["x", "y"], ["a", "b", "c"], Families(), 0)
    assert metrics == {}
    assert [row["round_robin"]["problem"] for row in panel["judges"]] == [None, None]
    # Every second of a pair wins two of three games, so that c is first and a last, for each judge and for all.
    assert panel["all"]["names"] == panel["judges"][0]["round_robin"]["names"] == ["c", "b", "a"]
    assert panel["judges"][0]["win_rates"]["a"]["value"] == pytest.approx(1 / 3)
    assert panel["judges"][0]["win_rates"]["b"]["value"] == pytest.approx(1 / 2)
    assert panel["all"]["strengths"]["c"]["n"] == 2 * panel["judges"][0]["round_robin"]["strengths"]["c"]["n"]


# --- whole runs


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ReplayServer]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ALMOST_API_KEY", "ALMOST_DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    rows = [{"question_id": i, "text": f"Question {i}?", "category": "generic"} for i in (1, 2, 3)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "abc":
        answers = [{"question_id": i, "text": f"{name} says {i}", "model_id": f"model-{name}"} for i in (1, 2, 3)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    served = ReplayServer([])
    served.fault = opinion
    yield served
    served.close()


def opinion(call: Call) -> Fault:
    """`kind` finds the model better in every question, `strict` in none, `fair` in the first two."""
    prompt = call.body["messages"][-1]["content"]
    judge = call.body["model"]
    likes = judge == "kind" or (judge == "fair" and "Question 3" not in prompt)
    is_forward = prompt.index("b says") < prompt.index("a says") if "a says" in prompt and "b says" in prompt else True
    text = "4 9" if likes == is_forward else "9 4"
    body = {
        "model": judge,
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 1000, "total_tokens": 2000},
    }
    return Fault("body", body=json.dumps(body).encode())


def arguments(server: ReplayServer, *judges: str, output: str = "run") -> list[str]:
    systems = ["--questions", "questions.jsonl", "--answers", "a.jsonl", "--baseline", "b.jsonl", "--data", "hub"]
    named = [part for judge in judges for part in ("--judge", judge)]
    return ["vicuna", *systems, *named, "--judge-base-url", server.url, "--prompt-set", "builtin", "--output", output]


def results_of(folder: str = "run") -> Any:
    return json.loads(Path(folder, "results.json").read_text())


def lines_of(folder: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def test_a_panel_of_three(almost_eval: Command, server: ReplayServer) -> None:
    command = arguments(server, "kind", "strict", "fair")
    families = ["--judge-family", "kind=acme", "--system-family", "model-a=acme"]
    code, out, err = almost_eval(*command, *families)
    assert code == 0, err
    assert server.count == 18
    assert {line["id"] for line in lines_of()} == {
        f"{q}/{order}/{judge}"
        for q in (1, 2, 3)
        for order in ("forward", "reverse")
        for judge in ("kind", "strict", "fair")
    }
    assert {line["sample"]["metadata"]["judge"] for line in lines_of()} == {"kind", "strict", "fair"}
    assert sqlite3.connect("run/journal.sqlite").execute("SELECT count(*) FROM replies").fetchone() == (18,)
    results = results_of()
    rates = {name: metric["value"] for name, metric in results["metrics"].items() if "rate" in name}
    # kind 1, strict 0, fair 2/3: the majority is fair's, the mean of (1, 0, 1), (1, 0, 1), (1, 0, 0).
    assert rates == {
        "win_rate": pytest.approx(2 / 3),
        "win_rate/generic": pytest.approx(2 / 3),
        "win_rate_mean": pytest.approx(5 / 9),
        "judge_win_rate/kind": 1.0,
        "judge_win_rate/strict": 0.0,
        "judge_win_rate/fair": pytest.approx(2 / 3),
    }
    panel = results["judging"]["panel"]
    assert [(both["a"], both["b"]) for both in panel["agreement"]] == [
        ("kind", "strict"),
        ("kind", "fair"),
        ("strict", "fair"),
    ]
    assert [both["agreement"]["value"] for both in panel["agreement"]] == [
        0.0,
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    ]
    [preference] = panel["self_preference"]
    assert preference["difference"]["value"] == pytest.approx(1 - (0 + 2 / 3) / 2)
    assert results["provenance"]["judge_models"] == ["fair", "kind", "strict"]
    assert "each judge by itself" in out
    assert "majority of 3 judges on 6 pairs" in out
    assert almost_eval("verify", "run").code == 0
    assert almost_eval("report", "run").out == out
    again = almost_eval(*command, *families)
    assert (again.code, server.count) == (0, 18)
    forward = json.loads(almost_eval("judge", "report", "run", "--orders", "forward", "--json").out)
    assert forward["judging"]["panel"]["counts"]["pairs"] == 3
    page = almost_eval("report", "run", "--output", "page.html")
    assert page.code == 0, page.err
    assert "panel of judges" in Path("page.html").read_text()


def test_two_panels_are_compared_by_each_judge_and_their_mean(almost_eval: Command, server: ReplayServer) -> None:
    assert almost_eval(*arguments(server, "kind", "fair")).code == 0
    other = [part.replace("a.jsonl", "c.jsonl") for part in arguments(server, "kind", "fair", output="other")]
    assert almost_eval(*other).code == 0
    compared = json.loads(almost_eval("compare", "run", "other", "--json").out)
    names = {"win_rate", "win_rate_mean", "judge_win_rate/kind", "judge_win_rate/fair"}
    assert names <= compared["metrics"].keys()
    majority = compared["metrics"]["win_rate"]
    assert (majority["n"], majority["mean_a"]) == (6, results_of()["metrics"]["win_rate"]["value"])
    assert majority["mean_b"] == results_of("other")["metrics"]["win_rate"]["value"]
    assert {flip["id"] for flip in compared["flipped"]} <= {
        f"{q}/{o}" for q in (1, 2, 3) for o in ("forward", "reverse")
    }
    assert compared["metrics"]["judge_win_rate/kind"]["n"] == 6
    assert compared["shared"] == 12


def test_a_judge_that_fails_wholly_does_not_lose_the_others(almost_eval: Command, server: ReplayServer) -> None:
    def broken(call: Call) -> Fault:
        return Fault("status", 401, "wrong key") if call.body["model"] == "strict" else opinion(call)

    server.fault = broken
    command = arguments(server, "kind", "strict", "fair")
    for _ in range(2):  # and again by the same command
        code, out, _ = almost_eval(*command)
        assert code == 3
        assert "judge strict failed: the endpoint" in " ".join(out.split())
        results = results_of()
        rates = results["metrics"]
        assert rates["win_rate"]["withheld"]
        assert rates["judge_win_rate/strict"]["withheld"]
        assert (rates["judge_win_rate/kind"]["value"], rates["judge_win_rate/fair"]["n"]) == (1.0, 6)
        assert results["judging"]["panel"]["counts"]["incomplete"] == 6
        assert [line["reason"] for line in lines_of()].count("judge_failed") == 6
        assert almost_eval("verify", "run").code == 0
    assert len([call for call in server.log if call.body["model"] == "kind"]) == 6
    server.fault = opinion
    assert almost_eval(*command).code == 0
    whole = arguments(server, "kind", "strict", "fair", output="whole")
    assert almost_eval(*whole).code == 0
    for part in ("metrics", "judging", "details"):
        assert results_of()[part] == results_of("whole")[part]


def test_where_all_fail_it_ends_as_with_one(almost_eval: Command, server: ReplayServer) -> None:
    server.fault = lambda call: Fault("status", 401, "wrong key")
    code, _, err = almost_eval(*arguments(server, "kind", "strict"))
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "refuses the key" in err


def test_one_bound_for_all_judges_at_their_own_prices(almost_eval: Command, server: ReplayServer) -> None:
    # A review by `kind` takes 1,000 tokens in and out: 0.002 USD. Six take 0.012. `fair` has ten times the price, and
    # 0.02 more are allowed: its first review may take more than that, so that nothing is sent to it.
    prices = ["--judge-price", "kind=1,1", "--judge-price", "fair=10,10"]
    command = [*arguments(server, "kind", "fair"), *prices]
    code, _, err = almost_eval(*command, "--max-cost", "0.013")
    assert code == 3, err
    assert {call.body["model"] for call in server.log} == {"kind"}
    assert [line["reason"] for line in lines_of()].count("budget") == 6
    timing = results_of()["timing"]
    assert timing["cost_usd_all_runs"] == pytest.approx(0.012)
    assert almost_eval(*command, "--max-cost", "1").code == 0
    timing = results_of()["timing"]
    assert timing["judges"]["kind"]["cost_usd_all_runs"] == pytest.approx(0.012)
    assert timing["judges"]["fair"]["cost_usd_all_runs"] == pytest.approx(0.12)
    assert timing["cost_usd_all_runs"] == pytest.approx(0.132)
    plan = json.loads(almost_eval(*command, "--max-cost", "1", "--dry-run", "--json").out)
    assert (plan["requests"], plan["of_fair"]) == (0, "no request")
    command[command.index("run")] = "new"
    plan = json.loads(almost_eval(*command, "--max-cost", "1", "--dry-run", "--json").out)
    assert plan["requests"] == 12
    assert plan["of_fair"].startswith("6 requests, ")


def test_judges_at_two_endpoints_and_one_without(almost_eval: Command, server: ReplayServer) -> None:
    other = ReplayServer([])
    other.fault = opinion
    try:
        command = [*arguments(server, "kind", "fair", "reward:nano/reward"), "--judge-at", f"fair={other.url}"]
        code, _, err = almost_eval(*command)
        assert code == 0, err
        assert ({call.body["model"] for call in server.log}, server.count) == ({"kind"}, 6)
        assert ({call.body["model"] for call in other.log}, other.count) == ({"fair"}, 6)
        assert results_of()["metrics"]["judge_win_rate/reward:nano/reward"]["n"] == 6
        assert almost_eval("verify", "run").code == 0
        prompts = [json.loads(line)["id"] for line in Path("run/prompts.jsonl").read_text().splitlines()]
        assert len(prompts) == 12  # a reward model reads no prompt
    finally:
        other.close()


def test_a_family_without_a_panel(almost_eval: Command, server: ReplayServer) -> None:
    code, _, err = almost_eval(*arguments(server, "kind"), "--judge-family", "kind=acme")
    assert (code, server.count) == (2, 0)
    assert "beside the other judges of a panel" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--judge", "kind"], "--judge kind is given twice"),
        (["--judge-family", "nobody=acme"], "--judge-family nobody: there is none of that name"),
        (["--system-family", "model-z=acme"], "--system-family model-z: there is none of that name"),
        (["--judge-family", "kind"], "is not NAME=VALUE"),
        (["--judge-at", "nobody=http://127.0.0.1:1/v1"], "--judge-at nobody: there is no such judge"),
        (["--judge-price", "kind=1"], "is not two numbers"),
        (["--judge-family", "kind=a", "--judge-family", "kind=b"], "names kind twice"),
    ],
)
def test_panels_that_cannot_be(almost_eval: Command, server: ReplayServer, more: list[str], message: str) -> None:
    code, _, err = almost_eval(*arguments(server, "kind", "fair"), *more)
    assert (code, server.count) == (2, 0)
    assert message in err
    assert len(err.strip().splitlines()) == 1
