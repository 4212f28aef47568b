"""Every way an endpoint fails, over real HTTP: nothing is lost, nothing counted twice, and the last line is clear."""

from __future__ import annotations

import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Forks, forks
from replay_server import SECRET, Archived, Call, Fault, ReplayServer, requests_for

from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.judge.api.client import JudgeClient
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.api.session import BREAKER, REFUSALS
from almost_eval.judge.records import Failure, Reply

pytest_plugins = ["judge_fixtures"]

N = 24

HTML = Fault("body", headers={"Content-Type": "text/html"}, body=b"<!DOCTYPE html><html>gateway</html>")
HTML_AS_JSON = Fault("body", body=b"<html>gateway</html>")
NOT_JSON = Fault("body", body=b'{"choices": [{"mess')
OTHER_JSON = Fault("body", body=b'{"result": "9 8"}')
LIST = Fault("body", body=b"[1, 2]")
NULL_CHOICES = Fault("body", body=b'{"choices": null}')
EMPTY_CHOICES = Fault("body", body=b'{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 0}}')
EMPTY_TEXT = Fault("body", body=b'{"choices": [{"message": {"content": " "}, "finish_reason": "length"}]}')
REFUSAL = Fault("body", body=b'{"choices": [{"message": {"content": null, "refusal": "No."}}]}')
TOO_LONG = Fault("status", 400, "maximum context length is 8192", "context_length_exceeded")
FILTERED_400 = Fault("status", 400, "filtered", "content_filter")

PASSING = {
    "429": (Fault("status", 429), "rate_limited"),
    "429 with Retry-After": (Fault("status", 429, headers={"Retry-After": "0.2"}), "rate_limited"),
    "500": (Fault("status", 500), "http_500"),
    "503 with Retry-After": (Fault("status", 503, headers={"Retry-After": "0.2"}), "http_503"),
    "408": (Fault("status", 408), "http_408"),
    "hangs": (Fault("hang"), "timeout"),
    "drips": (Fault("drip"), "timeout"),
    "cut": (Fault("cut"), "cut"),
    "reset": (Fault("reset"), "connection"),
    "html": (HTML, "html"),
    "html as json": (HTML_AS_JSON, "html"),
    "not json": (NOT_JSON, "malformed"),
    "other json": (OTHER_JSON, "malformed"),
    "a list": (LIST, "malformed"),
    "null choices": (NULL_CHOICES, "malformed"),
}
"""SamplePrompts again: the fault, and the reason it is counted under."""

LASTING = {
    "empty choices": (EMPTY_CHOICES, "empty_choices"),
    "empty text": (EMPTY_TEXT, "empty"),
    "refusal": (REFUSAL, "refusal"),
    "content filter": (Fault("content_filter"), "content_filter"),
    "content filter as 400": (FILTERED_400, "content_filter"),
    "policy as 400": (Fault("status", 400, "against the policy", "content_policy_violation"), "content_filter"),
    "too long": (TOO_LONG, "too_long"),
    "413": (Fault("status", 413), "too_long"),
}
"""Of the request itself: not asked again."""


@pytest.fixture
def client(server: ReplayServer, journal: Journal, request: pytest.FixtureRequest) -> JudgeClient:
    """Patient where the server always answers: a busy machine is slow, and that is no time-out."""
    name = request.node.name
    is_silent = any(word in name for word in ("hangs", "drips", "everything", "billed", "key_shows"))
    attempts = 2 if "does_not_pass" in name and is_silent else 3  # each of these waits for the time-out
    timeout = (3.0 if "everything" in name else 2.0) if is_silent else 60.0
    return JudgeClient("gpt-4", journal, base_url=server.url, timeout=timeout, max_attempts=attempts)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth: how long a client waits before it asks again is tested with the client."""
    monkeypatch.setattr("almost_eval.judge.api.adaptive._FIRST_PAUSE", 0.05)


def digests(server: ReplayServer, share: int, fault: Fault, until: int) -> Callable[[Call], Fault | None]:
    """A rule: every `share`-th prompt, by its own digest, gets the fault the first `until` times."""
    return lambda call: fault if int(call.digest[:8], 16) % share == 0 and call.times <= until else None


def check(
    outcomes: dict[int, Reply | Failure], archive: list[Archived], server: ReplayServer, client: JudgeClient
) -> list[Failure]:
    """What must hold whatever happened: every index once, replies true and stored, and the counts of both sides."""
    assert sorted(outcomes) == list(range(len(archive)))
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    for i, outcome in outcomes.items():
        if isinstance(outcome, Reply) and outcome.finish_reason == "stop":
            assert outcome.text == archive[i].review
    stats = client.stats
    assert stats.replied == len(archive) - len(failures) == len(client.journal)
    assert dict(stats.failed) == dict(Counter(failure.reason for failure in failures))
    assert stats.sent + stats.retried.total() == server.count
    assert all("\n" not in failure.message for failure in failures)
    return failures


# --- what passes when it is asked again, and what does not ---


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_in_the_end_is_only_counted(
    server: ReplayServer, client: JudgeClient, archive: list[Archived], name: str
) -> None:
    fault, reason = PASSING[name]
    server.fault = digests(server, 3, fault, until=1)
    assert check(dict(client.stream(requests_for(archive[:N]))), archive[:N], server, client) == []
    struck = sum(call.outcome == fault.kind for call in server.log)
    assert struck > 0
    assert dict(client.stats.retried) == {reason: struck}


@pytest.mark.parametrize("name", ["500", "hangs", "cut", "reset", "html", "not json"])
def test_what_does_not_pass_is_a_failure_with_its_reason(
    server: ReplayServer, client: JudgeClient, archive: list[Archived], name: str
) -> None:
    fault, reason = PASSING[name]
    server.fault = digests(server, 4, fault, until=99)
    failures = check(dict(client.stream(requests_for(archive[:N]))), archive[:N], server, client)
    struck = {call.digest for call in server.log if call.outcome == fault.kind}
    assert {failure.reason for failure in failures} == {reason}
    assert len(failures) == len(struck)
    assert max(call.times for call in server.log) == client.max_attempts
    server.fault = lambda call: None  # a later run asks what is missing, and nothing else
    before = server.count
    again = JudgeClient("gpt-4", client.journal, base_url=server.url)
    outcomes = dict(again.stream(requests_for(archive[:N])))
    assert [o.text for i, o in sorted(outcomes.items()) if isinstance(o, Reply)] == [a.review for a in archive[:N]]
    assert server.count - before == len(failures)


@pytest.mark.parametrize("name", LASTING)
def test_what_lies_in_the_request_is_not_asked_again(
    server: ReplayServer, client: JudgeClient, archive: list[Archived], name: str
) -> None:
    fault, reason = LASTING[name]
    server.fault = digests(server, 4, fault, until=99)
    failures = check(dict(client.stream(requests_for(archive[:N]))), archive[:N], server, client)
    assert {failure.reason for failure in failures} == {reason}
    assert len(failures) == sum(call.outcome == fault.kind for call in server.log) > 0
    assert client.stats.retried == {}


def test_a_reply_that_ends_for_its_length_is_a_reply(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    server.fault = lambda call: Fault("length")
    outcomes = dict(client.stream(requests_for(archive[:3])))
    check(outcomes, archive[:3], server, client)
    for i, outcome in outcomes.items():
        assert isinstance(outcome, Reply)
        assert outcome.finish_reason == "length"
        assert archive[i].review.startswith(outcome.text)
    stored = client.journal.get(requests_for(archive[:1])[0].digest)
    assert stored is not None
    assert stored.finish_reason == "length"


def test_what_a_failure_was_billed_is_booked(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    server.fault = lambda call: EMPTY_CHOICES if call.number == 2 else Fault("hang") if call.number == 3 else None
    dict(client.stream(requests_for(archive[:1])))
    before = client.stats.cost
    assert before is not None
    dict(client.stream(requests_for(archive[1:2])))
    assert client.stats.cost == pytest.approx(before + 7 * 30 / 1e6)
    dict(client.stream(requests_for(archive[2:3])))  # hangs, then passes
    assert client.stats.unmetered == 1


def test_everything_at_once(server: ReplayServer, client: JudgeClient, archive: list[Archived]) -> None:
    kinds = [fault for fault, _ in (*PASSING.values(), *LASTING.values())]

    def fault(call: Call) -> Fault | None:
        turn = int(call.digest[:8], 16) + call.times
        return kinds[turn // 2 % len(kinds)] if turn % 2 else None

    server.fault = fault
    failures = check(dict(client.stream(requests_for(archive[:120]))), archive[:120], server, client)
    assert {failure.reason for failure in failures} <= {reason for _, reason in LASTING.values()}


# --- what ends the run ---


def refuse(status: int, message: str = "no", code: str | None = None) -> Callable[[Call], Fault]:
    return lambda call: Fault("status", status, message, code)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (
            refuse(401, f"Incorrect API key provided: {SECRET}."),
            InputError,
            r"refuses the key \(401\): .*\*\*\*; check",
        ),
        (refuse(403, "Country not supported"), InputError, r"refuses the key \(403\): Country not supported"),
        (
            refuse(404, "The model `gpt-4` does not exist"),
            InputError,
            r"no judge 'gpt-4' \(404\): The model `gpt-4` does",
        ),
        (refuse(400, "bad\nvalue"), InputError, r"refuses what is sent to the judge 'gpt-4' \(400\): bad value"),
        (refuse(422, "extra inputs"), InputError, r"\(422\): extra inputs"),
        (
            refuse(429, "You exceeded your quota", "insufficient_quota"),
            RunError,
            r"no credit left \(429\): You exceeded",
        ),
        (refuse(418, "teapot"), RunError, "answers 418: teapot"),
    ],
)
def test_what_no_request_can_pass_is_told_once(
    server: ReplayServer,
    client: JudgeClient,
    archive: list[Archived],
    fault: Callable[[Call], Fault],
    kind: type[AlmostError],
    message: str,
) -> None:
    server.fault = fault
    for count in (1, 60):
        sent = server.count
        with pytest.raises(kind, match=message) as caught:
            list(client.stream(requests_for(archive[:count])))
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is caught.value.__context__ is None
        assert server.count - sent <= client.concurrency + REFUSALS
    assert len(client.journal) == 0


def test_one_refused_request_does_not_stop_the_others(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    server.latency = 0.1  # the refusal comes first
    odd = requests_for(archive[:1])[0].messages[1].content
    server.fault = lambda call: Fault("status", 400, "odd") if call.body["messages"][1]["content"] == odd else None
    for _ in range(2):  # and again when nothing else is left to ask
        outcomes = dict(client.stream(requests_for(archive[:N])))
        assert outcomes[0] == Failure("http_400", "400: odd")
        assert sum(isinstance(outcome, Reply) for outcome in outcomes.values()) == N - 1


def test_an_endpoint_that_is_not_there(journal: Journal, archive: list[Archived]) -> None:
    client = JudgeClient("gpt-4", journal, base_url="http://127.0.0.1:9/v1", max_attempts=2)
    began = time.monotonic()
    with pytest.raises(
        InputError, match=r"http://127.0.0.1:9/v1 is not reachable; start it, or check --judge-base-url"
    ):
        list(client.stream(requests_for(archive)))
    assert time.monotonic() - began < 5


def test_an_endpoint_that_dies_midway(server: ReplayServer, client: JudgeClient, archive: list[Archived]) -> None:
    server.fault = lambda call: Fault("die") if call.number == 60 else None
    read: dict[int, Reply | Failure] = {}
    with pytest.raises(RunError, match=r"has stopped answering: the last \d+ requests failed .*goes on"):
        read.update(client.stream(requests_for(archive)))
    # `update` reads all before it stores any, so what was read is counted where it is kept.
    assert 59 - client.concurrency <= len(client.journal) == client.stats.replied <= 60 + client.concurrency
    assert server.replies() - len(client.journal) <= client.concurrency
    assert client.stats.failed.total() >= BREAKER
    revived = ReplayServer(archive)
    try:
        stored = len(client.journal)
        again = JudgeClient("gpt-4", client.journal, base_url=revived.url)
        outcomes = dict(again.stream(requests_for(archive)))
        assert [o.text for _, o in sorted(outcomes.items()) if isinstance(o, Reply)] == [a.review for a in archive]
        assert revived.count == len(archive) - stored
    finally:
        revived.close()


def test_few_requests_left_when_it_dies_are_unscored(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    server.fault = lambda call: Fault("die") if call.number == 12 else None
    small = JudgeClient("gpt-4", client.journal, base_url=server.url, concurrency=2, max_attempts=2)
    outcomes = dict(small.stream(requests_for(archive[:N])))
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    assert len(outcomes) == N
    assert {failure.reason for failure in failures} <= {"connection", "cut"}
    assert len(failures) == N - len(client.journal) == small.stats.failed.total() >= N - 11


def test_a_journal_that_cannot_be_written_ends_the_run(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    client.journal._connection.execute("PRAGMA query_only = ON")  # as a disk that went read-only
    with pytest.raises(RunError, match=r"cannot write to .*the same command goes on"):
        list(client.stream(requests_for(archive[:N])))


# --- a killed run ---

CLIENT = """
import sys
from pathlib import Path
from almost_eval.judge.api.client import JudgeClient
from almost_eval.judge.api.journal import Journal
from replay_server import read_archive, requests_for
with Journal(Path(sys.argv[3])) as journal:
    client = JudgeClient("gpt-4", journal, base_url=sys.argv[2], concurrency=6)
    for i, outcome in client.stream(requests_for(read_archive(Path(sys.argv[1]))[:80])):
        pass
    print(client.stats.sent, client.stats.cached, flush=True)
"""


@pytest.fixture(scope="module")
def start() -> Iterator[Forks]:
    path = f"{Path.cwd()}:{Path(__file__).parent}"
    with forks("almost_eval.judge.api.client", "replay_server", "openai.resources.chat", PYTHONPATH=path) as started:
        yield started


def test_a_run_that_is_killed_ten_times_pays_no_stored_reply_twice(
    server: ReplayServer, start: Forks, data_root: Path, tmp_path: Path, archive: list[Archived]
) -> None:
    server.latency = 0.03
    command = [data_root.parent, server.url, tmp_path / "j"]
    (tmp_path / "cwd").mkdir()
    about = {"cwd": tmp_path / "cwd", "code": CLIENT, "OPENAI_API_KEY": SECRET}
    requests = requests_for(archive[:80])
    stored: set[int] = set()
    lost = 0  # under way at a kill: sent, and not stored
    for kill in range(10):
        before = server.count
        client = start(*command, **about)
        while server.count < before + 4 + kill % 5 and client.runs():
            time.sleep(0.002)
        client.send(signal.SIGKILL)
        assert client.wait() == -signal.SIGKILL
        time.sleep(0.1)  # calls that were in the server's queue
        with Journal(tmp_path / "j") as journal:
            now = {i for i, request in enumerate(requests) if journal.get(request.digest)}
        assert stored <= now
        lost += (server.count - before) - len(now - stored)
        stored = now
    assert 0 < len(stored) < 80
    done = start(*command, **about)
    assert done.wait() == 0, done.err.read_text()
    assert done.out.read_text().split() == [str(80 - len(stored)), str(len(stored))]
    assert server.count == 80 + lost
    with Journal(tmp_path / "j") as journal:
        replies = [journal.get(request.digest) for request in requests]
    assert [reply.text for reply in replies if reply] == [one.review for one in archive[:80]]


# --- the key ---


def test_the_key_shows_nowhere(
    server: ReplayServer,
    client: JudgeClient,
    archive: list[Archived],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f'{{"choices": [{{"message": {{"content": "9 8 {SECRET}"}}}}]}}'.encode()
    faults: list[Fault | None] = [None, Fault("body", body=echo), HTML, Fault("cut"), OTHER_JSON]
    faults += [Fault("status", status, f"Incorrect key {SECRET}") for status in (429, 500)]
    server.fault = lambda call: Fault("hang") if call.number == 5 else faults[call.number % len(faults)]
    shown = [repr(outcome) for outcome in dict(client.stream(requests_for(archive[:40]))).values()]
    assert "9 8 ***" in "".join(shown)
    for status in (400, 401, 403, 404, 418, 422):
        server.fault = refuse(status, f"Incorrect key: {SECRET}. Or sk-dist********t-me.")
        fresh = JudgeClient("gpt-4", client.journal, base_url=server.url)
        with pytest.raises(AlmostError) as caught:
            list(fresh.stream(requests_for(archive[100:110])))
        shown += [repr(caught.value), repr(caught.value.__context__), repr(vars(fresh.stats))]
        assert "sk-" not in str(caught.value)
    out, err = capfd.readouterr()
    files = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert {call.key for call in server.log} == {SECRET}
    assert SECRET not in "".join([*shown, out, err, caplog.text])
    assert SECRET.encode() not in files
    assert caplog.text  # the SDK did log
