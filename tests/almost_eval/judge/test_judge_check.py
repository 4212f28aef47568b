"""Checking a judge on archived reviews: agreement by hand on a small archive, and on the real one over HTTP."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from replay_server import ReplayServer, read_archive

from almost_eval.judge.api.journal import Journal

Command = Callable[..., Any]
VERDICTS = ["9 5", "8 4", "3 7", "2 9", "6 6", "1 8"]
"""Archived: 1, 1, 2, 2, tie, 2."""


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Six reviews of two systems, as arguments. The second answer is the longer one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    ids = range(len(VERDICTS))
    write(Path("q.jsonl"), [{"question_id": i, "text": f"Question {i}?", "category": "generic"} for i in ids])
    for name, text in (("a", "short"), ("b", "rather long")):
        rows = [{"question_id": i, "text": f"{text} {i}", "model_id": name, "answer_id": f"{name}{i}"} for i in ids]
        write(Path(f"archive/answer/{name}.jsonl"), rows)
    rows = [
        {"question_id": i, "answer1_id": f"a{i}", "answer2_id": f"b{i}", "text": f"{VERDICTS[i]}\nSo it is."}
        for i in ids
    ]
    write(Path("archive/review/a_b.jsonl"), rows)
    return ["--archive", "archive", "--questions", "q.jsonl", "--data", "hub"]


@pytest.fixture
def server() -> Iterator[ReplayServer]:
    served = ReplayServer([])
    yield served
    served.close()


def api(server: ReplayServer) -> list[str]:
    return ["--judge", "gpt-4", "--judge-base-url", server.url, "--prompt-set", "builtin", "--output", "check"]


def answers_in_order(prompt: str) -> tuple[int, bool]:
    """(question, whether `a` is shown first)."""
    number = next(i for i in range(len(VERDICTS)) if f"Question {i}?" in prompt)
    return number, prompt.index(f"short {number}") < prompt.index(f"rather long {number}")


def test_a_judge_that_agrees(archive: list[str], server: ReplayServer, almost_eval: Command) -> None:
    def same(prompt: str) -> str:
        number, forward = answers_in_order(prompt)
        first, second = VERDICTS[number].split()
        return f"{first} {second}\n" if forward else f"{second} {first}\n"

    server.review = same  # type: ignore[method-assign]
    code, out, err = almost_eval("judge", "check", *archive, *api(server), "--json")
    assert (code, err) == (0, "")
    results = json.loads(out)
    values = {name: metric["value"] for name, metric in results["metrics"].items()}
    assert server.count == 12
    for name in ("kappa", "agreement", "consistency", "kappa/decisive", "agreement/decisive"):
        assert values[name] == pytest.approx(1.0)
    assert results["metrics"]["kappa/decisive"]["n"] == 5
    assert values["first_wins"] == 0.5  # every pair in both orders
    assert values["longer_wins"] == values["archived/longer_wins"] == pytest.approx(3 / 5)
    assert values["archived/first_wins"] == pytest.approx(2 / 5)
    assert results["timing"]["cost_usd"] > 0
    assert {"spec.json", "samples.jsonl", "results.json", "journal.sqlite"} <= {p.name for p in Path("check").iterdir()}
    table = almost_eval("judge", "check", *archive, *api(server)).out
    assert server.count == 12  # nothing is paid twice
    assert "kappa with the archived verdicts" in table
    assert "1.000" in table


def test_a_judge_that_prefers_a_place(archive: list[str], server: ReplayServer, almost_eval: Command) -> None:
    server.review = lambda prompt: "9 1\nAlways the first."  # type: ignore[method-assign]
    results = json.loads(almost_eval("judge", "check", *archive, *api(server), "--json").out)
    values = {name: metric["value"] for name, metric in results["metrics"].items()}
    assert values["first_wins"] == 1.0
    assert values["consistency"] == 0.0
    # By hand: it says 1 always, as the archive does in 2 of 6; chance is as good (2/6), so kappa is 0.
    assert values["agreement"] == pytest.approx(2 / 6)
    assert values["kappa"] == pytest.approx(0.0)
    assert values["longer_wins"] == 0.5


def test_a_judge_that_wavers(archive: list[str], server: ReplayServer, almost_eval: Command) -> None:
    """Of three times it is asked, the third differs on question 0: 1 of 2 repeats agree there, all elsewhere."""
    asked: dict[str, int] = {}

    def wavering(prompt: str) -> str:
        asked[prompt] = asked.get(prompt, 0) + 1
        return "1 9\n" if answers_in_order(prompt)[0] == 0 and asked[prompt] == 3 else "9 1\n"

    server.review = wavering  # type: ignore[method-assign]
    given = ["judge", "check", *archive, *api(server), "--orders", "forward", "--concurrency", 1, "--json"]
    results = json.loads(almost_eval(*given, "--repeats", 3).out)
    assert server.count == 18
    found = results["metrics"]["self_consistency"]
    assert (found["value"], found["n"]) == (pytest.approx(11 / 12), 12)
    assert "consistency" not in results["metrics"]


def test_repeats_go_into_one_batch(archive: list[str], almost_eval: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from batch_server import BatchServer

    monkeypatch.setattr("almost_eval.judge.api.batch.FIRST_PAUSE", 0.02)
    server = BatchServer()
    flags = ["--repeats", 3, "--batch", "--price-in", 1, "--price-out", 5, "--price-batch", 0.5, "--json"]
    code, out, err = almost_eval("judge", "check", *archive, *api(server), *flags)
    server.close()
    assert code == 0, err
    assert (server.orders, server.count) == (1, 1)
    assert len(server.batches["batch_0"]["lines"]) == 3 * 12 - 1
    results = json.loads(out)
    assert results["metrics"]["self_consistency"]["n"] == 24
    assert results["timing"]["cost_usd_all_runs"] == pytest.approx(server.invoice, abs=1e-6)
    # Of the one request that went ahead; the others waited for their batch.
    with Journal(Path("check/journal.sqlite")) as journal:
        [ahead] = journal.waits()
        assert len(journal) == 3 * 12
    assert results["timing"]["verdicts"]["seconds_each"] == pytest.approx(ahead, abs=1e-5)


def test_unreadable_reviews_withhold_the_headline(
    archive: list[str], server: ReplayServer, almost_eval: Command
) -> None:
    server.review = lambda prompt: "I cannot say." if "Question 1?" in prompt else "9 1\n"  # type: ignore[method-assign]
    code, out, _ = almost_eval("judge", "check", *archive, *api(server), "--json")
    metrics = json.loads(out)["metrics"]
    assert code == 3
    assert "2 of 12 samples have a verdict that cannot be read" in metrics["kappa"]["withheld"]
    assert (metrics["agreement"]["n"], metrics["agreement"]["unscored"]) == (5, 1)


def test_a_dry_run_and_a_limit(archive: list[str], almost_eval: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    given = ["judge", "check", *archive, "--judge", "gpt-4", "--prompt-set", "builtin", "--dry-run", "--json"]
    whole = json.loads(almost_eval(*given).out)
    assert (whole["pairs"], whole["requests"]) == (6, 12)
    some = json.loads(almost_eval(*given, "--limit", 2, "--repeats", 3, "--orders", "forward").out)
    assert (some["pairs"], some["requests"]) == (2, 6)
    assert not Path("runs").exists()


def test_refused_in_one_line(archive: list[str], almost_eval: Command) -> None:
    write(Path("lost/review/r.jsonl"), [{"question_id": 0, "answer1_id": "x", "answer2_id": "y", "text": "1 2"}])
    Path("lost/answer").mkdir()
    reward = ["--judge", "reward:nano/reward"]
    for arguments, expected in (
        ([*archive], "--judge is missing"),
        ([*archive, *reward, "--repeats", 2], "says the same each time"),
        ([*archive, *reward, "--orders", "reverse"], "agreement is on the archived order"),
        ([*archive, "--judge", "nano"], "is not of the nano world"),
        (["--archive", "nope", *archive[2:], *reward], "nope is no archive"),
        (["--archive", "lost", *archive[2:], *reward], "is about answer 'x', which no file"),
        (["--archive", "archive", "--data", "nano", *reward], "which was not asked"),
    ):
        code, out, err = almost_eval("judge", "check", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert expected in err


def test_a_reward_model_on_the_archive(archive: list[str], almost_eval: Command) -> None:
    code, out, _ = almost_eval("judge", "check", *archive, "--judge", "reward:nano/reward", "--output", "c", "--json")
    assert code == 0
    metrics = json.loads(out)["metrics"]
    assert metrics["agreement"]["n"] == 6
    assert metrics["consistency"]["value"] == 1.0
    assert metrics["first_wins"]["value"] == 0.5


def test_the_real_archive_agrees_with_itself(almost_eval: Command, data_root: Path, tmp_path: Path) -> None:
    """A server that replays the archived reviews is GPT-4 as it was: it agrees with every archived verdict."""
    data = data_root.parent
    if not (data / "vicuna/review").is_dir():
        pytest.skip(f"no archived reviews at {data / 'vicuna'}")
    served = ReplayServer(read_archive(data))
    try:
        given = ["--archive", data / "vicuna", "--data-root", data_root, "--judge", "gpt-4", "--orders", "forward"]
        given += ["--judge-base-url", served.url, "--output", tmp_path / "check", "--limit", 150, "--json"]
        code, out, err = almost_eval("judge", "check", *given)
    finally:
        served.close()
    assert (code, err) == (0, "")
    metrics = json.loads(out)["metrics"]
    assert metrics["agreement"]["n"] == 150
    assert metrics["kappa"]["value"] == pytest.approx(1.0)
    assert metrics["longer_wins"] == metrics["archived/longer_wins"]
