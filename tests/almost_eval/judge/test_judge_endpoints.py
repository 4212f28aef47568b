"""One judge behind several endpoints: where reviews go, what happens when one dies, what is billed, what is refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from replay_server import SECRET, Archived, Call, Fault, ReplayServer, requests_for

from almost_eval.errors import InputError, RunError
from almost_eval.judge.api.client import JudgeClient
from almost_eval.judge.api.cost import Budget
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.records import Reply

pytest_plugins = ["judge_fixtures"]

N = 60


@pytest.fixture
def servers(archive: list[Archived], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ReplayServer]]:
    """Three servers of the judge gpt-4, of which a test may make others."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    three = [ReplayServer(archive, serves=["gpt-4", "gpt-5"], latency=0.01) for _ in range(3)]
    yield three
    for server in three:
        server.close()


def client(servers: list[ReplayServer], journal: Journal, **options: Any) -> JudgeClient:
    return JudgeClient("gpt-4", journal, base_url=",".join(server.url for server in servers), **options)


def reviews(judge: JudgeClient, archive: list[Archived], n: int = N) -> list[str]:
    outcomes = dict(judge.stream(requests_for(archive[:n])))
    assert all(isinstance(outcome, Reply) for outcome in outcomes.values()), outcomes
    return [outcomes[i].text for i in range(n)]  # type: ignore[union-attr]


def test_equal_endpoints_share_the_reviews_and_nothing_is_sent_twice(
    servers: list[ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    judge = client(servers, journal, concurrency=6)
    assert reviews(judge, archive) == [one.review for one in archive[:N]]
    shares = [len(server.log) for server in servers]
    assert sum(shares) == judge.stats.sent == len(journal) == N
    assert min(shares) >= N // 6
    assert {call.key for server in servers for call in server.log} == {SECRET}
    assert (judge.stats.lost, judge.stats.unmetered) == ([], 0)
    assert journal.tokens() == (judge.stats.prompt_tokens, judge.stats.completion_tokens)


def test_one_that_dies_is_replaced_named_and_what_it_had_is_billed_at_its_worst(
    servers: list[ReplayServer], tmp_path: Path, archive: list[Archived]
) -> None:
    dying, lines = servers[1], list[str]()
    dying.fault = lambda call: Fault("die") if call.number == 5 else None
    with Journal(tmp_path / "journal.sqlite") as journal:
        budget = Budget(judge="gpt-4")
        judge = client(servers, journal, concurrency=6, notice=lines.append, budget=budget)
        assert reviews(judge, archive) == [one.review for one in archive[:N]]
        calls = sum(len(server.log) for server in servers)
        cut = calls - N  # were read by the dying one, and never answered
        assert cut >= 1
        # One that was sent and not yet read when it died is unsure as well: its sender cannot tell the two apart.
        unread = judge.stats.unmetered - cut
        assert judge.stats.unmetered == journal.ledger().n_unsure
        assert 0 <= unread <= 6
        # Refused connections cost nothing: they were sent again, and no server has seen them.
        assert judge.stats.retried["connection"] + judge.stats.retried["cut"] >= cut
        prompts, replies = journal.tokens()
        known = (30 * prompts + 60 * replies) / 1e6
        unsure = sum(
            budget.worst(request)
            for server in servers
            for call in server.log
            if call.outcome != "replied"
            for request in requests_for(archive[:N])
            if request.messages[1].content == call.body["messages"][1]["content"]
        )
        dearest = max(budget.worst(request) for request in requests_for(archive[:N]))
        cost = judge.stats.cost or 0.0
        assert known + unsure <= cost * (1 + 1e-9)
        assert cost <= (known + unsure + unread * dearest) * (1 + 1e-9)
        assert sum(budget.of_ledger(journal.ledger())) == pytest.approx(cost)
    assert judge.stats.lost == [dying.url]
    assert lines[0] == f"{dying.url} is lost; what it had goes to the others"
    assert len(lines) == 1


def test_a_slow_endpoint_gets_little_and_holds_nobody_up(
    servers: list[ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    servers[0].latency = 1.0
    began = time.monotonic()
    reviews(client(servers, journal, concurrency=6), archive)
    assert len(servers[0].log) <= 6
    assert time.monotonic() - began < 8  # a third of them at the slow one, two at a time, is 10 s


def test_one_that_refuses_for_load_bounds_itself_alone(
    servers: list[ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    servers[0].at_once, servers[0].busy = 1, Fault("status", 429, "slow down", headers={"Retry-After": "30"})
    for server in servers:
        server.latency = 0.1
    began, lines = time.monotonic(), list[str]()
    reviews(client(servers, journal, concurrency=12, notice=lines.append), archive)
    assert time.monotonic() - began < 15  # nobody waits the 30 s that it asks for
    assert servers[0].most_at_once == 1
    assert max(server.most_at_once for server in servers[1:]) >= 4
    assert lines == []


def test_one_without_credit_is_left_out_and_said(
    servers: list[ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    servers[2].fault = lambda call: Fault("status", 402, "insufficient credits") if call.number > 3 else None
    lines: list[str] = []
    judge = client(servers, journal, concurrency=4, notice=lines.append)
    assert reviews(judge, archive) == [one.review for one in archive[:N]]
    assert (
        f"{servers[2].url} is left out from now on (402: insufficient credits); the others go on" in lines,
        judge.stats.lost,
    ) == (True, [servers[2].url])
    assert len(servers[2].log) <= 3 + 4
    assert judge.stats.unmetered == 0


def test_all_die(servers: list[ReplayServer], journal: Journal, archive: list[Archived]) -> None:
    for server in servers:
        server.fault = lambda call: Fault("die") if call.number >= 4 else None
    named = ", ".join(server.url for server in servers)
    with pytest.raises(RunError, match=re.escape(f"each of the endpoints {named} has stopped answering")):
        list(client(servers, journal, concurrency=8, max_attempts=2).stream(requests_for(archive[:N])))


def test_a_parameter_that_one_refuses_is_exchanged_there_alone(
    servers: list[ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    def refuse(call: Call) -> Fault | None:
        words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        return Fault("status", 400, words, "unsupported_parameter") if "max_tokens" in call.body else None

    servers[1].fault = refuse
    reviews(client(servers, journal, concurrency=4), archive)
    assert {"max_tokens" in call.body for call in servers[0].log + servers[2].log} == {True}
    assert "max_completion_tokens" in servers[1].log[-1].body
    before = len(servers[1].log)
    reviews(client(servers, journal, concurrency=4), archive[N:])  # the journal remembers it
    assert all("max_completion_tokens" in call.body for call in servers[1].log[before:])


def test_one_that_is_down_at_the_start_is_left_out_and_said(
    servers: list[ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    servers[0].close()
    lines: list[str] = []
    judge = client(servers, journal, notice=lines.append)
    reviews(judge, archive, 6)
    reviews(judge, archive, 12)
    assert lines == [f"the endpoint {servers[0].url} is not reachable; the run goes on with the other 2"]
    assert judge.stats.lost == [servers[0].url]
    for server in servers[1:]:
        server.close()
    with pytest.raises(InputError, match=r"none of the 3 endpoints answers, the first: .* is not reachable; start it"):
        list(client(servers, journal).stream(requests_for(archive[20:30])))


def test_one_that_serves_another_judge_is_refused_before_anything_is_paid(
    servers: list[ReplayServer], journal: Journal, archive: list[Archived]
) -> None:
    servers[2].serves = ["gpt-4o"]
    with pytest.raises(InputError, match=f"{servers[2].url} serves no judge 'gpt-4'; did you mean 'gpt-4o'"):
        list(client(servers, journal).stream(requests_for(archive[:N])))
    assert not any(server.log for server in servers)
    servers[2].serves = None  # a server without a list: its first review tells
    reviews(client(servers, journal), archive, 6)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("http://a/v1,http://a/v1/", "--judge-base-url names http://a/v1/ twice"),
        ("http://a/v1,b", "--judge-base-url is not an http"),
        ("http://a/v1,http://me:pw@b/v1", "holds a user, a password"),
        ("http://a/v1?key=pw,http://a/v1?key=pw", "holds a user, a password, a query or the key"),
        (",", "--judge-base-url is empty"),
    ],
)
def test_addresses_that_are_refused(urls: str, message: str, journal: Journal) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        JudgeClient("j", journal, base_url=urls)
    assert "pw" not in str(refusal.value)


def test_a_batch_goes_to_one(servers: list[ReplayServer], journal: Journal) -> None:
    with pytest.raises(InputError, match="--batch goes to one endpoint"):
        client(servers, journal, batch=True)


def test_the_command_takes_several_and_says_what_was_lost(
    servers: list[ReplayServer],
    archive: list[Archived],
    data_root: Path,
    tmp_path: Path,
    almost_eval: Callable[..., Any],
) -> None:
    archived = data_root.parent / "vicuna"
    servers[1].fault = lambda call: Fault("die") if call.number == 3 else None
    flags = ["--archive", archived, "--judge", "gpt-4", "--limit", 8, "--prompt-set", "builtin", "--json"]
    flags += ["--data-root", data_root, "--concurrency", 6]
    addresses = [word for server in servers for word in ("--judge-base-url", server.url)]
    several = almost_eval("judge", "check", *flags, *addresses, "--output", tmp_path / "several")
    results = json.loads(several.out)
    assert f"lost on the way: {servers[1].url}" in results["engine"]["warnings"]
    one = almost_eval("judge", "check", *flags, *addresses[:2], "--output", tmp_path / "one")
    assert json.loads(one.out)["metrics"] == results["metrics"]
    assert "lost" not in str(json.loads(one.out)["engine"]["warnings"])
