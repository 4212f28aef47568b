"""The Chat tab: one conversation, streamed; stop, retry, edit, undo, clear; best-of-N with its candidates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import astuple, replace

import gradio as gr
from gradio.blocks import Block

from serving.chat.client import EndpointError
from serving.chat.conversation import MAX_TURNS, Conversation, Settings, too_long
from serving.chat.kept import KEEP, LOAD, kept_text, record_of
from serving.chat.layout import ChatLayout, best_of_slider
from serving.chat.render import live_html, notice_html, past_html
from serving.chat.session import BROKEN, BUSY, NotNow, Step, draw
from serving.chat.widgets import ANSWERING, QUICK, SETTLE_S, Update, asker_of
from serving.gateway.events import joined

_LOG = logging.getLogger("almost.chat")
DIFFERING = 1.3
"""Temperature from which the aligned built-in model's candidates differ: of six, two do at 0.7 and four at 1.3."""
TOO_MANY = f"This conversation has {MAX_TURNS} questions, the most there can be: start a new one."


class ChatTab(ChatLayout):
    """The tab with its events."""

    def connect(self, page: gr.Blocks) -> None:
        """Attach the events."""
        state = [self.conversation, self.editing, self.system, *self.settings]
        spoken = [self.conversation, *self.settings]
        shown = [self.conversation, self.editing, self.before, self.past, self.live, self.notice, self.drop, self.kept]
        shown += [self.restore, self.cancel, self.box, self.best_of]
        work = {"outputs": [*shown, self.draft], **ANSWERING}
        gr.on([self.box.submit, self.send.click], self._on_send, [self.box, *state], **work)
        self.past.act(self._on_act, [self.box, *state], **work)
        self.drop.click(self._on_drop, [self.conversation, self.system, *self.settings], **work)
        self.stop.click(self._on_stop, None, None, **QUICK)
        self.undo.click(self._on_undo, [self.before, *spoken], shown, **QUICK)
        self.clear.click(self._on_clear, spoken, shown, **QUICK)
        self.restore.click(self._on_restore, [self.before, *self.settings], shown, **QUICK)
        self.cancel.click(self._on_cancel, [self.draft, self.conversation], shown, **QUICK)
        self.shelf.act(self._on_shelf, self.settings, [*shown, *self.settings], **QUICK)
        self.kept.change(None, self.kept, None, js=KEEP, api_visibility="private")
        for pressed, form, action in ((self.copy, "text", "copy"), (self.download, "jsonl", "download")):
            # The listener's own name for the form: a partial would hide the signature that gradio reads.
            pick = gr.State(form)
            pressed.click(self._on_export, [self.conversation, self.instruction, pick], self.export, **QUICK).then(
                None, self.export, None, js=f"(text) => window.almostChat.{action}(text)", api_visibility="private"
            )
        changes = [setting.change for setting in self.settings]
        gr.on(changes, self._on_settings, spoken, self.kept, trigger_mode="always_last", **QUICK)
        self.best_of.input(self._on_best_of, [self.best_of, self.temperature, self.system], self.temperature, **QUICK)
        self.system.change(self._on_system, self.system, [self.best_of, self.notice], **QUICK)
        loading = page.load(self._on_load, [self.record, self.conversation], [*shown, *self.settings], js=LOAD, **QUICK)
        loading.then(self._on_system, self.system, [self.best_of, self.notice], **QUICK)

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
        if refusal := too_long(text):
            yield {self.notice: notice_html(refusal)}
            return
        longer = conversation.ask(text) if editing is None else conversation.reopen(editing, text)
        replaced = None if editing is None else conversation
        checked = Settings.checked(*settings)
        async for update in self._answer(longer, system, checked, request, self.box_with(), replaced):
            yield update

    async def _on_act(
        self,
        event: gr.EventData,
        request: gr.Request,
        draft: str,
        conversation: Conversation,
        editing: int | None,
        system: str,
        *settings: object,
    ) -> AsyncIterator[Update]:
        pressed = event._data if isinstance(event._data, dict) else {}
        turn = pressed.get("turn")
        if pressed.get("act") == "edit" and isinstance(turn, int) and 0 <= turn < len(conversation.turns):
            later = len(conversation.turns) - turn - 1
            label = f"Editing message {turn + 1}" + (f"; the {later} after it will be replaced." if later else ".")
            yield self.box_with(conversation.turns[turn].user, "The question, anew") | {
                self.editing: turn,
                self.past: past_html(conversation, editing=turn),
                self.notice: notice_html(label, "hint"),
                self.cancel: gr.Button(visible=True),
                self.restore: gr.Button(visible=False),
                self.draft: gr.skip() if editing is not None else joined(draft or ""),
            }
            return
        replaced = None
        if pressed.get("act") == "example":
            longer = conversation.ask(str(pressed.get("text") or "")[:10_000])
        elif pressed.get("act") == "retry" and conversation.turns:
            longer = conversation.reopen(len(conversation.turns) - 1)
            replaced = None if conversation.open else conversation
        else:
            yield {self.notice: gr.skip()}
            return
        async for update in self._answer(longer, system, Settings.checked(*settings), request, {}, replaced):
            yield update

    async def _on_drop(
        self, request: gr.Request, conversation: Conversation, system: str, *settings: object
    ) -> AsyncIterator[Update]:
        # A quarter of what is left, so that a long conversation fits after a few presses, not a hundred.
        left = len(conversation.turns) - conversation.dropped
        shorter = conversation.drop_oldest(max(1, left // 4))
        shorter = shorter.reopen(len(shorter.turns) - 1)
        async for update in self._answer(shorter, system, Settings.checked(*settings), request, {}):
            yield update

    def _on_stop(self, request: gr.Request) -> None:
        self._desk.stop("chat", request.session_hash)

    def _on_undo(
        self, request: gr.Request, before: Conversation | None, conversation: Conversation, *settings: object
    ) -> Update:
        if before is not None and not conversation.turns:  # nothing is left to undo but the clearing itself
            return self._on_restore(request, before, *settings)
        left, text = conversation.undo()
        if not conversation.turns:
            return {self.notice: gr.skip()}
        return self._replace(request, left, conversation, settings, "Bring back the last turn") | self.box_with(text)

    def _on_clear(self, request: gr.Request, conversation: Conversation, *settings: object) -> Update:
        if not conversation.turns:
            return {self.notice: gr.skip()}
        empty = replace(Conversation(), id=conversation.id)
        return self._replace(request, empty, conversation, settings, "Bring back the conversation") | self.box_with()

    def _on_restore(self, request: gr.Request, before: Conversation | None, *settings: object) -> Update:
        return {self.notice: gr.skip()} if before is None else self._replace(request, before, None, settings)

    def _on_cancel(self, draft: str, conversation: Conversation) -> Update:
        return self.box_with(draft) | {
            self.editing: None,
            self.past: self.past_of(conversation),
            self.notice: "",
            self.cancel: gr.Button(visible=False),
        }

    def _on_shelf(self, event: gr.EventData, request: gr.Request, *settings: object) -> Update:
        told = event._data if isinstance(event._data, dict) else {}
        values = Settings.checked(*settings)
        opened = Conversation()
        if told.get("act") == "open":
            opened, values = record_of(told.get("record"), values)
        update = self._replace(request, opened, None, astuple(values))
        if self.conversation not in update:  # an answer is being written
            return update
        return update | self.box_with() | dict(zip(self.settings[:-1], astuple(values), strict=False))

    def _on_export(self, conversation: Conversation, instruction: str, form: str) -> str:
        return conversation.text() if form == "text" else conversation.jsonl(joined(instruction or ""))

    def _on_settings(self, conversation: Conversation, *settings: object) -> str:
        return kept_text(conversation, Settings.checked(*settings))

    async def _on_system(self, name: str) -> Update:
        most, sentence = await self._best_of(name)
        about = self._desk.system(name).about
        notice = notice_html(sentence) or notice_html(f"{about}." if about else "", "hint")
        return {self.best_of: best_of_slider(most), self.notice: notice or gr.skip()}

    def _on_best_of(self, best_of: float, temperature: float, name: str) -> object:
        """Candidates must differ to be worth a choice; the slider shows the temperature that is raised for it."""
        plain = self._desk.defaults.temperature
        if not (best_of > 1 and temperature == plain < DIFFERING and self._desk.system(name).is_toy):
            return gr.skip()
        return DIFFERING

    def _on_load(self, request: gr.Request, record: object, conversation: Conversation) -> Update:
        if conversation.turns or self._desk.busy("chat", request.session_hash):
            return {self.notice: gr.skip()}  # the visitor was faster
        conversation, settings = record_of(record, self._desk.defaults)
        values: dict[Block, object] = dict(zip(self.settings, astuple(settings), strict=True))
        return {**values, **self.settled(conversation, settings, "")}

    # --- one answer ---

    async def _answer(
        self,
        conversation: Conversation,
        system_name: str,
        settings: Settings,
        request: gr.Request,
        first: Update,
        before: Conversation | None = None,
    ) -> AsyncIterator[Update]:
        """Stream the answer to the last question, which is open; whatever goes wrong, what was said stays. `first`
        changes on the page as soon as the question is taken; what the conversation was `before` some of it was replaced
        can be brought back.
        """
        if not conversation.open:
            yield {self.notice: notice_html(TOO_MANY) if len(conversation.turns) >= MAX_TURNS else gr.skip()}
            return
        system = self._desk.system(system_name)
        step: Step | None = None
        try:
            with self._desk.work("chat", asker_of(self._desk, request)) as stop, self._desk.place() as place:
                # 1. The question moves into the transcript, whoever else waits and however slow the endpoint is.
                waiting = f"Drawing {settings.best_of} candidates" if settings.best_of > 1 else "Thinking"
                yield {
                    **first,
                    self.conversation: conversation,
                    self.editing: None,
                    self.before: before,
                    self.past: past_html(conversation, live=True),
                    self.live: live_html(system.name, "", waiting=place.sentence() or waiting),
                    self.notice: "",
                    **{one: gr.Button(visible=False) for one in (self.drop, self.restore, self.cancel)},
                    self.kept: kept_text(conversation, settings),
                }
                # 2. The visitor waits, and is told for how long. Gradio's page may lose some of an update that the next
                # one follows at once: what is kept in the browser, for one.
                await asyncio.sleep(SETTLE_S)
                async for sentence in place.sentences(stop):
                    yield {self.live: live_html(system.name, "", waiting=sentence or waiting)}
                # 3. The answer grows. What is kept goes with it once more, in case the page lost it.
                kept = kept_text(conversation, settings)
                most, _ = await self._best_of(system_name)
                settings = Settings.checked(*astuple(settings), most=max(most, 1))
                async for step in draw(system, conversation.messages(settings.system), settings, stop):
                    if not step.done:
                        yield {self.live: live_html(system.name, step.reply.text), self.kept: kept}
            # 4. It joins the transcript.
            assert step is not None
            answered = conversation.answer(step.reply) if step.reply.text or step.error is None else conversation
            full = step.error is not None and step.error.kind == "context_full"
            last = self.settled(
                answered,
                settings,
                notice_html(str(step.error)) if step.error else notice_html(step.note, "hint"),
                can_drop=full and conversation.dropped < len(conversation.turns) - 1,
                before=before,
            )
            last[self.best_of] = best_of_slider(most)  # a server that was not ready before may be by now
        except NotNow as refusal:
            notice = notice_html(str(refusal), refusal.kind)
            if refusal.busy:
                yield {self.notice: notice}
                return
            last = {**self.settled(conversation, settings, notice, before=before), **first}
        except Exception:  # whatever it was, the page can be used again
            _LOG.exception("an answer failed")
            last = self.settled(conversation, settings, notice_html(BROKEN), before=before)
        yield last

    async def _best_of(self, name: str) -> tuple[int, str]:
        """The largest N of the endpoint, and a sentence where it does not tell."""
        try:
            return (await self._desk.system(name).abilities()).best_of, ""
        except EndpointError as error:
            return 1, str(error)

    def _replace(
        self,
        request: gr.Request,
        conversation: Conversation,
        before: Conversation | None,
        settings: Sequence[object],
        back: str = "",
    ) -> dict[Block, object]:
        """Another conversation is shown, unless an answer to this one is being written."""
        if self._desk.busy("chat", request.session_hash):
            return {self.notice: notice_html(BUSY, "hint")}
        return self.settled(conversation, Settings.checked(*settings), "", before=before, back=back)
