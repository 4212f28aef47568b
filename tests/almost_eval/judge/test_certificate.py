"""A judge's certificate: planted biases and moves are shown as they are, by hand, over real HTTP and offline."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from replay_server import ReplayServer

from almost_eval.arena.human import read_human_votes
from almost_eval.arena.votes import Vote, VoteStore
from almost_eval.errors import DataError
from almost_eval.judge.cases import Case, HumanVote, as_review, reversed_pair, voted_cases
from almost_eval.judge.certificate import Checked, check_metrics, moves_between, moves_from_archive, sentence
from almost_eval.judge.records import Answer, Pair, Question, Side, Verdict

Command = Callable[..., Any]
N = 40
"""Archived pairs. The second answer, b's, is the longer one; GPT-4 said that it wins on the first half."""


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    write(Path("q.jsonl"), [{"question_id": i, "text": f"Question {i:02}?", "category": "generic"} for i in range(N)])
    for name, text in (("a", "short"), ("b", "rather long")):
        rows = [
            {"question_id": i, "text": f"{text} {i:02}", "model_id": name, "answer_id": f"{name}{i}"} for i in range(N)
        ]
        write(Path(f"archive/answer/{name}.jsonl"), rows)
    rows = [
        {"question_id": i, "answer1_id": f"a{i}", "answer2_id": f"b{i}", "text": "2 8" if i < N // 2 else "8 2"}
        for i in range(N)
    ]
    write(Path("archive/review/a_b.jsonl"), rows)
    return ["--archive", "archive", "--questions", "q.jsonl", "--data", "hub", "--prompt-set", "builtin"]


@contextmanager
def judge_that(prefers: Callable[[int, bool], str]) -> Iterator[ReplayServer]:
    """A judge over HTTP: (question, whether `a` is shown first) to `a`, `b` or `tie`."""

    def review(prompt: str) -> str:
        number = int(re.search(r"Question (\d\d)\?", prompt)[1])  # type: ignore[index]
        a_first = prompt.index(f"short {number:02}") < prompt.index(f"rather long {number:02}")
        winner = prefers(number, a_first)
        if winner == "tie":
            return "5 5"
        return "8 2" if (winner == "a") == a_first else "2 8"

    served = ReplayServer([])
    served.review = review  # type: ignore[method-assign]
    try:
        yield served
    finally:
        served.close()


def as_gpt4(number: int, a_first: bool) -> str:
    return "b" if number < N // 2 else "a"


def values(results: dict[str, Any]) -> dict[str, float | None]:
    return {name: metric["value"] for name, metric in results["metrics"].items()}


# --- over HTTP


def test_a_planted_place_and_a_planted_length(archive: list[str], almost_eval: Command) -> None:
    """It takes the first place on 10 of 40 pairs, the longer answer on 10 others, and is GPT-4 on the rest."""

    def biased(number: int, a_first: bool) -> str:
        if number % 4 == 0:
            return "a" if a_first else "b"
        return "b" if number % 4 == 1 else as_gpt4(number, a_first)

    with judge_that(biased) as server:
        given = ["--judge", "gpt-4", "--judge-base-url", server.url, "--output", "check"]
        code, out, err = almost_eval("judge", "check", *archive, *given, "--json")
        assert (code, err) == (0, "")
        results = json.loads(out)
        told = values(results)
        # By hand. Places: 10 of 40 pairs change with the order; elsewhere each place wins once.
        assert told["flips"] == pytest.approx(10 / 40)
        assert told["consistency"] == pytest.approx(30 / 40)
        assert told["first_wins"] == pytest.approx((2 * 10 + 30) / 80)
        # Archived order, a first. GPT-4: b, the longer, wins 20. It: of i % 4 == 0 none, of 1 all 10, of the rest 10.
        assert told["archived/longer_wins"] == pytest.approx(20 / 40)
        assert told["longer_wins_beyond_archive"] == pytest.approx(20 / 40 - 20 / 40)
        # Same verdict: of i % 4 == 0 the 5 that a won, of 1 the 5 that b won, and the other 20.
        assert told["agreement"] == pytest.approx(30 / 40)
        (move,) = results["judging"]["moves"]
        assert (move["before"], move["after"], move["n"]) == (0.5, 0.5, 40)
        low, high = move["ci95"]
        assert low < 0 < high
        assert results["judging"]["sentences"][0].startswith(
            "gpt-4 in place of GPT-4 moves the win rate of b against a by +0.0 points (95 % interval -"
        )
        price = results["timing"]["verdicts"]
        assert price["n"] == 80
        assert price["usd_each"] == pytest.approx(results["timing"]["cost_usd_all_runs"] / 80)
        assert 0 < price["seconds_each"] < 30

        # The same command asks nobody, and draws the same page.
        page = Path("check/certificate.html").read_text()
        _, shown, told_where = almost_eval("judge", "check", *archive, *given)
        assert server.count == 80
        assert "the other answer wins in the other order" in " ".join(re.sub("[│┃]", " ", shown).split())
        assert "page: check/certificate.html" in told_where
        assert almost_eval("report", "check").out == shown
        assert Path("check/certificate.html").read_text() == page
    for text in ("moves the win rate of b against a", "USD a verdict", "the other answer wins in the other", "25.0"):
        assert text in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert json.loads(Path("check/certificate.json").read_text())["sentences"] == results["judging"]["sentences"]


def test_a_judge_that_likes_length_more_than_the_archive(archive: list[str], almost_eval: Command) -> None:
    with judge_that(lambda number, a_first: "b" if number < 36 else "a") as server:
        given = ["--judge", "gpt-4", "--judge-base-url", server.url, "--output", "check", "--orders", "forward"]
        results = json.loads(almost_eval("judge", "check", *archive, *given, "--json").out)
    beyond = results["metrics"]["longer_wins_beyond_archive"]
    assert beyond["value"] == pytest.approx(36 / 40 - 20 / 40)
    # The same 16 of 40 questions differ: a standard error of sqrt(.4 * .6 / 40) = .077.
    assert beyond["ci95"] == pytest.approx([0.4 - 1.96 * 0.0775, 0.4 + 1.96 * 0.0775], abs=0.03)
    (move,) = results["judging"]["moves"]
    assert move["difference"] == pytest.approx(0.4)
    assert "by +40.0 points (95 % interval +" in results["judging"]["sentences"][0]
    assert "from 50.0 % to 90.0 % over 40 verdicts of each." in results["judging"]["sentences"][0]
    assert "flips" not in results["metrics"]  # one order


def test_two_judges_side_by_side(archive: list[str], almost_eval: Command) -> None:
    """The old one is GPT-4 as it was, the new one likes `b` on 8 pairs more: 8 / 40 = 20 points, in both orders."""
    with judge_that(lambda n, first: "b" if n < 28 else "a") as new, judge_that(as_gpt4) as old:
        judges = ["--judge", "gpt-6-luna", "--judge", "gpt-4", "--output", "check"]
        given = [*judges, "--judge-base-url", new.url, "--judge-base-url", old.url]
        plans = json.loads(almost_eval("judge", "check", *archive, *given, "--dry-run", "--json").out)
        assert [plan["requests"] for plan in plans.values()] == [80, 80]
        code, out, err = almost_eval("judge", "check", *archive, *given, "--json")
        assert (code, err) == (0, "")
        assert (new.count, old.count) == (80, 80)
        results = json.loads(out)
        shown = almost_eval("judge", "check", *archive, *given).out
        assert (new.count, old.count) == (80, 80)
    certificate = results["certificate"]
    assert certificate["between"]["agreement"]["value"] == pytest.approx(64 / 80)
    assert certificate["between"]["longer_wins_more"]["value"] == pytest.approx(0.2)
    assert certificate["between"]["first_wins_more"]["value"] == pytest.approx(0.0)
    (move,) = certificate["moves"]
    assert (move["before"], move["after"], move["n"]) == (0.5, pytest.approx(0.7), 80)
    assert certificate["sentences"][0].startswith(
        "gpt-6-luna in place of gpt-4 moves the win rate of b against a by +20.0"
    )
    assert certificate["sentences"][1].startswith("gpt-6-luna in place of GPT-4 moves")
    assert values(results)["agreement"] == pytest.approx(32 / 40)
    assert certificate["results"]["old"]["metrics"]["agreement"]["value"] == 1.0
    assert {"spec.json", "samples.jsonl", "results.json", "journal.sqlite"} <= {
        p.name for p in Path("check/old").iterdir()
    }
    page = Path("check/certificate.html").read_text()
    for text in ("gpt-6-luna in place of gpt-4", "kappa between the two judges", "GPT-4, archived", "+20.0"):
        assert text in page
    assert "kappa between the two judges" in shown
    assert almost_eval("report", "check").out == shown


def test_a_judge_with_unreadable_verdicts_gets_no_sentence(archive: list[str], almost_eval: Command) -> None:
    with judge_that(as_gpt4) as server:
        replay = server.review
        server.review = lambda prompt: "I cannot say." if "Question 01?" in prompt else replay(prompt)  # type: ignore[method-assign]
        given = ["--judge", "gpt-4", "--judge-base-url", server.url, "--output", "check"]
        code, out, _ = almost_eval("judge", "check", *archive, *given, "--json")
    results = json.loads(out)
    assert code == 3
    assert results["judging"] == {"moves": [], "sentences": []}
    assert "2 of 80 samples have a verdict that cannot be read" in results["metrics"]["kappa"]["withheld"]
    assert "withheld:" in Path("check/certificate.html").read_text()


# --- offline


def test_a_reward_model_beside_an_api_and_people(archive: list[str], almost_eval: Command) -> None:
    """Flags of the API are the API's alone; votes of an arena are cases of their own."""
    store = VoteStore(Path("votes.db"))
    for i in range(12):
        text = {"role": "user", "content": f"Question {i:02}?"}
        sides = ("a", "b") if i % 2 else ("b", "a")
        answers = [f"short {i:02}" if side == "a" else f"rather long {i:02}" for side in sides]
        verdict = "tie" if i == 0 else "a" if sides[0] == "b" else "b"  # b, but once
        store.append(Vote(str(i), f"s{i}", (text,), "typed", sides[0], sides[1], answers[0], answers[1], verdict))
    with judge_that(lambda n, first: "b") as server:
        given = ["--judge", "gpt-4", "--judge", "reward:nano/reward", "--judge-base-url", server.url]
        given += ["--max-cost", "5", "--votes", "votes.db", "--output", "check"]
        code, out, err = almost_eval("judge", "check", *archive, *given, "--json")
    assert (code, err) == (0, "")
    results = json.loads(out)
    told = values(results)
    assert (results["details"]["pairs"], results["details"]["pairs with votes"]) == (52, 12)
    assert told["human/agreement"] == pytest.approx(11 / 12)  # in both orders
    assert results["metrics"]["human/agreement/decisive"]["n"] == 22
    assert told["human/agreement/decisive"] == 1.0
    assert told["people/longer_wins"] == 1.0
    assert results["certificate"]["results"]["old"]["timing"]["verdicts"]["usd_each"] == 0.0
    # Moves are of the archived pairs: voted ones have no pair of systems in common.
    assert [move["n"] for move in results["certificate"]["moves"]] == [80]


def test_votes_alone_need_no_archive(almost_eval: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "chosen": f"\n\nHuman: What {i}?\n\nAssistant: Good {i}.",
            "rejected": f"\n\nHuman: What {i}?\n\nAssistant: Bad {i}.",
        }
        for i in range(30)
    ]
    with gzip.open("pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    given = ["--judge", "reward:nano/reward", "--votes", "pairs.jsonl.gz", "--data", "nano", "--output", "check"]
    code, out, err = almost_eval("judge", "check", *given, "--json")
    assert (code, err) == (0, "")
    results = json.loads(out)
    assert results["headline"] == "human/kappa"
    assert results["metrics"]["human/agreement"]["n"] == 60
    assert results["judging"]["sentences"] == []
    assert "reward:nano/reward and people" in Path("check/certificate.html").read_text()
    assert almost_eval("judge", "check", *given, "--limit", "10").code == 2  # another check than the folder's
    assert "60 verdicts" in almost_eval("judge", "check", *given).out
    assert "kappa with people's votes" in almost_eval("report", "check").out
    assert "is a check of a judge, not a run of vicuna" in almost_eval("judge", "report", "check").err
    assert "is a check of a judge" in almost_eval("verify", "check").err
    seconds = results["timing"]["verdicts"]["seconds_each"]
    again = json.loads(almost_eval("judge", "check", *given, "--json").out)
    assert again["timing"]["verdicts"]["seconds_each"] == seconds  # of the process that judged


def test_the_oracle_of_the_nano_world(almost_eval: Command, tmp_path: Path) -> None:
    """An archive made of a run of it: it agrees with itself, moves nothing, and the bound says how far it might."""
    run = tmp_path / "run"
    almost_eval("vicuna", "--limit", 12, "--orders", "forward", "--output", run)
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for file in (run / "answers").iterdir():
        write(tmp_path / "archive/answer" / file.name, [json.loads(line) for line in file.read_text().splitlines()])
    ids: dict[str, dict[str, str]] = {}
    for file in (tmp_path / "archive/answer").iterdir():
        for row in map(json.loads, file.read_text().splitlines()):
            ids.setdefault(str(row["question_id"]), {})[row["model_id"]] = row["answer_id"]
    rows = [
        {
            "question_id": line["id"].partition("/")[0],
            "answer1_id": ids[line["id"].partition("/")[0]]["nano/vanilla-medium"],
            "answer2_id": ids[line["id"].partition("/")[0]]["nano/almost"],
            "text": line["outputs"]["review"],
        }
        for line in lines
    ]
    write(tmp_path / "archive/review/nano.jsonl", rows)
    given = [
        "--judge",
        "nano",
        "--archive",
        tmp_path / "archive",
        "--archive-judge",
        "oracle",
        "--output",
        tmp_path / "c",
    ]
    code, out, err = almost_eval("judge", "check", *given, "--json")
    assert (code, err) == (0, "")
    results = json.loads(out)
    assert values(results)["agreement"] == 1.0
    (move,) = results["judging"]["moves"]
    assert move["difference"] == 0.0
    assert move["ci95"] == pytest.approx([-(1.96**2) / (12 + 1.96**2), 1.96**2 / (12 + 1.96**2)])  # Wilson's, 0 of 12
    assert "nano in place of oracle moves" in results["judging"]["sentences"][0]


def test_refused_in_one_line(archive: list[str], almost_eval: Command) -> None:
    reward = ["--judge", "reward:nano/reward"]
    Path("bad.jsonl").write_text('{"x": 1}\n')
    for arguments, expected in (
        (reward, "nothing to compare with: give --archive"),
        ([*archive, *reward, *reward], "name the new judge, then one other"),
        ([*archive, *reward, "--judge", "b", "--judge", "c"], "name the new judge, then one other"),
        ([*archive, *reward, "--votes", "bad.jsonl"], "bad.jsonl, line 1 is no vote"),
        ([*archive, *reward, "--votes", "none.db"], "no votes at none.db"),
        ([*archive, *reward, "--judge-base-url", "http://x/v1"], "--judge-base-url belongs to a judge behind an API"),
        (
            [*archive, "--judge", "m", "--judge-base-url", "a", "--judge-base-url", "b"],
            "--judge-base-url is not an http",
        ),
        ([*reward, "--votes", "bad.jsonl", "--questions", "q.jsonl"], "bad.jsonl, line 1 is no vote"),
    ):
        code, out, err = almost_eval("judge", "check", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert expected in err


# --- votes of people


def test_votes_on_one_pair_are_one_case() -> None:
    votes = [
        HumanVote("Q", "x", "y", "1", ("m", "n")),
        HumanVote("Q", "y", "x", "1", ("n", "m")),  # the other place: y wins
        HumanVote("Q", "x", "y", "tie"),
        HumanVote("Q", "x", "z", "2"),
    ]
    first, second = voted_cases(votes)
    assert [verdict.winner for verdict in first.verdicts] == ["1", "2", "tie"]
    assert (first.pair.answer_1.text, first.pair.answer_1.model) == ("x", "m")
    assert [verdict.winner for verdict in second.verdicts] == ["2"]
    assert first.id != second.id


def test_files_of_other_people(tmp_path: Path) -> None:
    file = tmp_path / "hh.jsonl"
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    write(
        file,
        [
            {"chosen": f"{prompt} Because.", "rejected": f"{prompt} No."},
            {"chosen": "\n\nHuman: A\n\nAssistant: b", "rejected": "\n\nHuman: C\n\nAssistant: d"},
            {"chosen": f"{prompt} Same", "rejected": f"{prompt} Same "},
        ],
    )
    (vote,), left_out = read_human_votes(file)
    assert vote.question == "Human: Hi\n\nAssistant: Hello\n\nHuman: Why?"
    assert {vote.answer_1: "1", vote.answer_2: "2"}["Because."] == vote.winner
    assert left_out == {"the dialogues differ before their last answer": 1, "both answers are the same": 1}

    sides = {
        f"conversation_{side}": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": f"answer {side}"}]
        for side in "ab"
    }
    judged = {"model_a": "m", "model_b": "n", **sides, "judge": "expert_1", "question_id": 81}
    winners = [("model_b", 1), ("tie (inconsistent)", 1), ("model_a", 2)]
    write(tmp_path / "mt.jsonl", [{**judged, "winner": winner, "turn": turn} for winner, turn in winners])
    votes, left_out = read_human_votes(tmp_path / "mt.jsonl")
    assert [(v.question, v.answer_1, v.winner, v.systems) for v in votes] == [
        ("Q?", "answer a", "2", ("m", "n")),
        ("Q?", "answer a", "tie", ("m", "n")),
    ]
    assert left_out == {"of a second turn, whose first turns differ": 1}
    write(tmp_path / "none.jsonl", [{**judged, "winner": "model_a", "turn": 2}])
    with pytest.raises(DataError, match="no vote on a pair"):
        read_human_votes(tmp_path / "none.jsonl")


def test_real_pairs_of_hh_rlhf(data_root: Path) -> None:
    file = data_root.parent / "hh_rlhf/harmless-base-test.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no pairs at {file}")
    votes, left_out = read_human_votes(file)
    assert len(votes) + sum(left_out.values()) == 2312
    assert len(votes) > 2000
    share = sum(vote.winner == "1" for vote in votes) / len(votes)
    assert 0.45 < share < 0.55  # no place is the better one
    assert not any("\n\nHuman:" in vote.answer_1 + vote.answer_2 for vote in votes)
    assert sum(not (vote.answer_1 and vote.answer_2) for vote in votes) == 4  # as the file has them


# --- the arithmetic


def checked(id: int, theirs: Side, mine: tuple[Side, Side], source: str = "file") -> Checked:
    """A pair, whose second answer is longer; `mine` is by place, of the archived order and of the other."""
    question = Question(str(id), f"q{id}")
    pair = Pair(question, Answer(str(id), "x", "a"), Answer(str(id), "xx", "b"), "forward")
    reviews = [as_review(pair, "a", "b", Verdict(mine[0])), as_review(reversed_pair(pair), "a", "b", Verdict(mine[1]))]
    return Checked(Case(source, pair, (Verdict(theirs),)), {"forward": (reviews[0],), "reverse": (reviews[1],)})


def test_moves_by_hand() -> None:
    rows = [
        checked(1, "1", ("2", "1")),  # from a to b
        checked(2, "2", ("2", "1")),
        checked(3, "tie", ("2", "tie"), "other"),  # from half to one
        checked(4, "2", ("1", "2"), "other"),  # from b to a
    ]
    every, first, second = moves_from_archive(rows, seed=0)
    assert (every.systems, every.n, every.difference) == (None, 4, pytest.approx((1 + 0 + 0.5 - 1) / 4))
    assert (first.before, first.after, first.n) == (0.5, 1.0, 2)
    assert (second.before, second.after) == (0.75, 0.5)
    assert sentence(second, "N", "O").startswith("N in place of O moves the win rate of b against a by -25.0 points (")
    assert "all pairs of systems together" in sentence(every, "N", "O")
    # Two judges: in both orders. Here the other one says a always.
    others = [
        checked(i, "1", ("1", "2"), source) for i, source in ((1, "file"), (2, "file"), (3, "other"), (4, "other"))
    ]
    assert [move.n for move in moves_between(rows, others, seed=0)] == [8, 4, 4]
    assert moves_between(rows, others, seed=0)[0].difference == pytest.approx((4 + 1.5) / 8)
    metrics = check_metrics(rows, seed=0)
    assert metrics["flips"].value == 0.0
    assert metrics["consistency"].value == pytest.approx(3 / 4)  # one order of the third is a tie
    assert metrics["agreement"].value == pytest.approx(1 / 4)
