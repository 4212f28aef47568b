"""Answers that are not what OpenAI's endpoint sends: none becomes a verdict that nobody gave, or is paid for twice."""

from __future__ import annotations

import json
from typing import Any

import pytest
from replay_server import Archived, Fault, ReplayServer, requests_for

from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.judge.api.bodies import completion_in, finish_of, refusal_of, usage_of
from almost_eval.judge.api.client import JudgeClient
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.records import Failure, Reply, Usage

pytest_plugins = ["judge_fixtures"]

USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}


@pytest.fixture
def client(server: ReplayServer, journal: Journal) -> JudgeClient:
    return JudgeClient("gpt-4", journal, base_url=server.url, timeout=60.0, max_attempts=2, concurrency=1)


def body(content: Any = "9 7", finish: str = "stop", **more: Any) -> bytes:
    message = {"role": "assistant", "content": content}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": USAGE} | more).encode()


def events(*rows: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(row).encode() + b"\n\n" for row in rows) + b"data: [DONE]\n\n"


def piece(finish: str | None = None, **delta: str) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


STREAM = events(
    {"choices": []},
    piece(role="assistant", content=""),
    piece(reasoning_content="7 9? "),
    piece(reasoning_content="No."),
    piece(content="9 7\n"),
    piece(content="One\u2028is better."),
    piece("stop"),
    {"choices": [], "usage": USAGE},
)


def only(client: JudgeClient, archive: list[Archived]) -> Reply | Failure:
    [(_, outcome)] = client.stream(requests_for(archive[:1]))
    return outcome


def test_a_stream_that_nobody_requested_is_read_and_paid_for_once(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    server.fault = lambda call: Fault(
        "body", headers={"Content-Type": "text/event-stream"}, body=b": wait\n\n" + STREAM
    )
    reply = only(client, archive)
    assert isinstance(reply, Reply)
    assert (reply.text, reply.thinking, reply.finish_reason) == ("9 7\nOne\u2028is better.", "7 9? No.", "stop")
    assert (reply.usage, reply.model, server.count) == (Usage(100, 50), "m", 1)


def test_a_stream_without_its_end_is_no_reply(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    server.fault = lambda call: Fault("body", body=events(piece(content="9 7\n"), piece(content="Assis")))
    outcome = only(client, archive)
    assert isinstance(outcome, Failure)
    assert outcome.reason == "cut"


@pytest.mark.parametrize("finish", ["error", "insufficient_system_resource", "abort", "network_error"])
def test_what_the_provider_broke_off_is_no_verdict(
    server: ReplayServer, client: JudgeClient, archive: list[Archived], finish: str
) -> None:
    server.fault = lambda call: Fault("body", body=body("9 7\n\nAssis", finish)) if call.times == 1 else None
    outcome = only(client, archive)
    assert isinstance(outcome, Reply)
    assert outcome.text == archive[0].review
    assert client.stats.retried == {"cut": 1}
    assert client.stats.prompt_tokens == 100 + outcome.prompt_tokens  # what was billed is booked


def test_ends_have_one_name() -> None:
    named = {
        "MAX_TOKENS": "length",
        "model_length": "length",
        "SAFETY": "content_filter",
        "stop": "stop",
        "": "unknown",
    }
    assert {finish: finish_of({"finish_reason": finish}) for finish in named} == named
    with pytest.raises(TypeError):
        finish_of({"finish_reason": 1})


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ({"error": {"message": "Quota exceeded", "code": "insufficient_quota"}}, RunError, r"no credit left \(429\)"),
        ({"error": {"message": "Bad key", "code": "invalid_api_key"}}, InputError, r"refuses the key \(401\): Bad key"),
        ({"error": {"message": "Bad key", "code": "401"}}, InputError, r"refuses the key \(401\): Bad key"),
        ({"object": "error", "message": "No such model", "code": 404}, InputError, r"\(404\): No such model"),
    ],
)
def test_an_error_under_status_200_ends_the_run_as_under_its_own(
    server: ReplayServer,
    client: JudgeClient,
    archive: list[Archived],
    error: dict[str, Any],
    kind: type[AlmostError],
    message: str,
) -> None:
    server.fault = lambda call: Fault("body", body=json.dumps(error).encode())
    with pytest.raises(kind, match=message):
        only(client, archive)
    assert server.count == 1


@pytest.mark.parametrize("error", [{"error": "overloaded, come back"}, {"detail": "overloaded, come back"}])
def test_the_words_of_an_error_under_status_200_are_told(
    server: ReplayServer, client: JudgeClient, archive: list[Archived], error: dict[str, Any]
) -> None:
    server.fault = lambda call: Fault("body", body=json.dumps(error).encode())
    assert only(client, archive) == Failure("http_500", "500: overloaded, come back")


def test_what_is_no_completion_and_was_billed_is_not_bought_again(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    other = {"choices": [{"text": "9 7", "finish_reason": "stop"}], "usage": USAGE}  # of the older endpoint
    server.fault = lambda call: Fault("body", body=json.dumps(other).encode())
    outcome = only(client, archive)
    assert isinstance(outcome, Failure)
    assert (outcome.reason, server.count) == ("malformed", 1)


@pytest.mark.parametrize(
    ("status", "message"),
    [(301, r"sends on to /elsewhere in a way that loses what is sent \(301\)"), (307, "sends on without end")],
)
def test_redirects_that_lead_nowhere_are_told(
    server: ReplayServer, client: JudgeClient, archive: list[Archived], status: int, message: str
) -> None:
    to = "/elsewhere" if status == 301 else "/v1/chat/completions"
    server.fault = lambda call: Fault("status", status, headers={"Location": to})
    with pytest.raises(InputError, match=message):
        only(client, archive)
    assert server.count <= 21  # one request, sent on twenty times


def test_a_server_that_is_there_is_not_called_unreachable(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    server.fault = lambda call: Fault("reset")
    with pytest.raises(InputError, match=r"gives no answer: the connection failed \(\w+\); look into its log"):
        only(client, archive)
    server.fault = lambda call: Fault("body", headers={"Content-Encoding": "gzip"}, body=b"{}")
    outcome = only(client, archive)
    assert isinstance(outcome, Failure)
    assert outcome == Failure("malformed", "the answer is not compressed as it says")


def test_a_refusal_in_a_part_of_its_own(server: ReplayServer, client: JudgeClient, archive: list[Archived]) -> None:
    server.fault = lambda call: Fault("body", body=body([{"type": "refusal", "refusal": "I cannot."}]))
    assert only(client, archive) == Failure("refusal", "I cannot.")
    assert refusal_of({"content": "9 7", "refusal": None}) == ""


def test_tokens_of_a_cache_beside_the_prompt_are_counted() -> None:
    beside = {
        "input_tokens": 100,
        "output_tokens": 50,
        "cache_read_input_tokens": 900,
        "cache_creation_input_tokens": 7,
    }
    assert usage_of({"usage": beside}) == Usage(1007, 50, 900, 0, 7)
    inside = {"input_tokens": 100, "output_tokens": 50, "input_tokens_details": {"cached_tokens": 40}}
    assert usage_of({"usage": inside}) == Usage(100, 50, 40)
    assert usage_of({"usage": USAGE | {"cache_read_input_tokens": 40}}) == Usage(100, 50, 40)


def test_a_count_that_no_database_holds_is_none(
    server: ReplayServer, client: JudgeClient, archive: list[Archived]
) -> None:
    server.fault = lambda call: Fault("body", body=body(usage={"prompt_tokens": 10**20, "completion_tokens": 1}))
    assert isinstance(only(client, archive), Reply)
    assert client.stats.unmetered == 1


def test_what_is_no_stream_is_read_as_it_was() -> None:
    assert completion_in(b'{"a": 1}') == {"a": 1}
    assert completion_in(b"data of a page") is None
    assert completion_in(b'data: {"error": {"code": 502}}\n\n') == {"error": {"code": 502}}
