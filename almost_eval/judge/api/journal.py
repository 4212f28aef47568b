"""Every reply that was paid for, on disk before the next is read.

One SQLite file beside the run: a row for each request that was answered, keyed by the request's digest. WAL with
`synchronous=FULL` means that a reply that was put survives a SIGKILL and a power cut. Failures are not replies and are
not kept: a later run sends the request again. No request and no reply holds a key, so this file holds none.

Two processes may hold the same file: SQLite orders their writes, and the first reply to a request stays.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from almost_eval.errors import RunError, StoreError
from almost_eval.judge.records import JudgeRequest, Reply

APPLICATION_ID = 0x414C4D4A
"""`ALMJ` in the header of the file: SQLite's own way to say whose a database is."""

VERSION = 1
PATIENCE = 30.0
"""Seconds to wait for another process's write."""

_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    digest TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL, time REAL NOT NULL) WITHOUT ROWID"""


class Journal:
    """An open journal. Use as a context manager; any thread may call it.

    Args:
        path: the file; made if absent, its folder too.

    Raises:
        StoreError: the file is damaged, not a journal, or made by a later version; or its folder cannot be written.
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

    def get(self, digest: str) -> Reply | None:
        """The stored reply to the request of this digest, marked `cached`; None where there is none.

        Raises:
            StoreError: the file was damaged.
        """
        row = self._one("SELECT reply FROM replies WHERE digest = ?", digest)
        if row is None:
            return None
        try:
            return Reply(**json.loads(row[0]), cached=True)
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"{self.path}: the reply {digest[:12]} cannot be read ({error}); remove the file"
            ) from None

    def put(self, request: JudgeRequest, reply: Reply) -> None:
        """Store a reply; when this returns it is on disk. A request that has a reply keeps the one it has.

        Raises:
            RunError: the disk is full, or gone.
        """
        sent = {
            "judge": request.judge,
            "messages": [message.to_dict() for message in request.messages],
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "attempt": request.attempt,
        }
        answered = {
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "model": reply.model,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
        row = (request.digest, json.dumps(sent), json.dumps(answered), time.time())
        try:
            with self._lock:
                self._connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)
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

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._database is None:
            raise StoreError(f"{self.path} is closed")
        return self._database

    def _one(self, query: str, *values: str) -> Any:
        try:
            with self._lock:
                return self._connection.execute(query, values).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _prepare(self, database: sqlite3.Connection) -> None:
        [owner] = database.execute("PRAGMA application_id").fetchone()
        [version] = database.execute("PRAGMA user_version").fetchone()
        [tables] = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (owner or tables) and owner != APPLICATION_ID:
            raise StoreError(f"{self.path} is another program's database; move it away, or choose another folder")
        if version > VERSION:
            raise StoreError(f"{self.path} was made by a later version of this toolkit; use that one")
        if owner and database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("its pages do not fit together")
        self._switch_to_wal(database)
        database.execute("PRAGMA synchronous = FULL")
        database.execute("BEGIN IMMEDIATE")  # two processes may be here at once
        database.execute(_TABLE)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")

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
