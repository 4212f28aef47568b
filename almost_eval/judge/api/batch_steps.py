"""Ordering a batch, and taking what came of it: both may be killed anywhere, and are repeated from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.judge.api.batch_api import MAX_TRIES, BatchAPI, MaybeCreated, NotThere
from almost_eval.judge.api.batch_files import EXPIRED, OutputLine, input_line, outcome_of, output_lines
from almost_eval.judge.api.batch_ledger import CREATED, CREATING, DONE, PLANNED, UPLOADED, BatchLedger, ProviderBatch
from almost_eval.judge.api.endpoint import KEPT, JudgeEndpoint, Trouble, duration
from almost_eval.judge.records import JudgeRequest, Reply
from almost_eval.types import JSONMapping

ORDERS_TRIED = 4
"""Orders of one batch that may come to nothing (each looked for before the next) until the command ends."""
KEPT_FOR = 30 * 86400.0
"""Seconds that OpenAI keeps the files of a batch."""
AT_A_TIME = 500
"""Outcomes that are stored in one write."""
QUEUE_FULL = "token_limit_exceeded"
"""The code of a batch that failed because too many tokens are waiting in all batches of the account."""


class SettledItem(NamedTuple):
    """One request of a batch with what became of it; it is stored already."""

    digest: str
    request: JudgeRequest
    outcome: Reply | Trouble


class QueueFull(Exception):
    """The provider takes no batch of this size now; it worked on nothing, and the batch is taken back."""


class BatchSteps:
    """What is done with one batch after the other, each step written down in the ledger."""

    def __init__(
        self, api: BatchAPI, ledger: BatchLedger, endpoint: JudgeEndpoint, notice: Callable[[str], None]
    ) -> None:
        self._api = api
        self._ledger = ledger
        self._endpoint = endpoint
        self._notice = notice

    # --- ordering

    def order(self, batch: ProviderBatch) -> ProviderBatch:
        """Bring a batch to where it has an id: upload, order, and look for it where no clear answer came.

        Raises:
            InputError: the provider refuses it; it is taken back.
            RunError: the provider does not answer; the same command goes on from here.
        """
        for tries in range(1, ORDERS_TRIED + 1):
            if batch.state == PLANNED:
                batch = self._upload(batch)
            if batch.state == CREATING:  # by a process that was killed, or without a clear answer
                if batch.account != self._endpoint.account:
                    raise InputError(
                        "a batch of this folder was ordered with another key, and with this one it cannot be seen "
                        "whether it was created; set that key again"
                    )
                if (existing := self._api.find(batch.key, batch.time)) is not None:
                    name = str(existing.get("id"))
                    self._notice(f"batch {name} had been created already: it is not ordered again")
                    return self._ledger.mark(batch, CREATED, name=name)
                batch = self._ledger.mark(batch, UPLOADED)
            batch = self._ledger.mark(batch, CREATING)
            try:
                name = str(self._api.create(batch.file, batch.key)["id"])
                return self._ledger.mark(batch, CREATED, name=name)
            except MaybeCreated as error:
                self._notice(f"no clear answer to the order of a batch ({error}); looking whether it was created")
            except NotThere:  # a file that was just uploaded may not be there yet; an old one is gone
                batch = self._ledger.mark(batch, UPLOADED if tries < ORDERS_TRIED - 1 else PLANNED)
                self._api.pause(tries, "the input file is not there yet")
            except AlmostError:  # a clear refusal: nothing was created
                self._ledger.drop(batch)
                raise
        raise RunError(f"the endpoint {self._endpoint.base_url} creates no batch after {ORDERS_TRIED} orders; {KEPT}")

    def _upload(self, batch: ProviderBatch) -> ProviderBatch:
        lines = (input_line(self._endpoint, *item) for item in self._ledger.items(batch))
        file = self._api.upload(f"almost-{batch.key[:16]}.jsonl", b"".join(lines))
        return self._ledger.mark(batch, UPLOADED, file=file)

    # --- taking what came of it

    def collect(self, batch: ProviderBatch, state: JSONMapping) -> Iterator[list[SettledItem]]:
        """Store all that came of a batch that has ended, as the provider says in `state`, bit by bit, then close it.

        Raises:
            QueueFull: it failed, and a smaller one may pass.
            InputError: it failed for its content.
            RunError: its files cannot be read now.
        """
        lines = _Lines()
        for name in ("output_file_id", "error_file_id"):
            file = state.get(name)
            if isinstance(file, str) and file:
                yield from self._read(batch, file, lines)
        if told := lines.words():
            self._notice(f"batch {batch.name}: {told}")
        if state.get("status") == "failed" and not lines.answers:
            self._ledger.drop(batch)
            raise self._failure(state)
        left = self._left(state, lines)
        rest: dict[str, tuple[JudgeRequest, Reply | Trouble]] = {}
        for digest, request, _ in self._ledger.items(batch):
            rest[digest] = (request, left)
            if len(rest) == AT_A_TIME:
                yield self._store(batch, rest)
        yield self._store(batch, rest)
        self._ledger.mark(batch, DONE)

    def lost(self, batch: ProviderBatch) -> Iterator[list[SettledItem]]:
        """Close a batch that the provider no longer knows: what it was billed stays unknown.

        Raises:
            RunError: it is not old enough for that.
        """
        self._refuse_young(batch, f"batch {batch.name}")
        self._notice(f"batch {batch.name}: the provider no longer knows it; its requests are asked again")
        yield from self.collect(batch, {"status": "lost"})

    def _read(self, batch: ProviderBatch, file: str, lines: _Lines) -> Iterator[list[SettledItem]]:
        for tries in range(1, MAX_TRIES + 1):
            before = replace(lines, seen=set(lines.seen))
            outcomes: dict[str, tuple[JudgeRequest, Reply | Trouble]] = {}
            try:
                for line in output_lines(self._api.content(file)):
                    if (settled := self._settled(batch, line, lines)) is not None:
                        outcomes[settled.digest] = (settled.request, settled.outcome)
                    if len(outcomes) == AT_A_TIME:
                        yield self._store(batch, outcomes)
                yield self._store(batch, outcomes)
                return
            except NotThere:
                if tries < MAX_TRIES:
                    self._api.pause(tries, "its file is not there")
                    continue
                self._refuse_young(batch, f"the file {file} of batch {batch.name}")
                self._notice(f"batch {batch.name}: its file {file} is gone; what it held is asked again")
                lines.is_gone = True
                return
            except ConnectionError as error:
                yield self._store(batch, outcomes)  # whole lines
                vars(lines).update(vars(before))
                if tries == MAX_TRIES:
                    raise RunError(f"batch {batch.name}: its file {file} cannot be read ({error}); {KEPT}") from None
                self._api.pause(tries, str(error))

    def _refuse_young(self, batch: ProviderBatch, what: str) -> None:
        """End where the provider denies what it should still have: asked again, it would be paid for twice."""
        if time.time() - batch.time > KEPT_FOR:
            return
        other = "" if batch.account == self._endpoint.account else " It was ordered with another key: set that one."
        raise RunError(
            f"the endpoint {self._endpoint.base_url} does not know {what} (404).{other} If it was deleted there, its "
            "replies are lost: move journal.sqlite of the folder away, and all is asked and paid again"
        )

    def _settled(self, batch: ProviderBatch, line: OutputLine | None, lines: _Lines) -> SettledItem | None:
        """What a line says of its request; None for one that says nothing new."""
        if line is None:
            lines.unreadable += 1
            return None
        item = self._ledger.item(batch, line.custom_id)
        if item is None:
            lines.strange += 1
            return None
        if line.custom_id in lines.seen:
            lines.double += 1
            return None
        lines.seen.add(line.custom_id)
        lines.answers += line.status is not None and 200 <= line.status < 300
        request, sent = item
        if request is None:  # stored by a process that was killed midway
            return None
        return SettledItem(line.custom_id, request, outcome_of(line, self._endpoint, request, sent))

    def _store(
        self, batch: ProviderBatch, outcomes: dict[str, tuple[JudgeRequest, Reply | Trouble]]
    ) -> list[SettledItem]:
        """Write outcomes down and empty the dict."""
        if outcomes:
            self._ledger.settle(batch, {digest: outcome for digest, (_, outcome) in outcomes.items()})
        settled = [SettledItem(digest, request, outcome) for digest, (request, outcome) in outcomes.items()]
        outcomes.clear()
        return settled

    @staticmethod
    def _left(state: JSONMapping, lines: _Lines) -> Trouble:
        """What became of requests of which no line says anything."""
        status = str(state.get("status"))
        counts = state.get("request_counts")
        completed = counts.get("completed") if isinstance(counts, dict) else None
        # Where the provider counts no more answers than were read, it has worked on none of these.
        is_complete = isinstance(completed, int) and completed <= lines.answers
        is_counted = is_complete or (completed is None and not lines.unreadable and status in ("expired", "cancelled"))
        may_be_billed = lines.is_gone or not is_counted
        reason = {"expired": EXPIRED, "cancelled": "batch_cancelled"}.get(status, "missing_in_batch")
        message = f"the batch is {status}, and no line of its files answers this request"
        return Trouble(reason, message, again=True, may_be_billed=may_be_billed and status != "failed")

    def _failure(self, state: JSONMapping) -> Exception:
        """Why the provider worked on nothing."""
        errors = state.get("errors")
        rows = errors.get("data") if isinstance(errors, dict) else None
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        codes = [str(row.get("code") or "") for row in rows]
        if QUEUE_FULL in codes:
            return QueueFull(self._endpoint.words(str(rows[codes.index(QUEUE_FULL)].get("message") or QUEUE_FULL)))
        first = rows[0] if rows else {}
        text = ": ".join(str(first[key]) for key in ("code", "message") if first.get(key)) or "no reason stated"
        where = f", line {first['line']} of its file" if first.get("line") else ""
        words = f"the endpoint {self._endpoint.base_url} refuses the batch{where}: {self._endpoint.words(text)}"
        if self._endpoint.has_no_credit(402 if "billing" in text else 400, codes[0] if codes else "", text):
            return RunError(f"{words}; {KEPT}")
        return InputError(f"{words}; nothing was billed for it")


@dataclass
class _Lines:
    """What the files of one batch held, beside the outcomes."""

    seen: set[str] = field(default_factory=set)
    answers: int = 0
    """Requests with an answer of status 2xx."""
    unreadable: int = 0
    strange: int = 0
    """Lines that belong to no request of the batch."""
    double: int = 0
    is_gone: bool = False
    """A file is no longer there."""

    def words(self) -> str:
        """What was wrong with the lines; empty where nothing was."""
        counts = {
            "cannot be read": self.unreadable,
            "belong to no request of it": self.strange,
            "stand twice": self.double,
        }
        told = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        return f"lines of its files: {told} (the first of two is taken)" if told else ""


def began(state: JSONMapping, batch: ProviderBatch) -> float:
    """When a batch was created, s since 1970; when it was planned, where the provider does not say."""
    stated = state.get("created_at")
    return float(stated) if isinstance(stated, int | float) else batch.time


def counts_in_words(state: JSONMapping, batch: ProviderBatch) -> str:
    """`in_progress, 12 of 80 done, 1 failed, 3 min`."""
    counts = state.get("request_counts")
    parts = [str(state.get("status") or "no status")]
    if isinstance(counts, dict) and isinstance(counts.get("total"), int) and counts["total"]:
        parts.append(f"{counts.get('completed', 0)} of {counts['total']} done")
        if counts.get("failed"):
            parts.append(f"{counts['failed']} failed")
    return ", ".join([*parts, f"{duration(max(0.0, time.time() - began(state, batch)))} since it was ordered"])
