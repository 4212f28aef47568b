"""Who waits for an answer: first come, first served, each knowing the place and how long it has been and may be."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from statistics import fmean

_REMEMBERED = 20
"""Answers whose durations say how long the wait is."""


class Place:
    """One visitor's place; of the one event loop that the line belongs to."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._joined = time.monotonic()
        self._begun: float | None = None
        self._changed = asyncio.Event()

    @property
    def number(self) -> int:
        """1 for the next; 0 at work."""
        return 0 if self._begun is not None else self._line.waiting.index(self) + 1

    @property
    def waited_s(self) -> float:
        """Seconds since the question came."""
        return time.monotonic() - self._joined

    def sentence(self) -> str:
        """What the visitor is told meanwhile; nothing at work."""
        if not self.number:
            return ""
        left_s = self._line.expected_s(self.number)
        left = "" if left_s is None else f", about {max(1, round(left_s))} s more"
        return f"Number {self.number} in the queue, {self.waited_s:.0f} s so far{left}"

    async def come(self, stop: asyncio.Event, most_s: float | None = None) -> None:
        """Wait until this answer is at work, `stop` is set, or `most_s` seconds are over."""
        waits = {asyncio.ensure_future(event.wait()) for event in (stop, self._changed)}
        try:
            await asyncio.wait(waits, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def sentences(self, stop: asyncio.Event, every_s: float = 1.0) -> AsyncIterator[str]:
        """A sentence every second, until this answer is at work or stopped; none where there is no wait."""
        while not (stop.is_set() or self._begun is not None):
            await self.come(stop, every_s)
            yield self.sentence()

    def begin(self) -> None:
        """It is at work from now on; the line says so."""
        self._begun = time.monotonic()
        self._changed.set()

    @property
    def worked_s(self) -> float | None:
        """Seconds at work; None while it waits."""
        return None if self._begun is None else time.monotonic() - self._begun


class Line:
    """The answers at work, `size` at a time, and those that wait."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self.working: set[Place] = set()
        self.waiting: list[Place] = []

    @contextmanager
    def join(self) -> Iterator[Place]:
        """A place, for the time of one answer."""
        place = Place(self)
        self.waiting.append(place)
        self._advance()
        try:
            yield place
        finally:
            if place in self.working:
                self.working.remove(place)
                self._durations.append(place.worked_s or 0.0)
                self._advance()
            else:
                self.waiting.remove(place)

    def expected_s(self, number: int) -> float | None:
        """Seconds until place `number` is at work; None before there is an answer to judge by.

        By the latest answers, and by those at work that take longer already.
        """
        if not self._durations:
            return None
        usual_s = fmean(self._durations)
        slow = [worked for place in self.working if (worked := place.worked_s or 0.0) > usual_s]
        return fmean([*self._durations, *slow]) * number / self._size

    def _advance(self) -> None:
        while self.waiting and len(self.working) < self._size:
            place = self.waiting.pop(0)
            self.working.add(place)
            place.begin()
