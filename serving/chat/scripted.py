"""A scripted OpenAI-compatible endpoint, for tests of everything that speaks to one. Real HTTP, no model."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from starlette.applications import Starlette


@dataclass(frozen=True, slots=True)
class Script:
    """What a request is answered with."""

    pieces: Sequence[str] = ("All", " is", " well.")
    """The text, piece by piece; for best-of-N each piece is one candidate."""
    delay_s: float = 0.0
    """Before each piece."""
    status: int = 200
    error: JSONObject = field(default_factory=dict)
    """The body's `error`, where `status` is not 200."""
    cut: bool = False
    """Whether the connection ends after the last piece without the end of the stream."""
    garbage: str = ""
    """Sent as it is, after the pieces."""


class ScriptedEndpoint:
    """A context manager that serves on a free port of 127.0.0.1.

    Args:
        script: what every request gets, or a function of the request's body.
        model: the name it serves.
        rewards: the reward of a text; None for an endpoint without `/v1/rewards` and best-of-N.
        key: what it wants as a bearer token.
    """

    def __init__(
        self,
        script: Script | Callable[[JSONObject], Script] = Script(),
        *,
        model: str = "scripted",
        rewards: Callable[[str], float] | None = None,
        key: str | None = None,
    ) -> None:
        self.script = script
        self.requests: list[JSONObject] = []
        """Bodies of the chat requests."""
        self.unfinished = 0
        """Streams that the client left before their end."""
        self._model = model
        self._rewards = rewards
        self._key = key
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        """Up to and including `/v1`."""

    def __enter__(self) -> Self:
        import uvicorn

        config = uvicorn.Config(self._app(), log_level="error", ws="none", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        self._listening.close()

    def _app(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response, StreamingResponse
        from starlette.routing import Route

        def refused(request: Request) -> Response | None:
            if self._key is None or request.headers.get("authorization") == f"Bearer {self._key}":
                return None
            return JSONResponse({"error": {"message": "wrong key", "code": "invalid_api_key"}}, 401)

        async def models(request: Request) -> Response:
            return refused(request) or JSONResponse({"data": [{"id": self._model}]})

        async def chat(request: Request) -> Response:
            if refusal := refused(request):
                return refusal
            body = await request.json()
            self.requests.append(body)
            script = self.script(body) if callable(self.script) else self.script
            if script.status != 200:
                return JSONResponse({"error": script.error}, script.status)
            return StreamingResponse(self._events(script, body), media_type="text/event-stream")

        async def rewards(request: Request) -> Response:
            assert self._rewards is not None
            texts = [conversation[-1]["content"] for conversation in (await request.json())["conversations"]]
            return JSONResponse({"rewards": [self._rewards(text) for text in texts]})

        async def document(request: Request) -> Response:
            best_of = {"anyOf": [{"type": "integer", "maximum": 8}, {"type": "null"}]}
            schemas = {"ChatRequest": {"properties": {"best_of": best_of}}}
            return JSONResponse({"paths": {"/v1/rewards": {}}, "components": {"schemas": schemas}})

        routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
        if self._rewards:
            routes += [Route("/v1/rewards", rewards, methods=["POST"]), Route("/openapi.json", document)]
        return Starlette(routes=routes)

    async def _events(self, script: Script, body: JSONObject) -> AsyncIterator[str]:
        whole = False
        try:
            pieces, almost = list(script.pieces), None
            if "best_of" in body and self._rewards:
                almost = self._almost(pieces)
                pieces = [pieces[almost["chosen"][0]]]
            for piece in pieces:
                await asyncio.sleep(script.delay_s)
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if script.garbage:
                yield script.garbage
            if not script.cut:
                last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
                yield _event(last | ({"almost": almost} if almost else {}))
                yield _event({"choices": [], "usage": {"completion_tokens": len(pieces)}})
                yield "data: [DONE]\n\n"
            whole = True
        finally:
            self.unfinished += not whole

    def _almost(self, texts: list[str]) -> JSONObject:
        assert self._rewards is not None
        rewards = [self._rewards(text) for text in texts]
        best = max(range(len(texts)), key=rewards.__getitem__)
        candidates = [
            {"index": i, "text": text, "reward": reward, "finish_reason": "stop"}
            for i, (text, reward) in enumerate(zip(texts, rewards, strict=True))
        ]
        return {"best_of": len(texts), "reward": rewards[best], "chosen": [best], "candidates": candidates}


def _event(chunk: JSONObject) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
