"""One question to several systems at once: what a tab tells its page from the press of the button to the last answer.

Gradio's page may lose some of an update that the next one follows at once. So the buttons of a tab follow what its
answers show, by a rule of the style sheet (`.working`), and not an update of their own; there is a pause after the
first update and before the last; and the last one holds all that stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import gradio as gr
from gradio.blocks import Block

from serving.chat.client import EndpointError
from serving.chat.conversation import ChatReply
from serving.chat.render import notice_html
from serving.chat.session import BROKEN, Desk, NotNow, Step
from serving.chat.together import Draw, draw_together
from serving.chat.widgets import SETTLE_S, Update, asker_of

_LOG = logging.getLogger("almost.chat")


class Asking:
    """The answers to one question on one tab.

    Args:
        desk: what is served.
        tab: the name by which `Desk.stop` knows it.
        notice: where sentences for the visitor go.
        shown: the tab's answers, as far as they are.
        hint: a sentence that stands there while nobody has to wait.
    """

    def __init__(
        self,
        desk: Desk,
        tab: str,
        notice: gr.HTML,
        shown: Callable[[Sequence[Step | None]], dict[Block, object]],
        hint: str = "",
    ) -> None:
        self._desk = desk
        self._tab = tab
        self._notice = notice
        self._shown = shown
        self._hint = hint
        self.steps: list[Step | None] = []
        """How far each answer is; once `is_refused` or all updates are there, nobody works on them."""
        self.is_refused = False
        """It could not begin; the page has been told why."""
        self.is_broken = False
        """A bug of ours ended it."""

    async def updates(self, request: gr.Request, draws: Sequence[Draw], first: Update) -> AsyncIterator[Update]:
        """All updates but the last, which is the tab's own; `first` goes with the first one."""
        self.steps = [None] * len(draws)
        try:
            with self._desk.work(self._tab, asker_of(self._desk, request)) as stop, self._desk.place() as place:
                yield {**self._shown(self.steps), self._notice: notice_html(self._hint, "hint"), **first}
                await asyncio.sleep(SETTLE_S)
                async for sentence in place.sentences(stop):
                    yield {self._notice: notice_html(sentence or self._hint, "hint")}
                async for self.steps in draw_together(draws, stop):
                    yield self._shown(self.steps)
                await asyncio.sleep(SETTLE_S)
        except NotNow as refusal:
            self.is_refused = True
            yield {self._notice: notice_html(str(refusal), refusal.kind)}
        except Exception:  # whatever it was, the page can be used again
            _LOG.exception("an answer failed")
            self.is_broken = True
            self.steps = [_given_up(step) for step in self.steps]

    def errors(self, *, notes: bool = False) -> str:
        """What went wrong, as sentences; with `notes` also what else is to be said of the answers."""
        if self.is_broken:
            return BROKEN
        told = (step.error or (step.note if notes else "") for step in self.steps if step)
        return " ".join(sorted({str(sentence) for sentence in told if sentence}))


def _given_up(step: Step | None) -> Step:
    """An answer that nobody works on any more, as far as it came."""
    if step is None:
        return Step(ChatReply(""), True, EndpointError("broken", BROKEN))
    return step if step.done else replace(step, done=True, error=EndpointError("broken", BROKEN))
