"""The conversations at the side of the Chat tab: where they are kept, and the page's part in keeping them.

The page's script (`assets/shelf.js`) keeps them: in the visitor's browser, or, where there is a login, by the routes of
`kept`. Python tells it what to keep (`kept_text`) and takes what it brings back. Each is kept under its own number with
a count of its versions, so that two tabs of a browser do not overwrite each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from urllib.parse import urlsplit

from serving.chat.conversation import Conversation, Settings
from serving.chat.session import ChatSystem
from serving.door.strict_json import NotJSON, read_json

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
