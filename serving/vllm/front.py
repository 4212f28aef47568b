"""What vLLM's server is put behind, through its own option `--middleware`: names and origins, the key, the model list.

Its settings come through the environment, as everything that a command line must not or cannot say.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from serving.door.hosts import HostGuard
from serving.door.keys import KeyGuard
from serving.door.names import names_alone

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEY = "VLLM_API_KEY"
"""Where vLLM's server, too, reads the key that clients must send."""
SETTINGS = "ALMOST_FRONT"
_LIST = "/v1/models"


def front_settings(host: str, allowed_hosts: tuple[str, ...], *, open_metrics: bool) -> str:
    """The value of the variable `SETTINGS`; see `HostGuard` and `KeyGuard`."""
    return json.dumps({"host": host, "allowed_hosts": allowed_hosts, "open_metrics": open_metrics})


class Front:
    """The middleware; made by vLLM, so all it takes is the application."""

    def __init__(self, app: ASGIApp) -> None:
        settings = json.loads(os.environ[SETTINGS])
        key = os.environ.get(KEY) or None
        inner = _BearerToo(NamesAlone(app), key) if key else NamesAlone(app)
        keyed = KeyGuard(inner, key, open_metrics=settings["open_metrics"])
        self.app = HostGuard(keyed, settings["host"], settings["allowed_hosts"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in, or refuse."""
        await self.app(scope, receive, send)


class _BearerToo:
    """Names the key as vLLM's own check reads it, to whom `x-api-key` says nothing. Only those with the key get here,
    and those who need none.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._header = (b"authorization", b"Bearer " + key.encode("utf-8", "surrogateescape"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = [name for name, _ in scope.get("headers", ())]
        if b"x-api-key" in names and b"authorization" not in names:
            scope = {**scope, "headers": [*scope["headers"], self._header]}
        await self.app(scope, receive, send)


class NamesAlone:
    """Lists served models without the paths of their checkpoints; see `names_alone`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; the list alone is rewritten."""
        if scope["type"] != "http" or scope["path"] != _LIST or scope["method"] != "GET":
            return await self.app(scope, receive, send)
        start: Message = {}
        parts: list[bytes] = []

        async def rewrite(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                body = names_alone(b"".join(parts))
                headers = [item for item in start.get("headers", ()) if item[0].lower() != b"content-length"]
                await send({**start, "headers": [*headers, (b"content-length", b"%d" % len(body))]})
                await send({"type": "http.response.body", "body": body, "more_body": False})

        return await self.app(scope, receive, rewrite)
