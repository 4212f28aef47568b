"""The online judge: many requests to one endpoint, each reply in the journal before anything else is done with it.

The caller reads a plain iterator. An event loop in a thread of its own holds the requests on their way, so that they
go on while the caller works, and Ctrl-C in the caller ends all of it at once. At most `concurrency` requests are
under way, and twice as many outcomes wait to be read: memory does not grow with the number of requests.

What is sent again: timeouts, lost connections, 408, 409, 5xx, answers that are cut, no JSON or no completion; up to
`max_attempts` times in all, after an exponential back-off with full jitter. After a 429 a request is sent again when
there is a place (see `adaptive`). It counts as an attempt only if nothing at all was answered since the request's last
one, since an endpoint that works through its queue gets to every request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from almost_eval.errors import InputError
from almost_eval.judge.api.bills import ClientStats, JudgeMeans
from almost_eval.judge.api.cost import Budget
from almost_eval.judge.api.endpoints import judge_endpoints, serving_the_same
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.api.session import JudgeSession
from almost_eval.judge.records import Failure, JudgeRequest, Reply
from almost_eval.progress import Progress

if TYPE_CHECKING:
    from almost_eval.judge.api.batch import BatchSession


class JudgeClient:
    """A judge at OpenAI or any compatible endpoint.

    Args:
        judge: the model's name; requests to another one are refused.
        journal: open; where replies are kept and looked up.
        base_url: the endpoint, up to and including `/v1`, or several by commas, which share the requests; None is
            `OPENAI_BASE_URL`, else OpenAI's.
        timeout: seconds that one answer may take.
        max_attempts: sendings of one request, the first included.
        concurrency: requests on their way at a time, to all endpoints together; fewer where an endpoint refuses.
        budget: what may be spent; by default no bound, at the price of the table.
        notice: takes a line that the user must see at once; None shows none.
        batch: send by the provider's batch API, cheaper and slower; see `batch`.
        batch_wait: seconds to wait for batches at most, from the start of a `stream`; None waits until they end.
        seed: of the jitter.

    Raises:
        InputError: no key for OpenAI's endpoint, a `base_url` that is no address or holds anything secret, a number
            out of range.
    """

    def __init__(
        self,
        judge: str,
        journal: Journal,
        *,
        base_url: str | None = None,
        timeout: float = 120.0,
        max_attempts: int = 6,
        concurrency: int = 32,
        budget: Budget | None = None,
        notice: Callable[[str], None] | None = None,
        batch: bool = False,
        batch_wait: float | None = None,
        seed: int = 0,
    ) -> None:
        if timeout <= 0 or max_attempts < 1 or concurrency < 1:
            raise InputError("timeout must be above 0 seconds, max_attempts and concurrency 1 or more")
        self.judge = judge
        self.endpoints = judge_endpoints(judge, base_url, timeout)
        if batch and len(self.endpoints) > 1:
            raise InputError("--batch goes to one endpoint, which works on it by itself; give one --judge-base-url")
        self.endpoint = self.endpoints[0]
        self.journal = journal
        self.max_attempts = max_attempts
        self.concurrency = concurrency
        self.budget = budget or Budget(judge=judge)
        self.notice = notice or Progress().notice
        self.batch = batch
        self.batch_wait = batch_wait
        self.ahead: Sequence[Sequence[JudgeRequest]] = ()
        """What later calls of `stream` will request: with `batch` it goes into the same batches."""
        for endpoint in self.endpoints:
            endpoint.parameters.merge(journal.note(endpoint.name))
        self._is_checked = False
        self.random = random.Random(seed)
        self.stats = ClientStats(cost=None if self.budget.price is None else 0.0)

    def stream(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Reply | Failure]]:
        """Yield (index, outcome) of every request: first what is stored, then each as its reply is committed.

        Closing the iterator, or an interrupt, ends everything that is under way; what was committed is kept.

        Raises:
            InputError: an endpoint refuses the key, the judge or the settings, or none is there at all.
            RunError: the endpoint stopped working, or a reply cannot be written down.
            StoreError: the journal was damaged.
        """
        missing: dict[str, list[int]] = {}
        for i in range(len(requests)):
            request = requests[i]
            if request.judge != self.judge:
                raise InputError(f"a request for the judge {request.judge!r} was given to {self.judge!r}")
            digest = request.digest
            stored = None if digest in missing else self.journal.get(digest)
            if stored is None:
                missing.setdefault(digest, []).append(i)
                continue
            self.stats.cached += 1
            yield i, stored
        if not missing:
            return
        session = self._session(requests, missing)
        with closing(session.outcomes()) as outcomes:
            for indices, outcome in outcomes:
                for copy, i in enumerate(indices):
                    if copy and isinstance(outcome, Reply):
                        self.stats.cached += 1
                        outcome = replace(outcome, cached=True)
                    yield i, outcome

    def _session(self, requests: Sequence[JudgeRequest], missing: dict[str, list[int]]) -> JudgeSession | BatchSession:
        """What sends the requests that no stored reply answers."""
        means = JudgeMeans(
            self.journal, self.budget, self.stats, self.random, self.concurrency, self.max_attempts, self.notice
        )
        if self.batch:
            from almost_eval.judge.api.batch import BatchSession

            return BatchSession(requests, missing, self.endpoint, means, self.batch_wait, self.ahead)
        self._refuse_what_is_in_a_batch(missing)
        if not self._is_checked:
            self.endpoints = serving_the_same(self.endpoints, self.notice, self.stats.lost)
            self._is_checked = True
        return JudgeSession(requests, list(missing.values()), self.endpoints, means)

    def _refuse_what_is_in_a_batch(self, missing: Mapping[str, object]) -> None:
        """Send nothing that a batch of an earlier command has under way: it would be paid for twice."""
        from almost_eval.judge.api.batch_ledger import BatchLedger

        ledger = BatchLedger(self.journal)
        for batch in ledger.release():
            if under_way := missing.keys() & ledger.unsettled([batch]):
                name = batch.name or "that may have been ordered"
                raise InputError(
                    f"{len(under_way)} of these requests are in batch {name} of an earlier command, and paid for; go "
                    "on with --batch, which takes its replies"
                )
