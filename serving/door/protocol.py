"""uvicorn's HTTP protocol with bounds: how long a head may be, and how long head and body may take.

uvicorn's protocol on httptools (0.54) has none. httptools joins a header to what came of it before at every read, so
one header that never ends costs the square of its length: a single connection froze a server for everybody. Trailers,
which follow a body in chunks, are the same. Here a head is fed to the parser in pieces of at most what is left of
64 KiB.

A subclass, named in `uvicorn.Config(http=...)`; it relies on `data_received`, the parser's callbacks, `cycle`, `flow`
and `pipeline` of `uvicorn.protocols.http.httptools_impl`.
"""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.door.refusals import error_text

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

HEAD_BYTES = 64 << 10
"""Of request line and headers together; of trailers too."""
HEAD_S = 15.0
"""Seconds from the connection, or from the first byte of a further request, to the end of its headers."""
BODY_S = 120.0
"""Seconds from there to the end of its body; servers may have shorter limits of their own."""

_LINGER_S = 2.0
_DROPPED_BYTES = 1 << 20
"""How long, and for how many bytes, a client that is refused is listened to, so that it can read why."""


_H2C = re.compile(rb"(\r\n)upgrade(:[ \t]*h2c[ \t]*\r\n)", re.IGNORECASE)


def _without_h2c(piece: bytes) -> bytes:
    """The beginning of a request, without an offer to go on in HTTP/2, which a server may pass over.

    httptools takes the body after such an offer for the other protocol: Java's client makes one with its first request,
    and its POST arrived without a body. Clients send a head in one piece; one that comes in several stays as it is.
    """
    head, end, rest = piece.partition(b"\r\n\r\n")
    return _H2C.sub(rb"\1x-was-\2", head + end) + rest


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    head_s = HEAD_S
    body_s = BODY_S

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = True
        self._begun = False
        """Whether a byte of the present head has come."""
        self._unbodied = 0
        """Bytes since the message began, or since its body's last byte: head, trailers."""
        self._grew = False
        """Whether the piece at work brought a byte of a body, or a message's end."""
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None

    # --- bytes ---

    def data_received(self, data: bytes) -> None:
        """Parse what came, in pieces that no bound is passed unseen in."""
        if self._refused:
            self._unbodied += len(data)
            if self._unbodied > _DROPPED_BYTES:
                self.transport.close()
            return
        while data and not (self._refused or self.transport.is_closing()):
            room = HEAD_BYTES - self._unbodied
            piece, data = data[:room], data[room:]
            if self._in_head and not self._begun:
                self._begun = True
                piece = _without_h2c(piece)
                if self._deadline is None:
                    self._expect(self.head_s)
            self._grew = False
            super().data_received(piece)
            self._unbodied = 0 if self._grew else self._unbodied + len(piece)
            if self._unbodied >= HEAD_BYTES:
                self._refuse(431, f"the headers are longer than {HEAD_BYTES} bytes, the limit of this server")

    def on_headers_complete(self) -> None:
        """The head is here; the body may take its time, but not all of it."""
        self._in_head, self._grew = False, True
        self._expect(self.body_s)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._grew = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole; another may follow."""
        self._in_head, self._begun, self._grew = True, False, True
        self._forget_deadline()
        super().on_message_complete()

    # --- time ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands; a client that then says nothing is not waited for."""
        super().connection_made(transport)  # type: ignore[arg-type]  # uvloop's transport is none by its class
        self._expect(self.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self._forget_deadline()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        """The connection is the websocket's from now on."""
        self._forget_deadline()
        super().handle_websocket_upgrade()

    def _expect(self, seconds: float) -> None:
        self._forget_deadline()
        self._deadline = self.loop.call_later(seconds, self._too_slow, seconds)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self, seconds: float) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.pipeline or self.flow.read_paused:  # it is we who do not read
            self._expect(seconds)
        elif self._in_head and not self._begun:
            self.transport.close()  # nothing was asked
        else:
            what = "headers" if self._in_head else "body"
            self._refuse(408, f"the {what} did not arrive within {seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer has begun already, and close; what still comes is dropped unread."""
        self._forget_deadline()
        self._refused = True
        answered = self.cycle is None or self.cycle.response_complete
        if answered if self._in_head else not self.cycle.response_started:
            code = "headers_too_large" if status == 431 else "request_timeout"
            body = error_text(status, message, code).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        if not answered:  # the application may be waiting for the rest
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        # Closed at once, the kernel would take the answer back: it resets a connection with bytes that nobody read.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(_LINGER_S, self.transport.close)


def bounded_config(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """The configuration of uvicorn that all our own servers have; `options` are more of `uvicorn.Config`'s."""
    import uvicorn

    own: dict[str, Any] = {
        "http": BoundedHttp,
        "ws": "none",
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,  # whoever sends X-Forwarded-For would be whom it names
    }
    return uvicorn.Config(app, **own | options)


def bound_uvicorn() -> None:
    """Let every uvicorn server of this process that chooses its protocol itself have these bounds: vLLM's does."""
    from uvicorn.config import HTTP_PROTOCOLS

    HTTP_PROTOCOLS["auto"] = f"{BoundedHttp.__module__}:{BoundedHttp.__qualname__}"
