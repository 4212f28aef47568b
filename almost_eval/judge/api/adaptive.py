"""How many requests may be on their way: learnt from what the endpoint refuses (429), not a setting.

Additive increase, and a decrease to what the endpoint holds at the moment it refuses. Where an endpoint allows N at a
time and more are sent, the N are still being answered when the others come back, so one burst of refusals finds N
exactly, and halving (TCP's rule) would idle half of it. Where it allows so many a minute, nothing is held when it
refuses, and the limit falls to 1. It then doubles each round up to half of the ceiling, and grows by one a round from
there. At a known number it stays, and tries one more every tenth round.
"""

from __future__ import annotations

import asyncio
import random

MAX_PAUSE = 3600.0
"""Seconds: the longest wait that a Retry-After can ask for. Where it is longer the run ends."""

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 8.0
_ROUNDS_BETWEEN_TRIALS = 10


def backoff(attempt: int, random_: random.Random) -> float:
    """Seconds to wait after the `attempt`-th failure (1, 2, ...): exponential, with full jitter."""
    return random_.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1)))


class AdaptiveLimit:
    """A gate for requests of one event loop to one endpoint.

    Args:
        ceiling: requests on their way at a time that are never exceeded; where it begins.
        random_: of the jitter.
        changed: set when there may be a place; by default an event of its own.
    """

    def __init__(self, ceiling: int, random_: random.Random, changed: asyncio.Event | None = None) -> None:
        self.ceiling = ceiling
        self.limit = float(ceiling)
        self.in_flight = 0
        self._known = ceiling  # where refusals began the last time, or the ceiling
        self._pauses = 0  # in a row, with no reply between them
        self._resume_at = 0.0  # the loop's clock, s
        self._changed = changed or asyncio.Event()
        self._random = random_

    def pause(self, now: float) -> float:
        """Seconds, from the loop's time `now` on, in which nothing is to be sent; 0 or less where there is no pause."""
        return self._resume_at - now

    def has_place(self, now: float) -> bool:
        """Whether one more request may be sent at the loop's time `now`."""
        return self.pause(now) <= 0 and self.in_flight < int(self.limit)

    def take(self) -> None:
        """Take a place; see `has_place`."""
        self.in_flight += 1

    def release(self) -> None:
        """Give the place back after a request that says nothing about load."""
        self.in_flight -= 1
        self._changed.set()

    def answered(self) -> None:
        """Give the place back after a reply: there may be room for more."""
        self._pauses = 0
        if self.limit >= self._known + 1 + 1 / _ROUNDS_BETWEEN_TRIALS:  # one more was held for a whole round
            self._known = self.ceiling
        if self.limit >= self._known:
            step = 1 / (self.limit * _ROUNDS_BETWEEN_TRIALS)
        else:
            step = 1.0 if self.limit < self._known / 2 else 1 / self.limit
        self.limit = min(self.ceiling, self.limit + step)
        self.release()

    def refused(self, retry_after: float | None) -> None:
        """Give the place back after a 429.

        Args:
            retry_after: seconds that the endpoint asks for; nothing at all is sent before they are over.
        """
        held = self.in_flight - 1
        self.limit = max(1.0, min(self.limit, held))
        self._known = held or self.ceiling
        if retry_after is None and not held:  # else the next reply says when
            self._pauses += 1
            retry_after = backoff(self._pauses, self._random)
        if retry_after:
            self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + min(retry_after, MAX_PAUSE))
        self.release()
