"""Kept conversations without a browser: the line of those who wait, the server's file and its routes, formulas."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

from almost_eval.errors import InputError, StoreError
from serving.chat.app import create_app, parts_of, parts_script
from serving.chat.client import Endpoint
from serving.chat.conversation import MAX_CHARACTERS, MAX_TURNS, ChatReply, Conversation, Settings, Turn
from serving.chat.kept import MAX_BYTES, Conflict, ConversationStore, kept_text, record_of, whereabouts
from serving.chat.line import Line
from serving.chat.render import markdown
from serving.chat.session import ChatSystem, Desk
from serving.chat.tab_chat import TOO_MANY, ChatTab

ID = "0123456789abcdef"
TALK = Conversation().ask("What is ÄTHER?").answer(ChatReply("Nothing."))
LONG = Conversation((Turn("q", ChatReply("x" * MAX_CHARACTERS)),) * (MAX_BYTES // MAX_CHARACTERS + 1))


def record(version: int = 0, **more: Any) -> dict[str, Any]:
    return {"name": "Äther", "version": version, "conversation": TALK.to_dict(), "settings": {}, **more}


# --- the line ---


def test_who_waits_is_told_the_place_until_it_is_their_turn() -> None:
    async def check() -> list[str]:
        line, order = Line(1), []

        async def visit(name: str) -> None:
            with line.join() as place:
                async for sentence in place.sentences(asyncio.Event(), 0.01):
                    order.append(f"{name}: {sentence.split(',')[0]}")
                order.append(f"{name} begins")
                await asyncio.sleep(0.05)

        await asyncio.gather(visit("a"), visit("b"))
        return order

    order = asyncio.run(check())
    assert (order[0], order[-1]) == ("a begins", "b begins")
    assert "b: Number 1 in the queue" in order


def test_the_expected_wait_is_that_of_the_latest_answers() -> None:
    async def check() -> None:
        line = Line(2)
        with line.join() as first, line.join(), line.join() as third:
            assert (first.number, first.sentence(), third.number) == (0, "", 1)
            assert third.sentence() == "Number 1 in the queue, 0 s so far"  # nobody knows yet how long answers take
        line._durations.clear()
        line._durations.extend((4.0, 8.0))
        assert line.expected_s(1) == 3.0  # 6 s an answer, two at a time
        assert line.expected_s(4) == 12.0
        with line.join(), line.join(), line.join() as third:
            assert third.sentence() == "Number 1 in the queue, 0 s so far, about 3 s more"
            stop = asyncio.Event()
            stop.set()
            assert [sentence async for sentence in third.sentences(stop)] == []
        assert (line.working, line.waiting) == (set(), [])

    asyncio.run(check())


# --- the server's file ---


def test_versions_keep_tabs_from_overwriting_each_other(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path / "deep" / "kept.db")
    assert store.write("ann", ID, record()) == 1
    assert store.write("ann", ID, record(1, name="renamed")) == 2
    with pytest.raises(Conflict):
        store.write("ann", ID, record(1))
    with pytest.raises(Conflict):
        store.write("ann", ID, record())
    found = store.read("ann", ID)
    assert found is not None
    assert (found["name"], found["version"], found["conversation"]["id"]) == ("renamed", 2, ID)
    assert Conversation.from_dict(found["conversation"]) == TALK
    # Another user has none of it, and the same number.
    assert store.read("bob", ID) is None
    assert store.write("bob", ID, record()) == 1
    store.delete("ann", ID)
    assert store.read("ann", ID) is None
    assert store.read("bob", ID) is not None
    assert (tmp_path / "deep" / "kept.db").stat().st_mode & 0o077 == 0


def test_a_search_looks_at_names_and_words_alone(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path / "kept.db")
    store.write("ann", ID, record(name="Physics"))
    store.write("ann", ID[::-1], record(conversation=Conversation().ask("100 % _x_").to_dict(), name="b"))
    for words, count in (("", 2), ("äther", 1), ("PHYSICS", 1), ("turns", 0), ("% _X_", 1), ("%", 1), ("nothing.", 1)):
        assert len(store.index("ann", words)) == count, words
    assert store.index("bob") == []
    assert [entry["name"] for entry in store.index("ann")] == ["b", "Physics"]  # newest first


@pytest.mark.parametrize(
    ("id", "given"),
    [
        ("../../etc/passwd", {}),
        (ID, {"conversation": None}),
        (ID, {"conversation": {"turns": []}}),
        (ID, {"conversation": {"turns": [{"user": 3}]}}),
        (ID, {"conversation": LONG.to_dict()}),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, id: str, given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ConversationStore(tmp_path / "kept.db").write("ann", id, record(**given))


def test_another_programs_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text of some length " * 100, encoding="utf-8")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE mine (x)")
    for name in ("text", "other.db"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(StoreError, match=name):
            ConversationStore(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


# --- its routes ---


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A page with two logins, in this process."""
    import socket

    import uvicorn

    desk = Desk([ChatSystem("one", Endpoint("http://127.0.0.1:9/v1"))], tmp_path / "votes.db", tmp_path)
    desk.conversations = tmp_path / "kept.db"
    app = create_app(desk, "ann:one\nbob:two")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def test_each_login_has_its_own_conversations(served: str) -> None:
    ann, bob, nobody, wrong = (
        httpx.Client(base_url=served, auth=auth, trust_env=False)
        for auth in (("ann", "one"), ("bob", "two"), None, ("ann", "two"))
    )
    path = f"/conversations/{ID}"
    for client in (nobody, wrong):
        assert client.get("/conversations").status_code == 401
        assert client.put(path, json=record()).status_code == 401
    assert ann.put(path, json=record()).json() == {"version": 1}
    assert ann.put(path, json=record()).status_code == 409
    assert [entry["name"] for entry in ann.get("/conversations?search=ÄTHER").json()] == ["Äther"]
    assert ann.get(path).json()["conversation"]["turns"][0]["user"] == "What is ÄTHER?"
    assert bob.get("/conversations").json() == []
    assert bob.get(path).status_code == 404
    assert bob.delete(path).status_code == 204
    assert ann.get(path).status_code == 200
    assert ann.put(path, json=record(1), headers={"Origin": "http://evil.lan"}).status_code == 403
    assert ann.put(path, content=b"[").status_code == 400
    assert ann.put(path, content=b"[]").status_code == 400
    assert ann.put(path, json=record(1, settings="x" * MAX_BYTES)).status_code == 413
    assert ann.get("/conversations/..%2fvotes.db").status_code == 404
    assert ann.delete(path).status_code == 204
    assert ann.get(path).status_code == 404


# --- what the page is told ---


def test_a_record_comes_back_and_anything_else_is_new() -> None:
    settings = Settings("Be brief.", 0.0, 0.5, 64, 3)
    assert record_of(kept_text(TALK, settings), Settings()) == (TALK, settings)
    back, _ = record_of({"conversation": TALK.to_dict(), "settings": {"temperature": "x"}}, Settings(temperature=0.3))
    assert back.id == TALK.id
    for broken in (None, "", "{", "[]", 3, {"conversation": [1]}, {"settings": {"evil": 1}}):
        conversation, settings = record_of(broken, Settings())
        assert (conversation, settings) == (Conversation(), Settings())
    forged = TALK.to_dict() | {"id": "../x"}
    assert record_of({"conversation": forged}, Settings())[0].id != "../x"


def test_the_page_says_where_what_is_said_goes() -> None:
    local = ChatSystem("nano", Endpoint("http://127.0.0.1:1/v1", local=True))
    far = ChatSystem("<b>", Endpoint("https://api.far.example/v1"))
    both = whereabouts([local, far], on_server=False)
    assert "in this browser" in both
    assert "the server's own machine or the endpoint api.far.example" in both
    assert "far.example" not in whereabouts([local], on_server=False)
    assert "on this page's server, for your login" in whereabouts([far], on_server=True)


def test_too_much_is_said_not_cut(tmp_path: Path) -> None:
    with gr.Blocks():
        tab = ChatTab(Desk([ChatSystem("one", Endpoint("http://127.0.0.1:9/v1"))], tmp_path / "v", tmp_path))

    async def told(text: str, conversation: Conversation) -> str:
        values = (None, "one", "", 0.7, 0.9, 16, 1)
        updates = [update async for update in tab._on_send(None, text, conversation, *values)]  # type: ignore[arg-type]
        return str(updates[-1][tab.notice])

    assert "more than 200,000 characters" in asyncio.run(told("x" * (MAX_CHARACTERS + 1), Conversation()))
    full = Conversation(TALK.turns * MAX_TURNS)
    assert TOO_MANY in asyncio.run(told("one more", full))


# --- formulas and code ---


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("$E=mc^2$ and $$x_1*y*$$", ["E=mc^2", "x_1*y*"]),
        (r"\(a_1\) or \[b_1\]", ["a_1", "b_1"]),
        ("$$\na\n= b\n- c * d\n$$\nand text", ["a\n= b\n- c * d"]),
        ("from $5 to $10, or $3-$4", []),
        ("a `$x$` and $x `q` y$", []),
        (r"\$5 and $x$", ["x"]),
        ("```\n$$\nx\n$$\n```", []),
        ("$$ never closed\n\nmore", []),
        ("- one\n  $$\n  z\n  $$\n- two", ["z"]),
    ],
)
def test_formulas_are_found_and_prices_are_not(text: str, sources: list[str]) -> None:
    import re
    from html import unescape

    html = markdown(text)
    assert [unescape(one) for one in re.findall(r'<code class="maths[^"]*">(.*?)</code>', html, re.DOTALL)] == sources


def test_a_formula_can_do_nothing() -> None:
    for text in ("$<img src=x onerror=alert(1)>$", "$$\n<script>alert(1)</script>\n$$", r'\("onmouseover="x\)'):
        assert "<img" not in markdown(text)
        assert "<script" not in markdown(text)
        assert 'class="maths' in markdown(text)


def test_hostile_delimiters_take_no_time() -> None:
    began = time.process_time()
    for piece in ("$a ", "$$a\n", "\\(a ", "$\\", "\\["):
        markdown(piece * 8_000)
    assert time.process_time() - began < 5


def test_gradio_brings_what_code_and_maths_need(tmp_path: Path) -> None:
    told = parts_script()
    for name in ("katex.js", "katex.css", "prism.js", "prism-python.js", "prism-bash.js"):
        assert f'"{name}"' in told
    assert parts_of(tmp_path / "nowhere") == {}
    (tmp_path / "katex-ABCDEFGH.js").touch()
    (tmp_path / "katex-worker.js").touch()
    assert parts_of(tmp_path) == {"katex.js": "katex-ABCDEFGH.js"}
