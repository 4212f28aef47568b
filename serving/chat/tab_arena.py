"""The Arena tab: two answers, no names, one vote; the names come after it, and the board takes the vote in."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from html import escape

import gradio as gr
from gradio.blocks import Block

from almost_eval.arena.report import board
from almost_eval.arena.votes import VOTES
from almost_eval.errors import AlmostError
from serving.chat.arena import MAX_TURNS, SIDES, Arena, Round, void_sentence
from serving.chat.client import EndpointError
from serving.chat.conversation import ChatReply
from serving.chat.render import badge, board_html, notice_html, reply_html
from serving.chat.session import BROKEN, Desk, Draw, NotNow, Step, draw_together
from serving.chat.toyworld import hint
from serving.chat.widgets import (
    ALONE,
    ANSWERING,
    QUICK,
    SETTLE_S,
    QuestionTab,
    Update,
    answering,
    asker_of,
    button,
    question_box,
    raw_html,
)

LABELS = {"a": "A is better", "b": "B is better", "tie": "Tie", "both_bad": "Both are bad"}
INTRODUCTION = (
    "Two systems answer the same questions, in an order that chance decides. Vote for the better one, at once or after "
    "a few turns; the names come after the vote. Stored are the questions, all answers, your vote and a random number "
    "for this browser: nothing about you."
)
KEYS = (
    "Keys, while no text is being typed: <kbd>N</kbd> next round, <kbd>A</kbd> or <kbd>B</kbd> is better, "
    "<kbd>T</kbd> tie, <kbd>X</kbd> both bad, <kbd>Esc</kbd> stop."
)
NAMED = "An answer says whose it is, so this round is not blind: your vote is kept, and is not counted on the board."
FIRST, NEXT = "Type a question, or draw one", "Go on with both, or vote"
REFRESH_S = 5.0
"""Seconds between two looks at the votes of others, while the tab is open."""
_FOCUS_NEXT = "() => setTimeout(() => document.querySelector('#arena-next')?.focus(), 60)"
_LETTERS = ("A", "B")
_LOG = logging.getLogger("almost.chat")


class ArenaTab(QuestionTab):
    """Builds the tab inside a `gr.Blocks` and answers its events; `arena` is None with fewer than two systems."""

    name = "arena"

    def __init__(self, desk: Desk, arena: Arena | None) -> None:
        self._desk = desk
        self._arena = arena
        if arena is None:
            raw_html(notice_html(ALONE, "hint"))
            return
        self.round = gr.State(None)
        self.question = gr.State(None)
        self._draws = random.Random(arena.seed)
        self._board = (-1, "")
        self._board_lock = threading.Lock()
        raw_html(f'<p class="aside intro">{INTRODUCTION}</p>')
        with gr.Row(elem_classes="composer"):
            self.box = question_box("Question for both", FIRST, "arena-message")
            self.draw = button("Draw a question", "arena-draw", width=130, visible=bool(desk.questions))
            self.send = button("Ask both", "arena-send", "primary")
            self.stop = button("Stop", "arena-stop", "stop", visible=False)
        self.notice = raw_html(elem_id="arena-notice")
        with gr.Row(elem_classes="pair"):
            self.panels = [
                raw_html(self._panel(place, None), elem_id=f"arena-{letter.lower()}")
                for place, letter in enumerate(_LETTERS)
            ]
        with gr.Row(elem_classes="votes"):
            self.buttons = {
                vote: gr.Button(LABELS[vote], interactive=False, min_width=110, elem_id=f"vote-{vote}")
                for vote in VOTES
            }
            self.next = gr.Button("Next round", min_width=110, visible=bool(desk.questions), elem_id="arena-next")
        raw_html(f'<p class="aside keys">{KEYS}</p>')
        self.board = raw_html(elem_id="arena-board")
        self.seen = gr.State(-1)
        self.timer = gr.Timer(REFRESH_S, active=False)

    def connect(self, page: gr.Blocks, own: gr.Tab, others: list[gr.Tab]) -> None:
        """Attach the events. While its own tab is open and none of the others, the votes of others are looked for."""
        if self._arena is None:
            return
        outputs = [self.round, self.box, self.question, *self.panels, self.notice, self.send, self.draw, self.stop]
        outputs += [self.next, *self.buttons.values(), self.board, self.seen]
        state = [self.box, self.question, self.round]
        gr.on([self.box.submit, self.send.click], self._on_send, state, outputs, **ANSWERING)
        self.next.click(self._on_next, self.round, outputs, **ANSWERING)
        self.draw.click(self._on_draw, None, [self.box, self.question], **QUICK)
        self.stop.click(self._on_stop, None, None, **QUICK)
        for vote, pressed in self.buttons.items():
            pick = gr.State(vote)
            event = pressed.click(self._on_vote, [self.round, pick], outputs, **ANSWERING)
            # The pressed button cannot be pressed again; the keyboard goes on at the next round.
            event.then(None, None, None, js=_FOCUS_NEXT, api_visibility="private")
        gr.on([page.load, self.timer.tick], self._on_look, self.seen, [self.board, self.seen], **QUICK)
        own.select(lambda: gr.Timer(active=True), None, self.timer, **QUICK)
        gr.on([tab.select for tab in others], lambda: gr.Timer(active=False), None, self.timer, **QUICK)

    def _on_draw(self) -> tuple[str, tuple[str, str]]:
        question = self._draws.choice(self._desk.questions)
        return question[1], question

    async def _on_next(self, request: gr.Request, round_: Round | None) -> AsyncIterator[Update]:
        """A new round on a drawn question; one without a vote is left."""
        text, question = self._on_draw()
        async for update in self._on_send(request, text, question, None):
            yield update

    @answering
    async def _on_send(
        self, request: gr.Request, text: str, question: tuple[str, str] | None, round_: Round | None = None
    ) -> AsyncGenerator[Update, None]:
        """One question to both: the next turn of a round that waits for its vote, else a new round."""
        assert self._arena is not None
        if round_ is not None and round_.votable and not round_.goes_on:
            yield {self.notice: notice_html(f"A round has at most {MAX_TURNS} turns: vote, or start the next.", "hint")}
            return
        # Typed words are `typed`, also where they began as a drawn question.
        source = question[0] if question and question[1] == text else "typed"
        on = round_ is not None and round_.goes_on
        current = round_.ask(text) if round_ is not None and on else self._arena.begin(text, source)
        steps: list[Step | None] = [None, None]
        try:
            with self._desk.work(self.name, asker_of(self._desk, request)) as stop, self._desk.place() as place:
                yield {self.round: None, self.notice: "", self.box: ""} | self._shown(current) | self._busy()
                await asyncio.sleep(SETTLE_S)
                settings = self._arena.settings
                draws = [
                    Draw(self._desk.system(name), current.messages(side, settings.system), settings)
                    for side, name in enumerate(current.systems)
                ]
                async for sentence in place.sentences(stop):
                    yield {self.notice: notice_html(sentence, "hint")}
                async for steps in draw_together(draws, stop):
                    yield self._shown(current, steps)
                await asyncio.sleep(SETTLE_S)
        except NotNow:
            raise
        except Exception:  # whatever it was, the round can be gone on with
            _LOG.exception("a round failed")
            yield self._undone(current, BROKEN, "error")
            return
        if why := self._why_void(steps):
            yield self._undone(current, *why)
            return
        first, second = (step.reply for step in steps if step)
        whole = current.answer((first, second), self._arena.names)
        notice = notice_html(NAMED, "hint") if whole.named else self._hint(text)
        yield {self.round: whole, self.notice: notice} | self._shown(whole) | self._ready(whole)

    def _why_void(self, steps: list[Step | None]) -> tuple[str, str] | None:
        """Why a question cannot be voted on, and the kind of the notice."""
        failed = next((step.error for step in steps if step and step.error), None)
        if failed is None and any(step is None or step.reply.ending == "stopped" for step in steps):
            return "Stopped", "hint"
        if failed is None and all(step and step.reply.text for step in steps):
            return None
        return void_sentence(failed or EndpointError("broken", "")), "error"

    def _undone(self, current: Round, why: str, kind: str) -> Update:
        """The question is taken back; what was answered before it can still be voted on."""
        before = current.take_back()
        if why != BROKEN:
            void = "this round does not count" if before is None else "this question does not count, those before it do"
            why = f"{why}: {void}."
        text = gr.Textbox(value=current.questions[-1])
        shown = self._shown(before) if before else {}
        return {self.round: before, self.box: text, self.notice: notice_html(why, kind)} | shown | self._ready(before)

    def _hint(self, text: str) -> str:
        """That a question is outside the world that all systems know."""
        assert self._arena is not None
        if not all(system.is_toy for system in self._arena.systems):
            return ""
        return notice_html(hint(text), "hint")

    def _on_vote(self, request: gr.Request, round_: Round | None, vote: str) -> Update:
        assert self._arena is not None
        if round_ is None or not round_.votable:
            return {self.notice: gr.skip()}
        try:
            voted = self._arena.vote(round_, asker_of(self._desk, request).visitor, vote)
        except AlmostError as error:  # a full disk, a locked file, a second vote: the round stays as it is
            return {self.notice: notice_html(f"{str(error)[:1].upper()}{str(error)[1:]}.")}
        marked = " It is marked as not blind." if voted.named else ""
        thanks = notice_html(f"Stored: {LABELS[vote]}.{marked}", "good")
        count, html = self._look(-1)
        told = {} if html is None else {self.board: html, self.seen: count}
        return {self.round: voted, self.notice: thanks} | self._shown(voted) | self._ready(voted) | told

    def _on_look(self, seen: int) -> tuple[object, object]:
        count, html = self._look(seen)
        return (gr.skip(), gr.skip()) if html is None else (html, count)

    def _look(self, seen: int) -> tuple[int, str | None]:
        """The number of votes and the board; None for a board that the page has already, or that cannot be read now."""
        assert self._arena is not None
        try:
            count = self._arena.store.count()
            if count == seen:
                return count, None
            with self._board_lock:  # of many pages that look at once, one reads the votes
                if self._board[0] != count:
                    votes = self._arena.store.votes() if count else []
                    self._board = (len(votes), board_html(board(votes)))
                return self._board
        except AlmostError as error:  # a locked file: the next look may succeed
            _LOG.warning("the board cannot be drawn: %s", error)
            return seen, None

    # --- what the page shows ---

    def _shown(self, round_: Round, steps: list[Step | None] | None = None) -> dict[Block, object]:
        return {
            panel: self._panel(place, round_, steps[place] if steps else None)
            for place, panel in enumerate(self.panels)
        }

    def _busy(self) -> dict[Block, object]:
        """While both answer."""
        still: dict[Block, object] = {one: gr.Button(interactive=False) for one in (self.next, *self.buttons.values())}
        return still | {self.send: gr.Button(visible=False), self.stop: gr.Button(visible=True)}

    def _buttons(self, *, busy: bool) -> dict[Block, object]:
        return self._busy() if busy else self._ready(None)

    def _ready(self, round_: Round | None) -> dict[Block, object]:
        """While nobody answers: what can be done with the round, if there is one."""
        votable = round_ is not None and round_.votable
        return {
            self.send: gr.Button("Ask both again" if votable else "Ask both", visible=True, interactive=True),
            **({} if round_ is None else {self.box: gr.Textbox(placeholder=NEXT if votable else FIRST)}),
            self.stop: gr.Button(visible=False),
            self.draw: gr.Button(visible=bool(self._desk.questions) and not votable),
            self.next: gr.Button(
                "Skip this round" if votable else "Next round",
                interactive=True,
                variant="primary" if round_ and round_.vote else "secondary",
            ),
            **{pressed: gr.Button(interactive=votable) for pressed in self.buttons.values()},
        }

    def _panel(self, place: int, round_: Round | None, step: Step | None = None) -> str:
        """One side. Before the vote nothing but text: speed, reward and ending could give a system away."""
        letter = _LETTERS[place]
        if round_ is None:
            body = '<p class="aside">The answer appears here</p>'
            return f'<article class="panel"><h3>{letter}</h3>{body}</article>'
        heading = f"{letter}: {escape(round_.systems[place])}" if round_.vote else letter
        body = ""
        for number, question in enumerate(round_.questions):
            body += f'<p class="question">{escape(question)}</p>'
            if number < len(round_.replies):
                body += reply_html(ChatReply(round_.replies[number][place].text))
            elif step is None or not step.reply.text:
                body += '<p class="aside pulse">Thinking</p>'
            else:
                body += reply_html(ChatReply(step.reply.text), live=not step.done)
        if round_.vote:
            mark = '<span class="badge good">your vote</span>' if round_.vote == SIDES[place] else ""
            named = '<span class="badge">named itself</span>' if SIDES[place] in round_.named else ""
            last = round_.replies[-1][place]
            body += f'<div class="facts">{mark}{named}{badge(last.reward, last.percentile)}</div>'
        won = " won" if round_.vote == SIDES[place] else ""
        return f'<article class="panel{won}"><h3>{heading}</h3>{body}</article>'
