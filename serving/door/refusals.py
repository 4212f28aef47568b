"""Answers of the door itself, in OpenAI's error form, so that its packages raise what one expects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

Headers = Sequence[tuple[bytes, bytes]]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_text(status: int, message: str, code: str, param: str | None = None) -> str:
    """`{"error": {...}}` as JSON: a line that says what to do, a `code` for programs, the field that is at fault."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


async def refuse(
    scope: Scope, receive: Receive, send: Send, status: int, message: str, code: str, headers: Headers = ()
) -> None:
    """Answer a request, or a websocket that has not been accepted, with an error."""
    body = error_text(status, message, code).encode()
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()  # its `websocket.connect`
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the client gets 403
            return
        kind = "websocket.http.response"
    length = (b"content-length", b"%d" % len(body))
    head = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": f"{kind}.start", "status": status, "headers": head})
    await send({"type": f"{kind}.body", "body": body, "more_body": False})
