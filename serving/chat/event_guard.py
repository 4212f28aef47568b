"""Refuses what no page of ours sends, before Gradio works on it.

Gradio takes the number of an event, the values for it and the name of a session as they come, and writes a traceback to
the log for each that is none: whoever reaches the page could fill the log with what looks like crashes of the server.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from types import UnionType

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.door.strict_json import NotJSON, read_json

_EVENTS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
_NEWS = "/gradio_api/queue/data"
_SESSION = re.compile(r"[0-9A-Za-z_-]{1,64}")
"""What a page calls itself."""
_LOG = logging.getLogger("almost.chat")


class EventGuard:
    """ASGI middleware: answers 400 and one line to an event that is none.

    Args:
        app: the page.
        inputs: number of an event -> the types of the values that it takes.
    """

    def __init__(self, app: ASGIApp, inputs: Mapping[int, Sequence[type | UnionType]]) -> None:
        self._app = app
        self._inputs = inputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        if path == _NEWS:
            await self._news(scope, receive, send)
        elif path in _EVENTS and scope["method"] == "POST":
            await self._event(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _news(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # Gradio has told the page: of a session that it does not know any more, for one
            _LOG.warning("the news for a page broke off: %s", " ".join(repr(error.__cause__ or error).split())[:200])
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        except HTTPException as error:  # longer than any event
            await PlainTextResponse(error.detail, error.status_code)(scope, receive, send)
            return
        if fault := self._fault(body):
            await PlainTextResponse(fault, 400)(scope, receive, send)
            return
        unread = [body]

        async def receive_again() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self._app(scope, receive_again, send)

    def _fault(self, body: bytes) -> str | None:
        """What is wrong with an event; None where nothing is, or gradio's own check of types says it."""
        try:
            event = read_json(body)
        except NotJSON:
            return "This is no JSON."
        if not isinstance(event, dict):
            return "This is no event."
        number, values = event.get("fn_index"), event.get("data")
        if type(number) is not int or number not in self._inputs:
            return "This page has no such event: load it again."
        types = self._inputs[number]
        if not isinstance(values, list) or len(values) < len(types) or not all(map(isinstance, values, types)):
            return f"This event takes {len(types)} values in data, each as its component has it: load the page again."
        session = event.get("session_hash")
        if not isinstance(session, str) or not _SESSION.fullmatch(session):
            return "session_hash must be up to 64 letters and digits."
        return None


def unreadable(request: Request, error: Exception) -> Response:
    """Answer a request whose fields are of other types. FastAPI would repeat them, and some no answer can hold."""
    return PlainTextResponse("This is no request that the page sends.", 422)
