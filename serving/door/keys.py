"""The key of a server: without it nothing is answered but `/health`.

vLLM's own check of `VLLM_API_KEY` (0.31, `entrypoints/serve/middleware/authenticate.py`) asks for the key only below
`/v1`, `/v2`, `/inference` and `/cohere`: `/invocations`, `/classify`, `/pooling`, `/score`, `/tokenize`, `/metrics`,
`/docs` and the scaling routes answer everybody. So all servers of this package have this middleware.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from serving.door.refusals import refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HEALTH = "/health"
METRICS = "/metrics"


class KeyGuard:
    """ASGI middleware: no key, no request and no websocket, whatever the path and the method.

    The key comes as `Authorization: Bearer KEY`, as OpenAI's packages send it, or as `x-api-key: KEY`, as Anthropic's
    do. A header that is sent twice is refused: proxies differ in which of the two counts. Where both are sent, both
    must hold the key.

    Args:
        app: what answers those with the key.
        key: the key, or None to let everybody in.
        open_metrics: `/metrics` needs no key either.
    """

    def __init__(self, app: ASGIApp, key: str | None, *, open_metrics: bool = False) -> None:
        self.app = app
        self._open = {HEALTH, METRICS} if open_metrics else {HEALTH}
        # A digest: of one length whatever is sent, and bytes, since compare_digest refuses non-ASCII strings.
        self._digest = None if key is None else _digest(key.encode("utf-8", "surrogateescape"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in, or answer 401."""
        if scope["type"] not in ("http", "websocket") or self._digest is None:
            return await self.app(scope, receive, send)
        is_open = scope["type"] == "http" and scope["path"] in self._open and scope["method"] in ("GET", "HEAD")
        if is_open or self._admits(scope):
            return await self.app(scope, receive, send)
        message = "no valid key: send the header 'Authorization: Bearer KEY' with this server's key"
        challenge = [(b"www-authenticate", b"Bearer")]
        return await refuse(scope, receive, send, 401, message, "invalid_api_key", challenge)

    def _admits(self, scope: Scope) -> bool:
        assert self._digest is not None
        bearers = [value for name, value in scope["headers"] if name == b"authorization"]
        plain = [value for name, value in scope["headers"] if name == b"x-api-key"]
        tokens = [*(_token(value) for value in bearers), *(value.strip() for value in plain)]
        # All are compared, so that the time says nothing of which one is wrong.
        right = [hmac.compare_digest(_digest(token), self._digest) for token in tokens]
        return bool(right) and all(right) and len(bearers) <= 1 and len(plain) <= 1


def _token(value: bytes) -> bytes:
    """The token of `Bearer TOKEN`; empty for another scheme, and no key is empty."""
    scheme, _, token = value.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
