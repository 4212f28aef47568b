"""Early answers of best-of-N: the best so far is told while others are drawn.

All candidates are drawn as one stream, and each is scored when it ends. What is told early is in `almost.racing` of
chunks without text, so that a client that only adds up the text of its choice gets the final answer and nothing else.
Until a candidate has a reward, the first one is told as it grows; from then on, each one that beats those before it,
whole. At the end one chunk says `final`, and the answer follows as any other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException

from almost_eval.types import JSONObject
from serving.gateway.candidates import Drawing, is_index
from serving.gateway.errors import message_of, refusal
from serving.gateway.events import EventReader, EventTooLong, TextJoiner, joined
from serving.gateway.http_client import MAX_ANSWER_BYTES, HttpResponse
from serving.gateway.rewards import Scored
from serving.gateway.streaming import EVENTS, ReplyWriter, event_of, notes_of, shared_fields, start_events
from serving.gateway.upstream import Upstream

_HEAD = ("id", "created", "model", "system_fingerprint")


class GrowingChoice:
    """One choice of a completion, put together from the chunks of a stream."""

    def __init__(self) -> None:
        self.message: JSONObject = {"role": "assistant", "content": None}
        self.ended = False
        """Whether its finish reason is here."""
        self._rest: JSONObject = {"logprobs": None, "finish_reason": None}
        self._calls: dict[int, JSONObject] = {}
        self._joiner = TextJoiner()

    def add(self, choice: JSONObject) -> str:
        """Take one chunk's part; what the text grew by.

        Raises:
            TypeError, LookupError, AttributeError: it is not in OpenAI's form, or goes on after the choice's end.
        """
        added, delta = "", choice.get("delta") or {}
        if self.ended and (delta.get("content") or delta.get("tool_calls")):  # what there was is being scored
            raise TypeError("a choice that goes on after its end")
        for name, value in delta.items():
            if name == "tool_calls":
                for call in value or ():
                    self._add_call(call)
            elif isinstance(value, str) and name != "role":
                self.message[name] = (self.message.get(name) or "") + value
                added += self._joiner.add(value) if name == "content" else ""
            elif value is not None:
                if name == "content":
                    raise TypeError("content that is no text")
                self.message[name] = value
        for name, value in choice.items():
            if name == "logprobs" and value:
                known = self._rest["logprobs"] or {}
                self._rest["logprobs"] = {key: [*known.get(key, ()), *(part or ())] for key, part in value.items()}
            elif name == "token_ids" and value:
                self._rest[name] = [*self._rest.get(name, ()), *value]
            elif name not in ("delta", "index") and value is not None:
                self._rest[name] = value
        self.ended = self._rest["finish_reason"] is not None
        return added

    def _add_call(self, call: JSONObject) -> None:
        known = self._calls.setdefault(call["index"], {"function": {"name": "", "arguments": ""}})
        known |= {name: value for name, value in call.items() if name not in ("index", "function") and value}
        for name, value in (call.get("function") or {}).items():
            known["function"][name] = known["function"].get(name, "") + (value or "")
        self.message["tool_calls"] = [self._calls[place] for place in sorted(self._calls)]

    def choice(self, index: int) -> JSONObject:
        """As a completion that is no stream has it."""
        content = self.message["content"]
        message = {**self.message, "content": content if content is None else joined(content)}
        return {"index": index, "message": message, **self._rest}


class Race:
    """One request: the candidates of a drawing, each scored as it ends, the best so far told."""

    def __init__(
        self,
        policy: Upstream,
        drawing: Drawing,
        score: Callable[[JSONObject], Awaitable[Scored]],
        reply: ReplyWriter,
        *,
        include_usage: bool,
    ) -> None:
        self.completion: JSONObject = {}
        """Without choices."""
        self.fallback: str | None = None
        """Why candidates were not scored."""
        self._policy = policy
        self._drawing = drawing
        self._score = score
        self._reply = reply
        self._include_usage = include_usage
        self._growing = [GrowingChoice() for _ in range(drawing.count)]
        self._scoring: dict[int, asyncio.Task[Scored]] = {}
        self._results: dict[int, Scored] = {}
        self._best: int | None = None

    @property
    def choices(self) -> list[JSONObject]:
        """All candidates."""
        return [one.choice(i) for i, one in enumerate(self._growing)]

    @property
    def scored(self) -> list[Scored]:
        """One result for each candidate."""
        return [self._results[i] for i in range(len(self._growing))]

    async def run(self, *, fallback: bool) -> None:
        """Draw and score all candidates; with `fallback`, candidates without rewards are an answer too.

        Raises:
            HTTPException: the policy server fails or refuses the request, or, without `fallback`, the reward server
                fails.
        """
        body = {**self._drawing.fields, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._policy.request("POST", "/v1/chat/completions", json.dumps(body).encode()) as response:
                if response.status >= 400:
                    raise await self._policy.refused(response)
                if not response.header(b"content-type").startswith(EVENTS.encode()):
                    self._policy.parsed(await response.read())  # where it breaks off, that is the fault
                    raise self._policy.malformed("a stream")
                await start_events(self._reply, notes_of(response))
                await self._follow(response, fallback=fallback)
            if not all(one.ended for one in self._growing):
                raise self._policy.malformed("the end of each candidate")
            while self._scoring:
                await asyncio.wait(self._scoring.values(), return_when=asyncio.FIRST_COMPLETED)
                await self._settle(fallback=fallback)
        except EventTooLong as error:
            raise self._policy.broken(str(error)) from None
        finally:
            for task in self._scoring.values():
                _drop(task)

    async def _follow(self, response: HttpResponse, *, fallback: bool) -> None:
        """Take the stream's events and the rewards in whatever order they come."""
        reader, parts, length = EventReader(), response.parts(), 0

        async def next_part() -> bytes | None:
            return await anext(parts, None)

        arriving = asyncio.create_task(next_part())
        try:
            while True:
                await asyncio.wait({arriving, *self._scoring.values()}, return_when=asyncio.FIRST_COMPLETED)
                await self._settle(fallback=fallback)
                if not arriving.done():
                    continue
                if (part := arriving.result()) is None:
                    return
                length += len(part)
                if length > MAX_ANSWER_BYTES:
                    raise self._policy.broken(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
                for event in reader.feed(part):
                    await self._take(event)
                arriving = asyncio.create_task(next_part())
        finally:
            _drop(arriving)

    async def _take(self, event: bytes) -> None:
        """One event of the policy server's stream."""
        if event == b"[DONE]":
            return
        chunk = self._policy.parsed(event)
        if isinstance(chunk, dict) and chunk.get("error"):
            raise refusal(502, f"the policy server failed: {self._policy.words(event)}", "policy_failed")
        try:
            self.completion |= {name: chunk[name] for name in _HEAD if name in chunk}
            self.completion["object"] = "chat.completion"
            if chunk.get("usage"):
                self.completion["usage"] = chunk["usage"]
            grown = []
            for choice in chunk["choices"]:
                if (place := is_index(choice["index"])) is None:
                    raise TypeError("an index that is none")
                grown.append((place, self._growing[place].add(choice)))
        except (LookupError, TypeError, AttributeError):
            raise self._policy.malformed("chunks of its candidates") from None
        for i, text in grown:
            if text and i == 0 and self._best is None:
                await self._tell(0, None, {"delta": text})
            if self._growing[i].ended and self.fallback is None and i not in self._scoring | self._results:
                self._scoring[i] = asyncio.ensure_future(self._score(self._growing[i].choice(i)["message"]))

    async def _settle(self, *, fallback: bool) -> None:
        """Take the rewards that have come."""
        for i in [i for i, task in self._scoring.items() if task.done()]:
            try:
                result = self._scoring.pop(i).result()
            except HTTPException as error:
                if not fallback:
                    raise
                self.fallback = message_of(error)
                for task in self._scoring.values():
                    _drop(task)
                self._scoring.clear()
                return
            self._results[i] = result
            if result.reward is not None and self._leads(i, result.reward):
                self._best = i
                await self._tell(i, result.reward, {"text": self._growing[i].choice(i)["message"]["content"] or ""})

    def _leads(self, candidate: int, reward: float) -> bool:
        """Whether it is the best so far; of equal ones the first drawn, as in the final choice."""
        if self._best is None:
            return True
        best = self._results[self._best].reward
        assert best is not None
        return (reward, -candidate) > (best, -self._best)

    async def tell_winner(self, *, scored: bool) -> None:
        """Say which candidate is the answer: without rewards, the first."""
        best = self._best if scored and self._best is not None else 0
        reward = self._results[best].reward if scored else None
        await self._tell(best, reward, {}, final=True)

    async def _tell(self, candidate: int, reward: float | None, text: dict[str, str], *, final: bool = False) -> None:
        racing: dict[str, Any] = {"candidate": candidate, "reward": reward, **text, "final": final}
        choice = {"index": 0, "delta": {}, "finish_reason": None}
        shared = shared_fields(self.completion, include_usage=self._include_usage)
        await self._reply.part(event_of({**shared, "choices": [choice], "almost": {"racing": racing}}))


def _drop(task: asyncio.Task[Any]) -> None:
    """End a task whose result nobody wants, and look at its error, or asyncio would print it."""
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
