"""The Chat tab: one conversation, streamed; stop, retry, edit, undo, clear; best-of-N with its candidates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr

from serving.chat.client import Abilities, EndpointError
from serving.chat.conversation import Conversation, Settings
from serving.chat.render import live_html, notice_html, past_html
from serving.chat.session import Desk, Step, draw

ACT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (button) trigger('act', {act: button.dataset.act, turn: Number(button.dataset.turn || 0),
                              text: button.dataset.text || ''});
});
"""
"""The buttons inside a conversation tell what was pressed; copying is the page's own (chat.js)."""

TOO_FAST = "That is more questions a minute than this server takes from one visitor: wait a moment, then press Retry."
BUSY = "The last answer is still being written: stop it first, or wait."
PLACEHOLDER = "Ask something"

KEPT: dict[str, Any] = {"storage_key": "almost-chat", "secret": "almost-chat"}
"""The conversation stays in the visitor's own browser. The secret hides nothing, and must outlive a server."""

Update = dict[str, Any]
"""A component of the tab, by name -> its new value."""


class ChatTab:
    """Builds the tab inside a `gr.Blocks` and answers its events.

    Args:
        desk: what is served.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        names = [system.name for system in desk.systems]
        self.kept = gr.BrowserState(None, **KEPT)
        self.conversation = gr.State(Conversation())
        self.editing = gr.State(None)
        with gr.Row(elem_classes="chat-page"):
            with gr.Column(scale=7, min_width=320, elem_classes="talk"):
                with gr.Column(elem_id="transcript"):
                    self.past = gr.HTML(
                        self._welcome(), js_on_load=ACT, apply_default_css=False, elem_id="past", padding=False
                    )
                    self.live = gr.HTML("", apply_default_css=False, elem_id="live", padding=False)
                self.notice = gr.HTML("", apply_default_css=False, elem_id="notice", padding=False)
                self.drop = gr.Button(
                    "Drop the oldest turn and retry", visible=False, size="sm", elem_id="drop", elem_classes="inline"
                )
                with gr.Row(elem_classes="composer"):
                    self.box = gr.Textbox(
                        show_label=False,
                        label="Message",
                        placeholder=PLACEHOLDER,
                        lines=1,
                        max_lines=10,
                        container=False,
                        autofocus=True,
                        scale=8,
                        elem_id="message",
                    )
                    self.send = gr.Button("Send", variant="primary", scale=1, min_width=84, elem_id="send")
                    self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=84, visible=False, elem_id="stop")
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
                gr.HTML(
                    '<p class="aside">Enter sends, Shift+Enter breaks the line, Esc stops. Everything said here stays '
                    "in this browser.</p>",
                    apply_default_css=False,
                    padding=False,
                )
        self.settings: list[Any] = [self.instruction, self.temperature, self.top_p, self.max_tokens, self.best_of]
        self._outputs = {
            "box": self.box,
            "conversation": self.conversation,
            "editing": self.editing,
            "past": self.past,
            "live": self.live,
            "notice": self.notice,
            "drop": self.drop,
            "send": self.send,
            "stop": self.stop,
            "kept": self.kept,
            "best_of": self.best_of,
        }

    def connect(self, page: gr.Blocks) -> None:
        """Attach the events."""
        state = [self.conversation, self.editing, self.system, *self.settings]
        outputs = list(self._outputs.values())
        work: dict[str, Any] = {
            "outputs": outputs,
            "show_progress": "hidden",
            "concurrency_limit": self._desk.concurrency,
            "concurrency_id": "answers",
            "api_visibility": "private",
        }
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        gr.on([self.box.submit, self.send.click], self._on_send, [self.box, *state], **work)
        self.past.act(self._on_act, state, **work)
        self.drop.click(self._on_drop, state, **work)
        self.stop.click(self._on_stop, None, None, **quick)
        self.undo.click(self._on_undo, state, outputs, **quick)
        self.clear.click(self._on_clear, state, outputs, **quick)
        for button, form, action in ((self.copy, "text", "copy"), (self.download, "jsonl", "download")):
            # The listener's own name for the form: a partial would hide the signature that gradio reads.
            pick = gr.State(form)
            button.click(self._on_export, [self.conversation, self.instruction, pick], self.export, **quick).then(
                None, self.export, None, js=f"(text) => window.almostChat.{action}(text)", api_visibility="private"
            )
        gr.on(
            [setting.change for setting in self.settings],
            self._on_settings,
            [self.conversation, *self.settings],
            self.kept,
            trigger_mode="always_last",
            **quick,
        )
        self.system.change(self._on_system, self.system, [self.best_of, self.notice], **quick)
        page.load(
            self._on_load,
            [self.kept, self.system],
            [self.conversation, self.past, self.notice, *self.settings],
            **quick,
        )

    # --- events ---

    async def _on_send(
        self,
        text: str,
        conversation: Conversation,
        editing: int | None,
        system: str,
        instruction: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
        best_of: float,
        request: gr.Request,
    ) -> AsyncIterator[list[Any]]:
        settings = self._checked(instruction, temperature, top_p, max_tokens, best_of)
        if not (text or "").strip():
            yield self._update({})
            return
        asked = conversation.ask(text.strip()) if editing is None else conversation.reopen(editing, text.strip())
        async for update in self._answer(asked, system, settings, request, box=self._empty_box()):
            yield update

    async def _on_act(
        self,
        conversation: Conversation,
        editing: int | None,
        system: str,
        instruction: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
        best_of: float,
        event: gr.EventData,
        request: gr.Request,
    ) -> AsyncIterator[list[Any]]:
        settings = self._checked(instruction, temperature, top_p, max_tokens, best_of)
        pressed, turn = event._data, int(event._data.get("turn") or 0)
        if pressed.get("act") == "edit" and 0 <= turn < len(conversation.turns):
            label = f"Editing message {turn + 1}: what follows it is asked anew"
            box = gr.Textbox(value=conversation.turns[turn].user, placeholder=label)
            yield self._update({"box": box, "editing": turn, "notice": notice_html(label + ".", "hint")})
            return
        if pressed.get("act") == "example":
            asked = conversation.ask(str(pressed.get("text") or "")[:10_000])
        elif pressed.get("act") == "retry" and conversation.turns:
            asked = conversation.reopen(len(conversation.turns) - 1)
        else:
            yield self._update({})
            return
        async for update in self._answer(asked, system, settings, request):
            yield update

    async def _on_drop(
        self,
        conversation: Conversation,
        editing: int | None,
        system: str,
        instruction: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
        best_of: float,
        request: gr.Request,
    ) -> AsyncIterator[list[Any]]:
        settings = self._checked(instruction, temperature, top_p, max_tokens, best_of)
        # A quarter of what is left, so that a long conversation fits after a few presses, not a hundred.
        shown = len(conversation.turns) - conversation.dropped
        shorter = conversation.drop_oldest(max(1, shown // 4))
        async for update in self._answer(shorter.reopen(len(shorter.turns) - 1), system, settings, request):
            yield update

    def _on_stop(self, request: gr.Request) -> None:
        self._desk.stop("chat", request.session_hash)

    def _on_undo(self, conversation: Conversation, *given: Any) -> list[Any]:
        left, text = conversation.undo()
        return self._settled(left, given, box=gr.Textbox(value=text, placeholder=PLACEHOLDER))

    def _on_clear(self, conversation: Conversation, *given: Any) -> list[Any]:
        return self._settled(Conversation(), given, box=self._empty_box())

    def _on_export(self, conversation: Conversation, instruction: str, form: str) -> str:
        return conversation.text() if form == "text" else conversation.jsonl(instruction)

    def _on_settings(self, conversation: Conversation, *settings: Any) -> dict[str, Any]:
        return self._keep(conversation, self._checked(*settings))

    async def _on_system(self, name: str) -> tuple[Any, str]:
        most, sentence = await self._best_of(name)
        return gr.Slider(maximum=max(most, 2), visible=most > 1), notice_html(sentence)

    async def _on_load(self, kept: Any, name: str) -> list[Any]:
        kept = kept if isinstance(kept, dict) else {}
        conversation = Conversation.from_dict(kept.get("conversation"))
        stored = kept.get("settings")
        settings = Settings.checked(**asdict(self._desk.defaults) | stored) if _is_settings(stored) else None
        settings = settings or self._desk.defaults
        most, sentence = await self._best_of(name)
        slider = gr.Slider(value=min(settings.best_of, max(most, 1)), maximum=max(most, 2), visible=most > 1)
        return [
            conversation,
            self._past(conversation),
            notice_html(sentence),
            settings.system,
            settings.temperature,
            settings.top_p,
            settings.max_tokens,
            slider,
        ]

    # --- one answer ---

    async def _answer(
        self, conversation: Conversation, system_name: str, settings: Settings, request: gr.Request, **first: Any
    ) -> AsyncIterator[list[Any]]:
        """Stream the answer to the last question; whatever goes wrong, what was said stays."""
        if not conversation.open:
            yield self._update({})
            return
        if not self._desk.rate.admits(str(request.session_hash)):
            yield self._settle(conversation, settings, notice_html(TOO_FAST), first)
            return
        system = self._desk.system(system_name)
        with self._desk.work("chat", request.session_hash) as stop:
            if stop is None:
                yield self._update({"notice": notice_html(BUSY, "hint")})
                return
            most, _ = await self._best_of(system_name)
            settings = self._checked(*_values(settings), most=max(most, 1))
            waiting = f"Drawing {settings.best_of} candidates" if settings.best_of > 1 else "Thinking"
            yield self._update(
                {
                    **first,
                    "conversation": conversation,
                    "editing": None,
                    "past": past_html(conversation, live=True),
                    "live": live_html(system.name, "", waiting=waiting),
                    "notice": "",
                    "drop": gr.Button(visible=False),
                    "send": gr.Button(visible=False),
                    "stop": gr.Button(visible=True),
                    "kept": self._keep(conversation, settings),
                    # A server that was not ready when the page was opened may be by now.
                    "best_of": gr.Slider(maximum=max(most, 2), visible=most > 1),
                }
            )
            step: Step | None = None
            async for step in draw(system, conversation.messages(settings.system), settings, stop):
                if not step.done:
                    yield self._update({"live": live_html(system.name, step.reply.text)})
            assert step is not None
            if step.reply.text or step.error is None:
                conversation = conversation.answer(step.reply)
            notice = notice_html(str(step.error)) if step.error else notice_html(step.note, "hint")
            full = step.error is not None and step.error.kind == "context_full"
            can_drop = full and conversation.dropped < len(conversation.turns) - 1
            yield self._settle(conversation, settings, notice, {"drop": gr.Button(visible=can_drop)})

    async def _best_of(self, name: str) -> tuple[int, str]:
        """The largest N of the endpoint, and a sentence where it cannot be asked."""
        try:
            found: Abilities = await self._desk.system(name).abilities()
        except EndpointError as error:
            return 1, str(error)
        return found.best_of, ""

    # --- what the page shows ---

    def _settle(self, conversation: Conversation, settings: Settings, notice: str, more: Update) -> list[Any]:
        return self._update(
            {
                "conversation": conversation,
                "editing": None,
                "past": self._past(conversation),
                "live": "",
                "notice": notice,
                "drop": gr.Button(visible=False),
                "send": gr.Button(visible=True),
                "stop": gr.Button(visible=False),
                "kept": self._keep(conversation, settings),
                **more,
            }
        )

    def _settled(self, conversation: Conversation, given: tuple[Any, ...], **more: Any) -> list[Any]:
        """After undo and clear; `given` is what an event hands over behind the conversation."""
        _editing, _system, *settings = given
        return self._settle(conversation, self._checked(*settings), "", more)

    def _update(self, values: Update) -> list[Any]:
        return [values.get(name, gr.skip()) for name in self._outputs]

    def _checked(self, *values: Any, most: int = 64) -> Settings:
        return Settings.checked(*values, most=most)

    def _keep(self, conversation: Conversation, settings: Settings) -> dict[str, Any]:
        return {"conversation": conversation.to_dict(), "settings": asdict(settings)}

    def _empty_box(self) -> Any:
        return gr.Textbox(value="", placeholder=PLACEHOLDER)

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
            f'<p>Answers by {escape(self._desk.systems[0].name)}.</p><div class="examples">{buttons}</div></div>'
        )


def _values(settings: Settings) -> tuple[Any, ...]:
    return settings.system, settings.temperature, settings.top_p, settings.max_tokens, settings.best_of


def _is_settings(value: object) -> bool:
    return isinstance(value, dict) and value.keys() <= asdict(Settings()).keys()
