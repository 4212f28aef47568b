"""Stop strings of a chat template as a default of vLLM's server, which knows defaults for numbers only.

`--override-generation-config` of vLLM 0.31 takes temperature, top-p and the like, and passes over `stop`. So this ASGI
middleware (vLLM's own option `--middleware`) adds them to a request to `/v1/chat/completions` that names none, and says
so in the header of the answer: `almost-default-stop: ["\\n\\nHuman:", ...]`. A request that names its own, were it
`[]`, and every other path are left as they are.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

VARIABLE = "ALMOST_DEFAULT_STOP"
HEADER = "almost-default-stop"
_PATHS = ("/v1/chat/completions",)


class DefaultStop:
    """The middleware; the strings are a JSON list in the environment variable `ALMOST_DEFAULT_STOP`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.stop: list[str] = json.loads(os.environ.get(VARIABLE) or "[]")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with `stop` set where it was not."""
        if not self.stop or scope["type"] != "http" or scope["path"] not in _PATHS or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        added = read = False

        async def receive_body() -> Message:
            # Not before the server asks: it checks the key first, and a stranger's body is never read.
            nonlocal added, read
            if read:
                return await receive()
            parts: list[bytes] = []
            while True:
                message = await receive()
                if message["type"] != "http.request":  # the client has gone
                    return message
                parts.append(message.get("body", b""))
                if not message.get("more_body", False):
                    break
            read = True
            body, added = self._with_stop(b"".join(parts))
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_header(message: Message) -> None:
            if added and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER.encode(), json.dumps(self.stop).encode())]
            await send(message)

        await self.app(scope, receive_body, send_header)

    def _with_stop(self, body: bytes) -> tuple[bytes, bool]:
        try:
            request = json.loads(body)
        except ValueError:
            return body, False  # the server says what is wrong with it
        if not isinstance(request, dict) or request.get("stop") is not None:
            return body, False
        return json.dumps({**request, "stop": self.stop}).encode(), True
