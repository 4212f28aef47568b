"""One chat request at work: a thread generates, and the event loop sends what it writes."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import AsyncIterator

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from almost_eval.engines.base import SamplingParams
from almost_eval.errors import AlmostError, InputError
from almost_eval.types import Completion, JSONObject
from serving.door.refusals import error_text
from serving.gateway.errors import refusal
from serving.gateway.limits import ends_with_client
from serving.local.generation import Cancelled, Turnstile, generate_in_turns
from serving.local.policy import Policy

_News = tuple[int, str] | list[Completion] | Exception
"""A piece of the text of completion `i`; or all completions, at the end; or why there are none."""


class ChatJob:
    """One request. The generation begins at once; all threads that use the device share the turnstile."""

    def __init__(
        self, policy: Policy, prompt: str, prompt_tokens: int, params: SamplingParams, turnstile: Turnstile
    ) -> None:
        self._params = params
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": f"chatcmpl-{random.getrandbits(64):016x}",
            "created": int(time.time()),
            "model": policy.name,
        }
        self._cancelled = threading.Event()
        self._news: asyncio.Queue[_News] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(news: _News) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._news.put_nowait, news)

        def on_text(number: int, text: str) -> None:
            tell((number, text))

        def work() -> None:
            stop = self._cancelled
            try:
                tell(generate_in_turns(policy.engine, prompt, params, turnstile, on_text=on_text, cancelled=stop))
            except Cancelled:
                pass
            except Exception as error:  # whatever it is, the client is waiting for it
                tell(error)

        threading.Thread(target=work, name="generate", daemon=True).start()

    async def whole(self, request: Request) -> JSONObject:
        """The completion, at its end. Where the client leaves, the generation ends.

        Raises:
            HTTPException: it failed, or the client has left.
        """
        try:
            async with ends_with_client(request.receive):
                while not isinstance(news := await self._next(), list):
                    pass  # a piece of the text: the end has all of them
            return self._completion(news)
        except ClientDisconnect:
            raise refusal(499, "the client has left", "client_left") from None
        finally:
            self._cancelled.set()

    async def events(self, *, include_usage: bool) -> AsyncIterator[bytes]:
        """The stream; closing it ends the generation."""
        try:
            for i in range(self._params.n):
                yield self._event(i, {"role": "assistant", "content": ""})
            while not isinstance(news := await self._next(), list):
                yield self._event(news[0], {"content": news[1]})
            for i, one in enumerate(news):
                yield self._event(i, {}, one.finish_reason)
            if include_usage:
                yield self._event(None, {}, usage=self._usage(news))
            yield b"data: [DONE]\n\n"
        except HTTPException as error:
            yield f"data: {error.detail}\n\ndata: [DONE]\n\n".encode()
        finally:
            self._cancelled.set()

    async def _next(self) -> tuple[int, str] | list[Completion]:
        news = await self._news.get()
        if isinstance(news, InputError):
            raise refusal(400, str(news), "invalid_value") from news
        if isinstance(news, Exception):
            words = str(news) if isinstance(news, AlmostError) else f"generation failed ({type(news).__name__})"
            raise HTTPException(500, error_text(500, words, "generation_failed")) from news
        return news

    def _completion(self, done: list[Completion]) -> JSONObject:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": one.text}, "finish_reason": one.finish_reason}
            for i, one in enumerate(done)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage(done)}

    def _usage(self, done: list[Completion]) -> dict[str, int]:
        new = sum(len(one.token_ids) for one in done)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }

    def _event(
        self, index: int | None, delta: dict[str, str], reason: str | None = None, usage: dict[str, int] | None = None
    ) -> bytes:
        choices = [] if index is None else [{"index": index, "delta": delta, "finish_reason": reason}]
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices, "usage": usage}
        return f"data: {json.dumps(chunk)}\n\n".encode()
