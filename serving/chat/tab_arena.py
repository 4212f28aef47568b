"""The Arena tab: two answers, no names, one vote; the names come after it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import gradio as gr

from almost_eval.arena.votes import VOTES
from almost_eval.errors import AlmostError
from serving.chat.arena import Arena, Round, sentence, session_id
from serving.chat.client import EndpointError
from serving.chat.conversation import Reply
from serving.chat.render import badge, notice_html, panel_html
from serving.chat.session import Desk, Step
from serving.chat.tab_chat import BUSY, TOO_FAST
from serving.chat.tab_compare import ALONE, draw_both

LABELS = {"a": "A is better", "b": "B is better", "tie": "Tie", "both_bad": "Both are bad"}
INTRODUCTION = (
    "Two systems answer the same question, in an order that chance decides. Vote for the better answer; the names come "
    "after the vote. Stored are the question, both answers, your vote and a random number for this browser: nothing "
    "about you."
)
_LETTERS = ("A", "B")


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
            gr.HTML(notice_html(ALONE, "hint"), apply_default_css=False, padding=False)
            return
        self.visitor = gr.BrowserState(None, storage_key="almost-arena", secret="almost-arena")
        self.round = gr.State(None)
        self.question = gr.State(None)
        self._draws = random.Random(arena.seed)
        gr.HTML(f'<p class="aside intro">{INTRODUCTION}</p>', apply_default_css=False, padding=False)
        with gr.Row(elem_classes="composer"):
            self.box = gr.Textbox(
                show_label=False,
                label="Question for both",
                placeholder="Type a question, or draw one",
                container=False,
                lines=1,
                max_lines=10,
                scale=8,
                elem_id="arena-message",
            )
            self.draw = gr.Button(
                "Draw a question",
                scale=1,
                min_width=130,
                elem_id="arena-draw",
                visible=bool(desk.questions),
            )
            self.send = gr.Button("Ask both", variant="primary", scale=1, min_width=96, elem_id="arena-send")
        self.notice = gr.HTML("", apply_default_css=False, padding=False, elem_id="arena-notice")
        with gr.Row(elem_classes="pair"):
            self.panels = [
                gr.HTML(self._empty(letter), apply_default_css=False, padding=False, elem_id=f"arena-{letter.lower()}")
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
        outputs = [self.box, self.round, *self.panels, self.notice, self.send, *self.buttons.values()]
        gr.on(
            [self.box.submit, self.send.click],
            self._on_send,
            [self.box, self.question],
            outputs,
            show_progress="hidden",
            concurrency_limit=self._desk.concurrency,
            concurrency_id="answers",
            api_visibility="private",
        )
        self.draw.click(
            self._on_draw,
            None,
            [self.box, self.question],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        for vote, button in self.buttons.items():
            pick = gr.State(vote)
            button.click(
                self._on_vote,
                [self.round, self.visitor, pick],
                [self.visitor, *outputs],
                show_progress="hidden",
                concurrency_limit=None,
                api_visibility="private",
            )

    def _on_draw(self) -> tuple[str, tuple[str, str]]:
        question = self._draws.choice(self._desk.questions)
        return question[1], question

    async def _on_send(
        self, text: str, question: tuple[str, str] | None, request: gr.Request
    ) -> AsyncIterator[list[Any]]:
        assert self._arena is not None
        text = (text or "").strip()
        if not text:
            yield self._view()
            return
        if not self._desk.rate.admits(str(request.session_hash)):
            yield self._view(notice=notice_html(TOO_FAST))
            return
        with self._desk.work("arena", request.session_hash) as stop:
            if stop is None:
                yield self._view(notice=notice_html(BUSY, "hint"))
                return
            # Typed words are `typed`, also where they began as a drawn question.
            source = question[0] if question and question[1] == text else "typed"
            round_ = self._arena.begin(text[:10_000], source)
            yield self._view(round_=None, panels=[self._thinking(letter) for letter in _LETTERS], notice="", free=False)
            steps: list[Step | None] = [None, None]
            systems = [self._desk.system(name) for name in round_.systems]
            async for steps in draw_both(systems, self._arena.messages(round_.prompt), self._arena.settings, stop):
                yield self._view(
                    panels=[self._panel(letter, step) for letter, step in zip(_LETTERS, steps, strict=True)]
                )
            failed = next((step.error for step in steps if step and step.error), None)
            if failed or not all(step and step.reply.text for step in steps):
                failed = failed or EndpointError("broken", "")
                yield self._view(notice=notice_html(sentence(failed)), free=True)
                return
            first, second = (step.reply for step in steps if step)
            yield self._view(round_=replace(round_, replies=(first, second)), free=True, votable=True)

    def _on_vote(self, round_: Round | None, visitor: Any, vote: str) -> list[Any]:
        assert self._arena is not None
        visitor = session_id(visitor)
        if round_ is None or not round_.votable:
            return [visitor, *self._view()]
        try:
            voted = self._arena.vote(round_, visitor, vote)
        except AlmostError as error:  # a full disk, a second vote: the round stays as it is
            return [visitor, *self._view(notice=notice_html(f"{str(error)[:1].upper()}{str(error)[1:]}."))]
        said = f"Stored: {LABELS[vote]}. Ask the next question whenever you like."
        panels = [self._named(voted, place) for place in (0, 1)]
        return [visitor, *self._view(round_=voted, panels=panels, notice=notice_html(said, "good"), votable=False)]

    # --- what the page shows ---

    def _view(self, **changes: Any) -> list[Any]:
        """Everything the tab shows; what is not named stays as it is."""
        panels = changes.get("panels", [gr.skip(), gr.skip()])
        free, votable = changes.get("free"), changes.get("votable")
        send = gr.skip() if free is None else gr.Button(interactive=free)
        votable = False if free is False else votable
        buttons = [gr.skip() if votable is None else gr.Button(interactive=votable) for _ in VOTES]
        return [gr.skip(), changes.get("round_", gr.skip()), *panels, changes.get("notice", gr.skip()), send, *buttons]

    def _empty(self, letter: str) -> str:
        return panel_html(None, live=False, heading=letter, note="The answer appears here")

    def _thinking(self, letter: str) -> str:
        return panel_html(Reply(""), live=True, heading=letter)

    def _panel(self, letter: str, step: Step | None) -> str:
        """An answer without anything but its text: speed, reward and ending could give a system away."""
        text = step.reply.text if step else ""
        if step and step.done:
            return panel_html(Reply(text), live=False, heading=letter)
        return panel_html(Reply(text), live=True, heading=letter)

    def _named(self, round_: Round, place: int) -> str:
        assert round_.replies is not None
        reply, won = round_.replies[place], round_.vote == "ab"[place]
        mark = '<span class="badge good">your vote</span>' if won else ""
        whole = panel_html(Reply(reply.text), live=False, heading=f"{_LETTERS[place]}: {round_.systems[place]}")
        return whole.replace("</article>", f'<div class="facts">{mark}{badge(reply.reward)}</div></article>')
