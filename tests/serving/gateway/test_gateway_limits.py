"""Who is let in, how much, how long; and what of a request goes further than the gateway."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest
from fake_upstream import FakeUpstream, Served

from almost_eval.errors import InputError
from serving.chat.client import Abilities, _read_abilities
from serving.door.keys import KeyGuard
from serving.gateway.app import GatewaySettings, create_app
from serving.gateway.candidates import independent_seed

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
PATHS = [CHAT, *"/v1/completions /v1/rewards /v1/models /ready /metrics /openapi.json /docs /tokenize".split()]

Gateway = Callable[..., httpx.Client]


@pytest.fixture
def fake() -> FakeUpstream:
    return FakeUpstream()


@pytest.fixture
def gateway(fake: FakeUpstream) -> Iterator[Gateway]:
    """`gateway(max_best_of=4, ...)`: a client of a gateway before the fake."""
    with ExitStack() as stack:
        upstream = stack.enter_context(fake.served())

        def make(**settings: Any) -> httpx.Client:
            keys = {"api_key": None, "policy_key": "policy-secret", "reward_key": "reward-secret"}
            settings = {"policy_url": upstream.url, "reward_url": upstream.url, **keys, **settings}
            served = Served(create_app(GatewaySettings(**settings)))
            stack.callback(served.stop)
            return stack.enter_context(httpx.Client(base_url=served.url, timeout=20))

        yield make


def error_of(answer: httpx.Response) -> dict[str, Any]:
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"]
    return found


# --- the key ---


@pytest.mark.parametrize("sent", [None, "Bearer wrong", "Bearer sésame", "sésame", "Basic sésame", "Bearer", ""])
def test_no_key_no_request_but_health(gateway: Gateway, fake: FakeUpstream, sent: str | None) -> None:
    client = gateway(api_key="sésame ouvre-toi")
    headers = [] if sent is None else [(b"Authorization", sent.encode())]
    for path in PATHS:
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            answer = client.request(method, path, headers=headers)
            assert (path, method, answer.status_code) == (path, method, 401)
    assert error_of(client.get("/v1/models"))["type"] == "authentication_error"
    assert client.get("/health").json() == {"status": "ok"}
    assert fake.seen == []


def test_the_key_opens_and_goes_no_further(gateway: Gateway, fake: FakeUpstream) -> None:
    client = gateway(api_key="sésame")
    more = [(b"X-Forwarded-For", b"evil"), (b"Cookie", b"a=b"), (b"TE", b"trailers"), (b"Connection", b"TE")]
    headers = [(b"Authorization", "Bearer sésame".encode()), *more]
    assert client.post(CHAT, json={"messages": HELLO, "best_of": 2}, headers=headers).status_code == 200
    assert len(fake.seen) == 3  # one request for the candidates, one for each reward
    for path, seen, _ in fake.seen:
        secret = "reward-secret" if path == "/classify" else "policy-secret"
        expected = {"host", "accept-encoding", "authorization", "content-type", "content-length"}
        assert set(seen) == expected
        assert seen["authorization"] == f"Bearer {secret}"


def test_two_keys_are_no_key() -> None:
    """Which of two headers counts is a matter of taste, and proxies differ in it."""
    sent: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append(200)

    async def send(message: Any) -> None:
        sent.append(message.get("status", 0))

    guard = KeyGuard(app, "k")
    for headers in ([(b"authorization", b"Bearer k")] * 2, [(b"authorization", b"Bearer k")]):
        asyncio.run(guard({"type": "http", "path": "/x", "headers": headers}, None, send))  # type: ignore[arg-type]
    assert sent == [401, 0, 200]


def test_keys_show_nowhere(gateway: Gateway, fake: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ALMOST_API_KEY", "ALMOST_POLICY_KEY", "ALMOST_REWARD_KEY"):
        monkeypatch.setenv(name, f"{name.lower()}-value")
    settings = GatewaySettings(policy_url="http://127.0.0.1:1")
    assert settings.api_key == "almost_api_key-value"
    assert settings.policy_key == "almost_policy_key-value"
    assert settings.reward_key == "almost_reward_key-value"
    assert "-value" not in repr(settings)


def test_a_refused_key_of_ours_is_no_fault_of_the_client() -> None:
    """A client that got 401 would look at its own key."""
    fake = FakeUpstream()
    with ExitStack() as stack:
        upstream = stack.enter_context(Served.of(KeyGuard(fake.app, "right")))
        settings = GatewaySettings(policy_url=upstream.url, api_key=None, policy_key="wrong")
        served = stack.enter_context(Served.of(create_app(settings)))
        answer = httpx.post(served.url + CHAT, json={"messages": HELLO})
        assert (answer.status_code, error_of(answer)["code"]) == (502, "policy_failed")
        assert "refuses the gateway's key" in answer.text


def test_the_gateway_answers_to_its_own_names_and_pages(gateway: Gateway, fake: FakeUpstream) -> None:
    client = gateway()
    body = {"messages": HELLO}
    for headers, expected in (
        ({}, 200),
        ({"Host": "evil.lan"}, 403),
        ({"Origin": "http://evil.lan"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": str(client.base_url)}, 200),
    ):
        answer = client.post(CHAT, json=body, headers=headers)
        assert (headers, answer.status_code) == (headers, expected)
    assert len(fake.seen) == 2
    assert client.get("/health", headers={"Host": "evil.lan"}).status_code == 200
    assert client.get("/v1/models", headers={"Host": "evil.lan"}).status_code == 403
    assert gateway(allowed_hosts=("evil.lan",)).get("/v1/models", headers={"Host": "evil.lan"}).status_code == 200


def test_open_metrics(gateway: Gateway) -> None:
    client = gateway(api_key="k", open_metrics=True)
    assert "almost_gateway_requests_total" in client.get("/metrics").text
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"x-api-key": "k"}).status_code == 200


# --- what may be asked ---


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HELLO, "best_of": 5}, "best_of"),
        ({"messages": HELLO, "n": 5}, "n"),
        ({"messages": HELLO, "n": 5.0}, "n"),
        ({"messages": HELLO, "n": "2"}, "n"),
        ({"messages": HELLO, "n": True}, "n"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "best_of": 2, "n": 3}, "best_of"),
        ({"messages": HELLO, "best_of_fallbak": True}, "best_of_fallbak"),
        ({"messages": HELLO, "almost_candidates": True}, "almost_candidates"),
        ({"messages": HELLO, "best_of": 2, "continue_final_message": True}, "continue_final_message"),
        ({"messages": []}, "messages"),
        ({}, "messages"),
    ],
)
def test_a_wrong_request_is_named_and_goes_no_further(
    gateway: Gateway, fake: FakeUpstream, body: dict[str, Any], param: str
) -> None:
    answer = gateway(max_best_of=4).post(CHAT, json=body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert fake.seen == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"a": ' * 100_000, b"\xff", b"[" * 100_000, b"9" * 5000])
def test_a_body_that_is_no_object(gateway: Gateway, body: bytes) -> None:
    answer = gateway().post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")


def test_of_a_doubled_field_the_gateway_sees_what_the_policy_sees(gateway: Gateway, fake: FakeUpstream) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "n": 1, "n": 100}'
    assert gateway(max_best_of=4).post(CHAT, content=body, headers=JSON).status_code == 400


JSON = {"content-type": "application/json; charset=utf-8"}


def test_only_json(gateway: Gateway, fake: FakeUpstream) -> None:
    client = gateway()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""):
        answer = client.post(CHAT, content=json.dumps({"messages": HELLO}), headers={"content-type": kind})
        assert (kind, answer.status_code) == (kind, 415)
    assert fake.seen == []
    assert client.post(CHAT, content=json.dumps({"messages": HELLO}), headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions/", "/v1//models", "/v1/chat/../models", "/metrics/..", "/classify"]
)
def test_only_its_own_paths(gateway: Gateway, fake: FakeUpstream, path: str) -> None:
    # Not httpx, which tidies paths up before it sends them.
    address = gateway().base_url
    connection = HTTPConnection(address.host, address.port)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["error"]["code"]) == (404, "not_found")
    connection.close()
    assert fake.seen == []


def test_models_are_listed_by_name(gateway: Gateway) -> None:
    answer = gateway().get("/v1/models")
    assert answer.json()["data"] == [{"id": "fake", "object": "model", "root": "fake"}]


def test_without_a_reward_server_nothing_that_needs_one_is_offered(gateway: Gateway) -> None:
    client = gateway(reward_url=None)
    document = client.get("/openapi.json")
    for word in ("best_of", "/v1/rewards", "almost_", "Almost", "Reward", "best-of"):
        assert word not in document.text.replace("almost_gateway", "")
    assert _read_abilities(("m",), document.json()) == Abilities(("m",), False, 1)
    assert "/v1/rewards" not in client.get("/nowhere").text
    whole = gateway().get("/openapi.json").json()
    assert _read_abilities(("m",), whole) == Abilities(("m",), True, 16, True)


def test_wrong_method(gateway: Gateway) -> None:
    answer = gateway().get(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert error_of(answer)["code"] == "method_not_allowed"


def test_unknown_fields_reach_the_policy(gateway: Gateway, fake: FakeUpstream) -> None:
    client = gateway()
    more = {"top_k": 5, "seed": 1, "stop": ["x"], "vllm_xargs": {"a": 1}}
    client.post(CHAT, json={"messages": HELLO, **more})
    client.post(CHAT, json={"messages": HELLO, "best_of": 3, "stream": True, "stream_options": {}, **more})
    assert fake.seen[0][2] == {"messages": HELLO, **more}
    assert fake.seen[1][2] == {"messages": HELLO, "n": 3, **more, "seed": independent_seed(1)}


# --- how much, how long ---


def test_body_size(gateway: Gateway, fake: FakeUpstream) -> None:
    client = gateway(max_body_bytes=1000)
    body = json.dumps({"messages": HELLO}).encode()
    fits, beyond = body.ljust(1000), body.ljust(1001)
    assert client.post(CHAT, content=fits, headers=JSON).status_code == 200
    for content in (beyond, iter([beyond[:600], beyond[600:]])):  # a length in the head, and chunks without one
        answer = client.post(CHAT, content=content, headers=JSON)
        assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")
    assert len(fake.seen) == 1


def test_concurrency_and_client_that_leaves(gateway: Gateway, fake: FakeUpstream) -> None:
    fake.mode = "hang"
    client = gateway(max_concurrent=2)
    with ExitStack() as stack:
        waiting = [_Hanging(str(client.base_url), {"messages": HELLO, "best_of": k}) for k in (1, 2)]
        for one in waiting:
            stack.callback(one.leave)
        until(lambda: fake.running == 2)
        answer = client.post(CHAT, json={"messages": HELLO})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert error_of(answer)["type"] == "rate_limit_error"
        assert client.get("/health").status_code == 200
        assert "almost_gateway_running 2.0" in client.get("/metrics").text
    until(lambda: fake.running == 0)  # the work of those who left has ended upstream
    fake.mode = "good"
    assert client.post(CHAT, json={"messages": HELLO}).status_code == 200
    metrics = client.get("/metrics").text
    assert "almost_gateway_disconnects_total 2.0" in metrics
    assert "almost_gateway_running 0.0" in metrics


def test_silent_bodies_hold_no_slot_and_end(gateway: Gateway, fake: FakeUpstream) -> None:
    client = gateway(max_concurrent=2, body_timeout_s=0.6)
    address = (client.base_url.host, client.base_url.port)
    head = b"POST /v1/rewards HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 100\r\n\r\n{"
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(20)]
        for connection in silent:
            connection.sendall(head)
        time.sleep(0.2)
        assert client.post(CHAT, json={"messages": HELLO}).status_code == 200
        for connection in silent:
            with connection.makefile("rb") as answer:
                told = answer.read()  # to the end: the connection closes
            assert told.startswith(b"HTTP/1.1 408 ")
            assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


@pytest.mark.parametrize(
    ("body", "sequences"),
    [
        ({"prompt": ["x"] * 1024, "n": 16}, 16384),
        ({"prompt": ["x"] * 5, "n": 4}, 20),
        ({"prompt": [[1, 2]] * 17}, 17),
        ({"prompt": "x", "prompt_embeds": ["eA=="] * 16}, 17),
        ({"prompt": ["x"] * 16}, None),
        ({"prompt": list(range(100)), "n": 16}, None),  # token ids of one prompt
        ({"prompt": [], "n": 16}, None),
    ],
)
def test_answers_of_one_request_are_bounded(
    gateway: Gateway, fake: FakeUpstream, body: dict[str, Any], sequences: int | None
) -> None:
    answer = gateway(max_sequences=16).post("/v1/completions", json=body)
    if sequences is None:
        assert error_of(answer)["code"] == "policy_refused"  # it was passed on, and the fake has no such path
        return
    assert (answer.status_code, error_of(answer)["code"]) == (400, "too_many_sequences")
    assert f"are {sequences} answers" in answer.text
    assert fake.seen == []


def test_candidates_are_answers_too(gateway: Gateway, fake: FakeUpstream) -> None:
    client = gateway(max_sequences=3)
    for body in ({"best_of": 4}, {"n": 4}, {"best_of": 4, "n": 2}):
        answer = client.post(CHAT, json={"messages": HELLO, **body})
        assert (answer.status_code, error_of(answer)["code"]) == (400, "too_many_sequences")
    assert client.post(CHAT, json={"messages": HELLO, "best_of": 3}).status_code == 200


def test_time_out(gateway: Gateway, fake: FakeUpstream) -> None:
    fake.mode = "hang"
    client = gateway(timeout_s=0.3)
    for body in ({"messages": HELLO}, {"messages": HELLO, "stream": True}, {"messages": HELLO, "best_of": 2}):
        answer = client.post(CHAT, json=body)
        assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")
    until(lambda: fake.running == 0)


def test_time_out_in_a_stream(gateway: Gateway, fake: FakeUpstream) -> None:
    fake.mode, fake.tokens = "slow", 100
    answer = gateway(timeout_s=0.5).post(CHAT, json={"messages": HELLO, "stream": True})
    *events, last, done, rest = answer.text.split("\n\n")
    assert events
    assert all(event.startswith("data: {") for event in events)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert (done, rest) == ("data: [DONE]", "")
    until(lambda: fake.running == 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("policy_url", "127.0.0.1:8000", "http"),
        ("policy_url", "file:///etc/passwd", "http"),
        ("policy_url", "http://host:99999", "http"),
        ("policy_url", "http://user:pw@host", "ALMOST_POLICY_KEY"),
        ("reward_url", "http://h/?a=b", "reward-url"),
        ("policy_key", "pw\r\nX-Evil: 1", "ALMOST_POLICY_KEY holds a line end"),
        ("max_best_of", 0, "max-best-of"),
        ("timeout_s", float("nan"), "timeout"),
        ("port", 70000, "port"),
    ],
)
def test_wrong_settings(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        GatewaySettings(**{"policy_url": "http://127.0.0.1:1", name: value})
    assert "pw" not in str(raised.value)


def test_a_closing_v1_is_taken_off() -> None:
    assert GatewaySettings(policy_url="http://h:1/v1/").policy_url == "http://h:1"


def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


class _Hanging:
    """A client that waits for an answer until it leaves."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._waiting = asyncio.run_coroutine_threadsafe(self._ask(url, body), self._loop)

    async def _ask(self, url: str, body: dict[str, Any]) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            await client.post(CHAT, json=body)

    def leave(self) -> None:
        self._waiting.cancel()
        self._loop.call_soon_threadsafe(self._loop.call_later, 0.1, self._loop.stop)
        self._thread.join()
