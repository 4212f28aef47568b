"""What may go wrong around an answer: too many who wait, a bug of our own, a model whose process ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from almost_eval.arena.votes import VoteStore
from serving.chat.arena import Arena
from serving.chat.client import Abilities, Endpoint
from serving.chat.conversation import MAX_QUESTION, Conversation
from serving.chat.session import BROKEN, FULL, ChatSystem, Desk, NotNow, RateLimit
from serving.chat.tab_arena import ArenaTab
from serving.chat.tab_chat import ChatTab
from serving.chat.tab_compare import CompareTab
from serving.chat.visitors import Asker


class Buggy(Endpoint):
    """An endpoint with a bug of our own."""

    async def abilities(self) -> Abilities:
        return Abilities(("m",))

    async def stream(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        raise TypeError("a bug")
        yield


def desk(folder: Path, **more: Any) -> Desk:
    systems = [ChatSystem(name, Buggy("http://127.0.0.1:9/v1")) for name in ("one", "two")]
    return Desk(systems, folder / "votes.db", folder, rate=RateLimit(1000), **more)


def request() -> Any:
    return SimpleNamespace(session_hash="page", headers={}, client=SimpleNamespace(host="1.1.1.1"))


def chat(desk: Desk) -> tuple[Any, AsyncIterator[Any]]:
    tab = ChatTab(desk)
    return tab, tab._on_send(request(), "hello", Conversation(), None, "one", "", 0.7, 0.9, 16, 1)


def compare(desk: Desk) -> tuple[Any, AsyncIterator[Any]]:
    tab = CompareTab(desk)
    return tab, tab._on_send(request(), "hello", "one", "two", "", 0.7, 0.9, 16, 1)


def arena(desk: Desk) -> tuple[Any, AsyncIterator[Any]]:
    tab = ArenaTab(desk, Arena(desk.systems, VoteStore(desk.votes), desk.defaults))
    return tab, tab._on_send(request(), "hello", None)


TABS = (chat, compare, arena)


async def told(events: AsyncIterator[Any]) -> dict[Any, Any]:
    """What all updates together leave on the page."""
    page: dict[Any, Any] = {}
    async for update in events:
        page |= update
    return page


@pytest.mark.parametrize("make", TABS)
def test_a_bug_of_ours_is_a_sentence_and_the_page_can_be_used_again(tmp_path: Path, make: Callable[..., Any]) -> None:
    with gr.Blocks():
        own = desk(tmp_path)
        tab, events = make(own)
    page = asyncio.run(told(events))
    assert BROKEN.replace("'", "&#x27;") in page[tab.notice]
    assert "a bug" not in page[tab.notice]
    if tab.send in page:
        assert page[tab.send].visible is not False
        assert page[tab.send].interactive is not False
        if hasattr(tab, "stop"):
            assert page[tab.stop].visible is False
    else:  # the Chat tab's buttons are as its live answer is, by a rule of the style sheet
        assert page[tab.live] == ""
    assert own._stops == {}
    assert not own._line.working


@pytest.mark.parametrize("make", TABS)
def test_where_too_many_wait_the_next_is_told_so(tmp_path: Path, make: Callable[..., Any]) -> None:
    with gr.Blocks():
        own = desk(tmp_path, concurrency=1, queue_size=1)
        tab, events = make(own)

    async def check() -> dict[Any, Any]:
        with own.work("chat", Asker("a", "a", "a")), own.work("chat", Asker("b", "b", "b")):
            return await told(events)

    assert FULL in asyncio.run(check())[tab.notice]


@pytest.mark.parametrize("make", [compare, arena])
def test_a_question_that_is_too_long_is_refused_and_not_cut(tmp_path: Path, make: Callable[..., Any]) -> None:
    with gr.Blocks():
        tab, _ = make(desk(tmp_path))
    long = "x" * (MAX_QUESTION + 1)
    events = tab._on_send(request(), long, "one", "two", "", 0.7, 0.9, 16, 1) if make is compare else None
    page = asyncio.run(told(events or tab._on_send(request(), long, None)))
    assert list(page) == [tab.notice]
    assert f"more than {MAX_QUESTION:,} characters" in page[tab.notice]


def test_answers_wait_their_turn_and_stop_ends_the_wait(tmp_path: Path) -> None:
    async def check() -> list[str]:
        own, order = desk(tmp_path, concurrency=1), []
        stop = {name: asyncio.Event() for name in "abc"}

        async def answer(name: str, seconds: float) -> None:
            with own.place() as place:
                await place.come(stop[name])
                order.append(f"{name} begins" if not stop[name].is_set() else f"{name} was stopped")
                await asyncio.sleep(seconds)

        tasks = [asyncio.create_task(answer(name, 0.2 if name == "a" else 0)) for name in "abc"]
        await asyncio.sleep(0.05)
        stop["c"].set()
        await asyncio.gather(*tasks)
        assert not own._line.working
        return order

    assert asyncio.run(check()) == ["a begins", "c was stopped", "b begins"]


def test_nobody_waits_for_whom_the_page_was_closed(tmp_path: Path) -> None:
    async def check() -> None:
        own = desk(tmp_path, concurrency=1)
        never = asyncio.Event()

        async def answer() -> None:
            with own.place() as place:
                await place.come(never)
                await asyncio.sleep(0.05)

        first, second = asyncio.create_task(answer()), asyncio.create_task(answer())
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.wait_for(answer(), 1)

    asyncio.run(check())


def test_no_more_than_the_queue_takes_are_let_in(tmp_path: Path) -> None:
    own = desk(tmp_path, concurrency=1, queue_size=0)
    first, second = own.work("chat", Asker("a", "a", "a")), own.work("chat", Asker("b", "b", "b"))
    with first, pytest.raises(NotNow, match="waiting here already"), second:
        pass
    with own.work("chat", Asker("b", "b", "b")):
        pass


def test_the_page_ends_with_its_models_and_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serving.cli.chat", "--model", "nano/sft", "--port", "0"]
    command += ["--votes", str(tmp_path / "votes.db"), "--reports", str(tmp_path)]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert page.stdout is not None
    assert page.stdout.readline().startswith("http://127.0.0.1:")
    children = Path(f"/proc/{page.pid}/task/{page.pid}/children").read_text().split()
    (model,) = [pid for pid in children if b"serving.cli.local" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(model), signal.SIGKILL)
    _, err = page.communicate(timeout=120)
    assert page.returncode == 1
    assert "--- the last lines of nano/sft" in err
    assert err.splitlines()[-1] == "error: nano/sft was killed by signal 9; its last lines say why"
