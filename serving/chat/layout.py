"""What the Chat tab is made of, and how it looks while nothing is being written."""

from __future__ import annotations

from html import escape

import gradio as gr
from gradio.blocks import Block

from serving.chat.conversation import Conversation, Settings
from serving.chat.kept import OPEN, SHELF, kept_text, whereabouts
from serving.chat.render import past_html
from serving.chat.session import Desk
from serving.chat.widgets import button, question_box, raw_html

ACT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (button) trigger('act', {act: button.dataset.act, turn: Number(button.dataset.turn || 0),
                              text: button.dataset.text || ''});
});
"""
"""The buttons inside a conversation tell what was pressed; copying is the page's own (chat.js)."""

PLACEHOLDER = "Ask something"


class ChatLayout:
    """Builds the tab inside a `gr.Blocks`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        names = [system.name for system in desk.systems]
        on_server = desk.conversations is not None
        self.conversation = gr.State(Conversation(id=""))  # of all visitors: none can have its number
        self.editing = gr.State(None)
        self.draft = gr.State("")
        self.before = gr.State(None)
        with gr.Row(elem_classes="chat-page"):
            with gr.Column(scale=2, min_width=200, elem_classes="kept"):
                self.shelf = raw_html(SHELF, js_on_load=OPEN, elem_id="shelf")
                self.record = gr.Textbox(visible="hidden", label="Record")
                self.kept = gr.Textbox(visible="hidden", elem_id="kept", label="Kept")
            with gr.Column(scale=7, min_width=320, elem_classes="talk"):
                with gr.Column(elem_id="transcript"):
                    self.past = raw_html(self._welcome(), js_on_load=ACT, elem_id="past")
                    self.live = raw_html(elem_id="live")
                with gr.Row(elem_classes="notices"):
                    self.notice = raw_html(elem_id="notice")
                    self.drop = _small("Drop the oldest turn and retry", "drop")
                    self.restore = _small("Bring it back", "restore")
                    self.cancel = _small("Cancel", "cancel-edit")
                with gr.Row(elem_classes="composer"):
                    self.box = question_box("Message", PLACEHOLDER, "message", autofocus=True)
                    self.send = button("Send", "send", "primary", width=84)
                    self.stop = button("Stop", "stop", "stop", width=84)
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
                self.top_p = gr.Slider(
                    0.05,
                    1,
                    value=base.top_p,
                    step=0.05,
                    label="Top-p",
                    info="1 is off. On a CPU it is next to free behind almost-serve, and twice the time elsewhere",
                    elem_id="top-p",
                )
                self.max_tokens = gr.Slider(
                    16, 2048, value=base.max_tokens, step=16, label="Longest answer, tokens", elem_id="max-tokens"
                )
                raw_html(
                    '<p class="aside">Enter sends, Shift+Enter breaks the line, Esc stops or cancels.</p>'
                    f'<p class="aside" id="whereabouts">{whereabouts(desk.systems, on_server=on_server)}</p>'
                )
        sliders = (self.temperature, self.top_p, self.max_tokens, self.best_of)
        self.settings: list[gr.Textbox | gr.Slider] = [self.instruction, *sliders]

    def settled(
        self,
        conversation: Conversation,
        settings: Settings,
        notice: str,
        *,
        can_drop: bool = False,
        before: Conversation | None = None,
        back: str = "Bring back the earlier version",
    ) -> dict[Block, object]:
        """Nothing is being written any more. What the conversation was `before` can be brought back, by a button that
        says `back`.
        """
        return {
            self.conversation: conversation,
            self.editing: None,
            self.before: before,
            self.past: self.past_of(conversation),
            self.live: "",
            self.notice: notice,
            self.drop: gr.Button(visible=can_drop),
            self.restore: gr.Button(back, visible=before is not None),
            self.cancel: gr.Button(visible=False),
            self.kept: kept_text(conversation, settings),
        }

    def box_with(self, text: str = "", placeholder: str = PLACEHOLDER) -> dict[Block, object]:
        """What stands in the message box."""
        return {self.box: gr.Textbox(value=text, placeholder=placeholder)}

    def past_of(self, conversation: Conversation) -> str:
        """The transcript, or what greets whoever has not said anything yet."""
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


def _small(label: str, elem_id: str) -> gr.Button:
    """A button beside a notice, where there is one to press it for."""
    return gr.Button(label, visible=False, size="sm", scale=0, min_width=90, elem_id=elem_id, elem_classes="inline")


def best_of_slider(most: int) -> gr.Slider:
    """Best-of-N for an endpoint that takes so many; not shown where it takes one."""
    return gr.Slider(maximum=max(most, 2), visible=most > 1)
