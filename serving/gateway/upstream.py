"""The servers behind the gateway. Each has a client and a key of its own; failures are told in OpenAI's form.

Only the body of a client's request reaches an upstream. Nothing is sent twice: an answer that breaks off is a failure,
and the client decides whether to ask again.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from starlette.exceptions import HTTPException

from serving.door.strict_json import NotJSON, read_json
from serving.gateway.errors import refusal, shaped_error, upstream_refusal, upstream_words
from serving.gateway.http_client import BrokenOff, HttpClient, HttpResponse, Unreachable
from serving.gateway.metrics import Metrics
from serving.gateway.streaming import notes_of

_HEALTH_S = 5.0
_CONSTRAINTS = (b'"structured_outputs"', b'"response_format"', b'"guided_', b'"tools"')
"""Fields of a request that hold a grammar, a regular expression or a schema."""
_ERROR_BYTES = 8 << 20
"""Of an error that is read: a message may repeat a request, which is half of it at most."""
_GRAMMAR = re.compile(
    r"grammar|json.?schema|regex|regular expression|structured.?output|structural.?tag|guidance", re.I
)
"""What an error says of them. Some are found out only when they are compiled, which vLLM tells as its own failure."""


class Upstream:
    """A vLLM server.

    Args:
        name: `policy` or `reward`.
        url: its address, without a closing slash.
        key: what it wants as a bearer token.
        status: what the client gets when it is down: 502 or 503.
        connections: at most so many at a time; 0 is any number.
        metrics: where its failures are counted.
    """

    def __init__(
        self, name: str, url: str, key: str | None, *, status: int, connections: int, metrics: Metrics
    ) -> None:
        self.name = name
        self.url = url
        self.status = status
        self._key = key
        headers = [("Content-Type", "application/json"), ("Accept-Encoding", "identity")]
        if key:
            headers.append(("Authorization", f"Bearer {key}"))
        self._client = HttpClient(url, headers, connections)
        self._metrics = metrics
        self._down_until = 0.0  # monotonic seconds

    @property
    def known_down(self) -> bool:
        """Whether it refused a connection within the last second: no work is worth starting for it."""
        return monotonic() < self._down_until

    def unreachable(self) -> HTTPException:
        """What the client gets while no connection can be made."""
        message = f"the {self.name} server is not reachable; GET /ready says when it is back"
        return refusal(self.status, message, f"{self.name}_unavailable", headers={"Retry-After": "1"})

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[HttpResponse]:
        """The upstream's answer, its body not yet read. Leaving early closes the connection, which ends its work.

        Raises:
            HTTPException: it is down, dies before the end of its answer, fails (5xx), redirects, or refuses the
                gateway's key; 400 where it fails on the request's own grammar.
        """
        try:
            async with self._client.request(method, path, body) as answer:
                if answer.status >= 500:
                    words = self.words(await error_body(answer))
                    if _GRAMMAR.search(words) and any(name in body for name in _CONSTRAINTS):
                        message = f"the {self.name} server cannot work with the grammar of this request: {words}"
                        raise refusal(400, message, "invalid_grammar")
                    raise self._failure("failed", f"failed ({answer.status}): {words}")
                if answer.status in (401, 403):
                    raise self._failure("key", f"refuses the gateway's key ({answer.status})")
                if answer.status < 200 or 300 <= answer.status < 400:  # followed, it would carry the key elsewhere
                    raise self._failure("redirect", f"answered {answer.status}, which is not followed; is it vLLM?")
                yield answer
        except Unreachable:
            self._down_until = monotonic() + 1.0
            self._count("unreachable")
            raise self.unreachable() from None
        except BrokenOff as error:
            raise self.broken(str(error)) from None

    def parsed(self, body: bytes) -> Any:
        """The JSON of an answer.

        Raises:
            HTTPException: it is none.
        """
        try:
            return read_json(body)
        except NotJSON:
            raise self._failure("malformed", "gave an answer that is no JSON") from None

    async def refused(self, answer: HttpResponse) -> HTTPException:
        """What the client gets for an answer of 400 to 499; see `upstream_refusal`."""
        error = upstream_refusal(self.name, answer.status, await error_body(answer), self._key)
        notes = {name.decode("latin-1"): value.decode("latin-1") for name, value in notes_of(answer)}
        return HTTPException(error.status_code, error.detail, notes)

    def error_in_stream(self, data: bytes) -> bytes | None:
        """An event's data where it is an error, written anew as in `upstream_refusal`; None where it is none."""
        content = self.parsed(data)
        if not isinstance(content, dict) or not content.get("error"):
            return None
        self._count("failed")
        if error := shaped_error(data, self._key):
            return json.dumps({"error": error | {"type": error["type"] or "server_error"}}).encode()
        failed = f"the {self.name} server failed within its answer: {self.words(data)}"
        return refusal(self.status, failed, f"{self.name}_failed").detail.encode()

    def words(self, body: bytes) -> str:
        """What its error says, fit for the client; see `upstream_words`."""
        return upstream_words(body, self._key)

    def broken(self, why: str) -> HTTPException:
        """For an answer that stopped before its end."""
        return self._failure("broken", f"broke off its answer ({why})")

    def malformed(self, what: str) -> HTTPException:
        """For an answer that is JSON and still no answer to the request."""
        return self._failure("malformed", f"gave an answer without {what}")

    async def ready(self) -> bool:
        """Whether it says itself that it is."""
        try:
            async with asyncio.timeout(_HEALTH_S), self.request("GET", "/health") as response:
                return response.status == 200
        except (HTTPException, TimeoutError):
            return False

    async def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _failure(self, kind: str, what: str) -> HTTPException:
        self._count(kind)
        return refusal(self.status, f"the {self.name} server {what}", f"{self.name}_failed")

    def _count(self, kind: str) -> None:
        self._metrics.upstream_failures.labels(self.name, kind).inc()


async def error_body(answer: HttpResponse) -> bytes:
    """The body of an error; nothing where it is longer than what an error has to say.

    Raises:
        BrokenOff: it stops before its end.
    """
    body = bytearray()
    async for part in answer.parts():
        body += part
        if len(body) > _ERROR_BYTES:
            return b""
    return bytes(body)
