"""The Side by side tab: one question to two systems, both answers at once, their rewards beneath."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import gradio as gr
from gradio.blocks import Block

from serving.chat.asking import Asking
from serving.chat.conversation import MAX_QUESTION, Conversation, Settings, too_long
from serving.chat.render import notice_html, panel_html
from serving.chat.session import Desk, Step
from serving.chat.together import Draw
from serving.chat.widgets import ALONE, ANSWERING, QUICK, Update, button, question_box, raw_html


class CompareTab:
    """Builds the tab inside a `gr.Blocks` and answers its events.

    Args:
        desk: what is served.
    """

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
            self.stop = button("Stop", "compare-stop", "stop")
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
            [*self.panels, self.notice],
            **ANSWERING,
        )
        self.stop.click(self._on_stop, None, None, **QUICK)

    def _on_stop(self, request: gr.Request) -> None:
        self._desk.stop("compare", request.session_hash)

    async def _on_send(
        self, request: gr.Request, text: str, left: str, right: str, *chat_settings: object
    ) -> AsyncIterator[Update]:
        if not (text or "").strip():
            yield {self.notice: gr.skip()}
            return
        if refusal := too_long(text, MAX_QUESTION):
            yield {self.notice: notice_html(refusal)}
            return
        settings = Settings.checked(*chat_settings, most=1)
        messages = Conversation().ask(text.strip()).messages(settings.system)
        draws = [Draw(self._desk.system(name), messages, settings) for name in (left, right)]
        asking = Asking(self._desk, "compare", self.notice, self._shown)
        async for update in asking.updates(request, draws, {}):
            yield update
        if not asking.is_refused:
            yield self._shown(asking.steps) | {self.notice: notice_html(asking.errors(notes=True))}

    def _shown(self, steps: Sequence[Step | None]) -> dict[Block, object]:
        panels = (panel_html(step.reply if step else None, live=not (step and step.done)) for step in steps)
        return dict(zip(self.panels, panels, strict=True))
