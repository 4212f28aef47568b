"""What all tabs share: the systems, the limits of a visitor, and one answer drawn step by step."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from serving.chat.client import Abilities, Delta, Draft, End, Endpoint, EndpointError
from serving.chat.conversation import ChatReply, Settings
from serving.chat.line import Line, Place
from serving.chat.options import AFTER, BEFORE
from serving.chat.scale import RewardScale
from serving.chat.toyworld import hint
from serving.chat.visitors import Asker, Visitors

TICK_S = 0.05
"""Seconds between two updates of a page: faster than people read, and less traffic than one for each token."""

REST = 4.0
"""Times as long as an update took, which is as long as its text, until the next one: the page is not for one answer
alone."""
_UNREAD = 1024
"""Pieces of an answer between two updates; beyond that the endpoint has to wait."""

TOO_FAST = (
    "That is more questions a minute than this server takes from one visitor or address: wait a moment, then press "
    "Retry."
)
FULL = "Many questions are waiting here already, as many as this server keeps: try again in a minute."
BROKEN = "Something failed here, and the server's log says what. What you wrote is kept: press Retry, or ask again."
BUSY = "The last answer is still being written: stop it first, or wait."

_FRESH_S = 60.0
"""Seconds for which an endpoint's abilities are taken as known."""


@dataclass(slots=True)
class ChatSystem:
    """One of the things to talk to: an endpoint, and the model it serves."""

    name: str
    endpoint: Endpoint
    model: str | None = None
    """None: the first that the endpoint lists."""
    scale: RewardScale | None = None
    """Where its rewards stand among those of known answers."""
    is_toy: bool = False
    """Whether it knows the built-in world alone."""
    about: str = ""
    """Whose model it is and under which licence, where the page is to say so."""
    _known: Abilities | None = None
    _known_since: float = 0.0

    async def abilities(self) -> Abilities:
        """What it can do; looked up once a minute.

        Raises:
            EndpointError: see `Endpoint.abilities`.
        """
        if self._known is None or time.monotonic() - self._known_since > _FRESH_S:
            self._known = await self.endpoint.abilities()
            self._known_since = time.monotonic()
        return self._known

    async def served(self) -> str:
        """The model's name at the endpoint.

        Raises:
            EndpointError: it is not known, and the endpoint does not answer.
        """
        if self.model:
            return self.model
        models = (await self.abilities()).models
        if not models:
            raise EndpointError("refused", "The endpoint serves no model.")
        return models[0]


class ModelLoader(Protocol):
    """Loads one more model while the page runs."""

    phase: str
    """What is being done, for those who wait."""

    async def load(self) -> ChatSystem:
        """The model, ready to answer and among the desk's systems; raises an AlmostError that says why not."""


class NotNow(Exception):
    """A question that cannot be answered now; the message is a sentence for the page. `busy`: the visitor's last answer
    is still being written; else too many questions came in a minute.
    """

    def __init__(self, sentence: str, *, busy: bool) -> None:
        super().__init__(sentence)
        self.busy = busy
        self.kind = "hint" if busy else "error"


@dataclass(frozen=True, slots=True)
class Step:
    """How far an answer is."""

    reply: ChatReply
    done: bool = False
    error: EndpointError | None = None
    """Why it broke off; `reply` holds what had come."""
    note: str = ""
    """A sentence about an answer that is whole: no reward could be had, ..."""


class RateLimit:
    """So many questions a minute: for each visitor, and for each address, by default as many as for a visitor."""

    def __init__(self, per_visitor: int, per_address: int | None = None) -> None:
        self.per_visitor = per_visitor
        self.per_address = per_address or per_visitor
        self._times: dict[str, deque[float]] = {}

    def admits(self, visitor: str, address: str, now: float | None = None) -> bool:
        """Count one question, unless it is one too many."""
        now = time.monotonic() if now is None else now
        if len(self._times) > 10_000:  # of those who left
            self._times = {who: times for who, times in self._times.items() if times and now - times[-1] < 60}
        counted = []
        for who, most in ((f"address {address}", self.per_address), (f"visitor {visitor}", self.per_visitor)):
            times = self._times.setdefault(who, deque())
            while times and now - times[0] >= 60:
                times.popleft()
            if len(times) >= most:
                return False
            counted.append(times)
        for times in counted:
            times.append(now)
        return True


@dataclass(slots=True)
class Desk:
    """What the page serves, and what is going on. One for a server, in its one event loop."""

    systems: list[ChatSystem]
    votes: Path
    reports: Path
    questions: list[tuple[str, str]] = field(default_factory=list)
    """(id, text): the arena's question set."""
    examples: tuple[str, ...] = ()
    rate: RateLimit = field(default_factory=lambda: RateLimit(30))
    concurrency: int = 8
    """Answers at work at a time; those beyond wait."""
    queue_size: int = 64
    """Questions that wait; those beyond are told so."""
    defaults: Settings = field(default_factory=Settings)
    seed: int | None = None
    """Of the arena's shuffling; None draws one."""
    visitors: Visitors = field(default_factory=Visitors)
    loader: ModelLoader | None = None
    """What loads a real small model when a visitor asks for it; None where that is not offered."""
    conversations: Path | None = None
    """Where the server keeps conversations, a user's apart from another's; None: each visitor's browser keeps them."""
    _stops: dict[str, asyncio.Event] = field(default_factory=dict)
    _line: Line = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._line = Line(self.concurrency)

    def system(self, name: str | None) -> ChatSystem:
        """By name; the first for an unknown one, as a page of an earlier server may send."""
        return next((system for system in self.systems if system.name == name), self.systems[0])

    def before_and_after(self) -> tuple[ChatSystem, ChatSystem] | None:
        """The built-in model before and after its alignment; None where not both are served with a reward model."""
        served = {system.name: system for system in self.systems if system.scale is not None}
        before, after = served.get(BEFORE), served.get(AFTER)
        return None if before is None or after is None else (before, after)

    @contextmanager
    def work(self, where: str, asker: Asker) -> Iterator[asyncio.Event]:
        """For the time of one answer; yields the event that `stop` sets.

        Raises:
            NotNow: too many questions in a minute, or this visitor's earlier answer is still being written, or too
                many others wait.
        """
        if not self.rate.admits(asker.visitor, asker.address):
            raise NotNow(TOO_FAST, busy=False)
        key = f"{where}/{asker.page}"
        if key in self._stops:
            raise NotNow(BUSY, busy=True)
        if len(self._stops) >= self.concurrency + self.queue_size:
            raise NotNow(FULL, busy=False)
        self._stops[key] = stop = asyncio.Event()
        try:
            yield stop
        finally:
            del self._stops[key]

    def place(self) -> AbstractContextManager[Place]:
        """A place among the answers that wait."""
        return self._line.join()

    def stop(self, where: str, page: str | None) -> None:
        """End what this page waits for, if anything."""
        if stop := self._stops.get(f"{where}/{page}"):
            stop.set()

    def busy(self, where: str, page: str | None) -> bool:
        """Whether an answer for this page waits or is being written."""
        return f"{where}/{page}" in self._stops

    def leave(self, page: str | None) -> None:
        """The page is closed: end all of it."""
        for key, stop in self._stops.items():
            if key.endswith(f"/{page}"):
                stop.set()


async def draw(
    system: ChatSystem, messages: Sequence[Mapping[str, str]], settings: Settings, stop: asyncio.Event
) -> AsyncIterator[Step]:
    """One answer as it grows; the last step is `done`. Setting `stop`, or leaving early, ends the work upstream."""
    began = time.perf_counter()
    news: asyncio.Queue[Draft | Delta | End | EndpointError] = asyncio.Queue(_UNREAD)
    showing_s = 0.0
    reply = ChatReply("", system.name)
    is_draft = False

    async def read() -> None:
        try:
            drafts = settings.best_of > 1 and (await system.abilities()).racing
            stream = system.endpoint.stream(await system.served(), messages, settings, drafts=drafts)
            async with aclosing(stream) as events:  # type: ignore[type-var]
                async for event in events:
                    await news.put(event)
        except EndpointError as error:
            await news.put(error)

    reader = asyncio.create_task(read())
    try:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(TICK_S, REST * showing_s))
            before = reply.text
            while not news.empty():
                event = news.get_nowait()
                if isinstance(event, Draft):
                    reply, is_draft = replace(reply, text=event.text.lstrip()), True
                elif isinstance(event, Delta):
                    told = "" if is_draft else reply.text
                    reply, is_draft = replace(reply, text=told + event.text if told else event.text.lstrip()), False
                elif isinstance(event, EndpointError):
                    yield Step(replace(reply, ending="broken", seconds=time.perf_counter() - began), True, event)
                    return
                else:
                    yield await _finished(system, messages, _ended(reply, event, time.perf_counter() - began), event)
                    return
            if stop.is_set():
                yield Step(replace(reply, ending="stopped", seconds=time.perf_counter() - began), True)
                return
            if reader.done() and news.empty():  # only a bug ends it without a word
                reader.result()
                raise RuntimeError("the stream ended without an end")
            if reply.text != before:
                shown = time.perf_counter()
                yield Step(reply)
                showing_s = time.perf_counter() - shown
    finally:
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader


def _ended(reply: ChatReply, end: End, seconds: float) -> ChatReply:
    return replace(
        reply,
        text=reply.text.rstrip(),
        reward=end.reward,
        candidates=end.candidates,
        tokens=end.tokens,
        seconds=seconds,
        ending=end.ending,
    )


async def _finished(system: ChatSystem, messages: Sequence[Mapping[str, str]], reply: ChatReply, end: End) -> Step:
    """The whole answer with its reward, where one can be had, and where that reward stands."""
    question = str(messages[-1]["content"])
    note = hint(question) if system.is_toy else ""
    if end.fallback:
        return Step(reply, True, note=f"Answered without best-of-N: {end.fallback}. {note}".strip())
    try:
        if reply.reward is None and reply.text and (await system.abilities()).rewards:
            (reward,) = await system.endpoint.rewards([[*messages, {"role": "assistant", "content": reply.text}]])
            reply = replace(reply, reward=reward)
    except EndpointError as error:
        return Step(reply, True, note=f"The answer has no reward. {error}")
    if system.scale is not None:
        reply = replace(reply, percentile=await system.scale.percentile(question, reply.reward))
    return Step(reply, True, note=note)


# --- several answers at once


@dataclass(frozen=True, slots=True)
class Draw:
    """One of the answers to draw."""

    system: ChatSystem
    messages: Sequence[Mapping[str, str]]
    settings: Settings


async def draw_together(draws: Sequence[Draw], stop: asyncio.Event) -> AsyncIterator[list[Step | None]]:
    """How far each answer is, whenever one of them has grown; ends when all are done.

    Leaving early, or setting `stop`, ends the work upstream.
    """
    latest: list[Step | None] = [None] * len(draws)
    news: asyncio.Queue[tuple[int, Step | Exception]] = asyncio.Queue()

    async def follow(place: int, one: Draw) -> None:
        try:
            async for step in draw(one.system, one.messages, one.settings, stop):
                news.put_nowait((place, step))
        except Exception as error:  # raised again below, where somebody waits for it
            news.put_nowait((place, error))

    tasks = [asyncio.create_task(follow(place, one)) for place, one in enumerate(draws)]
    try:
        while not all(step and step.done for step in latest):
            arrived = [await news.get()]
            while not news.empty():
                arrived.append(news.get_nowait())
            for place, step in arrived:
                if isinstance(step, Exception):
                    raise step
                latest[place] = step
            shown = time.perf_counter()
            yield list(latest)
            await asyncio.sleep(REST * (time.perf_counter() - shown))
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
