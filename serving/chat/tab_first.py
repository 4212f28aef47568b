"""The first tab: one question, the model before and after its alignment, and a race of candidates; all at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from html import escape

import gradio as gr
from gradio.blocks import Block

from almost_eval.errors import AlmostError
from serving.chat.conversation import Conversation
from serving.chat.render import notice_html, race_html, side_html
from serving.chat.session import BROKEN, ChatSystem, Desk, Draw, Step, draw_together
from serving.chat.small_model import ABOUT
from serving.chat.toyworld import KNOWN, PREPARED, hint
from serving.chat.widgets import (
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

CANDIDATES = 6
TEMPERATURE = 1.2
"""Of the candidates: at the page's own 0.7 fewer of them differ."""
TITLES = ("Before alignment", "After alignment")
ABOUTS = ("{}, pre-trained only", "{}, aligned by synthetic feedback")
PICK = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-question]');
  if (button) trigger('act', {question: button.dataset.question});
});
"""
_LOG = logging.getLogger("almost.chat")


class FirstTab(QuestionTab):
    """Builds the tab inside a `gr.Blocks` and answers its events, of a model `before` its alignment and `after` it."""

    name = "first"

    def __init__(self, desk: Desk, before: ChatSystem, after: ChatSystem) -> None:
        self._desk = desk
        self._pair = (before, after)
        raw_html(f'<section class="opening"><h2>What alignment changes</h2><p>{escape(KNOWN)}</p></section>')
        with gr.Row(elem_classes="composer"):
            first = PREPARED[0].question
            self.box = question_box("Question for both", "Ask about the made-up world", "first-message", value=first)
            self.send = button("Ask both", "first-send", "primary")
            self.stop = button("Stop", "first-stop", "stop", visible=False)
        chips = "".join(
            f'<button type="button" class="chip" data-question="{escape(one.question)}">'
            f"<i>{escape(one.label)}</i> {escape(one.question)}</button>"
            for one in PREPARED
        )
        self.chips = raw_html(f'<div class="chips">{chips}</div>', js_on_load=PICK, elem_id="first-questions")
        self.notice = raw_html(elem_id="first-notice")
        with gr.Row(elem_classes="pair"):
            self.sides = [
                raw_html(self._side(place, None, idle=True), elem_id=f"first-{name}")
                for place, name in enumerate(("before", "after"))
            ]
        self.race = raw_html(self._race([None] * CANDIDATES, idle=True), elem_id="first-race")
        if desk.loader is not None:
            self.loading = raw_html(elem_id="first-loading")
            with gr.Row(elem_classes="real"):
                raw_html(
                    f"<div><h3>A real small chat model</h3><p>{escape(ABOUT)}: 135 M parameters, on this machine's "
                    "CPU. It knows the real world a little.</p></div>"
                )
                self.load = gr.Button("Talk to SmolLM2", scale=0, min_width=200, elem_id="first-load")

    def connect(self, page: gr.Blocks, tabs: gr.Tabs, chat_system: gr.Dropdown, pickers: Sequence[gr.Dropdown]) -> None:
        """Attach the events. The page opens with the models of this moment, in the Chat tab and the `pickers` of Side
        by side.
        """
        outputs = [self.box, *self.sides, self.race, self.notice, self.send, self.stop]
        gr.on([self.box.submit, self.send.click], self._on_send, self.box, outputs, **ANSWERING)
        self.chips.act(self._on_pick, None, outputs, **ANSWERING)
        self.stop.click(self._on_stop, None, None, **QUICK)
        if self._desk.loader is None:
            return
        self._tabs, self._chat_system, self._pickers = tabs, chat_system, pickers
        self.load.click(self._on_load, None, [self.load, self.loading, tabs, chat_system, *pickers], **ANSWERING)
        page.load(self._models, None, [chat_system, *pickers], **QUICK)

    async def _on_pick(self, event: gr.EventData, request: gr.Request) -> AsyncIterator[Update]:
        told = event._data if isinstance(event._data, dict) else {}
        question = str(told.get("question") or "")
        async for update in self._on_send(request, question):
            yield update

    @answering
    async def _on_send(self, request: gr.Request, text: str) -> AsyncGenerator[Update, None]:
        """Both sides and all candidates at once."""
        settings = replace(self._desk.defaults, best_of=1)
        messages = Conversation().ask(text).messages(settings.system)
        racing = replace(settings, temperature=TEMPERATURE, top_p=1.0)
        draws = [Draw(system, messages, settings) for system in self._pair]
        draws += [Draw(self._pair[0], messages, racing)] * CANDIDATES
        steps: list[Step | None] = [None] * len(draws)
        with self._desk.work(self.name, asker_of(self._desk, request)) as stop, self._desk.place() as place:
            told = {self.box: text, self.notice: notice_html(hint(text), "hint")}
            yield self._shown(steps) | self._buttons(busy=True) | told
            await asyncio.sleep(SETTLE_S)
            async for sentence in place.sentences(stop):
                yield {self.notice: notice_html(sentence or hint(text), "hint")}
            async for steps in draw_together(draws, stop):
                yield self._shown(steps)
            await asyncio.sleep(SETTLE_S)
        errors = sorted({str(step.error) for step in steps if step and step.error})
        told = {self.notice: notice_html(" ".join(errors))} if errors else {}
        yield self._shown(steps) | self._buttons(busy=False) | told

    # --- the real small model ---

    async def _on_load(self) -> AsyncIterator[Update]:
        """Load it, telling what is being done; then the Chat tab, with it."""
        loader = self._desk.loader
        assert loader is not None
        task = asyncio.create_task(loader.load())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, also where the visitor leaves
        began = asyncio.get_running_loop().time()
        try:
            while not task.done():
                seconds = asyncio.get_running_loop().time() - began
                sentence = f"{loader.phase or 'One moment'} ... {seconds:.0f} s"
                yield {self.load: gr.Button(interactive=False), self.loading: notice_html(sentence, "hint")}
                await asyncio.wait({task}, timeout=1.0)
            system = task.result()
        except AlmostError as error:
            yield {self.load: gr.Button(interactive=True), self.loading: notice_html(f"{error}.")}
            return
        except Exception:
            _LOG.exception("the small model failed to load")
            yield {self.load: gr.Button(interactive=True), self.loading: notice_html(BROKEN)}
            return
        yield {
            self.load: gr.Button(interactive=True),
            self.loading: "",
            self._tabs: gr.Tabs(selected="chat"),
            self._chat_system: gr.Dropdown(self._names(), value=system.name, visible=True),
            **{picker: gr.Dropdown(self._names()) for picker in self._pickers},
        }

    def _models(self) -> list[gr.Dropdown]:
        """All models of this moment, for a page that has just been opened."""
        return [gr.Dropdown(self._names()) for _ in (self._chat_system, *self._pickers)]

    def _names(self) -> list[str]:
        return [system.name for system in self._desk.systems]

    # --- what the page shows ---

    def _shown(self, steps: Sequence[Step | None]) -> dict[Block, object]:
        sides: dict[Block, object] = {panel: self._side(place, steps[place]) for place, panel in enumerate(self.sides)}
        return sides | {self.race: self._race(steps[len(self.sides) :])}

    def _side(self, place: int, step: Step | None, *, idle: bool = False) -> str:
        return side_html(TITLES[place], ABOUTS[place].format(self._pair[place].name), step, idle=idle)

    def _race(self, steps: Sequence[Step | None], *, idle: bool = False) -> str:
        return race_html(steps, self._pair[0].name, idle=idle)
