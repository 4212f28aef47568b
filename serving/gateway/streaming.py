"""Sends answers to the client: a whole one, a stream passed through, or a finished text as a stream."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from starlette.exceptions import HTTPException
from starlette.types import Send

from almost_eval.types import JSONObject
from serving.gateway.events import MAX_EVENT_BYTES, EventReader
from serving.gateway.http_client import BrokenOff, HttpResponse

EVENTS = "text/event-stream"
_LAST = b"[DONE]"
_DONE = b"data: %s\n\n" % _LAST
_TAIL_BYTES = 32
"""Of a stream's end, which `_LAST` stands in."""
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
_END_BYTES = 4
_ERROR = re.compile(rb'"error"\s*:')
"""A field of an event; in an answer's text the quotes are escaped."""
_SHARED = ("id", "created", "model", "system_fingerprint")
_FAREWELL_S = 2.0


Notes = Sequence[tuple[bytes, bytes]]
"""Headers of an upstream's answer that are for the client."""


def notes_of(answer: HttpResponse) -> Notes:
    """Those of this toolkit, such as `almost-default-stop`; all others end at the gateway."""
    return [item for item in answer.headers if item[0].startswith(b"almost-")]


class ReplyWriter:
    """One answer, sent whole or in pieces; knows how far it is, so that a failure can be told at any point."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self._events = False
        self._ended = False

    async def whole(self, status: int, body: bytes, notes: Notes = ()) -> None:
        """Send all of a JSON answer."""
        await self.start(status, "application/json", notes, len(body))
        await self.end(body)

    async def start(self, status: int, kind: str, notes: Notes = (), length: int | None = None) -> None:
        """Send the head: status, content type, further headers, length of the body where it is known."""
        headers = [(b"content-type", kind.encode("latin-1")), *notes]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        self._started = True
        self._events = kind.startswith(EVENTS)
        if self._events:
            headers.append((b"cache-control", b"no-cache"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def part(self, body: bytes) -> None:
        """Send a piece."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        """Send the last piece."""
        self._ended = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def fail(self, error: HTTPException) -> None:
        """Tell the failure: as the answer's status, or as the last event of a stream that has begun."""
        if not self._started:
            told = (error.headers or {}).items()
            headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in told]
            return await self.whole(error.status_code, error.detail.encode(), headers)
        if self._events and not self._ended:
            try:
                async with asyncio.timeout(_FAREWELL_S):  # it may be the client who does not read
                    await self.end(b"data: " + error.detail.encode() + b"\n\n" + _DONE)
            except TimeoutError:
                pass  # uvicorn closes the connection: the answer is not complete
        return None


async def relay_events(answer: HttpResponse, reply: ReplyWriter, told: Callable[[bytes], bytes | None]) -> None:
    """Pass a stream through as it comes, byte for byte, but for errors in it.

    Args:
        answer: the stream.
        reply: where it goes.
        told: an event's data -> the error to be told in its place; None where the event is no error.

    Only the beginning of an event that is not whole yet is held back: should the upstream die there, what the client
    has can still be closed with a well-formed error.

    Raises:
        BrokenOff: the stream stops before its `[DONE]`, or an event is longer than `MAX_EVENT_BYTES`.
    """
    await reply.start(
        answer.status, f"{EVENTS}; charset=utf-8", notes_of(answer)
    )  # not the upstream's own words for it
    tail = b""
    async for events in whole_events(answer):
        await reply.part(_errors_told(events, told) if _ERROR.search(events) else events)
        tail = (tail + events[-_TAIL_BYTES:])[-_TAIL_BYTES:]
    if not tail.rstrip().endswith(_LAST):  # a server that dies may close its connection as if all was said
        raise BrokenOff("a stream without its end")
    await reply.end()


def _errors_told(events: bytes, told: Callable[[bytes], bytes | None]) -> bytes:
    """Whole events, each that is an error in the words of `told`."""
    reader = EventReader()
    pieces = []
    for data in [*reader.feed(events), *reader.finish()]:
        data = data if data == _LAST else told(data) or data
        pieces.append(b"".join(b"data: %s\n" % line for line in data.split(b"\n")) + b"\n")
    return b"".join(pieces)


async def whole_events(answer: HttpResponse) -> AsyncIterator[bytes]:
    """The bytes of a stream, in pieces that end where an event does; the last one need not have its blank line.

    Raises:
        BrokenOff: the stream stops before its end or within an event, or one is longer than `MAX_EVENT_BYTES`.
    """
    held = bytearray()
    async for data in answer.parts():
        if not held and data.endswith(_EVENT_ENDS):
            yield data
            continue
        # What was searched before is not searched again: an event in many small pieces costs no more than in one.
        since = max(0, len(held) - _END_BYTES + 1)
        held += data
        cut = max((at + len(end) for end in _EVENT_ENDS if (at := held.rfind(end, since)) >= 0), default=0)
        if cut:
            yield bytes(held[:cut])
            del held[:cut]
        if len(held) > MAX_EVENT_BYTES:
            raise BrokenOff(f"an event of more than {MAX_EVENT_BYTES >> 20} MiB")
    if held.rstrip().endswith(_LAST):
        yield bytes(held)
    elif held.strip():
        raise BrokenOff("a part of an event")


async def start_events(reply: ReplyWriter, notes: Notes) -> None:
    """Send the head of a stream of our own."""
    await reply.start(200, f"{EVENTS}; charset=utf-8", notes)


def event_of(chunk: JSONObject) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


async def send_as_events(completion: JSONObject, reply: ReplyWriter, *, include_usage: bool) -> None:
    """Tell a finished chat completion in a stream that was started: role, text and finish reason of each choice,
    `almost` at the end.
    """
    for chunk in _chunks(completion, include_usage):
        await reply.part(event_of(chunk))
    await reply.end(_DONE)


def shared_fields(completion: JSONObject, *, include_usage: bool) -> JSONObject:
    """What all chunks of a stream hold."""
    shared: JSONObject = {"object": "chat.completion.chunk"}
    shared |= {name: completion[name] for name in _SHARED if name in completion}
    if include_usage:
        shared["usage"] = None  # as OpenAI does it: null on all chunks but the last
    return shared


def _chunks(completion: JSONObject, include_usage: bool) -> Iterable[JSONObject]:
    shared = shared_fields(completion, include_usage=include_usage)

    def chunk(index: int, delta: JSONObject, **more: object) -> JSONObject:
        return {**shared, "choices": [{"index": index, "delta": delta, "finish_reason": None, **more}]}

    choices = completion["choices"]
    for number, choice in enumerate(choices):
        message = {name: value for name, value in choice["message"].items() if value is not None}
        yield chunk(number, {"role": message.pop("role", "assistant"), "content": ""})
        if calls := message.get("tool_calls"):  # in a stream each says which one it continues
            message["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
        yield chunk(number, message, logprobs=choice.get("logprobs"))
        last = chunk(number, {}, finish_reason=choice.get("finish_reason"), stop_reason=choice.get("stop_reason"))
        if number == len(choices) - 1:
            last["almost"] = completion["almost"]
        yield last
    if include_usage:
        yield {**shared, "choices": [], "usage": completion.get("usage")}
