"""Human preferences from a blind arena, on disk.

A vote is stored with everything that was on the screen: the prompt, both answers whole, which system stood on which
side, the settings, a random session id, and nothing about the person.

SQLite in WAL mode with `synchronous=FULL`: several processes and threads may vote at once, a vote is on disk before
its voter is told so, and neither a killed process nor a power cut loses it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from almost_eval.errors import InputError, RunError, StoreError, problem_of
from almost_eval.files import read_rows
from almost_eval.types import JSONMapping, JSONObject

VOTES = ("a", "b", "tie", "both_bad")
"""What can be voted: the side that is better, neither, or neither being any good."""

_APPLICATION = 0x414C4D56  # "ALMV": tells a vote file from any other SQLite file
_VERSION = 1
_WAIT_S = 2.0
"""Seconds for which a file that another program has locked is waited for: the voter waits as long."""
_TABLE = """
CREATE TABLE IF NOT EXISTS votes (
  id TEXT PRIMARY KEY, session TEXT NOT NULL, prompt TEXT NOT NULL, source TEXT NOT NULL,
  system_a TEXT NOT NULL, system_b TEXT NOT NULL, text_a TEXT NOT NULL, text_b TEXT NOT NULL,
  vote TEXT NOT NULL CHECK (vote IN ('a', 'b', 'tie', 'both_bad')),
  reward_a REAL, reward_b REAL, settings TEXT NOT NULL, recorded TEXT NOT NULL
) STRICT
"""


@dataclass(frozen=True, slots=True)
class Vote:
    """One round and its verdict."""

    id: str
    """Of the round: a second vote on it is refused."""
    session: str
    """Random, one for each visitor's page; says nothing about who it is."""
    prompt: tuple[Mapping[str, str], ...]
    """Messages, as both systems were sent them."""
    source: str
    """`typed`, or the id of the question that was drawn."""
    system_a: str
    """Name of the system whose answer was shown as A."""
    system_b: str
    text_a: str
    """The answer, whole."""
    text_b: str
    vote: str
    """One of `VOTES`."""
    reward_a: float | None = None
    """Raw logit of the reward model, where there is one; not shown before the vote."""
    reward_b: float | None = None
    settings: JSONMapping = field(default_factory=dict)
    """How both answers were drawn, and the seed that shuffled the sides. Of a round of several turns `earlier` holds
    the answers before the last, by side; `named` holds the sides that named their system, where any did."""
    recorded: str = ""
    """UTC, ISO 8601, to the second; set when it is stored."""

    @property
    def score_a(self) -> float:
        """1 where A won, 0 where B did, else 0.5."""
        return {"a": 1.0, "b": 0.0}.get(self.vote, 0.5)

    @property
    def is_blind(self) -> bool:
        """Whether no answer said whose it is."""
        return not self.settings.get("named")

    def answers(self, side: str) -> tuple[str, ...]:
        """The answers of side `a` or `b`, one for each turn of the user."""
        earlier = (self.settings.get("earlier") or {}).get(side, ())
        return (*map(str, earlier), self.text_a if side == "a" else self.text_b)

    def to_dict(self) -> JSONObject:
        """A line of the export."""
        return asdict(self) | {"prompt": [dict(message) for message in self.prompt]}


class VoteStore:
    """A file of votes. Any number of stores may have it open, in this process and in others.

    Args:
        path: the SQLite file; it and its folder are made at the first vote.

    Raises:
        StoreError: there is something else in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            with self._open():
                pass

    def append(self, vote: Vote) -> None:
        """Store one vote; it is on disk when this returns.

        Raises:
            InputError: the round has been voted on, or `vote` is none of `VOTES`.
            RunError: the disk is full or gone, or the file stayed locked.
        """
        if vote.vote not in VOTES:
            raise InputError(f"unknown vote {vote.vote!r}; known: {', '.join(VOTES)}")
        row = vote.to_dict()
        row |= {"prompt": _json(row["prompt"]), "settings": _json(dict(vote.settings))}
        row["recorded"] = vote.recorded or datetime.now(UTC).isoformat(timespec="seconds")
        places = ", ".join(f":{name}" for name in row)
        began = time.monotonic()
        try:
            with self._open() as connection:
                left = max(0.1, _WAIT_S - (time.monotonic() - began))
                connection.execute(f"PRAGMA busy_timeout = {int(1000 * left)}")
                connection.execute(f"INSERT INTO votes ({', '.join(row)}) VALUES ({places})", row)
        except sqlite3.IntegrityError:
            raise InputError("this round has a vote already; start the next one") from None
        except (sqlite3.Error, OSError) as error:
            raise RunError(f"the vote could not be stored in {self.path} ({error})") from None

    def count(self) -> int:
        """How many there are; none where there is no file yet.

        Raises:
            RunError: the file stayed locked.
            StoreError: another kind of file.
        """
        if not self.path.is_file():
            return 0
        with self._open() as connection:
            return int(connection.execute("SELECT count(*) FROM votes").fetchone()[0])

    def votes(self) -> list[Vote]:
        """All of them, in the order they were cast.

        Raises:
            StoreError: no such file, or another kind of file.
        """
        if not self.path.is_file():
            raise StoreError(f"no votes at {self.path}; give the file that almost-chat --votes wrote")
        with self._open() as connection:
            rows = [dict(row) for row in connection.execute("SELECT * FROM votes ORDER BY rowid")]
        return [
            Vote(**row | {"prompt": tuple(json.loads(row["prompt"])), "settings": json.loads(row["settings"])})
            for row in rows
        ]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # A connection for each use: opening takes a fraction of a millisecond, and no thread ever shares one.
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path} cannot be opened ({error}); give another file for the votes") from None
        with closing(connection):
            connection.row_factory = sqlite3.Row
            try:
                self._adopt(connection)
            except sqlite3.OperationalError as error:
                raise RunError(f"{self.path} cannot be used now ({error}); try again") from None
            except sqlite3.DatabaseError as error:
                raise StoreError(f"{self.path} is no file of votes ({error}); give another one") from None
            yield connection

    def _adopt(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")  # one view of the three, whoever may be making the file at this moment
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        connection.execute("COMMIT")
        if application == _APPLICATION and version == _VERSION:
            connection.execute("PRAGMA synchronous = FULL")
            return
        if application == _APPLICATION or tables:
            made = f"version {version} of this toolkit's votes" if application == _APPLICATION else "another program's"
            raise StoreError(f"{self.path} is {made}, which this version does not read; give another file")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")  # two processes may find it empty at once: the second finds it made
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute("COMMIT")


def read_votes(path: Path) -> list[Vote]:
    """The votes of an arena's own file, or of the `votes.jsonl` of its export.

    Raises:
        StoreError: no such file, or neither of the two.
    """
    if path.suffix != ".jsonl":
        return VoteStore(path).votes()
    votes = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            vote = Vote(**row | {"prompt": tuple(row["prompt"])})
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path}, line {number} is no vote ({problem_of(error)}); see arena export") from None
        if vote.vote not in VOTES:
            raise StoreError(f"{path}, line {number}: unknown vote {vote.vote!r}; known: {', '.join(VOTES)}")
        votes.append(vote)
    return votes


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
