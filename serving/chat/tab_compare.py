"""The Side by side tab: one question to two systems, both answers at once, their rewards beneath."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import gradio as gr
from gradio.blocks import Block

from serving.chat.conversation import Conversation, Settings
from serving.chat.render import notice_html, panel_html
from serving.chat.session import Desk, Draw, Step, draw_together
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


class CompareTab(QuestionTab):
    """Builds the tab inside a `gr.Blocks` and answers its events."""

    name = "compare"

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        names = [system.name for system in desk.systems]
        self._able = len(names) > 1
        self.pickers: list[gr.Dropdown] = []
        """Of the two systems; empty where there is one."""
        if not self._able:
            raw_html(notice_html(ALONE, "hint"))
            return
        with gr.Row(elem_classes="composer"):
            self.box = question_box("Question for both", "One question for both", "compare-message")
            self.send = button("Ask both", "compare-send", "primary")
            self.stop = button("Stop", "compare-stop", "stop", visible=False)
        self.notice = raw_html(elem_id="compare-notice")
        self.panels = []
        with gr.Row(elem_classes="pair"):
            for place, value in (("left", names[0]), ("right", names[1])):
                with gr.Column(min_width=280):
                    label = place.capitalize()
                    self.pickers.append(gr.Dropdown(names, value=value, label=label, elem_id=f"compare-{place}"))
                    empty = panel_html(None, live=False, note="The answer appears here")
                    self.panels.append(raw_html(empty, elem_id=f"compare-{place}-answer"))

    def connect(self, chat_settings: Sequence[Block]) -> None:
        """Attach the events; the settings are the Chat tab's, but for best-of-N."""
        if not self._able:
            return
        gr.on(
            [self.box.submit, self.send.click],
            self._on_send,
            [self.box, *self.pickers, *chat_settings],
            [*self.panels, self.notice, self.send, self.stop],
            **ANSWERING,
        )
        self.stop.click(self._on_stop, None, None, **QUICK)

    @answering
    async def _on_send(
        self, request: gr.Request, text: str, left: str, right: str, *chat_settings: object
    ) -> AsyncGenerator[Update, None]:
        """Both answers at once."""
        settings = Settings.checked(*chat_settings, most=1)
        messages = Conversation().ask(text).messages(settings.system)
        draws = [Draw(self._desk.system(name), messages, settings) for name in (left, right)]
        steps: list[Step | None] = [None, None]
        with self._desk.work(self.name, asker_of(self._desk, request)) as stop, self._desk.place() as place:
            thinking = panel_html(None, live=False, note="Thinking")
            yield dict.fromkeys(self.panels, thinking) | self._buttons(busy=True) | {self.notice: ""}
            await asyncio.sleep(SETTLE_S)
            async for sentence in place.sentences(stop):
                yield {self.notice: notice_html(sentence, "hint")}
            async for steps in draw_together(draws, stop):
                yield self._shown(steps)
            await asyncio.sleep(SETTLE_S)
        sentences = {str(step.error or step.note) for step in steps if step and (step.error or step.note)}
        notice = notice_html(" ".join(sorted(sentences)))
        yield self._shown(steps) | self._buttons(busy=False) | {self.notice: notice}

    def _shown(self, steps: Sequence[Step | None]) -> dict[Block, object]:
        panels = (panel_html(step.reply if step else None, live=not (step and step.done)) for step in steps)
        return dict(zip(self.panels, panels, strict=True))
