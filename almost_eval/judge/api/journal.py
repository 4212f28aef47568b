"""Every reply that was paid for, on disk before the next is read.

One SQLite file beside the run: a row for each request that was answered, keyed by the request's digest. WAL with
`synchronous=FULL` means that a reply that was put survives a SIGKILL and a power cut. Failures are not replies and are
not kept: a later run sends the request again. No request and no reply holds a key, so this file holds none.

A second table is the ledger: a row for every sending, written before it leaves, with the most it can take. What the
provider bills for it takes that place as soon as it is known. A sending that nobody says anything of (a timeout, a
connection that broke, a process that was killed) stays at its most. So what all runs in a folder may have spent is the
sum over this table.

Two processes may hold the same file: SQLite orders their writes, and the first reply to a request stays.

A reply is looked up by its key in the file, and none is held in memory. A small file is checked page by page when it is
opened; of a large one, which would take minutes, `SPOT_CHECKS` replies are read. Damage elsewhere in it is found when
the page is read: `StoreError`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from almost_eval.errors import RunError, StoreError
from almost_eval.judge.records import JudgeRequest, Reply, Usage
from almost_eval.types import JSONObject

APPLICATION_ID = 0x414C4D4A
"""`ALMJ` in the header of the file: SQLite's own way to say whose a database is."""

VERSION = 3
CHECKED_WHOLE = 256 * 2**20
"""Bytes of a journal that is checked page by page when it is opened: about 80,000 reviews, half a second to a few."""
SPOT_CHECKS = 256
"""Replies that are read of a larger one, evenly spread over the digests."""

PATIENCE = 30.0
"""Seconds to wait for another process's write."""

_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    digest TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL, time REAL NOT NULL) WITHOUT ROWID"""
_LEDGER = """CREATE TABLE IF NOT EXISTS sendings (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL, state TEXT NOT NULL, prompt INTEGER NOT NULL,
    completion INTEGER NOT NULL, cached INTEGER NOT NULL, reasoning INTEGER NOT NULL, time REAL NOT NULL,
    tier TEXT NOT NULL DEFAULT 'standard', cost REAL, written INTEGER NOT NULL DEFAULT 0)"""
_NOTES = "CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
_JUDGES = "CREATE TABLE IF NOT EXISTS judges (digest TEXT PRIMARY KEY, judge TEXT NOT NULL) WITHOUT ROWID"
"""Of a panel: whose a request is."""
_FROM_REPLIES = """INSERT INTO sendings (digest, state, prompt, completion, cached, reasoning, time)
    SELECT digest, 'billed', json_extract(reply, '$.prompt_tokens'), json_extract(reply, '$.completion_tokens'), 0, 0,
    time FROM replies"""
"""Version 1 had no ledger: its replies are what is known to be billed."""
_TO_3 = (
    "ALTER TABLE sendings ADD COLUMN tier TEXT NOT NULL DEFAULT 'standard'",
    "ALTER TABLE sendings ADD COLUMN cost REAL",
    "ALTER TABLE sendings ADD COLUMN written INTEGER NOT NULL DEFAULT 0",
)
"""Version 2 knew one price, no host that states its bill, and none that bills what it writes to its cache."""
_OF_JUDGE = " AND digest IN (SELECT digest FROM judges WHERE judge = ?)"

BILLED, UNSURE, FREE = "billed", "unsure", "free"
"""States of a sending: the provider has said for how much; nobody has, so that it counts as the most; not billed."""
_SENT = "sent"  # on its way, or its process was killed

STANDARD, BATCH = "standard", "batch"
"""Tiers of a sending: each has its price."""


class LedgerEntry(NamedTuple):
    """What the sendings of one kind took."""

    is_unsure: bool
    """Nobody says for how much they were billed, so that `usage` is the most; else it is as the provider counts."""
    tier: str
    """`STANDARD` or `BATCH`."""
    usage: Usage
    n: int
    """How many they are."""
    stated: float | None
    """USD that the host says it billed; None where it states tokens alone."""


class Ledger(NamedTuple):
    """What all sendings of a folder took."""

    entries: tuple[LedgerEntry, ...]

    @property
    def billed(self) -> Usage:
        """Tokens as the provider counts."""
        return self._sum(unsure=False)

    @property
    def unsure(self) -> Usage:
        """Tokens at most, of sendings that nobody says anything of."""
        return self._sum(unsure=True)

    @property
    def n_unsure(self) -> int:
        """How many these are."""
        return sum(entry.n for entry in self.entries if entry.is_unsure)

    def _sum(self, *, unsure: bool) -> Usage:
        mine = [entry.usage for entry in self.entries if entry.is_unsure is unsure]
        return Usage(*map(sum, zip(*mine, strict=True))) if mine else Usage(0, 0)


class Journal:
    """An open journal; its file and folder are made if absent. Use as a context manager; any thread may call it.

    Raises:
        StoreError: the file is damaged, not a journal, or made by a later version; or its folder cannot be written.
            Whatever reads may find damage later.
        RunError: of whatever writes: the disk is full, or gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            self._prepare(self._database)
        except OSError as error:
            raise StoreError(f"cannot write to {self.path.parent} ({error.strerror}); choose another folder") from None
        except sqlite3.Error as error:
            self._close()
            raise self._unusable(error) from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __len__(self) -> int:
        """Replies that are stored."""
        return int(self._one("SELECT count(*) FROM replies")[0])

    def has_reply_of(self, judge: str) -> bool:
        """Whether a reply of this judge is stored, so that it is known what it takes."""
        return bool(self._one("SELECT 1 FROM replies WHERE json_extract(request, '$.judge') = ? LIMIT 1", judge))

    def get(self, digest: str) -> Reply | None:
        """The stored reply to the request of this digest, marked `cached`; None where there is none."""
        row = self._one("SELECT reply FROM replies WHERE digest = ?", digest)
        if row is None:
            return None
        try:
            return Reply(**json.loads(row[0]), cached=True)
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"{self.path}: the reply {digest[:12]} cannot be read ({error}); remove the file"
            ) from None

    def begin(self, request: JudgeRequest, most: Usage) -> int:
        """Enter a sending into the ledger before it leaves, at the most it can take; its number."""
        with self.writing() as database:
            return enter(database, request.digest, _SENT, most)

    def settle(self, sending: int, state: str, usage: Usage | None = None, cost: float | None = None) -> None:
        """Enter what became of a sending: one of the states above, and its tokens or its USD where it was billed."""
        with self.writing() as database:
            settle(database, sending, state, usage, cost)

    def name_judge(self, judge: str, digests: Iterable[str]) -> None:
        """Enter whose requests these are, before they are sent: each judge of a panel has its price."""
        with self.writing() as database:
            database.executemany("INSERT OR IGNORE INTO judges VALUES (?, ?)", ((digest, judge) for digest in digests))

    def ledger(self, judge: str | None = None) -> Ledger:
        """What all sendings took, those of earlier processes too; with a judge, what its own took (`name_judge`)."""
        sums = ", ".join(f"sum({name})" for name in Usage._fields)
        mine, names = ("", ()) if judge is None else (_OF_JUDGE, (judge,))
        query = (
            f"SELECT state != '{BILLED}' AS is_unsure, tier, cost IS NOT NULL AS is_stated, count(*), total(cost), "
            f"{sums} FROM sendings WHERE state != '{FREE}'{mine} GROUP BY is_unsure, tier, is_stated"
        )
        return Ledger(
            tuple(
                LedgerEntry(bool(unsure), tier, Usage(*tokens), n, cost if stated else None)
                for unsure, tier, stated, n, cost, *tokens in self.rows(query, *names)
            )
        )

    def note(self, name: str) -> JSONObject:
        """What `take_note` was told under this name; empty where nothing was."""
        row = self._one("SELECT value FROM notes WHERE name = ?", name)
        return dict(json.loads(row[0])) if row else {}

    def take_note(self, name: str, value: JSONObject) -> None:
        """Keep something for later processes."""
        with self.writing() as database:
            database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))

    def put(self, request: JudgeRequest, reply: Reply, sending: int | None = None) -> None:
        """Store a reply; when this returns it is on disk. A request that has a reply keeps the one it has. Its sending
        in the ledger is settled at once; without a number it is entered there too.
        """
        row = (request.digest, request_text(request), reply_text(reply), time.time())
        known = any(reply.usage) or reply.cost is not None
        with self.writing() as database:
            database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)
            if sending is None:
                sending = enter(database, request.digest, BILLED, reply.usage)
            settle(database, sending, BILLED if known else UNSURE, reply.usage if known else None, reply.cost)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is on disk when it ends, or none."""
        try:
            with self._lock:
                database = self._connection
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                    database.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        database.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise RunError(
                f"cannot write to {self.path} ({error}); the replies so far are kept: the same command goes on"
            ) from None

    def tokens(self) -> tuple[int, int]:
        """(prompt, completion) tokens of all stored replies, as the provider counted them."""
        row = self._one(
            "SELECT coalesce(sum(json_extract(reply, '$.prompt_tokens')), 0), "
            "coalesce(sum(json_extract(reply, '$.completion_tokens')), 0) FROM replies"
        )
        return int(row[0]), int(row[1])

    def waits(self) -> list[float]:
        """Seconds from the last sending of a request to its reply, of each reply whose sending is in the ledger.

        Replies of a batch are left out: the provider answers them when it has nothing else to do.
        """
        # Of the columns that are in no aggregate, SQLite takes the row of the one min().
        (waits,) = self._one(
            "SELECT coalesce(json_group_array(wait), '[]') FROM (SELECT min(r.time - s.time) AS wait, s.tier AS tier "
            "FROM replies r JOIN sendings s ON s.digest = r.digest WHERE s.time < r.time GROUP BY r.digest) "
            f"WHERE tier = '{STANDARD}'"
        )
        return [float(wait) for wait in json.loads(waits)]

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._database is None:
            raise StoreError(f"{self.path} is closed")
        return self._database

    def rows(self, query: str, *values: str | int) -> list[Any]:
        """What a SELECT gives."""
        try:
            with self._lock:
                return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _one(self, query: str, *values: str) -> Any:
        rows = self.rows(query, *values)
        return rows[0] if rows else None

    def _prepare(self, database: sqlite3.Connection) -> None:
        # One snapshot: another process may make the tables between two reads, and they would seem to have no owner.
        database.execute("BEGIN")
        [tables] = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        [owner] = database.execute("PRAGMA application_id").fetchone()
        [version] = database.execute("PRAGMA user_version").fetchone()
        database.execute("COMMIT")
        if (owner or tables) and owner != APPLICATION_ID:
            raise StoreError(f"{self.path} is another program's database; move it away, or choose another folder")
        if version > VERSION:
            raise StoreError(f"{self.path} was made by a later version of this toolkit; use that one")
        if owner:
            self._check(database)
        self._switch_to_wal(database)
        database.execute("PRAGMA synchronous = FULL")
        database.execute("BEGIN IMMEDIATE")  # two processes may be here at once
        [version] = database.execute("PRAGMA user_version").fetchone()  # as the other one has left it
        database.execute(_TABLE)
        database.execute(_LEDGER)
        database.execute(_NOTES)
        database.execute(_JUDGES)
        if version == 1:
            database.execute(_FROM_REPLIES)
        if version == 2:
            for change in _TO_3:
                database.execute(change)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")

    def _check(self, database: sqlite3.Connection) -> None:
        """Refuse a damaged file; see the module's text for what is read of a large one."""
        [pages] = database.execute("PRAGMA page_count").fetchone()
        [size] = database.execute("PRAGMA page_size").fetchone()
        if pages * size <= CHECKED_WHOLE:
            if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("its pages do not fit together")
            return
        for number in range(SPOT_CHECKS):
            digest = f"{number * 16**8 // SPOT_CHECKS:08x}"
            row = database.execute("SELECT reply FROM replies WHERE digest >= ? LIMIT 1", (digest,)).fetchone()
            if row is not None and not isinstance(row[0], str):
                raise sqlite3.DatabaseError("a reply is no text")

    @staticmethod
    def _switch_to_wal(database: sqlite3.Connection) -> None:
        """SQLite does not wait here for another process that does the same, as it does everywhere else."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        if self.path.is_dir():
            return StoreError(f"{self.path} is a folder; the journal of a run is a file")
        if not os.access(self.path.parent, os.W_OK) or (self.path.exists() and not os.access(self.path, os.W_OK)):
            return StoreError(f"cannot write to {self.path}; choose another folder")
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # less the extended code; our own error has none
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreError(f"{self.path} is in use by another process; wait for it")
        return StoreError(
            f"{self.path} is damaged or not a journal of replies ({error}); move it away: what it held is asked again"
        )

    def _close(self) -> None:
        with self._lock, suppress(sqlite3.Error):
            if self._database is not None:
                self._database.close()
        self._database = None


def enter(
    database: sqlite3.Connection, digest: str, state: str = _SENT, most: Usage | None = None, tier: str = STANDARD
) -> int:
    """Add a row to the ledger, inside `Journal.writing`; its number."""
    row = (digest, state, *(most or Usage(0, 0)), time.time(), tier)
    columns = f"digest, state, {', '.join(Usage._fields)}, time, tier"
    query = f"INSERT INTO sendings ({columns}) VALUES ({', '.join('?' * len(row))})"
    return int(database.execute(query, row).lastrowid or 0)


def settle(
    database: sqlite3.Connection, sending: int, state: str, usage: Usage | None = None, cost: float | None = None
) -> None:
    """Change a row of the ledger, inside `Journal.writing`; see `Journal.settle`. None leaves tokens as they are."""
    if usage is None and state == FREE:
        usage = Usage(0, 0)
    if usage is None:
        database.execute("UPDATE sendings SET state = ?, cost = ? WHERE id = ?", (state, cost, sending))
    else:
        tokens = ", ".join(f"{name} = ?" for name in Usage._fields)
        query = f"UPDATE sendings SET state = ?, cost = ?, {tokens} WHERE id = ?"
        database.execute(query, (state, cost, *usage, sending))


def request_text(request: JudgeRequest) -> str:
    """A request as it is stored."""
    return json.dumps(request.to_dict())


def reply_text(reply: Reply) -> str:
    """A reply as it is stored; `Journal.get` gives it back."""
    whole = {field.name: getattr(reply, field.name) for field in fields(reply) if field.name != "cached"}
    stated = {name: value for name, value in whole.items() if value is not None}
    return json.dumps(stated | {"parameters": dict(reply.parameters)})
