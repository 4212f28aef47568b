"""The provider's batch API: every way it ends, every fault between two steps, and what is billed for it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_server import PRICE, BatchServer
from replay_server import ReplayServer

from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.judge.api import batch as batch_module
from almost_eval.judge.api import batch_api
from almost_eval.judge.api.batch_files import input_line, output_lines
from almost_eval.judge.api.client import JudgeClient
from almost_eval.judge.api.cost import Budget
from almost_eval.judge.api.journal import BATCH, STANDARD, Journal
from almost_eval.judge.records import Failure, JudgeRequest, Reply, Usage
from almost_eval.types import Message

N = 12


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALMOST_API_KEY", "sk-test")
    monkeypatch.setattr(batch_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(batch_module, "LAST_PAUSE", 0.02)
    monkeypatch.setattr(batch_api, "LOOKS", (0.0, 0.01))
    monkeypatch.setattr(batch_api, "backoff", lambda tries, random_: 0.01)


@pytest.fixture
def server() -> Iterator[BatchServer]:
    server = BatchServer()
    yield server
    server.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.sqlite") as journal:
        yield journal


def requests(n: int = N, attempt: int = 0) -> list[JudgeRequest]:
    return [
        JudgeRequest("j", (Message("user", f"question {i}: " + "which is better? " * (i % 3 + 1)),), 0.2, 64, attempt)
        for i in range(n)
    ]


class Client(JudgeClient):
    """Of the test server, with the lines that a user sees."""

    def __init__(self, server: ReplayServer, journal: Journal, max_cost: float | None = None, **options: Any) -> None:
        budget = Budget(max_cost, *PRICE[:2], price_batch=PRICE[2])
        budget.spent = sum(budget.of_ledger(journal.ledger()))
        self.told: list[str] = []
        super().__init__(
            "j", journal, base_url=server.url, budget=budget, notice=self.told.append, batch=True, **options
        )


def spent(journal: Journal) -> tuple[float, float]:
    """USD as the journal has them: known, and at most."""
    return Budget(None, *PRICE[:2], price_batch=PRICE[2]).of_ledger(journal.ledger())


def check(outcomes: dict[int, Reply | Failure], journal: Journal, server: BatchServer) -> None:
    """Every request once, and the invoice of the provider in the journal."""
    assert sorted(outcomes) == list(range(len(outcomes)))
    known, unsure = spent(journal)
    assert known == pytest.approx(server.invoice, abs=1e-12)
    assert unsure == 0
    assert max(server.worked.values(), default=1) == 1


def test_a_batch_of_the_whole(server: BatchServer, journal: Journal) -> None:
    client = Client(server, journal)
    outcomes = dict(client.stream(requests()))
    check(outcomes, journal, server)
    assert all(isinstance(outcome, Reply) for outcome in outcomes.values())
    assert (server.count, sum(server.worked.values())) == (1, N - 1)  # one went ahead
    tiers = {entry.tier: entry.n for entry in journal.ledger().entries}
    assert tiers == {STANDARD: 1, BATCH: N - 1}
    stats = client.stats
    assert (stats.sent, stats.replied, stats.cached) == (N, N, 0)
    assert stats.cost == pytest.approx(server.invoice)
    assert client.told[0] == "one request goes ahead of the batch, at the full price: it shows what the judge takes"
    assert client.told[1].startswith("batch batch_0 is ordered: 11 requests, a day at most.")
    assert any(line.startswith("batch batch_0: completed, 11 of 11 done") for line in client.told)
    again = Client(server, journal)
    assert {o.text for o in dict(again.stream(requests())).values() if isinstance(o, Reply)} == {
        o.text for o in outcomes.values() if isinstance(o, Reply)
    }
    assert (again.stats.cached, server.orders) == (N, 1)


def test_the_same_request_twice_is_one_item(server: BatchServer, journal: Journal) -> None:
    client = Client(server, journal)
    outcomes = dict(client.stream(requests(4) + requests(4)))
    assert len(outcomes) == 8
    assert sum(server.worked.values()) == 3
    assert client.stats.cached == 4


def test_a_line_of_the_file(server: BatchServer, journal: Journal) -> None:
    client = Client(server, journal)
    [request] = requests(1)
    line = json.loads(input_line(client.endpoint, request.digest, request, {"max_tokens": 64}))
    assert line == {
        "custom_id": request.digest,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "j",
            "messages": [{"role": "user", "content": request.messages[0].content}],
            "max_tokens": 64,
        },
    }
    assert len(request.digest) == 64  # the longest that OpenAI takes


def test_lines_come_in_any_pieces_and_line_separators_of_unicode_are_none() -> None:
    body = {"choices": [{"message": {"content": "9 8\u2028so"}}]}
    whole = json.dumps(
        {"custom_id": "a", "response": {"status_code": 200, "body": body}, "error": None}, ensure_ascii=False
    ).encode()
    content = whole + b"\n\n" + whole  # no end of line at the end
    for size in (1, 7, len(content)):
        pieces = [content[at : at + size] for at in range(0, len(content), size)]
        assert [line and line.body for line in output_lines(pieces)] == [body, body]
    assert list(output_lines([b'{"custom_id": 3}\n[]\n{"custom_id": "a"}\nno\n'])) == [None] * 4


# --- what becomes of one request


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        ("expired", "batch_expired"),
        ("error", "server_error"),
        ("status 500", "http_500"),
        ("status 429", "rate_limited"),
    ],
)
def test_what_may_pass_is_asked_again_in_the_next_batch(
    server: BatchServer, journal: Journal, fate: str, reason: str
) -> None:
    server.fate = lambda digest, times, body: fate if times == 1 and int(digest[:4], 16) % 2 else None
    client = Client(server, journal)
    outcomes = dict(client.stream(requests()))
    assert all(isinstance(outcome, Reply) for outcome in outcomes.values())
    struck = sum(n == 2 for n in server.seen.values())
    assert 0 < struck < N - 1
    assert client.stats.retried == {reason: struck}
    assert server.orders == 2
    known, unsure = spent(journal)
    assert known == pytest.approx(server.invoice, abs=1e-12)
    # Nobody says of a 500 whether it was billed.
    assert journal.ledger().n_unsure == client.stats.unmetered == (struck if fate in ("error", "status 500") else 0)
    assert (unsure > 0) == (fate in ("error", "status 500"))


def test_what_does_not_pass_is_a_failure_after_three_batches_and_the_next_command_asks_again(
    server: BatchServer, journal: Journal
) -> None:
    server.fate = lambda digest, times, body: "expired" if int(digest[:4], 16) % 2 and times < 4 else None
    outcomes = dict(Client(server, journal).stream(requests()))
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    assert {failure.reason for failure in failures} == {"batch_expired"}
    assert (len(failures), server.orders) == (sum(n == 3 for n in server.seen.values()), 3)
    check(outcomes, journal, server)
    after = dict(Client(server, journal).stream(requests()))
    check(after, journal, server)
    assert all(isinstance(outcome, Reply) for outcome in after.values())


def test_a_failure_for_good_is_billed_once_and_not_asked_again(server: BatchServer, journal: Journal) -> None:
    server.fate = lambda digest, times, body: "empty" if int(digest[:4], 16) % 2 else None
    client = Client(server, journal)
    outcomes = dict(client.stream(requests()))
    check(outcomes, journal, server)
    assert server.orders == 1
    assert 0 < client.stats.failed["empty"] == sum(isinstance(o, Failure) for o in outcomes.values())


def test_lines_that_are_wrong_are_told_and_what_they_cost_is_not_forgotten(
    server: BatchServer, journal: Journal
) -> None:
    digests = [request.digest for request in requests()]
    fates = dict(zip(digests[1:5], ("malformed", "missing", "double", "double"), strict=True))
    server.fate = lambda digest, times, body: fates.get(digest) if times == 1 else None
    server.strange_lines = [json.dumps({"custom_id": "x", "response": {"status_code": 200, "body": {}}}).encode()]
    client = Client(server, journal)
    outcomes = dict(client.stream(requests()))
    assert all(isinstance(outcome, Reply) for outcome in outcomes.values())
    told = "batch batch_0: lines of its files: 1 cannot be read, 1 belong to no request of it, 2 stand twice"
    assert any(line.startswith(told) for line in client.told)
    # Two were worked on, and billed, twice: nobody got the first reply. The journal holds the first at its most.
    assert [server.worked[digest] for digest in digests[1:5]] == [2, 2, 1, 1]
    known, unsure = spent(journal)
    assert journal.ledger().n_unsure == 2
    assert known < server.invoice < known + unsure


def test_what_an_expired_batch_did_not_reach_is_free_where_the_counts_say_so(
    server: BatchServer, journal: Journal
) -> None:
    server.ends = lambda n: "expired" if n == 0 else "completed"
    server.fate = lambda digest, times, body: "expired" if times == 1 and int(digest[:4], 16) % 2 else None
    outcomes = dict(Client(server, journal).stream(requests()))
    check(outcomes, journal, server)
    assert all(isinstance(outcome, Reply) for outcome in outcomes.values())


def test_a_batch_that_was_cancelled_gives_what_is_done(server: BatchServer, journal: Journal) -> None:
    server.ends = lambda n: "cancelled" if n == 0 else "completed"
    server.fate = lambda digest, times, body: "missing" if times == 1 and int(digest[:4], 16) % 2 else None
    client = Client(server, journal)
    outcomes = dict(client.stream(requests()))
    assert all(isinstance(outcome, Reply) for outcome in outcomes.values())
    assert client.stats.retried["batch_cancelled"] == journal.ledger().n_unsure > 0  # 'missing' was billed


def test_a_status_that_is_not_known_is_waited_for(server: BatchServer, journal: Journal) -> None:
    server.polls, server.ends = 4, lambda n: "unknown first"
    client = Client(server, journal)
    check(dict(client.stream(requests())), journal, server)
    assert any("brewing" in line and "a status that is not known here" in line for line in client.told)


def test_a_download_that_breaks_off(server: BatchServer, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("almost_eval.judge.api.batch_steps.AT_A_TIME", 2)
    server.cut_content = 3
    client = Client(server, journal)
    check(dict(client.stream(requests())), journal, server)
    assert not any("cannot be read" in line for line in client.told)


# --- parameters


def test_a_parameter_that_is_refused_is_told_by_the_request_that_goes_ahead(
    server: BatchServer, journal: Journal
) -> None:
    from replay_server import Fault

    server.fault = lambda call: (
        Fault("status", 400, "Unsupported parameter: 'max_tokens'") if "max_tokens" in call.body else None
    )
    client = Client(server, journal)
    check(dict(client.stream(requests())), journal, server)
    assert server.orders == 1
    assert {"max_completion_tokens" in line["body"] for line in server.batches["batch_0"]["lines"]} == {True}


def test_a_parameter_that_only_the_batch_refuses_is_exchanged_in_the_next(
    server: BatchServer, journal: Journal
) -> None:
    server.fate = lambda digest, times, body: "refused temperature" if "temperature" in body else None
    client = Client(server, journal)
    check(dict(client.stream(requests())), journal, server)
    assert client.stats.retried == {"exchanged": N - 1}
    assert sum("temperature left out from now on" in line for line in client.told) == 1


def test_settings_that_are_refused_end_it_before_a_batch(server: BatchServer, journal: Journal) -> None:
    from replay_server import Fault

    server.fault = lambda call: Fault("status", 400, "your settings are wrong")
    with pytest.raises(InputError, match="refuses what is sent to the judge 'j'"):
        dict(Client(server, journal).stream(requests()))
    assert (server.count, server.orders) == (3, 0)


# --- a batch that fails, and an endpoint without one


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        ({"code": "invalid_json_line", "message": "no", "line": 3}, InputError, r"line 3 of its file: invalid_json_li"),
        (
            {"code": "model_not_found", "message": "no j"},
            InputError,
            "refuses the batch: model_not_found: no j; nothing",
        ),
        ({"code": "billing_hard_limit_reached", "message": "limit"}, RunError, "billing_hard_limit.*same command goes"),
    ],
)
def test_a_batch_that_fails_is_free_and_said(
    server: BatchServer, journal: Journal, error: dict[str, Any], kind: type[AlmostError], words: str
) -> None:
    server.ends, server.errors = lambda n: "failed", [error]
    with pytest.raises(kind, match=words) as caught:
        dict(Client(server, journal).stream(requests()))
    assert "\n" not in str(caught.value)
    assert sum(spent(journal)) == pytest.approx(server.invoice)
    server.ends = lambda n: "completed"
    check(dict(Client(server, journal).stream(requests())), journal, server)


def test_a_full_queue_makes_smaller_batches(server: BatchServer, journal: Journal) -> None:
    server.errors = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached for j. Limit: 9"}]
    server.ends = lambda n: "failed" if len(server.batches[f"batch_{n}"]["lines"]) > 3 else "completed"
    client = Client(server, journal)
    check(dict(client.stream(requests())), journal, server)
    assert [len(batch["lines"]) for batch in server.batches.values()] == [11, 6, 5, 3, 3, 3, 2]
    assert any("queue for batches is full (Enqueued token limit reached" in line for line in client.told)


def test_no_batch_api(journal: Journal) -> None:
    plain = ReplayServer([])
    try:
        with pytest.raises(InputError, match=r"has no batch API \(404: .*\); leave out --batch"):
            dict(Client(plain, journal).stream(requests()))
        assert plain.count == 0
    finally:
        plain.close()


def test_files_hold_so_many_requests(server: BatchServer, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", 4)
    check(dict(Client(server, journal).stream(requests())), journal, server)
    assert [len(batch["lines"]) for batch in server.batches.values()] == [4, 4, 3]
    monkeypatch.setattr(batch_module, "MAX_BYTES", 700)
    check(dict(Client(server, journal).stream(requests(5, attempt=1))), journal, server)
    assert max(len(server.files[b["input_file_id"]]) for b in list(server.batches.values())[3:]) <= 700


# --- orders without a clear answer


@pytest.mark.parametrize("how", ["lost", "reset"])
def test_a_batch_that_was_created_behind_a_500_is_not_ordered_twice(
    server: BatchServer, journal: Journal, how: str
) -> None:
    server.on_create = lambda n: how if n == 1 else None
    client = Client(server, journal)
    check(dict(client.stream(requests())), journal, server)
    assert server.orders == 1
    assert "batch batch_0 had been created already: it is not ordered again" in client.told


def test_an_order_that_failed_is_given_again_when_no_batch_is_there(server: BatchServer, journal: Journal) -> None:
    server.on_create = lambda n: "500" if n == 1 else "no file" if n == 2 else None
    check(dict(Client(server, journal).stream(requests())), journal, server)
    assert (server.orders, len(server.batches)) == (3, 1)


def test_orders_that_all_fail_end_the_command_and_nothing_is_lost(server: BatchServer, journal: Journal) -> None:
    server.on_create = lambda n: "500"
    with pytest.raises(RunError, match="creates no batch after 4 orders; what was done is kept"):
        dict(Client(server, journal).stream(requests()))
    server.on_create = lambda n: None
    check(dict(Client(server, journal).stream(requests())), journal, server)


def test_another_folders_batch_of_the_same_requests_is_not_taken(
    server: BatchServer, journal: Journal, tmp_path: Path
) -> None:
    server.on_create = lambda n: "500" if n == 2 else None
    dict(Client(server, journal).stream(requests()))
    with Journal(tmp_path / "other") as other:
        dict(Client(server, other).stream(requests()))
        assert sum(spent(journal)) + sum(spent(other)) == pytest.approx(server.invoice)
    assert len(server.batches) == 2


# --- what the provider denies


def test_a_file_that_is_not_there_yet_is_waited_for(server: BatchServer, journal: Journal) -> None:
    server.event = lambda event: (
        setattr(server, "hidden", 4) if event == ("retrieve", "sent") and server.worked and server.hidden == 0 else None
    )
    check(dict(Client(server, journal).stream(requests())), journal, server)
    assert server.orders == 1


def test_what_a_provider_denies_is_not_ordered_again_before_it_is_old(
    server: BatchServer, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.polls = 10**6
    with pytest.raises(RunError, match="--batch-wait"):
        dict(Client(server, journal, batch_wait=0.05).stream(requests()))
    server.hidden = 10**6
    with pytest.raises(
        RunError, match=r"does not know batch batch_0 \(404\)\. If it was deleted there, its replies are"
    ):
        dict(Client(server, journal).stream(requests()))
    monkeypatch.setenv("ALMOST_API_KEY", "sk-another")
    with pytest.raises(RunError, match="It was ordered with another key: set that one"):
        dict(Client(server, journal).stream(requests()))
    assert server.orders == 1
    server.hidden, server.polls = 0, 0
    check(dict(Client(server, journal).stream(requests())), journal, server)
    assert server.orders == 1


def test_a_batch_that_is_gone_after_a_month_is_asked_again(server: BatchServer, journal: Journal) -> None:
    server.polls = 10**6
    with pytest.raises(RunError, match="--batch-wait"):
        dict(Client(server, journal, batch_wait=0.05).stream(requests()))
    with sqlite3.connect(journal.path) as database:
        database.execute("UPDATE batches SET time = time - 31 * 86400")
    server.batches["batch_gone"] = server.batches.pop("batch_0")
    server.polls = 0
    outcomes = dict(Client(server, journal).stream(requests()))
    assert all(isinstance(outcome, Reply) for outcome in outcomes.values())
    assert journal.ledger().n_unsure == N - 1  # they may have been billed


def test_an_order_of_another_key_is_not_given_again(
    server: BatchServer, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on_create = lambda n: "500"
    with pytest.raises(RunError, match="creates no batch"):
        dict(Client(server, journal).stream(requests()))
    monkeypatch.setenv("ALMOST_API_KEY", "sk-another")
    with pytest.raises(InputError, match="was ordered with another key"):
        dict(Client(server, journal).stream(requests()))


def test_the_key_shows_nowhere(
    server: BatchServer, journal: Journal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = "sk-distinctive-0123456789-do-not-print-me"
    monkeypatch.setenv("ALMOST_API_KEY", secret)
    server.fate = lambda digest, times, body: f"says {secret}" if int(digest[:4], 16) % 2 else None
    server.ends = lambda n: f"{secret} in_progress" if n == 0 else "completed"
    client = Client(server, journal, batch_wait=0.3)
    shown: list[str] = []
    with pytest.raises(RunError) as caught:
        dict(client.stream(requests()))
    shown += [str(caught.value), *client.told]
    server.batches["batch_0"]["status"] = "completed"
    shown += [repr(outcome) for outcome in dict(Client(server, journal).stream(requests())).values()]
    server.errors = [{"code": secret, "message": f"bad {secret}"}]
    server.ends = lambda n: "failed"
    with pytest.raises(InputError) as refused:
        dict(Client(server, journal).stream(requests(4, attempt=1)))
    shown.append(str(refused.value))
    assert secret not in "".join(shown)
    assert secret.encode() not in b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


# --- money


def test_what_does_not_fit_the_budget_at_its_worst_goes_into_the_next_batch(
    server: BatchServer, journal: Journal
) -> None:
    worst = Budget(None, *PRICE[:2], price_batch=PRICE[2]).worst(requests()[2], BATCH)
    client = Client(server, journal, max_cost=6.5 * worst)
    outcomes = dict(client.stream(requests()))
    check(outcomes, journal, server)
    assert all(isinstance(outcome, Reply) for outcome in outcomes.values())
    assert server.orders > 1
    assert any("requests wait for the next batch" in line for line in client.told)
    assert server.invoice <= 6.5 * worst


def test_the_budget_bounds_all_runs_in_the_folder(server: BatchServer, journal: Journal) -> None:
    bound = 1.05 * Budget(None, *PRICE[:2]).worst(requests()[2])
    for _ in range(3):
        outcomes = dict(Client(server, journal, max_cost=bound).stream(requests(400)))
        assert {o.reason for o in outcomes.values() if isinstance(o, Failure)} == {"budget"}
        assert server.invoice <= bound
    check(outcomes, journal, server)


def test_what_is_under_way_is_reserved(server: BatchServer, journal: Journal) -> None:
    server.polls = 10**6
    with pytest.raises(RunError, match=r"batch batch_0 has not ended within --batch-wait; it goes on, and what was"):
        dict(Client(server, journal, batch_wait=0.05).stream(requests()))
    known, unsure = spent(journal)
    budget = Budget(None, *PRICE[:2], price_batch=PRICE[2])
    assert known == pytest.approx(server.invoice)
    assert unsure == pytest.approx(sum(budget.worst(request, BATCH) for request in requests()[1:]))
    server.polls = 0
    check(dict(Client(server, journal).stream(requests())), journal, server)
    assert server.orders == 1


# --- several calls, one batch


def test_what_later_calls_request_goes_into_the_same_batch(server: BatchServer, journal: Journal) -> None:
    server.fate = lambda digest, times, body: (
        "empty" if int(digest[:4], 16) % 3 == 0 else "expired" if int(digest[:4], 16) % 3 == 1 and times == 1 else None
    )
    client = Client(server, journal)
    repeats = [requests(attempt=attempt) for attempt in range(3)]
    for attempt, mine in enumerate(repeats):
        client.ahead = repeats[attempt + 1 :]
        outcomes = dict(client.stream(mine))
        assert sorted(outcomes) == list(range(N))
    assert len(server.batches["batch_0"]["lines"]) == 3 * N - 1
    # No failure for good is billed twice, though a later call is told of it.
    assert server.orders == 3  # what expired of the first call, then of both others together
    assert set(server.worked.values()) == {1}
    known, unsure = spent(journal)
    assert known == pytest.approx(server.invoice, abs=1e-12)
    assert unsure == 0


# --- a run without --batch beside it


def test_without_the_flag_nothing_that_is_in_a_batch_is_sent(server: BatchServer, journal: Journal) -> None:
    server.polls = 10**6
    with pytest.raises(RunError, match="--batch-wait"):
        dict(Client(server, journal, batch_wait=0.05).stream(requests()))
    plain = Client(server, journal)
    plain.batch = False
    sent = server.count
    with pytest.raises(InputError, match=r"11 of these requests are in batch batch_0 of an earlier command, and paid"):
        dict(plain.stream(requests()))
    assert server.count == sent
    dict(plain.stream(requests(3, attempt=1)))  # others are free to go


def test_a_batch_that_was_never_ordered_is_taken_back(server: BatchServer, journal: Journal) -> None:
    server.on_create = lambda n: "500"
    with pytest.raises(RunError):
        dict(Client(server, journal).stream(requests()))
    with sqlite3.connect(journal.path) as database:
        database.execute("UPDATE batches SET state = 'uploaded'")
    plain = Client(server, journal)
    plain.batch = False
    check(dict(plain.stream(requests())), journal, server)
    assert server.count == N


def test_a_journal_of_the_second_version_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "j"
    with Journal(file) as journal:
        journal.put(requests(1)[0], Reply("9 8", "stop", "m", 100, 10))
    with sqlite3.connect(file) as database:
        for column in ("tier", "cost", "written"):
            database.execute(f"ALTER TABLE sendings DROP COLUMN {column}")
        database.execute("PRAGMA user_version = 2")
    with Journal(file) as journal:
        assert journal.ledger().billed == Usage(100, 10)
        [entry] = journal.ledger().entries
        assert (entry.tier, entry.stated) == (STANDARD, None)


def test_a_bound_below_one_request_at_the_full_price_still_allows_it_in_a_batch(
    server: BatchServer, journal: Journal
) -> None:
    worst = Budget(None, *PRICE[:2]).worst(requests(1)[0])
    client = Client(server, journal, max_cost=0.6 * worst)
    outcomes = dict(client.stream(requests(1)))
    check(outcomes, journal, server)
    assert isinstance(outcomes[0], Reply)
    assert (server.count, server.orders) == (0, 1)
    assert client.stats.failed.total() == 0
