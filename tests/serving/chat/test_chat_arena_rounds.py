"""Rounds of the arena: several turns, answers that name their system, stop, and the board that grows with each vote."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from almost_eval.arena.report import board
from almost_eval.arena.votes import Vote, VoteStore
from serving.chat.arena import MAX_TURNS, Arena, Round
from serving.chat.client import Abilities, Delta, End, Endpoint
from serving.chat.conversation import ChatReply, Settings
from serving.chat.names import names_itself
from serving.chat.render import EMPTY, board_html
from serving.chat.session import ChatSystem, Desk, RateLimit
from serving.chat.tab_arena import ArenaTab

SYSTEMS = ("nano/almost", "nano/vanilla-large", "SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    "text",
    [
        "I am ChatGPT, a large language model.",
        "Hello! I'm Claude.",
        "My name is Qwen2.5, how can I help?",
        "I am GPT-4.",
        "i\u2019m almost",
        "I am a language model trained by OpenAI.",
        "As an AI developed by Google, I cannot.",
        "This text was written by SmolLM2-135M-Instruct",
        "nano/vanilla-large says hello",
        "I'm SmolLM2!",
        "I was created and trained by Hugging Face.",
    ],
)
def test_an_answer_that_names_itself(text: str) -> None:
    assert names_itself(text, SYSTEMS)


@pytest.mark.parametrize(
    "text",
    [
        "The falcon lives in the forest.",
        "I am a falcon, and I fly.",
        "It is almost noon, and the almost empty box is red.",
        "Claude Monet painted lilies, and Google is a company.",
        "Vanilla is a flavour; large portions of it are sweet.",
        "My name is Anna.",
        "The clock was made by a baker.",
        "",
    ],
)
def test_an_answer_that_does_not(text: str) -> None:
    assert not names_itself(text, SYSTEMS)


def arena(folder: Path) -> Arena:
    systems = [ChatSystem(name, Endpoint("http://127.0.0.1:9/v1")) for name in ("red-1", "blue-2")]
    return Arena(systems, VoteStore(folder / "votes.db"), Settings(system="Be brief."), 1)


def pair(one: str, two: str) -> tuple[ChatReply, ChatReply]:
    return ChatReply(one, reward=1.0), ChatReply(two, reward=2.0)


def test_each_side_goes_on_with_its_own_answers_and_all_are_stored(tmp_path: Path) -> None:
    own = arena(tmp_path)
    round_ = own.begin("Who?", "typed").answer(pair("I.", "You."), own.names).ask("Why?")
    assert not round_.votable
    assert round_.messages(1, "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "You."},
        {"role": "user", "content": "Why?"},
    ]
    round_ = round_.answer(pair("So.", "Because."), own.names)
    own.vote(round_, "s", "b")
    (vote,) = own.store.votes()
    assert [message["content"] for message in vote.prompt] == ["Be brief.", "Who?", "Why?"]
    assert vote.answers("a") == ("I.", "So.")
    assert vote.answers("b") == ("You.", "Because.")
    assert vote.is_blind


def test_a_round_in_which_a_system_names_itself_is_marked_and_not_counted(tmp_path: Path) -> None:
    own = arena(tmp_path)
    plain = own.begin("Who?", "typed").answer(pair("I.", "You."), own.names)
    # Named in the first turn: the second does not unsay it.
    named = own.begin("Who?", "typed").answer(pair("I am red-1.", "You."), own.names).ask("Why?")
    named = named.answer(pair("So.", "So."), own.names)
    assert (plain.named, named.named) == ("", "a")
    own.vote(plain, "s", "a")
    own.vote(named, "s", "a")
    votes = own.store.votes()
    assert [vote.is_blind for vote in votes] == [True, False]
    result = board(votes)
    assert (result.votes, result.named) == (1, 1)
    assert "1 vote more is kept and not counted" in board_html(result)


def vote(number: int, verdict: str, session: str) -> Vote:
    return Vote(f"v{number}", session, (), "typed", "x", "y", "t", "u", verdict)


def test_the_board_says_how_sure_it_is() -> None:
    assert EMPTY in board_html(board([]))
    one = board([vote(1, "a", "s")])
    assert one.rates["x"].ci95 is None
    assert "one vote: no interval" in board_html(one)
    # Three votes of one voter, 2 of them for x: as if independent. Wilson's interval of 2/3 with n = 3.
    alone = board([vote(i, verdict, "s") for i, verdict in enumerate("aab")])
    assert list(alone.rates) == ["x", "y"]
    low, high = alone.rates["x"].ci95 or (0, 0)
    assert (round(low, 3), round(high, 3)) == (0.208, 0.939)
    assert "one voter" in board_html(alone)
    assert "67 %" in board_html(alone)
    both = board(
        [
            vote(i, verdict, session)
            for i, (verdict, session) in enumerate([("a", "s"), ("a", "s"), ("b", "t"), ("a", "t")])
        ]
    )
    assert "clustered by voter" in board_html(both)
    assert "&lt;i&gt;x" in board_html(board([Vote("i", "s", (), "t", "<i>x</i>", "y", "", "", "a")]))


# --- the tab ---


class Talking(Endpoint):
    """Answers with what it is told to; `slow` never ends."""

    answer = "An answer."

    async def abilities(self) -> Abilities:
        return Abilities(("m",))

    async def stream(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        yield Delta(self.answer)
        if self.answer == "slow":
            await asyncio.sleep(60)
        yield End("stop")


class Page:
    """One visitor's tab: what all updates have left on it."""

    def __init__(self, folder: Path) -> None:
        systems = [ChatSystem(name, Talking("http://127.0.0.1:9/v1")) for name in ("red-1", "blue-2")]
        self.desk = Desk(systems, folder / "votes.db", folder, [("q1", "Drawn?")], rate=RateLimit(1000))
        self.arena = Arena(systems, VoteStore(folder / "votes.db"), self.desk.defaults, 1)
        with gr.Blocks():
            self.tab = ArenaTab(self.desk, self.arena)
        self.request: Any = SimpleNamespace(session_hash="page", headers={}, client=SimpleNamespace(host="1.1.1.1"))
        self.shown: dict[Any, Any] = {self.tab.round: None}

    @property
    def round(self) -> Round:
        """The round of this page."""
        round_ = self.shown[self.tab.round]
        assert round_ is not None
        return round_

    async def follow(self, events: AsyncIterator[Any]) -> None:
        async for update in events:
            self.shown |= update

    async def ask(self, text: str) -> None:
        await self.follow(self.tab._on_send(self.request, text, None, self.shown[self.tab.round]))

    async def next(self) -> None:
        await self.follow(self.tab._on_next(self.request, self.shown[self.tab.round]))

    def vote(self, verdict: str) -> None:
        self.shown |= self.tab._on_vote(self.request, self.round, verdict)


def test_several_turns_a_vote_and_the_next_round(tmp_path: Path) -> None:
    async def check() -> None:
        page = Page(tmp_path)
        await page.ask("One?")
        first = page.round
        await page.ask("Two?")
        assert page.round.id == first.id
        assert page.round.questions == ("One?", "Two?")
        assert "red-1" not in str(page.shown[page.tab.panels[0]]) + str(page.shown[page.tab.panels[1]])
        page.vote("a")
        assert "1 vote by one voter" in page.shown[page.tab.board]
        assert page.shown[page.tab.next].value == "Next round"
        page.vote("b")  # a second one changes nothing
        assert len(page.arena.store.votes()) == 1
        await page.next()
        assert page.round.id != first.id
        assert (page.round.questions, page.round.source) == (("Drawn?",), "q1")
        page.vote("tie")
        assert "2 votes by one voter" in page.shown[page.tab.board]
        await page.ask("A new round after a vote?")
        assert len(page.round.questions) == 1
        for number in range(MAX_TURNS):
            await page.ask(f"{number}?")
        assert len(page.round.questions) == MAX_TURNS
        assert f"at most {MAX_TURNS} turns" in page.shown[page.tab.notice]
        page.vote("a")
        assert len(page.arena.store.votes()) == 3

    asyncio.run(check())


def test_stop_voids_its_question_and_not_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stopped(page: Page, text: str) -> None:
        asking = asyncio.create_task(page.ask(text))
        await asyncio.sleep(0.3)
        assert page.shown[page.tab.stop].visible is True
        page.tab._on_stop(page.request)
        await asking

    async def check() -> None:
        page = Page(tmp_path)
        monkeypatch.setattr(Talking, "answer", "slow")
        await stopped(page, "One?")
        assert page.shown[page.tab.round] is None
        assert "Stopped: this round does not count" in page.shown[page.tab.notice]
        assert page.shown[page.tab.buttons["a"]].interactive is False
        assert page.shown[page.tab.box].value == "One?"
        monkeypatch.setattr(Talking, "answer", "An answer.")
        await page.ask("One?")
        monkeypatch.setattr(Talking, "answer", "slow")
        await stopped(page, "Two?")
        assert page.round.questions == ("One?",)
        assert "those before it do" in page.shown[page.tab.notice]
        assert page.shown[page.tab.buttons["a"]].interactive is True
        page.vote("a")
        assert page.arena.store.votes()[0].answers("a") == ("An answer.",)

    asyncio.run(check())


def test_the_page_says_that_a_round_is_not_blind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        page = Page(tmp_path)
        monkeypatch.setattr(Talking, "answer", "I am ChatGPT.")
        await page.ask("Who are you?")
        assert page.round.named == "ab"
        assert "not blind" in page.shown[page.tab.notice]
        page.vote("a")
        assert "marked as not blind" in page.shown[page.tab.notice]
        assert EMPTY in page.shown[page.tab.board]
        assert "named itself" in page.shown[page.tab.panels[0]]

    asyncio.run(check())


def test_the_board_takes_in_the_votes_of_others(tmp_path: Path) -> None:
    page = Page(tmp_path)
    html, seen = page.tab._on_look(-1)
    assert EMPTY in str(html)
    assert page.tab._on_look(seen) == (gr.skip(), gr.skip())  # type: ignore[arg-type]
    page.arena.store.append(vote(1, "a", "somebody else"))
    html, seen = page.tab._on_look(seen)  # type: ignore[arg-type]
    assert "1 vote by one voter" in str(html)
    assert seen == 1
