"""What a request must meet before it is worked on: body size and time, concurrency, time-outs, a client that stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.gateway.errors import crashed, refusal
from serving.gateway.metrics import Metrics
from serving.gateway.settings import GatewaySettings
from serving.gateway.streaming import ReplyWriter

Handler = Callable[[bytes, ReplyWriter], Awaitable[None]]
"""Takes a request's body and answers it."""


class Slots:
    """How many requests are at work; one beyond the limit is refused, not queued: the servers behind have queues."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self.taken = 0
        metrics.running.set_function(lambda: self.taken)

    def check(self) -> None:
        """Raise HTTPException where none is free: 429 with Retry-After."""
        if self.taken >= self._limit:
            message = f"{self._limit} requests are at work, as many as this gateway takes; try again in a second"
            raise refusal(429, message, "too_many_requests", headers={"Retry-After": "1"})

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold one; see `check`."""
        self.check()
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Limited:
    """The ASGI app of one POST route: its handler, within all limits. Whatever happens ends in an answer or error."""

    def __init__(self, handler: Handler, settings: GatewaySettings, slots: Slots, metrics: Metrics) -> None:
        self._handler = handler
        self._settings = settings
        self._slots = slots
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        reply = ReplyWriter(send)
        seconds = self._settings.timeout_s
        try:
            async with asyncio.timeout(seconds):
                _refuse_wrong_type(scope)
                self._slots.check()  # no body is read that would be refused
                body = await self._body(scope, receive)
                with self._slots.take():  # not before the body is here: silent clients hold none
                    async with ends_with_client(receive):
                        await self._handler(body, reply)
        except ClientDisconnect:
            self._metrics.disconnects.inc()
        except TimeoutError:
            await reply.fail(refusal(504, f"no answer within {seconds:g} s", "timeout"))
        except HTTPException as error:
            await reply.fail(error)
        except RecursionError:
            await reply.fail(refusal(400, "the body is nested too deeply", "invalid_json"))
        except asyncio.CancelledError:  # the server shuts down and has waited long enough
            await reply.fail(refusal(503, "the gateway is shutting down", "shutting_down"))
            raise
        except Exception:
            await reply.fail(crashed())
            raise  # the server logs it

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """See `read_body`; 408 where it takes too long."""
        seconds = self._settings.body_timeout_s
        try:
            async with asyncio.timeout(seconds):
                return await read_body(scope, receive, self._settings.max_body_bytes)
        except TimeoutError:
            message = f"the body did not arrive within {seconds:g} s"
            raise refusal(408, message, "request_timeout", headers={"Connection": "close"}) from None


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The request's body.

    Raises:
        HTTPException: 413: it is, or says it is, longer than `limit` bytes.
        ClientDisconnect: the client left before its end.
    """
    stated = int(next((value for name, value in scope["headers"] if name == b"content-length"), b"0"))
    parts: list[bytes] = []
    length = 0
    more = stated <= limit
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        more = length <= limit and message.get("more_body", False)
    if max(stated, length) > limit:
        raise refusal(413, f"the body is longer than {limit} bytes, the limit of this gateway", "body_too_large")
    return b"".join(parts)


@asynccontextmanager
async def ends_with_client(receive: Receive) -> AsyncIterator[None]:
    """Cancel the body of the `with` when the client leaves; whatever it was waiting for upstream is cancelled too.

    Raises:
        ClientDisconnect: the client has left.
    """
    task = asyncio.current_task()
    assert task is not None
    gone, others = False, task.cancelling()

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except BaseException:  # what the cancelled work ended in does not matter
        if not gone:
            raise
        if task.uncancel() > others:  # the server, or a time-out, cancels it too
            raise
        raise ClientDisconnect from None
    finally:
        watcher.cancel()


def _refuse_wrong_type(scope: Scope) -> None:
    # Besides being what upstream reads: a page of another site can post text/plain to a port here, but not this.
    sent = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    packed = [value for name, value in scope["headers"] if name == b"content-encoding" and value != b"identity"]
    if packed:  # unpacked, a body could be a thousand times as long as its limit
        raise refusal(415, "the body must be sent without a Content-Encoding", "unsupported_media_type")
    if sent.partition(b";")[0].strip().lower() != b"application/json":
        raise refusal(415, "the body must be sent as 'Content-Type: application/json'", "unsupported_media_type")
