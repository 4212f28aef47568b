"""Where conversations are kept, and the page's part in keeping them.

The page's script (`assets/shelf.js`) keeps them: in the visitor's browser, or, where there is a login, on the server,
one user's apart from another's, in an SQLite file. Python tells it what to keep (`kept_text`) and takes what it brings
back. Each is kept under its own number with a count of its versions; whoever stores one says which version it was made
from, and is told where another tab was faster.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from almost_eval.errors import AlmostError, InputError, RunError, StoreError
from almost_eval.types import JSONObject
from serving.chat.conversation import ID, Conversation, Settings
from serving.chat.session import ChatSystem
from serving.door.strict_json import NotJSON, read_json
from serving.gateway.events import joined

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

_LOG = logging.getLogger("almost.chat")
PATH = "/conversations"
MAX_BYTES = 4 << 20
"""Of one conversation as JSON."""
MAX_COUNT = 2_000
"""Conversations of one user."""
_APPLICATION = 0x414C4D43  # "ALMC": tells this file from any other SQLite file
_WAIT_S = 2.0
_TABLE = """
CREATE TABLE IF NOT EXISTS conversations (
  user TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL, name TEXT NOT NULL, updated REAL NOT NULL,
  words TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (user, id)
) STRICT
"""


class Conflict(InputError):
    """The conversation has changed since the version that was named."""


class ConversationStore:
    """A file of conversations; it and its folder are made at once.

    Raises:
        StoreError: there is something else in its place, or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open():
            pass

    def index(self, user: str, search: str = "") -> list[JSONObject]:
        """All of a user that hold the words of `search`, in their name or in what was said; newest first, without what
        was said: `id`, `name`, `updated` [s since 1970], `version`.
        """
        with self._open() as connection:
            rows = connection.execute(
                "SELECT id, name, updated, version FROM conversations WHERE user = ? AND instr(words, ?) > 0 "
                "ORDER BY updated DESC",
                (user, _words(search)),
            )
            return [dict(row) for row in rows]

    def read(self, user: str, id: str) -> JSONObject | None:
        """One record, with `conversation` and `settings`; None where there is none."""
        with self._open() as connection:
            row = connection.execute(
                "SELECT id, name, updated, version, body FROM conversations WHERE user = ? AND id = ?", (user, id)
            ).fetchone()
        if row is None:
            return None
        values = dict(row)
        return values | json.loads(values.pop("body"))

    def write(self, user: str, id: str, record: JSONObject) -> int:
        """Store one record (`name`, `conversation`, `settings`, and the `version` that it was made from, 0 for a new
        one), and return its new version.

        Raises:
            Conflict: another version is there.
            InputError: it is no conversation, it is too large, or the user has too many.
        """
        conversation = Conversation.from_dict(record.get("conversation"))
        if not ID.fullmatch(id) or not conversation.turns:
            raise InputError("this is no conversation")
        settings = Settings.read(record.get("settings"), Settings())
        body = json.dumps({"conversation": conversation.to_dict() | {"id": id}, "settings": asdict(settings)})
        if len(body) > MAX_BYTES:
            raise InputError(f"the conversation is larger than {MAX_BYTES >> 20} MiB")
        name = joined(str(record.get("name") or ""))[:200]
        words = _words(f"{name}\n{conversation.text()}")
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            row = connection.execute(
                "SELECT version FROM conversations WHERE user = ? AND id = ?", (user, id)
            ).fetchone()
            version = row["version"] if row else 0
            if record.get("version") != version:
                raise Conflict("this conversation was changed elsewhere")
            (count,) = connection.execute("SELECT count(*) FROM conversations WHERE user = ?", (user,)).fetchone()
            if not version and count >= MAX_COUNT:
                raise InputError(f"there are {MAX_COUNT} conversations already; delete some")
            connection.execute(
                "INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?)",
                (user, id, version + 1, name, time.time(), words, body),
            )
            connection.execute("COMMIT")
        return int(version) + 1

    def delete(self, user: str, id: str) -> None:
        """Delete one, if it is there."""
        with self._open() as connection:
            connection.execute("DELETE FROM conversations WHERE user = ? AND id = ?", (user, id))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path} cannot be opened ({error}); give another file for --conversations") from None
        with closing(connection):  # which rolls back what was not committed
            connection.row_factory = sqlite3.Row
            try:
                self._adopt(connection)
                yield connection
            except sqlite3.OperationalError as error:
                raise RunError(f"{self.path} cannot be used now ({error}); try again") from None
            except sqlite3.DatabaseError as error:
                raise StoreError(f"{self.path} is no file of conversations ({error}); give another one") from None

    def _adopt(self, connection: sqlite3.Connection) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        if application == _APPLICATION:
            return
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application or tables:
            raise StoreError(f"{self.path} is another program's file; give another one for --conversations")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute("COMMIT")
        self.path.chmod(0o600)  # what was said is for nobody else on this machine


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def add_routes(app: FastAPI, store: ConversationStore) -> None:
    """Serve a store to users whose name the login has put into the scope, under `user`.

    GET `/conversations?search=`, and GET, PUT, DELETE `/conversations/ID`. A PUT of an old version is answered 409.
    """
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response

    def refusal(status: int, sentence: str) -> Response:
        return JSONResponse({"error": sentence}, status)

    async def answer(work: Callable[[], Response]) -> Response:
        try:
            return await asyncio.to_thread(work)
        except Conflict as error:
            return refusal(409, str(error))
        except InputError as error:
            return refusal(400, f"{str(error)[:1].upper()}{str(error)[1:]}.")
        except AlmostError:
            _LOG.exception("conversations cannot be kept")
            return refusal(503, "The server cannot keep conversations now: its log says why.")

    async def index(request: Request) -> Response:
        search = request.query_params.get("search", "")[:1000]
        return await answer(lambda: JSONResponse(store.index(request.scope["user"], search)))

    async def read(request: Request) -> Response:
        def work() -> Response:
            record = store.read(request.scope["user"], request.path_params["id"])
            return refusal(404, "There is no such conversation.") if record is None else JSONResponse(record)

        return await answer(work)

    async def delete(request: Request) -> Response:
        def work() -> Response:
            store.delete(request.scope["user"], request.path_params["id"])
            return Response(status_code=204)

        return await answer(work)

    async def write(request: Request) -> Response:
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BYTES:
                    return refusal(413, f"The conversation is larger than {MAX_BYTES >> 20} MiB.")
            record = read_json(body)
        except ClientDisconnect:
            return Response(status_code=400)
        except NotJSON:
            return refusal(400, "This is no JSON.")
        if not isinstance(record, dict):
            return refusal(400, "This is no conversation.")
        user, id = request.scope["user"], request.path_params["id"]
        return await answer(lambda: JSONResponse({"version": store.write(user, id, record)}))

    app.add_route(PATH, index, methods=["GET"])
    for method, handler in (("GET", read), ("PUT", write), ("DELETE", delete)):
        app.add_route(f"{PATH}/{{id}}", handler, methods=[method])


# --- the list at the side of the Chat tab

OPEN = """
window.almostShelf.mount(element, (detail) => trigger('act', detail));
"""
"""The list is the script's own; it tells what was chosen by `act`: `open` with a record, or `new`."""

LOAD = "async (record, conversation) => [await window.almostShelf.load(), conversation]"
"""What the tab had open before it was loaded again, as `record_of` reads it."""

KEEP = "(text) => { window.almostShelf.keep(text); }"
"""Called whenever there is something new to keep."""


SHELF = (
    '<details class="shelf" open><summary>Conversations</summary>'
    '<button type="button" data-shelf="new">New conversation</button>'
    '<input type="search" placeholder="Search" aria-label="Search conversations" autocomplete="off">'
    '<ul aria-label="Kept conversations"></ul><p class="aside" role="status"></p></details>'
)
"""The list without its conversations."""


def keeper_script(*, on_server: bool) -> str:
    """JavaScript that tells `assets/shelf.js` who keeps the conversations."""
    return f"window.almostKeeper = '{'server' if on_server else 'browser'}';"


def whereabouts(systems: Sequence[ChatSystem], *, on_server: bool) -> str:
    """A sentence or two for visitors: who is sent what they say, and where it is kept."""
    kept = "on this page's server, for your login" if on_server else "in this browser"
    hosts = list(dict.fromkeys(urlsplit(one.endpoint.url).netloc for one in systems if not one.endpoint.local))
    where = [f"the endpoint {escape(host)}" for host in hosts]
    if any(one.endpoint.local for one in systems):
        where.insert(0, "the model on the server's own machine")
    stored = "conversations and arena votes" if on_server else "arena votes and nothing else"
    return (
        f"Conversations are kept {kept}, until you delete them. What you ask goes to this page's server, which sends "
        f"it on to {' or '.join(where)}. On its disk that server keeps {stored}."
    )


def kept_text(conversation: Conversation, settings: Settings) -> str:
    """What is kept, as JSON."""
    return json.dumps({"conversation": conversation.to_dict(), "settings": asdict(settings)}, ensure_ascii=False)


def record_of(value: object, defaults: Settings) -> tuple[Conversation, Settings]:
    """The inverse, of what a browser sends: a record or its JSON; what cannot be read is new, with the default
    settings.
    """
    try:
        record = read_json(value) if isinstance(value, str) else value
    except NotJSON:
        record = None
    record = record if isinstance(record, dict) else {}
    return Conversation.from_dict(record.get("conversation")), Settings.read(record.get("settings"), defaults)
