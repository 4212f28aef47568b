"""The Arena tab: two answers, no names, one vote; the names come after it."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import gradio as gr
from gradio.blocks import Block

from almost_eval.arena.votes import VOTES
from almost_eval.errors import AlmostError
from serving.chat.arena import Arena, Round, sentence
from serving.chat.client import EndpointError
from serving.chat.conversation import ChatReply
from serving.chat.render import badge, notice_html, panel_html
from serving.chat.session import BROKEN, Desk, NotNow, Step
from serving.chat.widgets import ALONE, ANSWERING, QUICK, Update, asker_of, button, draw_both, question_box, raw_html

LABELS = {"a": "A is better", "b": "B is better", "tie": "Tie", "both_bad": "Both are bad"}
INTRODUCTION = (
    "Two systems answer the same question, in an order that chance decides. Vote for the better answer; the names come "
    "after the vote. Stored are the question, both answers, your vote and a random number for this browser: nothing "
    "about you."
)
_LETTERS = ("A", "B")
_LOG = logging.getLogger("almost.chat")


class ArenaTab:
    """Builds the tab inside a `gr.Blocks` and answers its events.

    Args:
        desk: what is served.
        arena: draws rounds and keeps votes; None with fewer than two systems.
    """

    def __init__(self, desk: Desk, arena: Arena | None) -> None:
        self._desk = desk
        self._arena = arena
        if arena is None:
            raw_html(notice_html(ALONE, "hint"))
            return
        self.round = gr.State(None)
        self.question = gr.State(None)
        self._draws = random.Random(arena.seed)
        raw_html(f'<p class="aside intro">{INTRODUCTION}</p>')
        with gr.Row(elem_classes="composer"):
            self.box = question_box("Question for both", "Type a question, or draw one", "arena-message")
            self.draw = button("Draw a question", "arena-draw", width=130, visible=bool(desk.questions))
            self.send = button("Ask both", "arena-send", "primary")
        self.notice = raw_html(elem_id="arena-notice")
        with gr.Row(elem_classes="pair"):
            self.panels = [
                raw_html(
                    panel_html(None, live=False, heading=letter, note="The answer appears here"),
                    elem_id=f"arena-{letter.lower()}",
                )
                for letter in _LETTERS
            ]
        with gr.Row(elem_classes="votes"):
            self.buttons = {
                vote: gr.Button(LABELS[vote], interactive=False, min_width=110, elem_id=f"vote-{vote}")
                for vote in VOTES
            }

    def connect(self) -> None:
        """Attach the events."""
        if self._arena is None:
            return
        outputs = [self.round, *self.panels, self.notice, self.send, *self.buttons.values()]
        gr.on(
            [self.box.submit, self.send.click],
            self._on_send,
            [self.box, self.question],
            outputs,
            **ANSWERING,
        )
        self.draw.click(self._on_draw, None, [self.box, self.question], **QUICK)
        for vote, pressed in self.buttons.items():
            pick = gr.State(vote)
            pressed.click(
                self._on_vote,
                [self.round, pick],
                outputs,
                show_progress="hidden",
                concurrency_limit=None,
                api_visibility="private",
            )

    def _on_draw(self) -> tuple[str, tuple[str, str]]:
        question = self._draws.choice(self._desk.questions)
        return question[1], question

    async def _on_send(self, request: gr.Request, text: str, question: tuple[str, str] | None) -> AsyncIterator[Update]:
        assert self._arena is not None
        text = (text or "").strip()
        if not text:
            yield {self.notice: gr.skip()}
            return
        try:
            with self._desk.work("arena", asker_of(self._desk, request)) as stop:
                # Typed words are `typed`, also where they began as a drawn question.
                source = question[0] if question and question[1] == text else "typed"
                round_ = self._arena.begin(text[:10_000], source)
                waiting = [panel_html(ChatReply(""), live=True, heading=letter) for letter in _LETTERS]
                yield {self.round: None, self.notice: ""} | self._shown(waiting) | self._usable(send=False, votes=False)
                steps: list[Step | None] = [None, None]
                systems = [self._desk.system(name) for name in round_.systems]
                messages = self._arena.messages(round_.prompt)
                async with self._desk.turn(stop):
                    async for steps in draw_both(systems, messages, self._arena.settings, stop):
                        yield self._shown([self._panel(*pair) for pair in zip(_LETTERS, steps, strict=True)])
        except NotNow as refusal:
            yield {self.notice: notice_html(str(refusal), refusal.kind)}
            return
        except Exception:  # whatever it was, the page can be used again
            _LOG.exception("a round failed")
            yield {self.notice: notice_html(BROKEN)} | self._usable(send=True)
            return
        failed = next((step.error for step in steps if step and step.error), None)
        if failed or not all(step and step.reply.text for step in steps):
            failed = failed or EndpointError("broken", "")
            yield {self.notice: notice_html(sentence(failed))} | self._usable(send=True)
            return
        first, second = (step.reply for step in steps if step)
        yield {self.round: replace(round_, replies=(first, second))} | self._usable(send=True, votes=True)

    def _on_vote(self, request: gr.Request, round_: Round | None, vote: str) -> Update:
        assert self._arena is not None
        if round_ is None or not round_.votable:
            return {self.notice: gr.skip()}
        try:
            voted = self._arena.vote(round_, asker_of(self._desk, request).visitor, vote)
        except AlmostError as error:  # a full disk, a locked file, a second vote: the round stays as it is
            return {self.notice: notice_html(f"{str(error)[:1].upper()}{str(error)[1:]}.")}
        thanks = notice_html(f"Stored: {LABELS[vote]}. Ask the next question whenever you like.", "good")
        named = self._shown([self._named(voted, place) for place in (0, 1)])
        return {self.round: voted, self.notice: thanks} | named | self._usable(votes=False)

    # --- what the page shows ---

    def _shown(self, panels: list[str]) -> dict[Block, object]:
        return dict(zip(self.panels, panels, strict=True))

    def _usable(self, *, send: bool | None = None, votes: bool | None = None) -> dict[Block, object]:
        """Which buttons can be pressed; None leaves them as they are."""
        update: dict[Block, object] = {}
        if send is not None:
            update[self.send] = gr.Button(interactive=send)
        if votes is not None:
            update |= {pressed: gr.Button(interactive=votes) for pressed in self.buttons.values()}
        return update

    def _panel(self, letter: str, step: Step | None) -> str:
        """An answer without anything but its text: speed, reward and ending could give a system away."""
        text = step.reply.text if step else ""
        if step and step.done:
            return panel_html(ChatReply(text), live=False, heading=letter)
        return panel_html(ChatReply(text), live=True, heading=letter)

    def _named(self, round_: Round, place: int) -> str:
        assert round_.replies is not None
        reply, won = round_.replies[place], round_.vote == "ab"[place]
        mark = '<span class="badge good">your vote</span>' if won else ""
        whole = panel_html(ChatReply(reply.text), live=False, heading=f"{_LETTERS[place]}: {round_.systems[place]}")
        return whole.replace("</article>", f'<div class="facts">{mark}{badge(reply.reward)}</div></article>')
