"""Several endpoints that serve one model, as one: each request goes where it will be answered first.

The pool is the transport below an SDK's client, so what stands above it (threads, retries, errors) knows of one
address. It sends nothing twice: a failure is handed on, the endpoint rests for a while, and the client's own retry goes
to another. What an endpoint is worth is measured: the requests that it has, times the seconds that its answers take. So
a slow endpoint gets few requests, and none waits at it while others are idle.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx

from almost_eval.models.endpoints import EndpointAddress, read_key

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes after which an endpoint rests."""
LONGEST_REST = 30.0
"""Seconds that an endpoint rests at most; the first time it is one."""
MEMORY = 0.8
"""Weight of the earlier answers in the mean of an endpoint's seconds."""


@dataclass(slots=True)
class _Member:
    """An endpoint of the pool, and what is known of it."""

    address: EndpointAddress
    key: str | None
    running: int = 0
    """Requests on their way."""
    seconds: float | None = None
    """Of an answer: a mean in which the last ones weigh most; None before the first."""
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    was_lost: bool = False
    """A connection failed, or ended before the answer did."""


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
        self._members = [_Member(address, read_key(address)) for address in addresses]
        self._notice = notice
        self._clock = clock
        self._lock = threading.Lock()
        self._wire = httpx.HTTPTransport(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))

    @property
    def lost(self) -> list[str]:
        """The addresses that could not be reached, or not to the end of an answer, at least once."""
        return [member.address.shown for member in self._members if member.was_lost]

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request to the endpoint that is likely to answer first.

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
            return any(member.rests_until <= self._clock() for member in self._members)

    def _take(self) -> _Member:
        with self._lock:
            now = self._clock()
            ready = [member for member in self._members if member.rests_until <= now]
            if not ready:
                ready = [min(self._members, key=lambda member: member.rests_until)]
            known = [member.seconds for member in ready if member.seconds is not None]
            usual = sum(known) / len(known) if known else 1.0
            chosen = min(
                ready, key=lambda m: ((m.running + 1) * (usual if m.seconds is None else m.seconds), m.running)
            )
            chosen.running += 1
            return chosen

    def _return(
        self,
        member: _Member,
        *,
        seconds: float | None = None,
        error: BaseException | None = None,
        rest: float | None = None,
    ) -> None:
        with self._lock:
            member.running -= 1
            if error is None and rest is None:
                is_back, member.failures = member.failures > 0 and seconds is not None, 0
                if seconds is not None:
                    old = seconds if member.seconds is None else member.seconds
                    member.seconds = MEMORY * old + (1 - MEMORY) * seconds
                line = f"{member.address.shown} answers again" if is_back and member.was_lost else ""
            else:
                member.failures += 1
                pause = min(LONGEST_REST, max(rest or 0.0, 2.0 ** (member.failures - 1)))
                member.rests_until = self._clock() + pause
                is_first = error is not None and member.failures == 1
                member.was_lost = member.was_lost or error is not None
                line = f"{member.address.shown} is lost; what it had goes to the others" if is_first else ""
        if line:
            self._notice(line)

    def _readdressed(self, request: httpx.Request, member: _Member) -> httpx.Request:
        """The request as it is for this member: its address, its key."""
        first = self._members[0].address
        here, there = _above(first), httpx.URL(_above(member.address))
        path = str(request.url.raw_path, "ascii").removeprefix(httpx.URL(here).raw_path.decode("ascii").rstrip("/"))
        url = there.copy_with(raw_path=(there.raw_path.decode("ascii").rstrip("/") + path).encode("ascii"))
        headers = request.headers.copy()
        headers["host"] = url.netloc.decode("ascii").rpartition("@")[2]
        if member.key and "authorization" in headers:
            headers["authorization"] = f"Bearer {member.key}"
        assert isinstance(request.stream, httpx.SyncByteStream)
        return httpx.Request(request.method, url, headers=headers, stream=request.stream, extensions=request.extensions)


def _above(address: EndpointAddress) -> str:
    """The address without `/v1`, so that what lies beside it moves too."""
    return address.beside("/")


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
