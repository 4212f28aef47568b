"""Several answers drawn at once: two systems side by side, or several candidates of one system."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from serving.chat.conversation import Settings
from serving.chat.session import REST, ChatSystem, Step, draw


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
