"""The Chat tab: one conversation, streamed; stop, retry, edit, undo, clear; best-of-N with its candidates."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, astuple
from html import escape

import gradio as gr
from gradio.blocks import Block

from almost_eval.types import JSONObject
from serving.chat.client import EndpointError
from serving.chat.conversation import Conversation, Settings
from serving.chat.render import live_html, notice_html, past_html
from serving.chat.session import BROKEN, Desk, NotNow, Step, draw
from serving.chat.widgets import ANSWERING, QUICK, Update, asker_of, button, question_box, raw_html

_LOG = logging.getLogger("almost.chat")
ACT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (button) trigger('act', {act: button.dataset.act, turn: Number(button.dataset.turn || 0),
                              text: button.dataset.text || ''});
});
"""
"""The buttons inside a conversation tell what was pressed; copying is the page's own (chat.js)."""

PLACEHOLDER = "Ask something"
DIFFERING = 1.3
"""Temperature from which the aligned built-in model's candidates differ: of six, two do at 0.7 and four at 1.3."""
KEY = "almost-chat"
"""Name under which the visitor's browser keeps the conversation, and the secret it is encoded with. The secret protects
nothing; it is fixed so that a conversation can still be read after the server was started again."""


class ChatTab:
    """Builds the tab inside a `gr.Blocks` and answers its events.

    Args:
        desk: what is served.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        names = [system.name for system in desk.systems]
        self.kept = gr.BrowserState(None, storage_key=KEY, secret=KEY)
        self.conversation = gr.State(Conversation())
        self.editing = gr.State(None)
        with gr.Row(elem_classes="chat-page"):
            with gr.Column(scale=7, min_width=320, elem_classes="talk"):
                with gr.Column(elem_id="transcript"):
                    self.past = raw_html(self._welcome(), js_on_load=ACT, elem_id="past")
                    self.live = raw_html(elem_id="live")
                self.notice = raw_html(elem_id="notice")
                self.drop = gr.Button(
                    "Drop the oldest turn and retry", visible=False, size="sm", elem_id="drop", elem_classes="inline"
                )
                with gr.Row(elem_classes="composer"):
                    self.box = question_box("Message", PLACEHOLDER, "message", autofocus=True)
                    self.send = button("Send", "send", "primary", width=84)
                    self.stop = button("Stop", "stop", "stop", width=84, visible=False)
                with gr.Row(elem_classes="tools"):
                    self.undo = gr.Button("Undo", size="sm", min_width=60, elem_id="undo")
                    self.clear = gr.Button("Clear", size="sm", min_width=60, elem_id="clear")
                    self.copy = gr.Button("Copy all", size="sm", min_width=60, elem_id="copy-all")
                    self.download = gr.Button("Download JSONL", size="sm", min_width=60, elem_id="download")
                self.export = gr.Textbox(visible="hidden", elem_id="export", label="Export")
            with gr.Column(scale=3, min_width=260, elem_classes="settings"):
                self.system = gr.Dropdown(
                    names, value=names[0], label="Model", visible=len(names) > 1, elem_id="system", interactive=True
                )
                base = desk.defaults
                self.instruction = gr.Textbox(
                    base.system, label="System prompt", lines=3, max_lines=12, elem_id="instruction"
                )
                self.best_of = gr.Slider(
                    1,
                    16,
                    value=base.best_of,
                    step=1,
                    label="Best of N",
                    info="Candidates to draw; the reward model picks one",
                    visible=False,
                    elem_id="best-of",
                )
                self.temperature = gr.Slider(
                    0, 2, value=base.temperature, step=0.05, label="Temperature", elem_id="temperature"
                )
                self.top_p = gr.Slider(0.05, 1, value=base.top_p, step=0.05, label="Top-p", elem_id="top-p")
                self.max_tokens = gr.Slider(
                    16, 2048, value=base.max_tokens, step=16, label="Longest answer, tokens", elem_id="max-tokens"
                )
                raw_html(
                    '<p class="aside">Enter sends, Shift+Enter breaks the line, Esc stops. Everything said here stays '
                    "in this browser.</p>"
                )
        self.settings: list[gr.Textbox | gr.Slider] = [
            self.instruction,
            self.temperature,
            self.top_p,
            self.max_tokens,
            self.best_of,
        ]

    def connect(self, page: gr.Blocks) -> None:
        """Attach the events."""
        state = [self.conversation, self.editing, self.system, *self.settings]
        outputs = [self.box, self.conversation, self.editing, self.past, self.live, self.notice, self.drop, self.send]
        outputs += [self.stop, self.kept, self.best_of]
        work = {"outputs": outputs, **ANSWERING}
        gr.on([self.box.submit, self.send.click], self._on_send, [self.box, *state], **work)
        self.past.act(self._on_act, state, **work)
        self.drop.click(self._on_drop, state, **work)
        self.stop.click(self._on_stop, None, None, **QUICK)
        self.undo.click(self._on_undo, state, outputs, **QUICK)
        self.clear.click(self._on_clear, state, outputs, **QUICK)
        for pressed, form, action in ((self.copy, "text", "copy"), (self.download, "jsonl", "download")):
            # The listener's own name for the form: a partial would hide the signature that gradio reads.
            pick = gr.State(form)
            pressed.click(self._on_export, [self.conversation, self.instruction, pick], self.export, **QUICK).then(
                None, self.export, None, js=f"(text) => window.almostChat.{action}(text)", api_visibility="private"
            )
        gr.on(
            [setting.change for setting in self.settings],
            self._on_settings,
            [self.conversation, *self.settings],
            self.kept,
            trigger_mode="always_last",
            **QUICK,
        )
        self.best_of.input(self._on_best_of, [self.best_of, self.temperature, self.system], self.temperature, **QUICK)
        self.system.change(self._on_system, self.system, [self.best_of, self.notice], **QUICK)
        page.load(
            self._on_load,
            [self.kept, self.system],
            [self.conversation, self.past, self.notice, *self.settings],
            **QUICK,
        )

    # --- events: the visitor's settings come last, in the order of `self.settings` ---

    async def _on_send(
        self,
        request: gr.Request,
        text: str,
        conversation: Conversation,
        editing: int | None,
        system: str,
        *settings: object,
    ) -> AsyncIterator[Update]:
        text = (text or "").strip()
        if not text:
            yield {self.notice: gr.skip()}
            return
        longer = conversation.ask(text) if editing is None else conversation.reopen(editing, text)
        async for update in self._answer(longer, system, Settings.checked(*settings), request, self._box()):
            yield update

    async def _on_act(
        self,
        event: gr.EventData,
        request: gr.Request,
        conversation: Conversation,
        editing: int | None,
        system: str,
        *settings: object,
    ) -> AsyncIterator[Update]:
        pressed, turn = event._data, int(event._data.get("turn") or 0)
        if pressed.get("act") == "edit" and 0 <= turn < len(conversation.turns):
            label = f"Editing message {turn + 1}: what follows it is asked anew"
            box = self._box(conversation.turns[turn].user, label)
            yield box | {self.editing: turn, self.notice: notice_html(label + ".", "hint")}
            return
        if pressed.get("act") == "example":
            longer = conversation.ask(str(pressed.get("text") or "")[:10_000])
        elif pressed.get("act") == "retry" and conversation.turns:
            longer = conversation.reopen(len(conversation.turns) - 1)
        else:
            yield {self.notice: gr.skip()}
            return
        async for update in self._answer(longer, system, Settings.checked(*settings), request):
            yield update

    async def _on_drop(
        self, request: gr.Request, conversation: Conversation, editing: int | None, system: str, *settings: object
    ) -> AsyncIterator[Update]:
        # A quarter of what is left, so that a long conversation fits after a few presses, not a hundred.
        left = len(conversation.turns) - conversation.dropped
        shorter = conversation.drop_oldest(max(1, left // 4))
        shorter = shorter.reopen(len(shorter.turns) - 1)
        async for update in self._answer(shorter, system, Settings.checked(*settings), request):
            yield update

    def _on_stop(self, request: gr.Request) -> None:
        self._desk.stop("chat", request.session_hash)

    def _on_undo(self, conversation: Conversation, editing: int | None, system: str, *settings: object) -> Update:
        left, text = conversation.undo()
        return self._settle(left, Settings.checked(*settings), "") | self._box(text)

    def _on_clear(self, conversation: Conversation, editing: int | None, system: str, *settings: object) -> Update:
        return self._settle(Conversation(), Settings.checked(*settings), "") | self._box()

    def _on_export(self, conversation: Conversation, instruction: str, form: str) -> str:
        return conversation.text() if form == "text" else conversation.jsonl(instruction)

    def _on_settings(self, conversation: Conversation, *settings: object) -> JSONObject:
        return self._keep(conversation, Settings.checked(*settings))

    async def _on_system(self, name: str) -> Update:
        most, sentence = await self._best_of(name)
        about = self._desk.system(name).about
        notice = notice_html(sentence) or notice_html(f"{about}." if about else "", "hint")
        return {self.best_of: _slider(most), self.notice: notice}

    def _on_best_of(self, best_of: float, temperature: float, name: str) -> object:
        """Candidates must differ to be worth a choice; the slider shows the temperature that is raised for it."""
        plain = self._desk.defaults.temperature
        if not (best_of > 1 and temperature == plain < DIFFERING and self._desk.system(name).is_toy):
            return gr.skip()
        return DIFFERING

    async def _on_load(self, kept: object, name: str) -> Update:
        kept = kept if isinstance(kept, dict) else {}
        conversation = Conversation.from_dict(kept.get("conversation"))
        stored, settings = kept.get("settings"), self._desk.defaults
        if isinstance(stored, dict) and stored.keys() <= asdict(settings).keys():
            settings = Settings.checked(**asdict(settings) | stored)
        most, sentence = await self._best_of(name)
        values: dict[Block, object] = dict(zip(self.settings, astuple(settings), strict=True))
        return {
            **values,
            self.conversation: conversation,
            self.past: self._past(conversation),
            self.notice: notice_html(sentence),
            self.best_of: gr.Slider(value=min(settings.best_of, max(most, 1)), maximum=max(most, 2), visible=most > 1),
        }

    # --- one answer ---

    async def _answer(
        self,
        conversation: Conversation,
        system_name: str,
        settings: Settings,
        request: gr.Request,
        first: Update | None = None,
    ) -> AsyncIterator[Update]:
        """Stream the answer to the last question; whatever goes wrong, what was said stays.

        Args:
            conversation: its last question is open.
            system_name: whom to ask.
            settings: the visitor's.
            request: whose question it is.
            first: what else changes on the page as soon as the question is taken.
        """
        if not conversation.open:
            yield {self.notice: gr.skip()}
            return
        system = self._desk.system(system_name)
        try:
            with self._desk.work("chat", asker_of(self._desk, request)) as stop:
                # 1. The question moves into the transcript.
                most, _ = await self._best_of(system_name)
                settings = Settings.checked(*astuple(settings), most=max(most, 1))
                waiting = f"Drawing {settings.best_of} candidates" if settings.best_of > 1 else "Thinking"
                yield {
                    **(first or {}),
                    self.conversation: conversation,
                    self.editing: None,
                    self.past: past_html(conversation, live=True),
                    self.live: live_html(system.name, "", waiting=waiting),
                    self.notice: "",
                    self.drop: gr.Button(visible=False),
                    self.send: gr.Button(visible=False),
                    self.stop: gr.Button(visible=True),
                    self.kept: self._keep(conversation, settings),
                    self.best_of: _slider(most),  # a server that was not ready when the page was opened may be by now
                }
                # 2. The answer grows.
                step: Step | None = None
                async with self._desk.turn(stop):
                    async for step in draw(system, conversation.messages(settings.system), settings, stop):
                        if not step.done:
                            yield {self.live: live_html(system.name, step.reply.text)}
        except NotNow as refusal:
            notice = notice_html(str(refusal), refusal.kind)
            if refusal.busy:
                yield {self.notice: notice}
            else:
                yield self._settle(conversation, settings, notice) | dict(first or {})
            return
        except Exception:  # whatever it was, the page can be used again
            _LOG.exception("an answer failed")
            yield self._settle(conversation, settings, notice_html(BROKEN))
            return
        # 3. It joins the transcript.
        assert step is not None
        if step.reply.text or step.error is None:
            conversation = conversation.answer(step.reply)
        notice = notice_html(str(step.error)) if step.error else notice_html(step.note, "hint")
        full = step.error is not None and step.error.kind == "context_full"
        can_drop = full and conversation.dropped < len(conversation.turns) - 1
        yield self._settle(conversation, settings, notice, can_drop=can_drop)

    async def _best_of(self, name: str) -> tuple[int, str]:
        """The largest N of the endpoint, and a sentence where it does not tell."""
        try:
            return (await self._desk.system(name).abilities()).best_of, ""
        except EndpointError as error:
            return 1, str(error)

    # --- what the page shows ---

    def _settle(
        self, conversation: Conversation, settings: Settings, notice: str, *, can_drop: bool = False
    ) -> dict[Block, object]:
        """Nothing is being written any more."""
        return {
            self.conversation: conversation,
            self.editing: None,
            self.past: self._past(conversation),
            self.live: "",
            self.notice: notice,
            self.drop: gr.Button(visible=can_drop),
            self.send: gr.Button(visible=True),
            self.stop: gr.Button(visible=False),
            self.kept: self._keep(conversation, settings),
        }

    def _keep(self, conversation: Conversation, settings: Settings) -> JSONObject:
        return {"conversation": conversation.to_dict(), "settings": asdict(settings)}

    def _box(self, text: str = "", placeholder: str = PLACEHOLDER) -> dict[Block, object]:
        return {self.box: gr.Textbox(value=text, placeholder=placeholder)}

    def _past(self, conversation: Conversation) -> str:
        return past_html(conversation) if conversation.turns else self._welcome()

    def _welcome(self) -> str:
        buttons = "".join(
            f'<button type="button" class="example" data-act="example" data-text="{escape(text)}">{escape(text)}'
            "</button>"
            for text in self._desk.examples
        )
        return (
            '<div class="welcome"><h2>What would you like to know?</h2>'
            f"<p>Answers by {escape(self._desk.systems[0].about or self._desk.systems[0].name)}.</p>"
            f'<div class="examples">{buttons}</div></div>'
        )


def _slider(most: int) -> gr.Slider:
    """Best-of-N for an endpoint that takes so many; not shown where it takes one."""
    return gr.Slider(maximum=max(most, 2), visible=most > 1)
