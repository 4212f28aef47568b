"""The gateway on another HTTP client: httpx or aiohttp in the place of `serving.gateway.http_client`.

    python benchmarks/gateway_clients.py httpx gateway --policy-url http://127.0.0.1:8001 --port 8000

`benchmarks/serving.py --parts overhead --http-clients ours,httpx,aiohttp` runs all three side by side. Each client is
set up as lean as its options allow: no redirects, cookies, proxies or decompression, connections kept for 2 s.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))  # `python benchmarks/gateway_clients.py` from anywhere

from serving.gateway import upstream
from serving.gateway.http_client import BrokenOff, HttpClient, Unreachable

_CONNECT_S = 10.0
_IDLE_S = 2.0
Parts = Callable[[], AsyncIterator[bytes]]


class LibraryResponse:
    """What the gateway reads of an answer."""

    def __init__(self, status: int, headers: Iterable[tuple[bytes, bytes]], parts: Parts, failures: type[Exception]):
        self.status = status
        self.headers = [(name.lower(), value) for name, value in headers]
        self._parts, self._failures = parts, failures

    def header(self, name: bytes) -> bytes:
        """The first of that name; empty where there is none."""
        return next((value for other, value in self.headers if other == name), b"")

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, as it comes."""
        try:
            async for part in self._parts():
                yield part
        except self._failures as error:
            raise BrokenOff(str(error)) from None

    async def read(self) -> bytes:
        """The body, whole."""
        return b"".join([part async for part in self.parts()])


class HttpxClient:
    """`HttpClient`'s interface on httpx."""

    def __init__(self, url: str, headers: Iterable[tuple[str, str]], connections: int = 0) -> None:
        self._url = url
        limits = httpx.Limits(max_connections=connections or None, keepalive_expiry=_IDLE_S)
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        self._client = httpx.AsyncClient(headers=list(headers), limits=limits, timeout=timeout, trust_env=False)

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[LibraryResponse]:
        """See `HttpClient.request`."""
        try:
            async with self._client.stream(method, self._url + path, content=body) as response:
                yield LibraryResponse(response.status_code, response.headers.raw, response.aiter_raw, httpx.HTTPError)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreachable(str(error)) from None
        except httpx.HTTPError as error:
            raise BrokenOff(str(error)) from None

    def close(self) -> None:
        """Close the connections that are kept."""
        self._closing = asyncio.ensure_future(self._client.aclose())


class AiohttpClient:
    """`HttpClient`'s interface on aiohttp."""

    def __init__(self, url: str, headers: Iterable[tuple[str, str]], connections: int = 0) -> None:
        self._url, self._headers, self._connections = url, list(headers), connections
        self._session: aiohttp.ClientSession | None = None  # made in the event loop

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[LibraryResponse]:
        """See `HttpClient.request`."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=_IDLE_S)
            timeout = aiohttp.ClientTimeout(None, sock_connect=_CONNECT_S)
            jar, headers = aiohttp.DummyCookieJar(), self._headers
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, cookie_jar=jar, headers=headers, auto_decompress=False
            )
        try:
            async with self._session.request(method, self._url + path, data=body, allow_redirects=False) as response:
                body_parts = response.content.iter_any
                yield LibraryResponse(response.status, response.raw_headers, body_parts, aiohttp.ClientError)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(str(error)) from None
        except aiohttp.ClientError as error:
            raise BrokenOff(str(error)) from None

    def close(self) -> None:
        """Close the connections that are kept."""
        if self._session is not None:
            self._closing = asyncio.ensure_future(self._session.close())


CLIENTS = {"ours": HttpClient, "httpx": HttpxClient, "aiohttp": AiohttpClient}

if __name__ == "__main__":
    from serving.cli.main import serve

    upstream.HttpClient = CLIENTS[sys.argv.pop(1)]  # type: ignore[misc, assignment]
    serve()
