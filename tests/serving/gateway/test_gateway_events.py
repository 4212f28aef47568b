"""Server-sent events: where they end, how long they may be, and characters that were split."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_upstream import Served
from raw_upstream import STREAM, chunk, raw_upstream

from serving.gateway.app import GatewaySettings, create_app
from serving.gateway.events import MAX_EVENT_BYTES, EventReader, EventTooLong, TextJoiner, joined

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def read(data: bytes, size: int) -> list[bytes]:
    reader = EventReader()
    events = [event for at in range(0, len(data), size) for event in reader.feed(data[at : at + size])]
    return events + reader.finish()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_end_where_the_standard_says(end: bytes, size: int) -> None:
    text = "before\u2028after\u2029para\u0085next\x0b\x0c\x1c\x1d\x1e"
    data = f": comment\nevent: x\ndata: {text}\nid: 7\n\ndata:one\ndata: two\n\n\n\ndata: last".encode()
    expected = [text.encode(), b"one\ntwo", b"last"]
    assert read(data.replace(b"\n", end), size) == expected


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_a_byte_order_mark_at_the_beginning_is_no_part_of_the_first_event(size: int) -> None:
    assert read("\ufeffdata: one\n\n\ufeffdata: two\n\ndata: \ufeffthree\n\n".encode(), size) == [
        b"one",
        "\ufeffthree".encode(),
    ]


@pytest.mark.parametrize("piece", [b"a" * (1 << 20), b"data: " + b"a" * (1 << 20) + b"\n"])
def test_an_event_without_an_end_is_not_kept(piece: bytes) -> None:
    reader = EventReader()
    for _ in range(MAX_EVENT_BYTES // len(piece)):
        reader.feed(piece)
    with pytest.raises(EventTooLong):
        reader.feed(2 * piece)


def test_an_event_in_small_pieces_costs_no_more_than_its_length() -> None:
    reader, began = EventReader(), time.process_time()
    for _ in range(3_000_000 // 64):
        reader.feed(b"a" * 64)
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        (["a\ud83d", "\ude00b"], ["a", "😀b"]),
        (["\ud83d", "\ude00"], ["", "😀"]),
        (["\ud83d", "x"], ["", "\ufffdx"]),
        (["\ude00"], ["\ufffd"]),
        (["a\ud83d"], ["a"]),
        (["é", "日本", "👩‍👩‍👧"], ["é", "日本", "👩‍👩‍👧"]),
    ],
)
def test_halves_of_a_character_are_joined(pieces: list[str], told: list[str]) -> None:
    joiner = TextJoiner()
    assert [joiner.add(piece) for piece in pieces] == told
    assert joiner.rest() == ("\ufffd" if pieces[-1].endswith("\ud83d") else "")
    assert joined("".join(pieces)) == joined("".join([*told, "\ufffd" if pieces == ["a\ud83d"] else ""]))


# --- what an upstream sends, through the gateway ---

MIB = b"a" * (1 << 20)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ENDLESS = {
    "header": HEAD + b"X-Big: ",
    "name": HEAD + b"X",
    "reason": b"HTTP/1.1 200 ",
    "trailer": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nT: ",
    "event": STREAM,
    "data": STREAM + b"data: ",
}


def endless(fields: dict[str, Any]) -> Iterator[bytes]:
    """What the model's name says, 300 MiB of it."""
    yield ENDLESS[fields["model"]]
    for _ in range(300):
        yield MIB


@pytest.mark.parametrize("what", ENDLESS)
@pytest.mark.parametrize("more", [{}, {"best_of": 2}, {"best_of": 2, "stream": True, "almost_stream": "racing"}])
def test_what_has_no_end_is_a_failure_and_not_kept(what: str, more: dict[str, Any]) -> None:
    if more and what in ("event", "data") and "almost_stream" not in more:
        pytest.skip("best-of-N reads no stream, and a whole answer has a bound of its own")
    with raw_upstream(endless) as url:
        settings = GatewaySettings(policy_url=url, reward_url=url, api_key=None)
        with Served.of(create_app(settings)) as served, httpx.Client(base_url=served.url, timeout=30) as client:
            began = time.monotonic()
            answer = client.post(CHAT, json={"model": what, "messages": HELLO, **more})
            assert time.monotonic() - began < 10
            if answer.headers["content-type"].startswith("text/event-stream"):
                *_, last, done, rest = answer.text.split("\n\n")
                assert (done, rest) == ("data: [DONE]", "")
                error = json.loads(last.removeprefix("data: "))["error"]
            else:
                assert answer.status_code == 502
                error = answer.json()["error"]
            assert error["code"] == "policy_failed"
            assert "of more than" in error["message"] or "ParserError" in error["message"]
            assert client.get("/health").status_code == 200


def test_a_stream_with_cr_alone_is_not_held_back() -> None:
    event = chunk(0, {"content": "hi"}).replace(b"\n", b"\r")

    told, in_time = threading.Event(), []

    def parts(fields: dict[str, Any]) -> Iterator[bytes]:
        yield STREAM + event
        in_time.append(told.wait(15))
        yield event

    with raw_upstream(parts) as url, Served.of(create_app(GatewaySettings(policy_url=url, api_key=None))) as served:
        body = {"messages": HELLO, "stream": True}
        with httpx.stream("POST", served.url + CHAT, json=body, timeout=20) as answer:
            pieces = answer.iter_raw()
            assert next(pieces) == event
            told.set()
            assert b"".join(pieces).startswith(event)
    assert in_time == [True]
