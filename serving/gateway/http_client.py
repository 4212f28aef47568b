"""HTTP/1.1 to one server: a request out, its answer in as it comes, over connections that are kept.

Why no library: beside a model on the same cores a gateway on aiohttp, the fastest one, takes 1.0 to 1.5 times the CPU
for an answer and is over the bounds of its overhead more often; on httpx it halves the throughput (benchmarks/LOG.md).
aiohttp redirects, decodes, traces and keeps cookies, none of which a gateway may do; this is what is left. The parser
is httptools, Node's, as in uvicorn; the connections and TLS are the event loop's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, nullcontext
from time import monotonic
from typing import cast
from urllib.parse import quote, urlsplit

import httptools

# Below the 5 s after which uvicorn, hence vLLM, closes an idle connection: ours must not be the one it is closing.
_IDLE_S = 2.0
_CONNECT_S = 10.0
_HEAD_BYTES = 64 << 10
"""Of status line and headers, with all `100 Continue` before them; of trailers too. httptools joins a header to what
came of it before at every read: without a bound, one that never ends costs the square of its length."""
MAX_ANSWER_BYTES = 256 << 20
"""Of an answer that is read whole."""
_UNREAD_BYTES = 256 << 10
"""Bytes of an answer that are kept in memory until they are read; beyond that the server has to wait."""


class Unreachable(Exception):
    """No connection can be made."""


class BrokenOff(Exception):
    """The connection closed before the answer's end, or what came over it is not HTTP."""


class TooLong(Exception):
    """A server sends more than is read. Never leaves this module."""


class HttpResponse:
    """One answer: status, headers, and a body that may still be coming."""

    def __init__(self, connection: _Connection) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        """Names in lower case."""
        self.ended = False
        """Whether all of it has arrived."""
        self.keeps_alive = False
        """Whether another request may follow on the same connection."""
        self._connection = connection
        self._parts: list[bytes] = []
        self._has_head = False
        self._unbodied = 0
        """Bytes since the answer began, or since its body's last byte: head, trailers."""
        self._grew = False
        self._unread = 0
        self._has_length = False
        self._error: BrokenOff | None = None
        self._waiter: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> bytes:
        """The first of that name; empty where there is none."""
        return next((value for other, value in self.headers if other == name), b"")

    async def head(self) -> None:
        """Wait for status and headers.

        Raises:
            BrokenOff: they do not come.
        """
        while not self._has_head:
            await self._news()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, as it comes.

        Raises:
            BrokenOff: it stops before its end.
        """
        while True:
            if self._parts:
                part = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                self._parts.clear()
                self._unread = 0
                self._connection.read_on()
                yield part
            elif self.ended:
                return
            else:
                await self._news()

    async def read(self) -> bytes:
        """The body, whole.

        Raises:
            BrokenOff: it stops before its end, or is longer than `MAX_ANSWER_BYTES`.
        """
        parts: list[bytes] = []
        length = 0
        async for part in self.parts():
            parts.append(part)
            length += len(part)
            if length > MAX_ANSWER_BYTES:
                raise BrokenOff(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
        return b"".join(parts)

    async def _news(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    # --- the connection calls these ---

    def tell(self) -> None:
        """Wake the reader."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def closed(self, cleanly: bool) -> None:
        """No more will come: the end of a body that has no length of its own, else too early."""
        if cleanly and self._has_head and not self._has_length:
            self.ended = True
        self.fail("the connection closed")

    def fail(self, why: str) -> None:
        """Whatever is still to come will not."""
        if not self.ended and self._error is None:
            self._error = BrokenOff(why)
        self.tell()

    def feed(self, data: bytes) -> None:
        """Parse what came, in pieces that no bound is passed unseen in.

        Raises:
            HttpParserError: it is no HTTP, or no answer to one request.
            TooLong: a head or trailers of more than `_HEAD_BYTES`.
        """
        while data:
            room = _HEAD_BYTES - self._unbodied
            piece, data = data[:room], data[room:]
            self._grew = False
            self._connection.parser.feed_data(piece)
            self._unbodied = 0 if self._grew else self._unbodied + len(piece)
            if self._unbodied >= _HEAD_BYTES:
                raise TooLong(f"headers of more than {_HEAD_BYTES} bytes")

    # --- the parser calls these ---

    def on_message_begin(self) -> None:
        """An answer begins."""
        if self.ended:
            raise ValueError("more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header or trailer."""
        if not self._has_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Status and headers are here."""
        self.status = self._connection.parser.get_status_code()
        if self.status < 200:  # 100 Continue and the like: the answer itself comes after
            self.headers.clear()
            return
        self._has_head = self._grew = True
        self._has_length = any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    def on_body(self, part: bytes) -> None:
        """A piece of the body."""
        self._grew = True
        self._parts.append(part)
        self._unread += len(part)
        if self._unread > _UNREAD_BYTES:
            self._connection.hold()

    def on_message_complete(self) -> None:
        """The end."""
        if self._has_head:
            self.ended = True
            self.keeps_alive = self._connection.parser.should_keep_alive()


class _Connection(asyncio.Protocol):
    """A connection: one answer after the other."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.closed = False
        self.parser: httptools.HttpResponseParser
        self._transport: asyncio.Transport
        self._answer: HttpResponse | None = None
        self._held = False

    def ask(self, request: bytes) -> HttpResponse:
        """Send a request."""
        self._answer = HttpResponse(self)
        self.parser = httptools.HttpResponseParser(self._answer)
        if self.closed:  # by the server, between the connection and this: nobody would tell the answer
            self._answer.fail("the connection closed")
        else:
            self._transport.write(request)
        return self._answer

    def release(self) -> bool:
        """Let the answer go; whether another request may follow."""
        answer, self._answer = self._answer, None
        del self.parser
        at_rest = not (self.closed or self._held or self._transport.get_write_buffer_size())
        return answer is not None and answer.keeps_alive and at_rest

    def close(self) -> None:
        """At once, whatever is under way."""
        self.closed = True
        self._transport.abort()

    def hold(self) -> None:
        """Let the server wait."""
        if not self._held:
            self._held = True
            self._transport.pause_reading()

    def read_on(self) -> None:
        """Let it wait no longer."""
        if self._held:
            self._held = False
            self._transport.resume_reading()

    # --- the event loop calls these ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        answer = self._answer
        if answer is None or answer.ended:
            self.close()  # to no request: what it says next could be taken for an answer
            return
        try:
            answer.feed(data)
        except TooLong as error:
            answer.fail(str(error))
            self.close()
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            answer.fail(f"{type(error).__name__}: {error.__context__ or error}")
            self.close()
        answer.tell()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self.closed = True
        if self._answer is not None:
            self._answer.closed(cleanly=exc is None)


class HttpClient:
    """Requests to one server.

    Args:
        url: http(s) address, without a closing slash.
        headers: what goes with every request; each one line (`GatewaySettings` refuses keys that are not).
        connections: so many requests at a time, others wait; 0 is any number.
    """

    def __init__(self, url: str, headers: Iterable[tuple[str, str]], connections: int = 0) -> None:
        address = urlsplit(url)
        tls = address.scheme == "https"
        lines = [("Host", address.netloc), *headers]
        self._host = address.hostname or ""
        self._port = address.port or (443 if tls else 80)
        self._tls = ssl.create_default_context() if tls else None
        self._path = quote(address.path, safe="/%:@!$&'()*+,;=")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines)
        self._slots = asyncio.Semaphore(connections) if connections else None
        self._idle: deque[_Connection] = deque()  # the longest idle first
        self._sweeper: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[HttpResponse]:
        """The answer, once its status and headers are here. Leaving before its end closes the connection.

        Raises:
            Unreachable: no connection can be made.
            BrokenOff: the answer does not come, or, inside the `with`, stops before its end.
        """
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        request = head.encode("utf-8", "surrogateescape") + body
        async with self._slots or nullcontext():
            connection = self._kept() or await self._connect()
            try:
                answer = connection.ask(request)
                await answer.head()
                yield answer
            finally:
                if connection.release():
                    self._keep(connection)
                else:
                    connection.close()

    def close(self) -> None:
        """Close the connections that are kept."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        while self._idle:
            self._idle.popleft().close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            raise Unreachable(str(error)) from None
        return connection

    def _kept(self) -> _Connection | None:
        oldest = monotonic() - _IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    def _keep(self, connection: _Connection) -> None:
        connection.idle_since = monotonic()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_IDLE_S, self._sweep)

    def _sweep(self) -> None:
        """Close what was idle for too long; look again when the next will have been."""
        self._sweeper = None
        oldest = monotonic() - _IDLE_S
        while self._idle and self._idle[0].idle_since <= oldest:
            self._idle.popleft().close()
        if self._idle:
            wait = self._idle[0].idle_since - oldest
            self._sweeper = asyncio.get_running_loop().call_later(wait, self._sweep)
