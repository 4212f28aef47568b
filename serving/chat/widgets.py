"""Pieces of the page that several tabs have: text boxes, raw HTML, how events run."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import gradio as gr
from gradio.blocks import Block

from serving.chat.conversation import MAX_QUESTION, too_long
from serving.chat.render import notice_html
from serving.chat.session import BROKEN, Desk, NotNow
from serving.chat.visitors import Asker
from serving.gateway.events import joined

Update = Mapping[Block, object]
"""A component -> its new value; all others stay as they are."""

SETTLE_S = 0.1
"""Seconds after the update that takes a question, and before the one that ends its answers: gradio's page may lose some
of an update that the next one follows at once."""

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""How an event runs that draws no answer."""

ALONE = (
    "Two systems are needed here: start almost-chat with two models (--model A --model B), two endpoints "
    "(--base-url URL --base-url URL), or one of each."
)


ANSWERING: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
"""How an event runs that draws answers. It starts at once: whoever has to wait is told so by the desk, whereas a full
queue of gradio's own is an error without a sentence."""


_LOG = logging.getLogger("almost.chat")


class QuestionTab:
    """A tab that puts a question to several systems at once."""

    name: str
    """Where the desk counts its questions."""
    notice: gr.HTML
    send: gr.Button
    stop: gr.Button
    _desk: Desk

    def _on_stop(self, request: gr.Request) -> None:
        self._desk.stop(self.name, request.session_hash)

    def _buttons(self, *, busy: bool) -> dict[Block, object]:
        return {self.send: gr.Button(visible=not busy), self.stop: gr.Button(visible=busy)}


_Tab = TypeVar("_Tab", bound=QuestionTab)
_P = ParamSpec("_P")
_Event = Callable[Concatenate[_Tab, gr.Request, str, _P], AsyncGenerator[Update, None]]


def answering(send: _Event[_Tab, _P]) -> _Event[_Tab, _P]:
    """Wrap a tab's event that takes a question: it is not called without one, or with one that is too long.

    A question that cannot be answered now is told at the tab's notice, as is a bug, after which the page can be used
    again.
    """

    @wraps(send)
    async def event(
        self: _Tab, request: gr.Request, text: str, /, *args: _P.args, **kwargs: _P.kwargs
    ) -> AsyncGenerator[Update, None]:
        text = joined((text or "").strip())
        if not text:
            yield {self.notice: gr.skip()}
            return
        if excess := too_long(text, MAX_QUESTION):
            yield {self.notice: notice_html(excess)}
            return
        try:
            async with aclosing(send(self, request, text, *args, **kwargs)) as updates:
                async for update in updates:
                    yield update
        except NotNow as refusal:
            yield {self.notice: notice_html(str(refusal), refusal.kind)}
        except Exception:
            _LOG.exception("an answer failed")
            yield {**self._buttons(busy=False), self.notice: notice_html(BROKEN)}

    return event


def asker_of(desk: Desk, request: gr.Request) -> Asker:
    """Who asks, by cookie and address."""
    client = request.client
    return desk.visitors.asker(
        request.session_hash, request.headers.get("cookie") or "", client.host if client else None
    )


def raw_html(html: str = "", **options: Any) -> gr.HTML:
    """HTML without gradio's frame around it."""
    return gr.HTML(html, apply_default_css=False, padding=False, **options)


def question_box(label: str, placeholder: str, elem_id: str, *, value: str = "", autofocus: bool = False) -> gr.Textbox:
    """Where a question is typed; grows with it."""
    return gr.Textbox(
        value,
        show_label=False,
        label=label,
        placeholder=placeholder,
        container=False,
        lines=1,
        max_lines=10,
        autofocus=autofocus,
        scale=8,
        elem_id=elem_id,
    )


def button(label: str, elem_id: str, variant: Any = "secondary", *, width: int = 96, visible: bool = True) -> gr.Button:
    """A button beside a question box."""
    return gr.Button(label, variant=variant, scale=1, min_width=width, visible=visible, elem_id=elem_id)
