"""One call of `JudgeClient.stream`: the workers in their thread, and what they do about what goes wrong.

Each worker sends one request after the other. A failure belongs to the request, or to the endpoint: in the second case
the session ends, and what is on its way is awaited, because it will be billed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue

from almost_eval.errors import InputError, RunError
from almost_eval.judge.api.adaptive import MAX_PAUSE, backoff
from almost_eval.judge.api.bills import Bill, JudgeMeans
from almost_eval.judge.api.endpoint import EXCHANGED, KEPT, THOUGHT_ONLY, JudgeEndpoint, Trouble, duration
from almost_eval.judge.api.places import JudgePlace, JudgePlaces
from almost_eval.judge.records import Failure, JudgeRequest, Reply

BREAKER = 20
"""Requests that fail for good in a row, all for the endpoint's sake, before the run ends instead of trying the rest."""

REFUSALS = 3
"""Requests refused as invalid (400) before anything passes, until it is taken for the settings' fault."""

CLOSING = 1.0
"""Seconds that the loop has to close its connections when the caller has had enough."""

PROBE = 0.6
"""Seconds that all other requests wait for the first one: a refused parameter is refused once, not by each of them.
A refusal comes at once; a review takes longer, and nobody waits for it."""

TOLD = 20.0
"""Seconds of a wait from which on it is told."""

MOST_EXCHANGES = 8
"""Parameters of one request that an endpoint may refuse, one after the other."""


_Outcome = tuple[list[int], Reply | Failure]


class JudgeSession:
    """One call of `stream`: the workers, in their thread.

    Args:
        requests: what to send, and what to pass over.
        groups: places in `requests`, identical ones together: each group is sent once.
        endpoints: where to; several serve the same judge.
        means: of the client.
    """

    def __init__(
        self,
        requests: Sequence[JudgeRequest],
        groups: list[list[int]],
        endpoints: Sequence[JudgeEndpoint],
        means: JudgeMeans,
    ) -> None:
        self.requests = requests
        self.groups = groups
        self.endpoints = endpoints
        self.means = means
        self.waits_until = 0.0
        """The loop's clock, s: up to when the user was told to wait."""
        self.is_probing = False
        self.ready: SimpleQueue[_Outcome | BaseException | None] = SimpleQueue()
        """Outcomes; then None, or what ended it."""
        self.ending: BaseException | None = None
        self.undecided: list[tuple[list[int], Trouble]] = []
        self.lost_in_a_row = 0
        self.sending: set[asyncio.Task[None]] = set()
        self.workers: list[asyncio.Task[None]] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self.main: asyncio.Task[None] | None = None

    def outcomes(self) -> Generator[_Outcome, None, None]:
        """Run until all is sent, in the caller's thread; outcomes as they come."""
        started = threading.Event()
        thread = threading.Thread(target=self._thread, args=(started,), name="judge", daemon=True)
        thread.start()
        try:
            started.wait()
            while True:
                outcome = self.ready.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome is None:
                    return
                yield outcome
                self._call(self.room.release)
        finally:
            if self.main is not None:
                self._call(self.main.cancel)
            thread.join(CLOSING)  # a daemon: a connection that does not close holds nothing up

    def _call(self, function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop has ended
            assert self.loop is not None  # `_thread` has begun
            self.loop.call_soon_threadsafe(function)

    def _thread(self, started: threading.Event) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            self.main = asyncio.current_task()
            self.room = asyncio.Semaphore(2 * self.means.concurrency)
            self.settled = asyncio.Event()
            self.probed = asyncio.Event()
            started.set()
            await self._run()

        try:
            asyncio.run(main())
            self.ready.put(self.ending)
        except BaseException as error:  # it is raised where somebody reads it
            self.ready.put(error)
        finally:
            started.set()

    async def _run(self) -> None:
        self.places = JudgePlaces(self.endpoints, self.means)
        todo = iter(self.groups)
        async with self.places.connected():
            count = min(self.means.concurrency, len(self.groups))
            self.workers = [asyncio.create_task(self._work(todo)) for _ in range(count)]
            await asyncio.gather(*self.workers, return_exceptions=True)
        if self.undecided and self.ending is None:
            self.ending = self.undecided[0][1].refused

    @property
    def _where(self) -> str:
        """The endpoints, for errors."""
        one, *others = (endpoint.base_url for endpoint in self.endpoints)
        return f"each of the endpoints {', '.join([one, *others])}" if others else f"the endpoint {one}"

    def _end(self, error: BaseException) -> None:
        """Send nothing more; what is on its way is awaited, for it is paid for."""
        self.ending = self.ending or error
        for worker in self.workers:
            if worker not in self.sending:
                worker.cancel()

    async def _work(self, todo: Iterator[list[int]]) -> None:
        """Send one request after the other until there are none."""
        try:
            for indices in todo:
                await self.room.acquire()
                outcome = await self._reply_to(self.requests[indices[0]])
                if isinstance(outcome, Reply):
                    self.means.stats.replied += 1
                    self.lost_in_a_row = 0
                    self.ready.put((indices, outcome))
                    while self.undecided:
                        self._fail(*self.undecided.pop())
                elif outcome is not None:
                    self._decide(indices, outcome)
                if self.ending is not None:
                    return
        except Exception as error:
            self._end(error)

    def _decide(self, indices: list[int], trouble: Trouble) -> None:
        """Whether the fault is this request's, or concerns all of them."""
        proven = self.means.stats.replied + self.means.stats.cached > 0
        if trouble.fatal is not None:
            self._end(trouble.fatal)
        elif trouble.refused is not None and not proven:
            self.undecided.append((indices, trouble))
            if len(self.undecided) >= REFUSALS:
                self._end(trouble.refused)
        elif trouble.reason == "connection" and not proven:
            why = (
                f"gives no answer: {trouble.message}; look into its log"
                if trouble.may_be_billed
                else "is not reachable; start it"
            )
            self._end(InputError(f"{self._where} {why}, or check --judge-base-url"))
        else:
            self._fail(indices, trouble)

    def _fail(self, indices: list[int], trouble: Trouble) -> None:
        self.means.stats.failed[trouble.reason] += len(indices)
        self.ready.put((indices, Failure(trouble.reason, trouble.message)))
        if trouble.again or trouble.reason == THOUGHT_ONLY:
            self.lost_in_a_row += 1
            if self.lost_in_a_row >= BREAKER:
                what = "has stopped answering" if trouble.again else "writes no verdict"
                self._end(
                    RunError(
                        f"{self._where} {what}: the last {self.lost_in_a_row} requests failed "
                        f"({trouble.message}); {KEPT}"
                    )
                )

    async def _reply_to(self, request: JudgeRequest) -> Reply | Trouble | None:
        """Send until there is a reply or no hope; None where it was stopped in between."""
        worst = self.means.budget.worst(request)
        attempts, exchanges, answered_before, sent = 0, 0, self.means.stats.replied, False
        why = ""
        await self._probe()
        while True:
            if not await self._afford(worst):
                return Trouble("budget", self.means.budget.too_dear(worst))
            try:
                place = await self.places.take()
            except asyncio.CancelledError:
                self.means.budget.settle(worst, 0.0)
                raise
            if sent:
                self.means.stats.retried[why] += 1
            else:
                self.means.stats.sent += 1
            sent = True
            outcome = await self._send(request, worst, place)
            if not isinstance(outcome, Reply) and outcome.reason == EXCHANGED and exchanges < MOST_EXCHANGES:
                exchanges += 1
                why = EXCHANGED
                self.means.keep_exchange(place.endpoint, outcome)
                if (unbounded := self.means.unbounded(place.endpoint)) is not None:
                    return replace(outcome, fatal=unbounded)
                continue
            self.probed.set()
            if isinstance(outcome, Reply):
                return outcome
            why = outcome.reason
            if isinstance(outcome.fatal, RunError) and self.places.leave(place, outcome.message):
                continue
            if not outcome.again:
                return outcome
            if outcome.reason != "rate_limited" or self.means.stats.replied == answered_before:
                attempts += 1
            answered_before = self.means.stats.replied
            if attempts >= self.means.max_attempts:
                return outcome
            if self.ending is not None:
                return None
            if self.places.others_are_ready(place):
                continue
            self._tell_wait(outcome)
            if why != "rate_limited":
                await asyncio.sleep(
                    max(backoff(attempts, self.means.random), min(outcome.retry_after or 0.0, MAX_PAUSE))
                )

    async def _probe(self) -> None:
        """Let one request go first, until it is known what the endpoint takes, or it takes its time."""
        if self.is_probing and not self.probed.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self.probed.wait(), PROBE)
            self.probed.set()
        self.is_probing = True

    def _tell_wait(self, trouble: Trouble) -> None:
        """Say for what and how long the run waits, once for each wait."""
        pause = min(trouble.retry_after or 0.0, MAX_PAUSE)
        until = asyncio.get_running_loop().time() + pause
        if pause >= TOLD and until > self.waits_until + TOLD / 2:
            self.waits_until = until
            at = time.strftime("%H:%M:%S", time.localtime(time.time() + pause))
            self.means.notice(f"waiting {duration(pause)}, until {at}, as the endpoint asks to ({trouble.message})")

    async def _send(self, request: JudgeRequest, worst: float, place: JudgePlace) -> Reply | Trouble:
        """Send once, and commit the reply."""
        task: asyncio.Task[None] = asyncio.current_task()  # type: ignore[assignment]
        self.sending.add(task)
        outcome: Reply | Trouble | None = None
        number: int | None = None
        began = time.monotonic()
        try:
            number = self.means.journal.begin(request, self.means.budget.most(request))
            outcome = await place.endpoint.send(place.connection, request)
            if isinstance(outcome, Reply):
                self.means.journal.put(request, outcome, number)
        finally:
            self.sending.discard(task)
            self._settle(outcome, worst, number)
            self.places.give_back(place, outcome, time.monotonic() - began)
        return outcome

    def _settle(self, outcome: Reply | Trouble | None, worst: float, number: int | None) -> None:
        """Book what was billed of `worst` USD that were set aside; `outcome` is None where it was cancelled on its way,
        the `number` in the ledger where it never left.
        """
        bill = Bill(False, None, None) if number is None else Bill.of(outcome)
        if number is not None and not isinstance(outcome, Reply):  # a reply is settled as it is stored
            with suppress(RunError):  # then it stays at its most
                self.means.journal.settle(number, bill.state, bill.usage, bill.cost)
        self.means.budget.settle(worst, self.means.book(bill, worst))
        self.settled.set()

    async def _afford(self, worst: float) -> bool:
        """Set the worst case aside. What is on its way may turn out cheaper: it is awaited before the answer is no."""
        while not self.means.budget.reserve(worst):
            if not self.means.budget.pending:
                return False
            self.settled.clear()
            await self.settled.wait()
        return True
