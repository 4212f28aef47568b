"""Requests and answers that are HTTP, and nearly what OpenAI's API says: refused or told as failures, never a crash."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from fake_upstream import Served
from raw_upstream import STREAM, chunk, completion, raw_upstream, whole

from serving.gateway import app as gateway_app
from serving.gateway.app import GatewaySettings, create_app

CHAT = "/v1/chat/completions"
TEXT = {"role": "assistant", "content": "text"}
CALLS = {**TEXT, "tool_calls": [1]}
DONE = b"data: [DONE]\n\n"
Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Asks a gateway whose policy says exactly `parts`, and whose reward server scores by length."""
    with ExitStack() as stack:

        def post(parts: list[bytes], **fields: Any) -> httpx.Response:
            url = stack.enter_context(raw_upstream(lambda _: iter(parts)))
            settings = GatewaySettings(policy_url=url, reward_url=url, api_key=None, policy_key="the-policys-own-key")
            served = stack.enter_context(Served.of(create_app(settings)))
            body = {"messages": [{"role": "user", "content": "q"}], **fields}
            return httpx.post(served.url + CHAT, json=body, timeout=20)

        yield post


def answer(*choices: dict[str, Any]) -> bytes:
    return whole({**completion([]), "choices": choices})


def choice(index: object = 0, message: object = TEXT) -> dict[str, Any]:
    return {"index": index, "message": message, "finish_reason": "stop"}


@pytest.mark.parametrize(
    "said",
    [
        answer(choice(0), choice(0)),
        answer(choice(0), choice(-1)),
        answer(choice(0), choice(True)),
        answer(choice(0), choice("1")),
        answer(choice(0), {"message": TEXT}),
        answer(choice(0), choice(1), choice(2)),
        answer(choice(0), choice(1, [])),
        answer(choice(0), choice(1, [["role", "assistant"], ["content", "text"]])),
        answer(choice(0), choice(1, CALLS)),
        answer(choice(0), choice(1, {**TEXT, "tool_calls": 5})),
        answer(choice(0), choice(1)).replace(b'"stop"', b"1e999 "),
    ],
    ids=lambda said: said.partition(b"choices")[2].decode()[-60:],
)
@pytest.mark.parametrize("stream", [False, True])
def test_choices_that_are_none_are_the_policys_failure(ask: Ask, said: bytes, stream: bool) -> None:
    refused = ask([said], best_of=2, stream=stream, best_of_fallback=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "policy_failed")


def test_a_choice_may_leave_out_why_it_ended(ask: Ask) -> None:
    streamed = ask([answer({"index": 0, "message": TEXT})], best_of=1, stream=True)
    assert streamed.text.endswith(DONE.decode())
    assert "error" not in streamed.text
    assert '"content": "text"' in streamed.text


@pytest.mark.parametrize(
    "events",
    [
        [chunk(0, {"content": "a"}, "stop"), chunk(-1, {"content": "b"}, "stop")],
        [chunk(0, {"content": "a"}, "stop"), chunk(True, {"content": "b"}, "stop")],
        [chunk(0, {"content": 5}, "stop"), chunk(1, {"content": "b"}, "stop")],
        [chunk(0, {"content": "a"}, "stop"), chunk(0, {"content": "late"}), chunk(1, {"content": "b"}, "stop")],
        [
            chunk(0, {"content": "a"}, "stop").replace(b'"delta"', b'"logprobs": {"x": [-1e999]}, "delta"'),
            chunk(1, {"content": "b"}, "stop"),
        ],
    ],
)
def test_chunks_that_are_none_are_the_policys_failure(ask: Ask, events: list[bytes]) -> None:
    told = ask([STREAM, *events, DONE], best_of=2, stream=True, almost_stream="racing").text
    *_, error, done, rest = told.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "policy_failed"
    assert (done, rest) == ("data: [DONE]", "")


@pytest.mark.parametrize("last", [b"", b'data: {"id": "c", "ob'])
def test_a_stream_that_only_stops_is_told(ask: Ask, last: bytes) -> None:
    """A server without `Transfer-Encoding: chunked` that dies closes its connection as if all was said."""
    begun = chunk(0, {"content": "half of"})
    told = ask([STREAM, begun, last], stream=True).content
    assert told.startswith(begun)
    error, done, rest = told[len(begun) :].split(b"\n\n")
    assert "broke off" in json.loads(error.removeprefix(b"data: "))["error"]["message"]
    assert (done, rest) == (b"data: [DONE]", b"")


@pytest.mark.parametrize("end", [b"data: [DONE]\n\n", b"data: [DONE]", b"data:[DONE]\r\n\r\n"])
def test_a_stream_that_ends_is_passed_on_as_it_is(ask: Ask, end: bytes) -> None:
    said = chunk(0, {"content": "all"}, "stop") + end
    assert ask([STREAM, said], stream=True).content == said


def test_no_key_and_no_folder_of_the_server_is_told(ask: Ask) -> None:
    words = "no /models/private/secret.bin for the-policys-own-key; POST http://host/a/b or /v1/chat/completions"
    told = ask([whole({"error": {"message": words}}, "500 Failed")]).json()["error"]["message"]
    assert "private" not in told
    assert "own-key" not in told
    assert "no .../secret.bin" in told
    assert "http://host/a/b or /v1/chat/completions" in told


def test_a_policy_that_names_no_models_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_app, "_LIST_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Served.of(create_app(GatewaySettings(policy_url=url, api_key=None))) as served:
            began = time.monotonic()
            refused = httpx.get(served.url + "/v1/models", timeout=20)
            assert (refused.status_code, refused.json()["error"]["code"]) == (504, "timeout")
            assert time.monotonic() - began < 10


# --- refusals of the policy server ---

KEPT = {"message": "The model `gpt-5` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
WAYS: list[dict[str, Any]] = [
    {},
    {"stream": True},
    {"best_of": 2},
    {"best_of": 2, "stream": True, "almost_stream": "racing"},
]


def refused_with(body: bytes, status: str = "400 Bad", kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("fields", WAYS)
def test_a_refusal_in_openais_form_keeps_what_it_says(ask: Ask, fields: dict[str, Any]) -> None:
    for error in (
        KEPT,
        {**KEPT, "code": "x", "param": None},
        {**KEPT, "message": "bad <script>:\n  two lines", "code": None},
    ):
        told = ask([whole({"error": error, "more": 1}, "404 Not Found")], **fields)
        assert (told.status_code, told.json()) == (404, {"error": error})
        told = ask([whole({"object": "error", **error}, "422 No")], **fields)  # the form of older versions
        assert (told.status_code, told.json()) == (422, {"error": error})


@pytest.mark.parametrize("fields", WAYS)
@pytest.mark.parametrize(
    "said",
    [
        refused_with(b""),
        refused_with(b"<html><h1>no such page</h1></html>", kind="text/html"),
        refused_with(b"\x00\xff\x80\x1b[31m"),
        refused_with(b'{"error": {"message": "cut'),
        refused_with(b'{"error": "no"}'),
        refused_with(b'{"id": "x", "choices": []}'),
        refused_with(b'{"detail": [{"msg": "Field required"}]}'),
        refused_with(b"[" * 100_000),
        refused_with(b'data: {"choices": []}\n\n', kind="text/event-stream"),
        refused_with(b"x" * (9 << 20)),
        whole({"error": {"message": "x" * 5_000_000}}, "400 Bad"),
        whole({"error": {"message": "a\nb\x1b\u202e\ud83d", "type": 5, "param": ["x"], "code": 10**400}}, "400 Bad"),
        whole({"error": {"message": "at /home/secret/x.py, file:///srv/secret/y for the-policys-own-key"}}, "400 Bad"),
    ],
    ids=lambda said: said.partition(b"\r\n\r\n")[2][:30] if isinstance(said, bytes) else "",
)
def test_any_other_refusal_is_told_in_openais_form(ask: Ask, said: bytes, fields: dict[str, Any]) -> None:
    refused = ask([said], **fields)
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/json"
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].replace("\n", "").isprintable()
    assert 0 < len(error["message"]) <= 2000
    assert isinstance(error["type"], str)
    for word in ("secret", "own-key", "<", '{"error', "choices"):
        assert word not in error["message"]
    if said.endswith(b'{"error": "no"}'):
        assert error["message"] == "the policy server refuses the request (400): no"


def test_a_failure_with_a_long_word_holds_nobody_up(ask: Ask) -> None:
    """A pattern that looks for keys took the square of its length."""
    began = time.monotonic()
    assert ask([whole({"error": {"message": "x" * 400_000}}, "500 Failed")]).status_code == 502
    assert time.monotonic() - began < 5


def test_a_refused_list_of_models_is_told_in_openais_form() -> None:
    said = refused_with(b"<html>/home/secret</html>", "404 Not Found", "text/html")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(said)

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with Served.of(create_app(GatewaySettings(policy_url=url, api_key=None))) as served:
            refused = httpx.get(served.url + "/v1/models", timeout=20)
    assert refused.status_code == 404
    assert refused.json()["error"]["message"].endswith("(404): it does not say why")


# --- requests ---


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_is_no_request(number: str) -> None:
    """A NaN passes every check of a bound, vLLM's too, and what was sampled with it was answered with 200."""
    with raw_upstream(lambda _: iter((answer(choice()),))) as url:
        app = create_app(GatewaySettings(policy_url=url, api_key=None))
        with Served.of(app) as served, httpx.Client(base_url=served.url) as client:
            body = f'{{"messages": [{{"role": "user", "content": "q"}}], "temperature": {number}}}'
            refused = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")
            packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            refused = client.post(CHAT, content=body, headers=packed)
            assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")


# --- rewards ---

RIGHT = [{"index": 1, "probs": [2.0]}, {"index": 0, "probs": [1]}]


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "probs": [1.0]}],
        [{"index": 0, "probs": [1.0, 2.0]}],
        [{"index": 0, "probs": [1.0]}, {"index": 0, "probs": [2.0]}],
        [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": ["2.0"]}],
        [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": [True]}],
        [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": [None]}],
        [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": [10**400]}],
        [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": [float("nan")]}],
        [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": []}],
        [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": {"0": 1.0}}],
        [*RIGHT, {"index": 2, "probs": [3.0]}],
        {"0": 1.0, "1": 2.0},
        RIGHT,
    ],
    ids=lambda data: str(data)[:60],
)
def test_one_number_for_each_conversation_and_nothing_else(data: object) -> None:
    from serving.gateway.metrics import Metrics
    from serving.gateway.rewards import Rewards
    from serving.gateway.upstream import Upstream

    upstream = Upstream("reward", "http://127.0.0.1:1", None, status=503, connections=1, metrics=Metrics())
    rewards = Rewards(upstream, 1.0, Metrics())
    body = json.dumps({"model": "m", "data": data}).encode()
    if data is RIGHT:
        assert [one.reward for one in rewards.read(body, 2)] == [1.0, 2.0]
        return
    with pytest.raises(Exception, match="503"):
        rewards.read(body, 2)
