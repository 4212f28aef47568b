"""Batches in the journal: what is in each, and how far it has come, written down before each step over the network.

A batch passes through `planned` (its requests are chosen, and stand in the ledger at their most), `uploaded` (its file
is at the provider, and costs nothing), `creating` (the order to work on it may have arrived), `created` (it has an id)
and `done` (all that came of it is stored). A process may be killed between any two of them. The key of a batch travels
in its metadata: a batch that was created though its id was never written down is found by it, and not ordered twice.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from almost_eval.judge.api.bills import Bill
from almost_eval.judge.api.endpoint import Trouble
from almost_eval.judge.api.journal import BATCH, FREE, Journal, enter, reply_text, request_text, settle
from almost_eval.judge.records import Failure, JudgeRequest, Reply, Usage
from almost_eval.types import JSONObject, Message

PLANNED, UPLOADED, CREATING, CREATED, DONE = "planned", "uploaded", "creating", "created", "done"
"""States of a batch, in this order."""

_TABLES = (
    """CREATE TABLE IF NOT EXISTS batches (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, endpoint TEXT NOT NULL, state TEXT NOT NULL,
    account TEXT NOT NULL, file TEXT NOT NULL DEFAULT '', name TEXT NOT NULL DEFAULT '', n INTEGER NOT NULL,
    time REAL NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS batch_items (
    batch INTEGER NOT NULL, digest TEXT NOT NULL, place INTEGER NOT NULL, sending INTEGER NOT NULL, request TEXT,
    sent TEXT NOT NULL, reason TEXT, message TEXT, is_told INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch, digest)) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS batch_items_of ON batch_items (digest)",
)
"""`request` is emptied when an item is settled: a reply has it then, and a failure is asked anew from the run."""


class BatchItem(NamedTuple):
    """One request of a batch."""

    digest: str
    """Its `custom_id`."""
    request: JudgeRequest
    sent: JSONObject
    """Its parameters, as they are sent."""
    most: Usage
    """Tokens that it may take."""


@dataclass(frozen=True, slots=True)
class ProviderBatch:
    """One batch as the journal knows it."""

    id: int
    key: str
    """64 letters; in the metadata of the batch at the provider."""
    endpoint: str
    """`JudgeEndpoint.name`."""
    account: str
    """`JudgeEndpoint.account`."""
    state: str
    file: str
    """Id of the input file; empty before it is uploaded."""
    name: str
    """Its id at the provider; empty before it is known."""
    n: int
    """Requests in it."""
    time: float
    """When it was planned, s since 1970."""


class BatchLedger:
    """The batches of one open journal. Any thread may call it.

    Raises:
        RunError: of whatever writes: the disk is full, or gone.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        with journal.writing() as database:
            for table in _TABLES:
                database.execute(table)

    def open(self) -> list[ProviderBatch]:
        """Batches of which something is still to come, the oldest first."""
        rows = self._journal.rows(
            "SELECT id, key, endpoint, account, state, file, name, n, time FROM batches WHERE state != ? ORDER BY id",
            DONE,
        )
        return [ProviderBatch(*row) for row in rows]

    def plan(self, endpoint: str, account: str, items: Sequence[BatchItem]) -> ProviderBatch:
        """Write a batch down before anything is sent: its items, and what they may cost."""
        digest = hashlib.sha256("".join(item.digest for item in items).encode())
        key = hashlib.sha256(digest.digest() + secrets.token_bytes(16)).hexdigest()  # the same items may be sent again
        now = time.time()
        with self._journal.writing() as database:
            row = (key, endpoint, account, PLANNED, len(items), now)
            query = "INSERT INTO batches (key, endpoint, account, state, n, time) VALUES (?, ?, ?, ?, ?, ?)"
            id = int(database.execute(query, row).lastrowid or 0)
            query = "INSERT INTO batch_items (batch, digest, place, sending, request, sent) VALUES (?, ?, ?, ?, ?, ?)"
            for place, item in enumerate(items):
                sending = enter(database, item.digest, most=item.most, tier=BATCH)
                texts = (request_text(item.request), json.dumps(item.sent))
                database.execute(query, (id, item.digest, place, sending, *texts))
        return ProviderBatch(id, key, endpoint, account, PLANNED, "", "", len(items), now)

    def mark(self, batch: ProviderBatch, state: str, *, file: str = "", name: str = "") -> ProviderBatch:
        """Write down how far a batch has come; ids where they are known now."""
        now = replace(batch, state=state, file=file or batch.file, name=name or batch.name)
        with self._journal.writing() as database:
            query = "UPDATE batches SET state = ?, file = ?, name = ? WHERE id = ?"
            database.execute(query, (state, now.file, now.name, batch.id))
        return now

    def drop(self, batch: ProviderBatch) -> None:
        """Take back a batch that the provider never began: nothing is billed for it."""
        with self._journal.writing() as database:
            query = (
                "UPDATE sendings SET state = ?, prompt = 0, completion = 0 WHERE id IN "
                "(SELECT sending FROM batch_items WHERE batch = ? AND request IS NOT NULL)"
            )
            database.execute(query, (FREE, batch.id))
            database.execute("DELETE FROM batch_items WHERE batch = ? AND request IS NOT NULL", (batch.id,))
            database.execute("UPDATE batches SET state = ? WHERE id = ?", (DONE, batch.id))

    def release(self) -> list[ProviderBatch]:
        """Take back batches that were never ordered; those that are open all the same."""
        for batch in self.open():
            if batch.state in (PLANNED, UPLOADED):
                self.drop(batch)
        return self.open()

    def items(self, batch: ProviderBatch) -> Iterator[tuple[str, JudgeRequest, JSONObject]]:
        """(digest, request, parameters) of what is not settled yet, in the order of the file; read bit by bit."""
        after = -1
        while rows := self._journal.rows(
            "SELECT place, digest, request, sent FROM batch_items WHERE batch = ? AND place > ? "
            "AND request IS NOT NULL ORDER BY place LIMIT 500",
            batch.id,
            after,
        ):
            for after, digest, request, sent in rows:  # noqa: B007
                yield digest, _request(request), json.loads(sent)
            after = rows[-1][0]

    def item(self, batch: ProviderBatch, digest: str) -> tuple[JudgeRequest | None, JSONObject] | None:
        """Request and parameters of an item; the request is None once it is settled. None where it is no item of it."""
        rows = self._journal.rows(
            "SELECT request, sent FROM batch_items WHERE batch = ? AND digest = ?", batch.id, digest
        )
        if not rows:
            return None
        request, sent = rows[0]
        return (None if request is None else _request(request)), json.loads(sent)

    def unsettled(self, batches: Iterable[ProviderBatch]) -> set[str]:
        """Digests of what these batches still owe."""
        query = "SELECT digest FROM batch_items WHERE batch = ? AND request IS NOT NULL"
        return {digest for batch in batches for (digest,) in self._journal.rows(query, batch.id)}

    def settle(self, batch: ProviderBatch, outcomes: Mapping[str, Reply | Trouble]) -> None:
        """Store what became of items, all of it or nothing: replies, bills and reasons."""
        with self._journal.writing() as database:
            for digest, outcome in outcomes.items():
                [(sending,)] = database.execute(
                    "SELECT sending FROM batch_items WHERE batch = ? AND digest = ?", (batch.id, digest)
                )
                bill, reason, message, is_told = Bill.of(outcome), None, None, True
                if isinstance(outcome, Reply):
                    query = (
                        "INSERT OR IGNORE INTO replies SELECT digest, request, ?, ? FROM batch_items "
                        "WHERE batch = ? AND digest = ?"
                    )
                    database.execute(query, (reply_text(outcome), time.time(), batch.id, digest))
                else:
                    reason, message = outcome.reason, outcome.message
                    # What is asked again, by this process or the next, or was not billed, needs no telling.
                    is_told = outcome.again or bill.state == FREE
                settle(database, sending, bill.state, bill.usage, bill.cost)
                database.execute(
                    "UPDATE batch_items SET request = NULL, reason = ?, message = ?, is_told = ? "
                    "WHERE batch = ? AND digest = ?",
                    (reason, message, is_told, batch.id, digest),
                )

    def untold(self) -> dict[str, Failure]:
        """Failures for good that were stored, and that no caller has taken yet: the process was killed before."""
        rows = self._journal.rows(
            "SELECT digest, reason, message FROM batch_items WHERE is_told = 0 AND request IS NULL"
        )
        return {digest: Failure(reason, message) for digest, reason, message in rows}

    def tell(self, digest: str) -> None:
        """The caller has taken this failure."""
        with self._journal.writing() as database:
            database.execute("UPDATE batch_items SET is_told = 1 WHERE digest = ? AND is_told = 0", (digest,))


def under_way(journal: Journal | None) -> set[str]:
    """Digests of requests that batches of a folder still owe: they are paid for, or will be."""
    if journal is None:
        return set()
    ledger = BatchLedger(journal)
    return ledger.unsettled(ledger.open())


def _request(text: str) -> JudgeRequest:
    stored = json.loads(text)
    messages = tuple(Message(message["role"], message["content"]) for message in stored["messages"])
    return JudgeRequest(**stored | {"messages": messages})
