"""`almost-eval vicuna --batch` as a process of its own, killed between any two steps: each request is billed once."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_server import PRICE, BatchServer, Event
from forked import Forks, Process, forks

from almost_eval.judge.api.cost import Budget
from almost_eval.judge.api.journal import Journal

DRIVER = """
import sys
from almost_eval.judge.api import batch, batch_api, batch_steps
batch.FIRST_PAUSE, batch.LAST_PAUSE, batch.MAX_REQUESTS = 0.02, 0.05, int(sys.argv.pop(1))
batch_api.LOOKS = (0.0, 0.1)
batch_api.backoff = lambda tries, random_: 0.02
batch_steps.AT_A_TIME = 2
from almost_eval.cli.main import main
main()
"""
QUESTIONS = 5


@pytest.fixture
def server() -> Iterator[BatchServer]:
    server = BatchServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question_id": i, "text": f"What is {i} + {i}?", "category": "math"} for i in range(QUESTIONS)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for model in ("a", "b"):
        answers = [{"question_id": i, "text": f"{model} says {i}", "model_id": model} for i in range(QUESTIONS)]
        Path(f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))


Start = Callable[..., Process]


@pytest.fixture(scope="module")
def started() -> Iterator[Forks]:
    modules = "almost_eval.judge.run almost_eval.judge.api.batch almost_eval.judge.api.batch_steps sklearn.linear_model"
    modules += " almost_eval.nano.data almost_eval.report.console almost_eval.report.judge_console"
    modules += " openai.resources.chat.completions openai.resources.batches openai.resources.files"
    with forks(*modules.split(), ALMOST_API_KEY="sk-test") as started:
        yield started


@pytest.fixture
def start(started: Forks, server: BatchServer) -> Start:
    """`start("--json", size=3)`: the command, with batches of so many requests at most."""

    def run(*more: str, size: int = 3) -> Process:
        return started(str(size), "vicuna", *flags(server), *more, cwd=Path.cwd(), code=DRIVER)

    return run


def flags(server: BatchServer) -> list[str]:
    flags = ["--questions", "questions.jsonl", "--answers", "a.jsonl", "--baseline", "b.jsonl", "--data", "hub"]
    flags += ["--judge", "j", "--judge-base-url", server.url, "--prompt-set", "builtin", "--output", "run"]
    prices = ["--price-in", f"{PRICE[0]}", "--price-out", f"{PRICE[1]}", "--price-batch", f"{PRICE[2]}"]
    return [*flags, *prices, "--batch"]


def finish(start: Start) -> str:
    process = start()
    code, out, err = process.wait(), process.out.read_text(), process.err.read_text()
    assert code == 0, err
    assert "Traceback" not in err
    lines = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * QUESTIONS
    assert {line["reason"] for line in lines} == {None}
    assert all(line["outputs"]["scores"] in ([8.0, 6.0], [7.0, 7.0]) for line in lines)
    return out


def ledger() -> tuple[float, float, int]:
    """(USD known, USD at most, how many of these) as the journal has them."""
    with Journal(Path("run/journal.sqlite")) as journal:
        entries = journal.ledger()
        return *Budget(None, *PRICE[:2], price_batch=PRICE[2]).of_ledger(entries), entries.n_unsure


def test_a_command_that_is_killed_at_every_step_in_turn_pays_each_request_once(
    start: Start, server: BatchServer
) -> None:
    steps = ("list", "chat", "upload", "create", "retrieve", "content")
    points: list[Event] = [(step, when) for step in steps for when in ("before", "worked", "sent")]
    points.remove(("chat", "worked"))  # the plain client's; its server has no such moment
    left, lock, started = list(points), threading.Lock(), threading.Event()
    process: list[Process] = []
    n_chats: list[int] = []

    def kill(event: Event) -> None:
        with lock:
            if left and event == left[0]:
                left.pop(0)
                started.wait(30)
                process[-1].send(signal.SIGKILL)

    server.event = kill
    for _ in range(len(points) + 2):
        started.clear()
        process.append(start())
        started.set()  # a process that was forked may be at its point before this one knows its id
        code = process[-1].wait()
        n_chats.append(server.count)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    finish(start)
    server.work_off()
    assert left == []
    assert max(server.worked.values()) == 1
    known, unsure, n_unsure = ledger()
    # The request ahead of the batch may be lost with its process: it is in the ledger at its most, as without --batch.
    assert n_unsure <= 2
    assert server.count - n_unsure <= 2
    assert known == pytest.approx(server.bill + server.chat_bills[0], abs=1e-12)
    assert known - 1e-12 <= server.invoice <= known + unsure


@pytest.mark.slow
def test_a_command_that_is_killed_at_random_pays_each_request_once(start: Start, server: BatchServer) -> None:
    chance = random.Random(7)
    server.polls = 3
    server.fate = lambda digest, times, body: "expired" if times == 1 and int(digest[:4], 16) % 3 == 0 else None
    process = start()  # the request ahead, undisturbed
    while not server.calls["upload"] and process.runs():
        time.sleep(0.005)
    for _ in range(6):
        time.sleep(chance.uniform(0.0, 0.15))
        process.send(signal.SIGKILL)
        process.wait()
        before = server.calls["list"]
        process = start()
        while server.calls["list"] == before and process.runs():
            time.sleep(0.005)
    process.send(signal.SIGKILL)
    process.wait()
    finish(start)
    server.work_off()
    assert server.count == 1
    assert {server.worked[digest] for digest in server.seen} == {1}
    known, unsure, _ = ledger()
    assert known == pytest.approx(server.invoice, abs=1e-12)
    assert unsure == 0
    results = json.loads(Path("run/results.json").read_text())
    assert results["timing"]["cost_usd_all_runs"] == pytest.approx(server.invoice, abs=1e-6)


def test_ctrl_c_says_that_the_batch_goes_on(start: Start, server: BatchServer) -> None:
    server.polls = 10**6
    process = start(size=100)
    while server.calls["retrieve"] < 2 and process.runs():
        time.sleep(0.01)
    process.send(signal.SIGINT)
    assert process.wait() != 0
    err = process.err.read_text()
    assert "batch batch_0 goes on at the provider, and is billed; the same command takes its replies" in err
    assert "Traceback" not in err
    server.polls = 0
    out = finish(start)
    assert (server.orders, server.count) == (1, 1)
    assert "win rate" in out


def test_all_tasks_of_a_model_take_the_flags_of_a_judge(
    server: BatchServer, almost_eval: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from almost_eval.judge.api import batch

    monkeypatch.setenv("ALMOST_API_KEY", "sk-test")
    monkeypatch.setattr(batch, "FIRST_PAUSE", 0.02)
    answers = [{"question_id": i, "text": f"an answer {i}", "model_id": "b"} for i in range(1, 3)]
    Path("baseline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    flags = ["--tasks", "vicuna", "--limit", 2, "--baseline", "baseline.jsonl", "--judge", "j", "--data", "nano"]
    flags += ["--judge-base-url", server.url, "--price-in", 1, "--price-out", 5, "--price-batch", 0.5, "--max-cost", 1]
    flags += ["--max-tokens", 321, "--judge-temperature", 0.5, "--reasoning-effort", "low", "--reask", "--batch"]
    code, _, err = almost_eval("all", *flags, "--output", "all", "--batch-wait", 60)
    assert code == 0, err
    assert (server.orders, server.count) == (1, 1)
    assert "batch batch_0 is ordered: 3 requests" in err  # told without a terminal too
    body = server.batches["batch_0"]["lines"][0]["body"]
    assert (body["max_tokens"], body["temperature"], body["reasoning_effort"]) == (321, 0.5, "low")


@pytest.mark.parametrize("more", [["--judge", "k"], ["--verdict", "json"]], ids=["panel", "json"])
def test_a_panel_and_other_forms_of_a_verdict_go_into_batches(
    server: BatchServer, almost_eval: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    from almost_eval.judge.api import batch

    monkeypatch.setenv("ALMOST_API_KEY", "sk-test")
    monkeypatch.setattr(batch, "FIRST_PAUSE", 0.02)
    if "json" in more:
        server.review = lambda prompt: '{"reason": "so", "score_1": 8, "score_2": 6}'  # type: ignore[method-assign]
    flags = ["--questions", "questions.jsonl", "--answers", "a.jsonl", "--baseline", "b.jsonl", "--data", "hub"]
    flags += ["--judge", "j", "--judge-base-url", server.url, "--prompt-set", "builtin", "--output", "run", "--batch"]
    prices = ["--price-in", PRICE[0], "--price-out", PRICE[1], "--price-batch", PRICE[2]]
    code, _, err = almost_eval("vicuna", *flags, *prices, *more)
    assert code in (0, 3), err
    n = 2 if "--judge" in more else 1
    assert (server.orders, server.count) == (n, n)  # one request of each judge goes ahead
    assert max(server.worked.values()) == 1
    known, unsure, _ = ledger()
    assert (known, unsure) == (pytest.approx(server.invoice, abs=1e-12), 0.0)
    timing = json.loads(Path("run/results.json").read_text())["timing"]
    assert timing["cost_usd_all_runs"] == pytest.approx(server.invoice, abs=1e-5)


def test_a_dry_run_says_what_a_batch_costs_and_what_is_under_way(start: Start, server: BatchServer) -> None:
    process = start("--dry-run", "--json")
    assert (process.wait(), process.err.read_text()) == (0, "")
    plan = json.loads(process.out.read_text())
    assert server.calls.total() == server.count == 0
    assert (plan["requests"], plan["batches"], plan["batch_price"]) == (10, 1, "0.5 of the price (--price-batch)")
    whole = (plan["prompt_tokens_at_most"] * PRICE[0] + plan["completion_tokens_at_most"] * PRICE[1]) / 1e6
    assert plan["price_usd_at_most"] == pytest.approx(whole * (0.9 * 0.5 + 0.1), rel=0.01)  # one goes ahead
    server.polls = 10**6
    process = start("--batch-wait", "0.1", size=100)
    assert process.wait() == 1
    last = process.err.read_text().splitlines()[-1]
    assert last.startswith("error: batch batch_0 has not ended within --batch-wait; it goes on")
    process = start("--dry-run", "--json")
    process.wait()
    plan = json.loads(process.out.read_text())
    assert (plan["requests"], plan["requests_in_a_batch_already"], plan["price_usd_at_most"]) == (0, 9, 0.0)
    assert plan["of_it_uncertain_usd"] > 0
