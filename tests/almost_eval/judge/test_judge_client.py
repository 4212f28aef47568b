"""The client against a real server that replays the archived reviews: what is sent, how fast, how much, and when."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any, overload

import pytest
from machine_time import seconds_to_end
from replay_server import SECRET, Archived, Fault, ReplayServer, requests_for

from almost_eval.errors import InputError
from almost_eval.judge.api.adaptive import MAX_PAUSE, AdaptiveLimit
from almost_eval.judge.api.client import JudgeClient
from almost_eval.judge.api.cost import Budget
from almost_eval.judge.api.endpoint import JudgeEndpoint, retry_after
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.records import Failure, JudgeRequest, Reply

pytest_plugins = ["judge_fixtures"]


@pytest.fixture
def serve(archive: list[Archived], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ReplayServer]]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    servers: list[ReplayServer] = []

    def start(**options: Any) -> ReplayServer:
        servers.append(ReplayServer(archive, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def texts(outcomes: dict[int, Reply | Failure]) -> list[str]:
    found = [outcomes[i] for i in sorted(outcomes)]
    assert all(isinstance(one, Reply) for one in found), found
    return [one.text for one in found if isinstance(one, Reply)]


# --- what is asked, and what comes back ---


def test_every_archived_review_comes_back(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve()
    client = JudgeClient("gpt-4", journal, base_url=server.url)
    outcomes = dict(client.stream(requests_for(archive)))
    assert texts(outcomes) == [one.review for one in archive]
    assert len(server.log) == len(journal) == client.stats.sent == client.stats.replied == 400
    assert client.stats.retried == client.stats.failed == {}
    first = outcomes[0]
    assert isinstance(first, Reply)
    assert (first.model, first.finish_reason, first.cached) == ("gpt-4-0314", "stop", False)
    assert journal.tokens() == (client.stats.prompt_tokens, client.stats.completion_tokens)
    assert client.stats.cost == pytest.approx((journal.tokens()[0] * 30 + journal.tokens()[1] * 60) / 1e6)
    prompt = archive[0].prompt
    [call] = [call for call in server.log if call.body["messages"][1]["content"] == prompt]
    assert call.body == {
        "model": "gpt-4", "temperature": 0.2, "max_tokens": 1024,
        "messages": [{"role": "system", "content": "You are a fair judge."}, {"role": "user", "content": prompt}],
    }  # fmt: skip


def test_stored_replies_come_first_and_are_not_paid_again(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve()
    requests = requests_for(archive[:12])
    dict(JudgeClient("gpt-4", journal, base_url=server.url).stream(requests[6:]))
    client = JudgeClient("gpt-4", journal, base_url=server.url)
    order = list(client.stream(requests))
    assert [i for i, _ in order[:6]] == [6, 7, 8, 9, 10, 11]
    assert [outcome.cached for _, outcome in order if isinstance(outcome, Reply)] == [True] * 6 + [False] * 6
    assert (client.stats.sent, client.stats.cached) == (6, 6)
    assert len(server.log) == 12


def test_identical_requests_are_asked_once(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve()
    one, two = requests_for(archive[:2])
    client = JudgeClient("gpt-4", journal, base_url=server.url)
    outcomes = dict(client.stream([one, two, one, one]))
    assert texts(outcomes) == [archive[0].review, archive[1].review, archive[0].review, archive[0].review]
    assert sorted(o.cached for o in outcomes.values() if isinstance(o, Reply)) == [False, False, True, True]
    assert (len(server.log), client.stats.sent, client.stats.cached) == (2, 2, 2)


def test_a_request_for_another_judge_is_refused(journal: Journal, archive: list[Archived]) -> None:
    client = JudgeClient("gpt-4", journal, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="'gpt-5' was given to 'gpt-4'"):
        list(client.stream(requests_for(archive[:1], "gpt-5")))


# --- how fast ---


@pytest.mark.slow
def test_a_server_that_allows_twenty_at_a_time_is_used_to_the_full(
    serve: Callable[..., ReplayServer], tmp_path: Path, archive: list[Archived]
) -> None:
    server, seconds = serve(latency=1.0, at_once=20), []
    for concurrency in (20, 32):  # one that knows what is allowed, and one that has to find out
        with Journal(tmp_path / f"{concurrency}.sqlite") as journal:
            client = JudgeClient("gpt-4", journal, base_url=server.url, concurrency=concurrency)
            began = time.monotonic()
            outcomes = dict(client.stream(requests_for(archive[:160])))
            seconds.append(time.monotonic() - began)
        assert texts(outcomes) == [one.review for one in archive[:160]]
    assert seconds[1] <= seconds[0] + 1.5  # 8 s and what this machine adds; at most one round of replies more
    assert server.most_at_once == 20
    assert server.outcomes()["busy"] <= 15  # the first burst's, and a trial or two


@pytest.mark.alone("how well 20 places are used")
def test_the_same_where_the_server_asks_to_wait(
    serve: Callable[..., ReplayServer], tmp_path: Path, archive: list[Archived]
) -> None:
    busy = Fault("status", 429, headers={"Retry-After": "0.25"})
    server, seconds = serve(latency=0.25, at_once=20, busy=busy), []
    for concurrency in (20, 32):  # one that knows what is allowed, and one that has to find out
        with Journal(tmp_path / f"{concurrency}.sqlite") as journal:
            client = JudgeClient("gpt-4", journal, base_url=server.url, concurrency=concurrency)
            began = time.monotonic()
            dict(client.stream(requests_for(archive[:160])))
            seconds.append(time.monotonic() - began)
    assert seconds[1] <= 2.2 * seconds[0]  # the first takes 2 s, and more on a busy machine
    assert server.outcomes()["busy"] <= 20


def test_one_at_a_time_is_found_too(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve(latency=0.05, at_once=1)
    client = JudgeClient("gpt-4", journal, base_url=server.url, max_attempts=2)
    assert len(texts(dict(client.stream(requests_for(archive[:20]))))) == 20  # refused often, and never for good
    assert client.stats.retried["rate_limited"] == server.outcomes()["busy"]


@pytest.mark.slow
def test_a_limit_that_is_lifted_is_used(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve(latency=0.1, at_once=2)  # long beside what a request costs here
    client = JudgeClient("gpt-4", journal, base_url=server.url)
    for count, _ in enumerate(client.stream(requests_for(archive))):
        if count == 30:
            server.at_once = 10**6
    assert server.most_at_once >= 16


def test_nothing_is_sent_before_retry_after_is_over(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve()
    server.fault = lambda call: Fault("status", 429, headers={"Retry-After": "1"}) if call.number == 1 else None
    client = JudgeClient("gpt-4", journal, base_url=server.url, concurrency=4)
    assert len(texts(dict(client.stream(requests_for(archive[:8]))))) == 8
    arrivals = sorted(call.began for call in server.log)
    assert arrivals[1] - arrivals[0] >= 0.99


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": formatdate(1000030, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(5000030, usegmt=True), "date": formatdate(5000000, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(999990, usegmt=True)}, None),
        ({"retry-after": "1e9"}, 1e9),
        *[({"retry-after": silly}, None) for silly in ("-3", "0", "nan", "inf", "soon", "", "Wed, 99 Foo")],
        ({}, None),
    ],
)
def test_what_retry_after_means(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=1000000.0) == seconds


def test_a_silly_retry_after_is_capped() -> None:
    async def pause() -> float:
        limit = AdaptiveLimit(4, random.Random(0))
        limit.take()
        limit.refused(1e9)
        return limit.pause(asyncio.get_running_loop().time())

    assert MAX_PAUSE - 1 < asyncio.run(pause()) <= MAX_PAUSE


# --- how much is held, and how it ends ---


class Lazy(Sequence[JudgeRequest]):
    """Requests that are made when they are looked at."""

    def __init__(self, requests: list[JudgeRequest]) -> None:
        self.requests = requests

    def __len__(self) -> int:
        return len(self.requests)

    @overload
    def __getitem__(self, i: int) -> JudgeRequest: ...

    @overload
    def __getitem__(self, i: slice) -> list[JudgeRequest]: ...

    def __getitem__(self, i: int | slice) -> JudgeRequest | list[JudgeRequest]:
        return self.requests[i]


def test_no_more_is_asked_than_is_read(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve()
    client = JudgeClient("gpt-4", journal, base_url=server.url, concurrency=4)
    stream = client.stream(Lazy(requests_for(archive)))
    assert len(list(itertools.islice(stream, 10))) == 10
    time.sleep(0.5)  # time enough for hundreds
    assert len(server.log) <= 10 + 3 * 4
    assert len(dict(stream)) == 390


@pytest.mark.alone("two seconds")
def test_closing_ends_promptly_and_keeps_what_was_read(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve()
    server.fault = lambda call: Fault("hang") if call.number > 5 else None
    stream = JudgeClient("gpt-4", journal, base_url=server.url, concurrency=5).stream(requests_for(archive[:50]))
    for _ in range(5):
        next(stream)
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 2
    assert len(journal) == 5


INTERRUPTED = """
from pathlib import Path
import click
from almost_eval.cli.command_line import Commands, run_command_line
from almost_eval.judge.api.client import JudgeClient
from almost_eval.judge.api.journal import Journal
from replay_server import read_archive, requests_for

@click.group(cls=Commands)
def cli(): ...

@cli.command()
@click.argument("data", type=Path)
@click.argument("url")
@click.argument("file", type=Path)
def judge(data, url, file):
    with Journal(file) as journal:
        for i, _ in JudgeClient("gpt-4", journal, base_url=url).stream(requests_for(read_archive(data))):
            print(i, flush=True)

run_command_line(cli, "judge")
"""


def test_ctrl_c_ends_within_two_seconds(serve: Callable[..., ReplayServer], data_root: Path, tmp_path: Path) -> None:
    server = serve()
    server.fault = lambda call: Fault("hang") if call.number > 6 else None
    command = [sys.executable, "-c", INTERRUPTED, "judge", str(data_root.parent), server.url, str(tmp_path / "j")]
    environment = os.environ | {"PYTHONPATH": f"{Path.cwd()}:{Path(__file__).parent}"}
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert client.stdout is not None
    for _ in range(6):
        assert client.stdout.readline(), client.communicate()
    client.send_signal(signal.SIGINT)
    assert seconds_to_end(client.pid) < 2
    _, err = client.communicate(timeout=20)
    assert (client.returncode, err.count("\n")) == (1, 1)
    assert "interrupted; what was done is kept" in err
    with Journal(tmp_path / "j") as journal:
        assert len(journal) == 6


# --- the budget ---


def test_no_request_is_sent_that_could_exceed_the_bound(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve(latency=0.01)
    budget = Budget(0.6, judge="gpt-4")
    client = JudgeClient("gpt-4", journal, base_url=server.url, budget=budget)
    outcomes = dict(client.stream(requests_for(archive[:60])))
    refused = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    assert {failure.reason for failure in refused} == {"budget"}
    assert client.stats.failed == {"budget": len(refused)}
    assert len(server.log) == client.stats.sent == len(journal) == 60 - len(refused)
    assert 0.5 < budget.spent <= 0.6  # a reply uses far less than is set aside: nearly all is spent
    assert client.stats.cost == pytest.approx(budget.spent)
    assert budget.reserved == pytest.approx(0, abs=1e-9)
    assert "not sent: it may cost 0.0" in refused[0].message


def test_what_was_under_way_when_it_was_closed_is_booked_and_holds_nothing_up(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve()
    server.fault = lambda call: Fault("hang") if 3 < call.number <= 7 else None
    budget = Budget(100.0, judge="gpt-4")
    client = JudgeClient("gpt-4", journal, base_url=server.url, budget=budget, concurrency=4)
    stream = client.stream(requests_for(archive[:20]))
    for _ in range(3):
        next(stream)
    deadline = time.monotonic() + 5
    while server.count < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    stream.close()  # type: ignore[attr-defined]
    assert (budget.pending, budget.reserved) == (0, 0.0)
    assert client.stats.unmetered == 4
    budget.max_cost = budget.spent + 0.3  # little: it has to wait for what is under way
    assert {type(outcome) for outcome in dict(client.stream(requests_for(archive[:6]))).values()} == {Reply}


def test_a_reply_that_counts_no_tokens_is_booked_at_its_worst(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    server = serve()
    body = b'{"choices": [{"message": {"content": "9 9"}, "finish_reason": "stop"}]}'
    server.fault = lambda call: Fault("body", body=body)
    budget = Budget(judge="gpt-4")
    client = JudgeClient("gpt-4", journal, base_url=server.url, budget=budget)
    [request] = requests_for(archive[:1])
    assert texts(dict(client.stream([request]))) == ["9 9"]
    assert (budget.spent, client.stats.unmetered) == (budget.worst(request), 1)


def test_an_unknown_price_is_no_cost(
    serve: Callable[..., ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    client = JudgeClient("my-judge", journal, base_url=serve().url)
    texts(dict(client.stream(requests_for(archive[:2], "my-judge"))))
    assert client.stats.cost is None
    assert client.stats.completion_tokens > 0


# --- the address and the key ---


@pytest.mark.parametrize(
    ("base_url", "message"),
    [
        (f"http://someone:{SECRET}@host/v1", "holds a user, a password, a query or the key"),
        (f"http://{SECRET}@host/v1", "holds a user"),
        (f"http://host/v1?api_key={SECRET}", "holds a user"),
        (f"http://host/{SECRET}/v1", "or the key"),
        (f"http://host/v1#{SECRET}", "holds a user"),
        (SECRET, "is not an http.s. address"),
        (f"ftp://host/{SECRET}", "is not an http.s. address"),
        ("http://[host/v1", "is not an http.s. address"),
        (f"http://host:{SECRET}/v1", "is not an http.s. address"),
    ],
)
def test_an_address_with_a_secret_is_not_repeated(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, base_url: str, message: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(InputError, match=message) as caught:
        JudgeClient("gpt-4", journal, base_url=base_url)
    assert SECRET not in str(caught.value) + repr(caught.value.__context__)
    assert "\n" not in str(caught.value)


def test_no_key_for_openai_is_told_before_anything_is_sent(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for empty in ("", "  \n"):
        monkeypatch.setenv("OPENAI_API_KEY", empty)
        with pytest.raises(InputError, match=r"no key for https://api.openai.com/v1: set OPENAI_API_KEY"):
            JudgeClient("gpt-4", journal)
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")  # as `export KEY=$(cat file)` with a stray end of line
    assert JudgeClient("gpt-4", journal).endpoint.is_openai
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nsecond line")
    with pytest.raises(InputError, match="holds spaces or characters") as caught:
        JudgeClient("gpt-4", journal)
    assert SECRET not in str(caught.value)


def test_only_openais_own_hosts_are_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    hosts = {
        "https://api.openai.com/v1": True,
        "https://eu.api.openai.com/v1/": True,
        "http://openai.com.evil/v1": False,
    }
    assert {url: JudgeEndpoint("j", url, 1.0).is_openai for url in hosts} == hosts


@pytest.mark.parametrize("options", [{"timeout": 0}, {"max_attempts": 0}, {"concurrency": 0}])
def test_numbers_out_of_range(journal: Journal, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be"):
        JudgeClient("gpt-4", journal, base_url="http://host/v1", **options)
