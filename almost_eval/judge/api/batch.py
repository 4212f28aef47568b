"""One call of `JudgeClient.stream` by the provider's batch API: half the price, and up to a day of waiting.

Requests go into files of up to 50,000; each file is one batch. What comes back is stored before it is handed on, and
what failed for a passing reason (the batch expired, a 500) goes into the next batch. Where a bound on the cost does
not allow all requests at their worst, the rest waits until it is known what the first ones cost. Everything that is
under way is in the journal (see `batch_ledger`): a killed command takes up its batches where they are.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from almost_eval.errors import InputError, RunError
from almost_eval.judge.api.batch_api import BatchAPI, NotThere
from almost_eval.judge.api.batch_files import MAX_BYTES, MAX_REQUESTS, input_line
from almost_eval.judge.api.batch_ledger import (
    CREATED,
    CREATING,
    PLANNED,
    UPLOADED,
    BatchItem,
    BatchLedger,
    ProviderBatch,
)
from almost_eval.judge.api.batch_steps import BatchSteps, QueueFull, SettledItem, began, counts_in_words
from almost_eval.judge.api.bills import Bill, JudgeMeans
from almost_eval.judge.api.endpoint import EXCHANGED, KEPT, JudgeEndpoint, Trouble, duration
from almost_eval.judge.api.journal import BATCH
from almost_eval.judge.api.session import MOST_EXCHANGES, REFUSALS, JudgeSession
from almost_eval.judge.records import Failure, JudgeRequest, Reply
from almost_eval.types import JSONObject

MAX_ROUNDS = 3
"""Batches that one request may be in, where it fails for a reason that may pass, before it counts as failed."""
FIRST_PAUSE, LAST_PAUSE = 5.0, 60.0
"""Seconds between two looks at the batches: it grows by half each time."""
TELL = 30.0
"""Seconds between two lines about a batch, where stderr is no terminal."""
OUTAGE = 1800.0
"""Seconds without an answer about a batch until the command ends."""
OVERDUE = 48 * 3600.0
"""Seconds after which a batch that still has not ended is given up: its window is 24 hours."""

ENDED = ("completed", "failed", "expired", "cancelled")
_ON_ITS_WAY = ("validating", "in_progress", "finalizing", "cancelling")
_PASSING = ("timeout", "connection", "rate_limited", "cut", "html", "malformed", "budget")
"""Reasons for which the request that went ahead goes into the batch too; and those that begin with `http_5`."""

_Outcome = tuple[list[int], Reply | Failure]


class BatchSession:
    """One call of `stream` in batches.

    Args:
        requests: what to send, and what to pass over.
        missing: digest -> places in `requests` that hold this request; each digest is sent once.
        endpoint: where to.
        means: of the client.
        wait: seconds until the command ends though a batch has not; None waits for all.
        ahead: what later calls will request: it goes into the same batches, and its replies wait in the journal.
    """

    def __init__(
        self,
        requests: Sequence[JudgeRequest],
        missing: dict[str, list[int]],
        endpoint: JudgeEndpoint,
        means: JudgeMeans,
        wait: float | None,
        ahead: Sequence[Sequence[JudgeRequest]] = (),
    ) -> None:
        self.requests = requests
        self.ahead = ahead
        self.missing = dict(missing)
        self.endpoint = endpoint
        self.means = means
        self.ledger = BatchLedger(means.journal)
        self.spent_before = means.budget.spent - sum(means.budget.of_ledger(means.journal.ledger()))
        """USD that the journal does not hold, or holds at another judge's price."""
        self.until = None if wait is None else time.monotonic() + wait
        self.largest = MAX_REQUESTS
        self.is_held = False
        """The provider's queue is full of our own batches: no other is ordered before one of them ends."""
        self.tries: Counter[str] = Counter()
        self.exchanges: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        """Digest -> why it is asked again."""
        self.statuses: dict[int, str] = {}
        self.told_at = time.monotonic()

    def outcomes(self) -> Generator[_Outcome, None, None]:
        """Run until every request has an outcome; outcomes as they are stored."""
        with BatchAPI(self.endpoint, self.means.notice, self.means.random) as api:
            self.api = api
            self.steps = BatchSteps(api, self.ledger, self.endpoint, self.means.notice)
            api.check()
            try:
                yield from self._run()
            except KeyboardInterrupt:
                self._tell_interrupted()
                raise

    def _run(self) -> Iterator[_Outcome]:
        yield from self._untold()
        batches = self._open()
        for batch in batches:
            self.means.notice(f"going on with batch {batch.name or 'that was not ordered yet'}: {batch.n} requests")
        if not batches and self.missing and not self.means.journal.has_reply_of(self.endpoint.judge):
            yield from self._probe()
        while self.missing:
            self._plan()
            if not self._open():
                yield from self._unaffordable()
                return
            yield from self._until_one_ends()

    def _open(self) -> list[ProviderBatch]:
        """Batches at this endpoint of which something is still to come."""
        batches = []
        for batch in self.ledger.open():
            if batch.endpoint == self.endpoint.name:
                batches.append(batch)
            elif self.missing.keys() & self.ledger.unsettled([batch]):
                raise InputError(
                    f"batch {batch.name or batch.key[:12]} of this folder holds these requests, under "
                    f"{batch.endpoint}; go on with that --judge-base-url, or choose another --output"
                )
        return batches

    # --- what is sent

    def _untold(self) -> Iterator[_Outcome]:
        """Failures that an earlier process stored and could not hand on."""
        for digest, failure in self.ledger.untold().items():
            if (indices := self.missing.pop(digest, None)) is not None:
                self.means.stats.failed[failure.reason] += len(indices)
                yield indices, failure
                self.ledger.tell(digest)

    def _probe(self) -> Iterator[_Outcome]:
        """Send one request ahead of all, by itself: a parameter that is refused is refused once, and not in a day."""
        self.means.notice("one request goes ahead of the batch, at the full price: it shows what the judge takes")
        for place, digest in enumerate(list(self.missing)[:REFUSALS], 1):
            alone = replace(self.means, concurrency=1)
            session = JudgeSession(self.requests, [self.missing[digest]], [self.endpoint], alone)
            try:
                with closing(session.outcomes()) as outcomes:
                    for indices, outcome in outcomes:
                        if isinstance(outcome, Failure) and outcome.reason.startswith((*_PASSING, "http_5")):
                            self.means.stats.failed[outcome.reason] -= len(indices)
                            continue
                        del self.missing[digest]
                        yield indices, outcome
                return
            except InputError:
                if not session.undecided or place == min(REFUSALS, len(self.missing)):
                    raise  # not this request's own fault

    def _plan(self) -> None:
        """Write down batches of what is in none, as far as the money goes."""
        batches = self._open()
        if self.is_held and batches:
            return
        self.is_held = False
        if (unbounded := self.means.unbounded(self.endpoint)) is not None:
            raise unbounded
        self._count_spent()
        under_way = self.ledger.unsettled(batches)
        items: list[BatchItem] = []
        size, left = 0, 0
        wanted = ((digest, self.requests[indices[0]]) for digest, indices in self.missing.items())
        for digest, request in itertools.chain(wanted, self._wanted_later()):
            if digest in under_way:
                continue
            worst = self.means.budget.worst(request, BATCH)
            if left or not self.means.budget.reserve(worst):
                left += digest in self.missing
                continue
            self.means.budget.settle(worst, worst)
            item = BatchItem(digest, request, self.endpoint.parameters.of(request), self.means.budget.most(request))
            length = len(input_line(self.endpoint, digest, request, item.sent))
            if items and (len(items) >= self.largest or size + length > MAX_BYTES):
                self.ledger.plan(self.endpoint.name, self.endpoint.account, items)
                items, size = [], 0
            items.append(item)
            size += length
        if items:
            self.ledger.plan(self.endpoint.name, self.endpoint.account, items)
        if left and (items or batches):
            self.means.notice(
                f"{left} requests wait for the next batch: at their worst they could exceed --max-cost "
                f"{self.means.budget.max_cost:g} USD before it is known what the first ones cost"
            )

    def _wanted_later(self) -> Iterator[tuple[str, JudgeRequest]]:
        """What later calls request, once: what has a reply or failed for good is not sent again."""
        ahead, self.ahead = self.ahead, ()
        failed = self.ledger.untold() if ahead else {}
        for request in itertools.chain.from_iterable(ahead):
            digest = request.digest
            if digest not in self.missing and digest not in failed and self.means.journal.get(digest) is None:
                yield digest, request

    def _count_spent(self) -> None:
        """Take what is spent from the ledger: what is under way stands there at its most."""
        self.means.budget.spent = self.spent_before + sum(self.means.budget.of_ledger(self.means.journal.ledger()))

    def _unaffordable(self) -> Iterator[_Outcome]:
        """What cannot be sent within the budget, with nothing under way that could turn out cheaper."""
        for digest in list(self.missing):
            worst = self.means.budget.worst(self.requests[self.missing[digest][0]], BATCH)
            yield self._failed(digest, Failure("budget", self.means.budget.too_dear(worst)))

    # --- what comes back

    def _until_one_ends(self) -> Iterator[_Outcome]:
        """Order what is not ordered yet, then look at all batches until one has ended; its outcomes."""
        batches = [self._ordered(batch) for batch in self._open()]
        pause, silent_since = FIRST_PAUSE, time.monotonic()
        while True:
            for batch in batches:
                try:
                    state = self.api.retrieve(batch.name)
                except NotThere:
                    yield from self._taken(self.steps.lost(batch))
                    return
                except RunError as error:
                    if time.monotonic() - silent_since > OUTAGE:
                        raise
                    self.means.notice(f"{error}; looking again")
                    continue
                silent_since = time.monotonic()
                self._tell(batch, state)
                if state.get("status") in ENDED:
                    yield from self._taken(self.steps.collect(batch, state), batch)
                    return
                if time.time() - began(state, batch) > OVERDUE:
                    raise RunError(f"batch {batch.name} has not ended {duration(OVERDUE)} after it was ordered; {KEPT}")
            if self.until is not None and time.monotonic() + pause > self.until:
                time.sleep(max(0.0, self.until - time.monotonic()))
                names = ", ".join(batch.name for batch in batches)
                raise RunError(f"batch {names} has not ended within --batch-wait; it goes on, and {KEPT}")
            time.sleep(pause)
            pause = min(1.5 * pause, LAST_PAUSE)

    def _ordered(self, batch: ProviderBatch) -> ProviderBatch:
        if batch.state not in (PLANNED, UPLOADED, CREATING):
            return batch
        batch = self.steps.order(batch)
        assert batch.state == CREATED
        self.means.notice(
            f"batch {batch.name} is ordered: {batch.n} requests, a day at most. Stop this command when you like: the "
            "batch goes on, and the same command takes its replies"
        )
        return batch

    def _taken(self, chunks: Iterator[list[SettledItem]], batch: ProviderBatch | None = None) -> Iterator[_Outcome]:
        """Outcomes of a batch, and what is asked again."""
        fatal: Trouble | None = None
        replies = 0
        try:
            for chunk in chunks:
                for settled in chunk:
                    self._book(settled)
                    outcome = settled.outcome
                    if isinstance(outcome, Reply):
                        replies += 1
                    elif outcome.fatal is not None or (
                        outcome.refused is not None and not self.means.journal.has_reply_of(self.endpoint.judge)
                    ):
                        fatal = fatal or outcome
                        continue
                    yield from self._outcome(settled)
        except QueueFull as error:
            self._shrink(batch, error)
        self._count_spent()
        if fatal is not None and (fatal.fatal is not None or not replies):
            raise fatal.fatal or fatal.refused or RunError(fatal.message)

    def _outcome(self, settled: SettledItem) -> Iterator[_Outcome]:
        """The outcome of one request; nothing where it will be asked again, or belongs to another call."""
        digest, outcome = settled.digest, settled.outcome
        if digest not in self.missing:
            return
        if isinstance(outcome, Reply):
            self.means.stats.replied += 1
            yield self.missing.pop(digest), outcome
            return
        self.reasons[digest] = outcome.reason
        if outcome.reason == EXCHANGED and self.exchanges[digest] < MOST_EXCHANGES:
            self.exchanges[digest] += 1
            self.means.keep_exchange(self.endpoint, outcome)
            return
        self.tries[digest] += 1
        if outcome.again and self.tries[digest] < MAX_ROUNDS:
            return
        yield self._failed(digest, Failure(outcome.reason, outcome.message))
        if not outcome.again:
            self.ledger.tell(digest)

    def _failed(self, digest: str, failure: Failure) -> _Outcome:
        indices = self.missing.pop(digest)
        self.means.stats.failed[failure.reason] += len(indices)
        return indices, failure

    def _book(self, settled: SettledItem) -> None:
        if settled.digest in self.reasons:
            self.means.stats.retried[self.reasons.pop(settled.digest)] += 1
        else:
            self.means.stats.sent += 1
        self.means.book(Bill.of(settled.outcome), self.means.budget.worst(settled.request, BATCH), BATCH)

    def _shrink(self, batch: ProviderBatch | None, error: QueueFull) -> None:
        """The provider's queue is full: wait for our own batches, else try with half as many requests."""
        self.is_held = bool(self._open())
        if not self.is_held:
            assert batch is not None
            if batch.n == 1:
                raise RunError(f"the endpoint {self.endpoint.base_url} takes no batch now: {error}; {KEPT}") from None
            self.largest = -(-batch.n // 2)
        how = "the next waits until one of them ends" if self.is_held else f"the next holds {self.largest} requests"
        self.means.notice(f"the provider's queue for batches is full ({error}); {how}")

    # --- what is told

    def _tell(self, batch: ProviderBatch, state: JSONObject) -> None:
        """A line when the status changes; where nobody sees a bar, one every half minute too."""
        status, now = str(state.get("status")), time.monotonic()
        is_new = self.statuses.get(batch.id) != status
        self.statuses[batch.id] = status
        if is_new or (now - self.told_at > TELL and not sys.stderr.isatty()):
            self.told_at = now
            strange = "" if status in (*ENDED, *_ON_ITS_WAY) else " (a status that is not known here; waiting)"
            self.means.notice(self.endpoint.words(f"batch {batch.name}: {counts_in_words(state, batch)}{strange}"))

    def _tell_interrupted(self) -> None:
        names = [batch.name for batch in self.ledger.open() if batch.name]
        if names:
            self.means.notice(
                f"batch {', '.join(names)} goes on at the provider, and is billed; the same command takes its replies"
            )
