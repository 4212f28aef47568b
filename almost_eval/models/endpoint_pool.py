"""Several endpoints that serve one model, as one: each request goes where it will be answered first.

The pool is the transport below an SDK's client, so what stands above it (threads, retries, errors) knows of one
address. It sends nothing twice: a failure is handed on, the endpoint rests for a while, and the client's own retry goes
to another. Which endpoint is next is decided in `endpoint_load`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx

from almost_eval.models.endpoint_load import EndpointLoad, first_to_answer
from almost_eval.models.endpoints import EndpointAddress, read_key

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes after which an endpoint rests."""


@dataclass(slots=True)
class _Member:
    """An endpoint of the pool."""

    address: EndpointAddress
    key: str | None
    load: EndpointLoad


class EndpointPool(httpx.BaseTransport):
    """The transport that spreads requests over endpoints. Requests are made for the first one's address.

    Args:
        addresses: of the endpoints.
        notice: takes a line to be shown, when an endpoint is lost and when it is back.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        addresses: Sequence[EndpointAddress],
        notice: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._members = [_Member(one, read_key(one), EndpointLoad(one.shown)) for one in addresses]
        self._notice = notice
        self._clock = clock
        self._lock = threading.Lock()
        self._wire = httpx.HTTPTransport(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))

    @property
    def lost(self) -> list[str]:
        """The addresses that could not be reached, or not to the end of an answer, at least once."""
        return [member.load.shown for member in self._members if member.load.was_lost]

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request to the endpoint that is likely to answer first, which the answer's extension `endpoint` names.

        Raises:
            httpx.TransportError: that endpoint failed.
        """
        member, begun = self._take(), self._clock()
        try:
            response = self._wire.handle_request(self._readdressed(request, member))
        except httpx.TransportError as error:
            self._return(member, error=error)
            raise
        except BaseException:  # a Ctrl-C says nothing about the endpoint
            self._return(member)
            raise
        response.extensions["endpoint"] = member.load.shown
        if response.status_code in BUSY:
            self._return(member, rest=_seconds(response.headers.get("retry-after")))
            if self._has_ready():  # whoever sent it need not wait for this endpoint
                for name in ("retry-after", "retry-after-ms"):
                    response.headers.pop(name, None)
            return response

        def done(error: BaseException | None) -> None:
            self._return(member, seconds=self._clock() - begun, error=error)

        assert isinstance(response.stream, httpx.SyncByteStream)
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_Watched(response.stream, done),
            extensions=response.extensions,
        )

    def close(self) -> None:
        """Close all connections."""
        self._wire.close()

    def _has_ready(self) -> bool:
        with self._lock:
            return not all(member.load.rests(self._clock()) for member in self._members)

    def _take(self) -> _Member:
        with self._lock:
            chosen = self._members[first_to_answer([member.load for member in self._members], self._clock())]
            chosen.load.running += 1
            return chosen

    def _return(
        self,
        member: _Member,
        *,
        seconds: float | None = None,
        error: BaseException | None = None,
        rest: float | None = None,
    ) -> None:
        line = ""
        with self._lock:
            member.load.running -= 1
            if error is not None or rest is not None:
                line = member.load.failed(self._clock(), rest or 0.0, lost=error is not None)
            elif seconds is not None:
                line = member.load.answered(seconds)
        if line:
            self._notice(line)

    def _readdressed(self, request: httpx.Request, member: _Member) -> httpx.Request:
        """The request as it is for this member: its address, its key."""
        first = self._members[0].address
        # The addresses without `/v1`, so that what lies beside it moves too.
        here, there = first.beside("/"), httpx.URL(member.address.beside("/"))
        path = str(request.url.raw_path, "ascii").removeprefix(httpx.URL(here).raw_path.decode("ascii").rstrip("/"))
        url = there.copy_with(raw_path=(there.raw_path.decode("ascii").rstrip("/") + path).encode("ascii"))
        headers = request.headers.copy()
        headers["host"] = url.netloc.decode("ascii").rpartition("@")[2]
        if member.key and "authorization" in headers:
            headers["authorization"] = f"Bearer {member.key}"
        assert isinstance(request.stream, httpx.SyncByteStream)
        return httpx.Request(request.method, url, headers=headers, stream=request.stream, extensions=request.extensions)


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header says, where it is a number; else 0."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0


class _Watched(httpx.SyncByteStream):
    """The bytes of an answer; tells once when they end, and with what error."""

    def __init__(self, stream: httpx.SyncByteStream, done: Callable[[BaseException | None], None]) -> None:
        self._stream = stream
        self._done: Callable[[BaseException | None], None] | None = done

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        except httpx.TransportError as error:
            self._finish(error)
            raise

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(error)
