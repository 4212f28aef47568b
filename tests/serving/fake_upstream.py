"""A real HTTP server in a thread that answers like vLLM's two servers, and misbehaves on demand.

For faults that a healthy vLLM does not have: hanging, dying half-way, answering with garbage, dripping tokens. What is
right is tested on real vLLM.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp


class _Server(uvicorn.Server):
    """Looks every 5 ms whether it may end, where uvicorn looks every 100 ms, and at least twice."""

    async def main_loop(self) -> None:
        await self.on_tick(0)  # writes the headers of every answer
        while not self.should_exit:
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while state.connections or state.tasks:
                    await asyncio.sleep(0.005)
        for task in state.tasks:
            task.cancel()
        await self.lifespan.shutdown()


class Served:
    """An ASGI app on a port of its own, in a thread."""

    def __init__(self, app: ASGIApp, port: int = 0) -> None:
        self._socket = socket.create_server(("127.0.0.1", port), backlog=2048)
        self.port = int(self._socket.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app, log_level="critical", access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=1
        )
        self.server = _Server(config)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()

    @classmethod
    @contextmanager
    def of(cls, app: ASGIApp, port: int = 0) -> Iterator[Served]:
        """For the time of a `with`."""
        served = cls(app, port)
        try:
            yield served
        finally:
            served.stop()

    def stop(self) -> None:
        """Stop listening and close all connections."""
        self.server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._socket.close()


class FakeUpstream:
    """Policy and reward server in one.

    A candidate says "answer 0", "answer 1", ...; the reward of a conversation is the number at its end, except 7, which
    it calls too long.
    """

    def __init__(self) -> None:
        self.mode = "good"
        self.error_in_stream = b""
        """The data of an event before `[DONE]`."""
        """`good`, `hang`, `garbage`, `die`, `half-event`, `fail`, `slow`: what it does from now on."""
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        """Path, headers and body of every request."""
        self.running = 0
        """Requests at work."""
        self.tokens = 4
        """Chunks of a stream."""
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/classify", self._classify, methods=["POST"]),
            ]
        )

    def served(self, port: int = 0) -> AbstractContextManager[Served]:
        """On a port, for the time of a `with`."""
        return Served.of(self.app, port)

    async def _health(self, request: Request) -> Response:
        return Response(status_code=503 if self.mode == "fail" else 200)

    async def _models(self, request: Request) -> Response:
        entry = {"id": "fake", "object": "model", "root": "/home/secret/checkpoint"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _chat(self, request: Request) -> Response:
        body = await self._take(request)
        if (bad := await self._misbehave(request)) is not None:
            return bad
        if body.get("stream"):
            return StreamingResponse(self._events(), media_type="text/event-stream")
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": f" answer {i}"},
                "logprobs": None,
                "finish_reason": "stop",
            }
            for i in range(body.get("n") or 1)
        ]
        usage = {"prompt_tokens": 3, "completion_tokens": 2 * len(choices), "total_tokens": 3 + 2 * len(choices)}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "fake"}
        return JSONResponse({**head, "choices": choices, "usage": usage})

    async def _events(self) -> AsyncIterator[bytes]:
        self.running += 1
        try:
            for i in range(self.tokens):
                yield event(i)
                await asyncio.sleep(0.2 if self.mode == "slow" else 0)
            if self.mode == "half-event":
                yield event(9)[:20]
                await asyncio.sleep(0.05)
                raise ConnectionResetError  # the connection closes in the middle of the event
            if self.error_in_stream:
                yield b"data: " + self.error_in_stream + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            self.running -= 1

    async def _classify(self, request: Request) -> Response:
        body = await self._take(request)
        if (bad := await self._misbehave(request)) is not None:
            return bad
        texts = body["input"] if "input" in body else [body["messages"][-1]["content"]]
        rewards = [float(text.removesuffix("\n\n-----").split()[-1]) for text in texts]
        if 7 in rewards:
            error = {"message": "the prompt is too long", "type": "BadRequestError", "param": None, "code": 400}
            return JSONResponse({"error": error}, 400)
        head = {"id": "classify-1", "object": "list", "created": 1, "model": "fake-reward"}
        data = [{"index": i, "label": "LABEL_0", "probs": [x], "num_classes": 1} for i, x in enumerate(rewards)]
        return JSONResponse({**head, "data": data})

    async def _take(self, request: Request) -> Any:
        body = json.loads(await request.body())
        self.seen.append((request.url.path, dict(request.headers), body))
        return body

    async def _misbehave(self, request: Request) -> Response | None:
        if self.mode == "hang":
            self.running += 1
            try:
                while not await request.is_disconnected():
                    await asyncio.sleep(0.02)
            finally:
                self.running -= 1
            return Response()
        if self.mode == "garbage":
            return Response(b'{"choices": [{', media_type="application/json")
        if self.mode == "not a number":
            return Response('{"choices": [{"index": 0, "logprobs": NaN, "message": {"content": "x"}}]}')
        if self.mode == "redirect":
            return Response("{}", 302, {"Location": "/v1/elsewhere"}, "application/json")
        if self.mode == "die":
            return StreamingResponse(_broken(), headers={"content-length": "1000"}, media_type="application/json")
        if self.mode == "fail":
            return JSONResponse({"error": {"message": "out of luck", "type": "InternalServerError", "code": 500}}, 500)
        return None


async def _broken() -> AsyncIterator[bytes]:
    yield b'{"id": '
    await asyncio.sleep(0.02)
    raise ConnectionResetError


def event(number: int) -> bytes:
    """A chunk of a stream, as the fake policy writes it."""
    choice = {"index": 0, "delta": {"content": f"w{number} "}, "logprobs": None, "finish_reason": None}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fake", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"
