"""Votes: none is lost, and what they say is what a reader would count."""

import itertools
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from almost_eval.arena.report import export, judge_verdicts, report
from almost_eval.arena.votes import Vote, VoteStore
from almost_eval.errors import InputError, RunError, StoreError
from almost_eval.stats import cohen_kappa

PROMPT = ({"role": "user", "content": "What do otters eat?"},)


def vote(id: str, verdict: str, *, session: str = "s1", a: str = "X", b: str = "Y", **more: Any) -> Vote:
    return Vote(id, session, PROMPT, "typed", a, b, f"{a} says", f"{b} says", verdict, **more)


# --- the store ---


def test_a_vote_comes_back_as_it_was(tmp_path: Path) -> None:
    cast = vote("1", "a", reward_a=1.5, reward_b=-0.25, settings={"temperature": 0.7, "seed": 3}, recorded="2026-01-01")
    VoteStore(tmp_path / "deep" / "votes.db").append(cast)
    assert VoteStore(tmp_path / "deep" / "votes.db").votes() == [cast]


def test_the_file_is_in_wal_mode_and_made_at_the_first_vote(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.db")
    assert not store.path.exists()
    store.append(vote("1", "tie"))
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_round_takes_one_vote(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.db")
    store.append(vote("1", "a"))
    with pytest.raises(InputError, match="has a vote already"):
        store.append(vote("1", "b"))
    with pytest.raises(InputError, match="unknown vote 'c'; known: a, b, tie, both_bad"):
        store.append(vote("2", "c"))
    assert [found.vote for found in store.votes()] == ["a"]


@pytest.mark.parametrize("kind", ["text", "other database", "folder"])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "votes.db"
    if kind == "text":
        path.write_text("not a database, and longer than the header of one would be" * 20, encoding="utf-8")
    elif kind == "folder":
        path.mkdir()
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE mine (x)")
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreError, match="another"):
        VoteStore(path)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_no_votes_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no votes at"):
        VoteStore(tmp_path / "none.db").votes()


@pytest.mark.alone("three seconds")
@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_locked_file_answers_soon_and_keeps_the_vote_for_later(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "votes.db"
    store = VoteStore(path)
    store.append(vote("first", "a"))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(f"PRAGMA journal_mode = {mode}")
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with pytest.raises(RunError, match="locked"):
            store.append(vote("second", "b"))
        assert time.monotonic() - began < 3
        other.execute("ROLLBACK")
    store.append(vote("second", "b"))
    assert [one.id for one in store.votes()] == ["first", "second"]


def cast_many(path: Path, voter: int, count: int) -> None:
    for i in range(count):
        VoteStore(path).append(vote(f"{voter}-{i}", "a", session=str(voter)))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_voters_at_once_lose_no_vote(tmp_path: Path, kind: str) -> None:
    # All of them find no file and make it at the same moment.
    path, make = tmp_path / "votes.db", threading.Thread if kind == "threads" else multiprocessing.Process
    workers: Sequence[Any] = [make(target=cast_many, args=(path, voter, 25)) for voter in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(v.id for v in VoteStore(path).votes()) == sorted(f"{w}-{i}" for w in range(4) for i in range(25))


def test_a_killed_process_loses_no_vote_that_it_said_was_stored(tmp_path: Path) -> None:
    code = (
        "import sys, itertools; from pathlib import Path; from almost_eval.arena.votes import Vote, VoteStore\n"
        "for i in itertools.count():\n"
        "    VoteStore(Path(sys.argv[1])).append(Vote(str(i), 's', (), 'typed', 'X', 'Y', 'x' * 5000, 'y', 'a'))\n"
        "    print(i, flush=True)\n"
    )
    path = tmp_path / "votes.db"
    voter = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert voter.stdout is not None
    for _ in range(20):
        voter.stdout.readline()
    time.sleep(0.01)
    os.kill(voter.pid, signal.SIGKILL)
    told = 20 + len(voter.stdout.readlines())
    stored = [int(v.id) for v in VoteStore(path).votes()]
    assert stored == list(range(len(stored)))
    assert told <= len(stored) <= told + 1  # the one more was stored, and killed before it was told


# --- what they say ---


def test_counts_and_win_rates_by_hand() -> None:
    votes = [
        vote("1", "a"),  # X wins
        vote("2", "b", a="Y", b="X", session="s2"),  # X wins, on the other side
        vote("3", "a", a="Y", b="X"),  # Y wins
        vote("4", "tie", session="s2"),
        vote("5", "both_bad", session="s3"),
    ]
    found = report(votes)
    (pair,) = found.pairs
    assert (pair.system, pair.other) == ("X", "Y")
    assert (pair.wins, pair.losses, pair.ties, pair.both_bad) == (2, 1, 1, 1)
    # (1 + 1 + 0 + 0.5 + 0.5) / 5
    assert pair.win_rate.value == pytest.approx(0.6)
    assert found.systems["Y"].value == pytest.approx(0.4)
    # Residuals summed by session: s1 0.4 - 0.6 = -0.2, s2 0.4 - 0.1 = 0.3, s3 -0.1; sqrt(3/2 * 0.14) / 5
    assert pair.win_rate.stderr == pytest.approx((1.5 * 0.14) ** 0.5 / 5)
    assert (found.votes, found.sessions) == (5, 3)
    assert found.counts == {"a": 2, "b": 1, "tie": 1, "both_bad": 1}
    # Two of three votes with a winner went to side A.
    assert found.position.value == pytest.approx(2 / 3)
    # log strengths of +-s with 1 / (1 + exp(-2 s)) = 0.6
    assert found.strengths.values is not None
    assert found.strengths.values["X"] - found.strengths.values["Y"] == pytest.approx(0.405465, abs=1e-6)


def test_one_session_has_no_interval() -> None:
    (pair,) = report([vote("1", "a"), vote("2", "b")]).pairs
    assert pair.win_rate.value == 0.5
    assert pair.win_rate.ci95 is None


def test_strengths_that_are_not_finite_are_no_number() -> None:
    found = report([vote("1", "a"), vote("2", "a", session="s2")])
    assert found.strengths.values is None
    assert "no finite estimate" in (found.strengths.reason or "")


def test_strengths_have_an_interval_over_sessions() -> None:
    votes = [vote(f"{s}-{i}", "a" if i < 6 else "b", session=str(s)) for s in range(12) for i in range(8)]
    found = report(votes)
    assert found.strengths.values is not None
    assert found.strengths.ci95 is not None
    low, high = found.strengths.ci95["X"]
    assert low <= found.strengths.values["X"] <= high
    assert report(votes).to_dict() == found.to_dict()  # seeded


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    pairs = list(zip(first, second, strict=True))
    return cohen_kappa(pairs, list(map(str, range(len(pairs)))), rng=np.random.default_rng(0)).value


def test_kappa_by_hand() -> None:
    # Agreement 3 of 4; chance: (3 * 2 + 1 * 2) / 16 = 0.5; (0.75 - 0.5) / 0.5
    assert kappa(["a", "a", "a", "b"], ["a", "a", "b", "b"]) == pytest.approx(0.5)
    assert kappa(["a", "b"], ["b", "a"]) == pytest.approx(-1.0)
    assert kappa(["a", "a"], ["a", "a"]) is None
    assert kappa([], []) is None


def test_kappa_is_scikit_learns() -> None:
    from sklearn.metrics import cohen_kappa_score

    first, second = ["a", "b", "tie", "a", "b", "a", "tie"], ["a", "b", "a", "a", "tie", "b", "tie"]
    assert kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))


def test_intervals_are_those_of_whole_sessions_drawn_with_replacement() -> None:
    # Written out: what `report` says without the shared bootstrap.
    random = np.random.default_rng(5)
    votes = [
        vote(
            str(i),
            str(random.choice(["a", "b", "tie"])),
            session=str(i % 9),
            reward_a=float(random.normal()),
            reward_b=0.0,
        )
        for i in range(60)
    ]
    found = report(votes, seed=3)
    rng = np.random.default_rng(3)
    sessions = [[v for v in votes if v.session == str(g)] for g in range(9)]
    differences, kappas = [], []
    for _ in range(500):
        drawn = [v for g in rng.integers(9, size=9) for v in sessions[g]]
        share = sum(v.score_a for v in drawn) / len(drawn)  # X is always A
        differences.append(np.log(share / (1 - share)) / 2)
    for _ in range(500):
        drawn = [v for g in rng.integers(9, size=9) for v in sessions[g]]
        kappas.append(kappa([v.vote for v in drawn], ["a" if (v.reward_a or 0) > 0 else "b" for v in drawn]))
    assert found.strengths.ci95 is not None
    assert found.strengths.ci95["X"] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=1e-9)
    assert found.agreement[0].kappa_ci95 == pytest.approx(np.quantile(np.array(kappas, float), [0.025, 0.975]))


def test_agreement_with_the_reward_model_and_a_judge() -> None:
    votes = [
        vote("1", "a", reward_a=2.0, reward_b=1.0),  # the reward model agrees
        vote("2", "b", reward_a=2.0, reward_b=1.0, session="s2"),  # it does not
        vote("3", "both_bad", reward_a=1.0, reward_b=1.0, session="s3"),  # a tie for both
        vote("4", "a", session="s4"),  # no rewards
    ]
    reward, judge = report(votes, {"gpt": {"1": "a", "2": "b", "9": "a"}}).agreement
    assert (reward.source, reward.n, reward.decisive, reward.rate.value) == ("reward model", 3, 2, 0.5)
    # a/a, b/a, tie/tie: agreement 2/3; chance (1 * 2 + 1 * 0 + 1 * 1) / 9 = 1/3
    assert reward.kappa == pytest.approx(0.5)
    assert (judge.source, judge.n, judge.rate.value, judge.kappa) == ("gpt", 2, 1.0, 1.0)


def test_a_round_in_which_a_system_named_itself_is_in_no_figure(tmp_path: Path) -> None:
    blind = [vote(str(i), verdict, session=f"s{i}") for i, verdict in enumerate("aab")]
    named = [vote(f"n{i}", "b", session="s9", settings={"named": "b"}) for i in range(4)]
    results = report([*blind, *named])
    assert (results.votes, results.named, results.sessions, results.counts["b"]) == (3, 4, 3, 1)
    assert results.systems["X"].value == pytest.approx(2 / 3)
    assert results.to_dict()["named"] == 4
    with pytest.raises(InputError, match="no vote was blind"):
        report(named)
    store = VoteStore(tmp_path / "votes.db")
    assert store.count() == 0
    for one in [*blind, *named]:
        store.append(one)
    assert store.count() == 7


def test_several_turns_are_exported_whole(tmp_path: Path) -> None:
    earlier = {"a": ["first of a"], "b": ["first of b"]}
    cast = vote("1", "a", settings={"earlier": earlier})
    assert cast.answers("b") == ("first of b", "Y says")
    export([cast, vote("2", "b")], tmp_path)
    texts = [json.loads(line)["text"] for line in (tmp_path / "answers-b.jsonl").read_text().splitlines()]
    assert texts == ["first of b\n\nY says", "Y says"]


def test_no_votes_no_report() -> None:
    with pytest.raises(InputError, match="no votes yet"):
        report([])


def test_export_names_no_system_to_a_judge(tmp_path: Path) -> None:
    votes = [vote("1", "a", a="secret-one", b="secret-two")]
    files = {file.name: file.read_text(encoding="utf-8") for file in export(votes, tmp_path / "out")}
    assert json.loads(files["votes.jsonl"])["system_a"] == "secret-one"
    assert json.loads(files["questions.jsonl"]) == {
        "question_id": "1",
        "text": "What do otters eat?",
        "category": "arena",
    }
    assert json.loads(files["answers-b.jsonl"])["model_id"] == "side-b"
    assert "secret-two says" in files["answers-b.jsonl"]
    assert not any('"secret' in files[name] for name in ("questions.jsonl",))
    assert "model_id" in files["answers-a.jsonl"]


def test_the_command_line(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from almost_eval.cli.arena import arena

    store = VoteStore(tmp_path / "votes.db")
    for i in range(6):
        store.append(vote(str(i), "a" if i % 3 else "b", session=str(i), reward_a=1.0, reward_b=0.0))
    shown = CliRunner().invoke(arena, ["report", str(store.path)])
    assert shown.exit_code == 0, shown.output
    assert "66.7 %" in shown.output
    assert "6 votes of 6 sessions" in shown.output
    found = json.loads(CliRunner().invoke(arena, ["report", str(store.path), "--json"]).output)
    assert found["pairs"][0]["wins"] == 4
    CliRunner().invoke(arena, ["export", str(store.path), "--output", str(tmp_path / "out")])
    assert len((tmp_path / "out" / "votes.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_a_judges_run_over_the_exported_pairs(almost_eval: Callable[..., Any], tmp_path: Path) -> None:
    """The whole way: votes, export, a judge that sees no names, agreement."""
    from almost_eval.rewards.hf import HFRewardModel
    from almost_eval.types import Message

    question = "What does the hamster eat?"
    texts = ["The hamster eats seeds. It has a small body.", "I will not help with that.", "Seeds", "No no no no"]
    conversations = [(Message("user", question), Message("assistant", text)) for text in texts]
    rewards = dict(zip(texts, HFRewardModel("nano/reward").score(conversations), strict=True))
    prompt = ({"role": "user", "content": question},)
    pairs = list(itertools.combinations(texts, 2))
    votes = [
        Vote(f"v{i}", f"s{i % 3}", prompt, "typed", "X", "Y", a, b, "a", rewards[a], rewards[b])
        for i, (a, b) in enumerate(pairs)
    ]
    export(votes, tmp_path / "out")
    files = [tmp_path / "out" / f"{name}.jsonl" for name in ("questions", "answers-b", "answers-a")]
    given = itertools.chain(*zip(("--questions", "--answers", "--baseline"), files, strict=True))
    outcome = almost_eval("vicuna", *given, "--judge", "reward:nano/reward", "--output", tmp_path / "judged")
    assert outcome.code == 0, outcome.err
    judged = judge_verdicts(tmp_path / "judged")
    assert judged == {f"v{i}": "a" if rewards[a] > rewards[b] else "b" for i, (a, b) in enumerate(pairs)}
    by_reward, by_judge = report(votes, {"judge": judged}).agreement
    assert (by_judge.n, by_judge.rate, by_judge.kappa) == (len(pairs), by_reward.rate, by_reward.kappa)


def test_another_run_is_no_judge_of_these_votes(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="give the folder of a run"):
        judge_verdicts(tmp_path)
