"""The Side by side tab: one question to two systems, both answers at once, their rewards beneath."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import gradio as gr

from serving.chat.conversation import Settings
from serving.chat.render import notice_html, panel_html
from serving.chat.session import Desk, Step, System, draw
from serving.chat.tab_chat import BUSY, TOO_FAST

ALONE = (
    "Two systems are needed here: start almost-chat with two models (--model A --model B), two endpoints "
    "(--base-url URL --base-url URL), or one of each."
)


class CompareTab:
    """Builds the tab inside a `gr.Blocks` and answers its events.

    Args:
        desk: what is served.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        names = [system.name for system in desk.systems]
        self._able = len(names) > 1
        if not self._able:
            gr.HTML(notice_html(ALONE, "hint"), apply_default_css=False, padding=False)
            return
        with gr.Row(elem_classes="composer"):
            self.box = gr.Textbox(
                show_label=False,
                label="Question for both",
                placeholder="One question for both",
                container=False,
                lines=1,
                max_lines=10,
                scale=8,
                elem_id="compare-message",
            )
            self.send = gr.Button("Ask both", variant="primary", scale=1, min_width=96, elem_id="compare-send")
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=96, visible=False, elem_id="compare-stop")
        self.notice = gr.HTML("", apply_default_css=False, padding=False, elem_id="compare-notice")
        self.names, self.panels = [], []
        with gr.Row(elem_classes="pair"):
            for place, value in (("left", names[0]), ("right", names[1])):
                with gr.Column(min_width=280):
                    label = f"{place.capitalize()}"
                    self.names.append(gr.Dropdown(names, value=value, label=label, elem_id=f"compare-{place}"))
                    empty = panel_html(None, live=False, note="The answer appears here")
                    self.panels.append(
                        gr.HTML(empty, apply_default_css=False, padding=False, elem_id=f"compare-{place}-answer")
                    )

    def connect(self, chat_settings: Sequence[Any]) -> None:
        """Attach the events; the settings are the Chat tab's, but for best-of-N."""
        if not self._able:
            return
        gr.on(
            [self.box.submit, self.send.click],
            self._on_send,
            [self.box, *self.names, *chat_settings],
            [*self.panels, self.notice, self.send, self.stop],
            show_progress="hidden",
            concurrency_limit=self._desk.concurrency,
            concurrency_id="answers",
            api_visibility="private",
        )
        self.stop.click(self._on_stop, None, None, queue=False, show_progress="hidden", api_visibility="private")

    def _on_stop(self, request: gr.Request) -> None:
        self._desk.stop("compare", request.session_hash)

    async def _on_send(
        self,
        text: str,
        left: str,
        right: str,
        instruction: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
        best_of: float,
        request: gr.Request,
    ) -> AsyncIterator[list[Any]]:
        quiet = [gr.skip()] * 5
        if not (text or "").strip():
            yield quiet
            return
        if not self._desk.rate.admits(str(request.session_hash)):
            yield [*quiet[:2], notice_html(TOO_FAST), *quiet[:2]]
            return
        with self._desk.work("compare", request.session_hash) as stop:
            if stop is None:
                yield [*quiet[:2], notice_html(BUSY, "hint"), *quiet[:2]]
                return
            settings = Settings.checked(instruction, temperature, top_p, max_tokens, 1)
            system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
            messages = [*system, {"role": "user", "content": text.strip()}]
            systems = [self._desk.system(name) for name in (left, right)]
            busy, free = gr.Button(visible=True), gr.Button(visible=False)
            yield [*(panel_html(None, live=False, note="Thinking") for _ in systems), "", free, busy]
            steps: list[Step | None] = [None, None]
            async for steps in draw_both(systems, messages, settings, stop):
                panels = [panel_html(step.reply if step else None, live=not (step and step.done)) for step in steps]
                yield [*panels, *[gr.skip()] * 3]
            sentences = {str(step.error or step.note) for step in steps if step and (step.error or step.note)}
            yield [gr.skip(), gr.skip(), notice_html(" ".join(sorted(sentences))), busy, free]


async def draw_both(
    systems: Sequence[System], messages: Sequence[dict[str, str]], settings: Settings, stop: asyncio.Event
) -> AsyncIterator[list[Step | None]]:
    """How far each system's answer is, whenever one of them has grown; ends when all are done."""
    latest: list[Step | None] = [None] * len(systems)
    news: asyncio.Queue[tuple[int, Step | Exception]] = asyncio.Queue()

    async def follow(place: int, system: System) -> None:
        try:
            async for step in draw(system, messages, settings, stop):
                news.put_nowait((place, step))
        except Exception as error:  # raised again below, where somebody waits for it
            news.put_nowait((place, error))

    tasks = [asyncio.create_task(follow(place, system)) for place, system in enumerate(systems)]
    try:
        while not all(step and step.done for step in latest):
            news_now = [await news.get()]
            while not news.empty():
                news_now.append(news.get_nowait())
            for place, found in news_now:
                if isinstance(found, Exception):
                    raise found
                latest[place] = found
            yield list(latest)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
