"""Where the next request to a judge goes, and when: a place at one of its endpoints.

Each endpoint has its own limit of requests on their way (see `adaptive`). Of those that have a place, the one that is
likely to answer first gets the request (see `models.endpoint_load`). One that fails rests; one that has no credit left,
or asks for hours, is left out from then on. A request that is sent again takes a place anew, as a rule at another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from almost_eval.judge.api.adaptive import AdaptiveLimit
from almost_eval.judge.api.bills import JudgeMeans
from almost_eval.judge.api.endpoint import JudgeEndpoint, Trouble
from almost_eval.judge.records import Reply
from almost_eval.models.endpoint_load import EndpointLoad, first_to_answer

if TYPE_CHECKING:
    import openai

_LOST = ("connection", "cut", "timeout")
"""Reasons of a `Trouble` that mean that an endpoint is not there any more."""


@dataclass(slots=True, eq=False)
class JudgePlace:
    """What is known of one endpoint in this session."""

    endpoint: JudgeEndpoint
    connection: openai.AsyncOpenAI
    limit: AdaptiveLimit
    load: EndpointLoad
    is_out: bool = False
    """No request goes there any more."""


class JudgePlaces:
    """The places of one event loop. Addresses that are lost or left out are added to the client's `stats.lost`."""

    def __init__(self, endpoints: Sequence[JudgeEndpoint], means: JudgeMeans) -> None:
        self._endpoints = endpoints
        self._means = means
        self._changed = asyncio.Event()
        self._places: list[JudgePlace] = []

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Inside, every endpoint has its client."""
        async with AsyncExitStack() as stack:
            for endpoint in self._endpoints:
                connection = await stack.enter_async_context(endpoint.connect())
                limit = AdaptiveLimit(self._means.concurrency, self._means.random, self._changed)
                self._places.append(JudgePlace(endpoint, connection, limit, EndpointLoad(endpoint.base_url)))
            yield

    async def take(self) -> JudgePlace:
        """Wait for a place, and take it."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            working = [place for place in self._places if not place.is_out]
            awake = [place for place in working if not place.load.rests(now)]
            free = [place for place in awake or working if place.limit.has_place(now)]
            if free:
                chosen = free[first_to_answer([place.load for place in free], now)]
                chosen.limit.take()
                chosen.load.running += 1
                return chosen
            waits = [place.limit.pause(now) for place in working] + [place.load.rests_until - now for place in working]
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min((wait for wait in waits if wait > 0), default=None)):
                    await self._changed.wait()

    def give_back(self, place: JudgePlace, outcome: Reply | Trouble | None, seconds: float) -> None:
        """Give a place back, with what came of it: None where the request was cancelled; after how many seconds."""
        place.load.running -= 1
        if isinstance(outcome, Reply):
            place.limit.answered()
        elif outcome is not None and outcome.reason == "rate_limited":
            place.limit.refused(outcome.retry_after)
        else:
            place.limit.release()
        if len(self._places) > 1:
            self._note(place, outcome, seconds)

    def _note(self, place: JudgePlace, outcome: Reply | Trouble | None, seconds: float) -> None:
        """What an outcome says of one endpoint of several."""
        line = ""
        if isinstance(outcome, Reply):
            line = place.load.answered(seconds)
        elif outcome is not None and (outcome.reason in _LOST or outcome.reason.startswith("http_5")):
            now, is_lost = asyncio.get_running_loop().time(), outcome.reason in _LOST
            line = place.load.failed(now, outcome.retry_after or 0.0, lost=is_lost)
            if is_lost:
                self._add_lost(place)
        if line:
            self._means.notice(line)

    def leave(self, place: JudgePlace, why: str) -> bool:
        """Send nothing there any more; False where there is no other endpoint."""
        if all(other is place or other.is_out for other in self._places):
            return False
        if not place.is_out:
            place.is_out = True
            self._add_lost(place)
            self._means.notice(f"{place.load.shown} is left out from now on ({why}); the others go on")
        return True

    def others_are_ready(self, place: JudgePlace) -> bool:
        """Whether a request that failed at one endpoint need not wait for it."""
        now = asyncio.get_running_loop().time()
        others = (other for other in self._places if other is not place and not other.is_out)
        return any(not other.load.rests(now) and other.limit.pause(now) <= 0 for other in others)

    def _add_lost(self, place: JudgePlace) -> None:
        if place.load.shown not in self._means.stats.lost:
            self._means.stats.lost.append(place.load.shown)
