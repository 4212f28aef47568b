"""A whole run against real HTTP: killed and resumed, and every way in which an endpoint can fail."""

import hashlib
import json
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from forked import Forks, forks
from replay_server import Archived, Call, Fault, ReplayServer

Command = Callable[..., Any]
N = 20
"""Questions; both orders, so 40 reviews."""


@pytest.fixture(scope="module")
def start() -> Iterator[Forks]:
    modules = "transformers.models.llama.modeling_llama almost_eval.engines.hf almost_eval.engines.hf_generation"
    modules += (
        " almost_eval.judge.run almost_eval.report.console almost_eval.report.judge_console openai sklearn.linear_model"
    )
    modules += " openai.resources.chat.completions almost_eval.nano.data"
    with forks(*modules.split(), OPENAI_API_KEY="none") as started:
        yield started


def review(number: int) -> str:
    return f"{5 + number % 4} {5 + number * 7 % 5}\nThey differ."


@pytest.fixture
def server() -> Iterator[ReplayServer]:
    served = ReplayServer([Archived(f"Question {i}?", f"baseline {i}", f"model {i}", review(i)) for i in range(N)])
    yield served
    served.close()


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(server: ReplayServer, cwd: Path, *more: object) -> list[object]:
    """A run of 40 reviews in the folder `cwd/run`."""
    cwd.mkdir(exist_ok=True)
    write(cwd / "q.jsonl", [{"question_id": i, "text": f"Question {i}?", "category": "generic"} for i in range(N)])
    for name in ("baseline", "model"):
        rows = [{"question_id": i, "text": f"{name} {i}", "model_id": name} for i in range(N)]
        write(cwd / f"{name}.jsonl", rows)
    given = "vicuna --questions q.jsonl --answers model.jsonl --baseline baseline.jsonl --judge gpt-4 --data hub"
    given += " --prompt-set builtin --output run --judge-base-url"
    return [*given.split(), server.url, *more]


def results(folder: Path) -> dict[str, Any]:
    """`results.json` without its times."""
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in content.items() if key != "timing"}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def stored(folder: Path) -> set[str]:
    """Digests of the messages whose replies are in the journal, as the server's log has them."""
    if not (folder / "journal.sqlite").exists():
        return set()
    with closing(sqlite3.connect(folder / "journal.sqlite")) as journal:
        if not journal.execute("SELECT 1 FROM sqlite_master WHERE name = 'replies'").fetchone():
            return set()  # it is being made
        requests = [json.loads(row[0]) for row in journal.execute("SELECT request FROM replies")]
    return {hashlib.sha256(json.dumps(request["messages"]).encode()).hexdigest() for request in requests}


def test_killed_at_ten_points(start: Forks, server: ReplayServer, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(*command(server, undisturbed), cwd=undisturbed).wait() == 0
    assert server.count == 2 * N
    server.latency = 0.02
    given = command(server, killed, "--concurrency", 2)
    paid: set[str] = set()
    for wanted in sorted(random.Random(4).sample(range(1, 2 * N - 6), 10)):
        before = len(server.log)
        process = start(*given, cwd=killed)
        until = time.monotonic() + 30
        while len(stored(killed / "run") if (killed / "run/spec.json").exists() else ()) < wanted:
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "run/results.json").exists()
        assert not paid & {call.digest for call in server.log[before:]}  # nothing that was stored is asked again
        paid = stored(killed / "run")
        assert len(lines_whole(killed / "run")) <= len(paid)
    before = len(server.log)
    assert start(*given, cwd=killed).wait() == 0
    asked = {call.digest for call in server.log[before:]}
    assert len(server.log) - before == len(asked) == 2 * N - len(paid)  # exactly what was missing
    assert not asked & paid
    mine, theirs = results(killed / "run"), results(undisturbed / "run")
    for found in (mine, theirs):
        found["provenance"].pop("command")
    assert mine == theirs
    assert sorted(line["id"] for line in lines(killed / "run")) == sorted(
        line["id"] for line in lines(undisturbed / "run")
    )


def lines_whole(folder: Path) -> list[bytes]:
    """Whole lines: a kill may have left half of one."""
    file = folder / "samples.jsonl"
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def test_killed_while_it_answers(start: Forks, tmp_path: Path) -> None:
    """The answers' own lines: the same answers, and none is written twice."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    given = "vicuna --limit 16 --output run --batch-size 2".split()
    assert start(*given, cwd=tmp_path / "whole").wait() == 0
    file = tmp_path / "killed/run/answers/nano_almost.jsonl"
    for wanted in (1, 6, 11):
        process = start(*given, cwd=tmp_path / "killed")
        until = time.monotonic() + 60
        while not file.exists() or file.read_bytes().count(b"\n") < wanted:
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send(signal.SIGKILL)
        process.wait()
    assert start(*given, cwd=tmp_path / "killed").wait() == 0
    assert results(tmp_path / "killed/run") == results(tmp_path / "whole/run")
    assert sorted(file.read_text().splitlines()) == sorted(
        (tmp_path / "whole/run/answers/nano_almost.jsonl").read_text().splitlines()
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr("almost_eval.judge.api.adaptive._FIRST_PAUSE", 0.0)  # waiting is tested with the client
    monkeypatch.chdir(tmp_path)
    return tmp_path


FAILURES: dict[str, tuple[Fault, str]] = {
    "http_500": (Fault("status", 500), "failed: http_500"),
    "html": (Fault("body", body=b"<html>no</html>", headers={"Content-Type": "text/html"}), "failed: html"),
    "empty choices": (Fault("body", body=b'{"choices": [], "model": "m"}'), "failed: empty_choices"),
    "content filter": (Fault("content_filter"), "failed: content_filter"),
    "wrong JSON": (Fault("body", body=b'{"hello": 1}'), "failed: malformed"),
    "cut": (Fault("cut"), "failed: cut"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_fails_is_counted_and_asked_again(
    case: str, almost_eval: Command, server: ReplayServer, here: Path
) -> None:
    """Three questions fail for good; the rest stands, and the same command asks for the three alone."""
    fault, counted = FAILURES[case]

    def broken(call: Call) -> Fault | None:
        text = call.body["messages"][-1]["content"]
        return fault if any(f"Question {i}?" in text for i in (3, 8, 14)) else None

    server.fault = broken
    given = command(server, here)
    code, out, err = almost_eval(*given)
    assert (code, err) == (3, "")
    assert "withheld" in out
    found = results(here / "run")
    assert found["details"][counted] == 6
    assert found["metrics"]["unparsed"] == {"value": 6, "stderr": None, "ci95": None, "n": 40, "unscored": 0}
    assert found["metrics"]["wins"]["n"] == 34
    assert "6 of 40 samples are missing" in found["validity"]["reason"]
    assert [line["score"] for line in lines(here / "run") if line["reason"]] == [None] * 6
    assert len(lines(here / "run")) == 40
    low, high = found["judging"]["bounds"]
    assert high - low == pytest.approx(6 / 40)
    assert almost_eval("verify", "run").code == 0
    before = server.count
    server.fault = lambda call: None
    code, _, _ = almost_eval(*given)
    if case == "content filter":  # the same would come back: it is not asked again
        assert (code, server.count) == (3, before)
        return
    assert (code, server.count) == (0, before + 6)
    assert len(lines(here / "run")) == 40
    assert results(here / "run")["metrics"]["unparsed"]["value"] == 0


def test_a_server_that_dies_midway(almost_eval: Command, server: ReplayServer, here: Path) -> None:
    """What was answered is kept; the endpoint comes back at another address, and the run goes on there."""
    server.fault = lambda call: Fault("die") if call.number == 15 else None
    code, _, err = almost_eval(*command(server, here, "--concurrency", 1))
    assert (code, err.count("\n")) == (1, 1)
    assert "has stopped answering" in err
    assert "the same command goes on" in err
    kept = len(stored(here / "run"))
    assert kept == 14
    again = ReplayServer(server.archive)
    try:
        assert almost_eval(*command(again, here)).code == 0
        assert again.count == 2 * N - kept
    finally:
        again.close()


def test_the_budget_is_not_exceeded(almost_eval: Command, server: ReplayServer, here: Path) -> None:
    given = command(server, here, "--price-in", 10, "--price-out", 10, "--concurrency", 1)
    code, out, _ = almost_eval(*given, "--max-cost", 0.1, "--json")
    assert code == 3
    found = json.loads(out)
    assert found["timing"]["cost_usd"] <= 0.1
    assert 0 < found["details"]["failed: budget"] < 40
    assert "withheld" in found["metrics"]["win_rate"]
    sent = server.count
    assert sent == 40 - found["details"]["failed: budget"]
    assert almost_eval(*given).code == 0
    assert server.count == 40


def test_a_review_that_ran_out_of_tokens(almost_eval: Command, server: ReplayServer, here: Path) -> None:
    server.fault = lambda call: Fault("length") if call.number == 1 else None
    almost_eval(*command(server, here))
    assert results(here / "run")["details"]["reviews cut at their token limit"] == 1


def test_many_reviews_keep_memory_flat_in_prompts(here: Path) -> None:
    """Requests are rendered when they are looked at, not held."""
    from almost_eval.data.sources import DataSource
    from almost_eval.judge.model_judge import Requests
    from almost_eval.judge.prompts import load_judge_prompts
    from almost_eval.judge.records import Answer, Pair, Question

    prompts = load_judge_prompts("vicuna", "builtin", DataSource("nano", None))
    pair = Pair(Question("1", "q"), Answer("1", "a", "x"), Answer("1", "b", "y"), "forward")
    requests = Requests("gpt-4", prompts, [pair] * 10_000_000, range(10_000_000), 0)
    assert len(requests) == 10_000_000
    assert requests[9_999_999].digest == requests[0].digest
    assert len(requests[10:20]) == 10
