"""Several generations on one model at the same time, one token each in turn.

transformers' `generate` runs in a thread for each request. Its streamer, which gets every new token, tells the new text
and lets the next thread have the model: nobody waits for somebody else's long answer. The result is what
`HFEngine.generate` gives for the same prompt and seed, since the same code runs on the same batches.

Why neither of the two ways of transformers itself. One generation at a time (a lock and `TextIteratorStreamer`): a
second visitor, and the right side of two models side by side, would wait for the whole first answer; and that streamer
takes no batch, so no best-of-N. Continuous batching: it streams, but draws all requests from one generator, so an
answer would depend on who else asks, and a request's `seed` would mean nothing.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.models.stops import end_ids
from almost_eval.types import Completion

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

OnText = Callable[[int, str], None]
"""Takes the number of a completion, and the text that was added to it."""


class Cancelled(Exception):
    """Nobody waits for this generation any more. Never leaves this module's callers."""


class Turnstile:
    """A lock that threads get in the order in which they ask for it, which `threading.Lock` does not promise."""

    def __init__(self) -> None:
        self._tickets = 0
        """Drawn so far."""
        self._served = 0
        """The ticket that holds the lock."""
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            ticket = self._tickets
            self._tickets += 1
            self._changed.wait_for(lambda: self._served == ticket)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()

    def pass_on(self) -> None:
        """Let those who wait have a turn each, and come back."""
        self.__exit__()
        self.__enter__()


class RowText:
    """What of a growing completion can be told already: it is never taken back.

    Whitespace around a completion is no part of the answer. Half a character, and what may become a stop string, are
    held back.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int | None] = (), stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._stop = stop
        self._told = ""
        self.restart()

    def restart(self) -> None:
        """The completion begins again, after an out-of-memory error; it will be the same."""
        self._ids: list[int] = []
        self._context = self._decoded = 0
        """ids[:decoded] are in the text; the last of them, from `context` on, are what the next token is read after."""
        self._text = ""
        self._ended = False

    def add(self, token: int) -> str:
        """The text to tell now that the completion has one more token."""
        self._ended = self._ended or token in self._end_ids
        if self._ended:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._decoded])
        after = self._decode(self._ids[self._context :])
        if after.endswith("\ufffd"):  # half a character
            return ""
        self._text += after[len(before) :]
        self._context, self._decoded = self._decoded, len(self._ids)
        text = self._text.lstrip()
        for stop in self._stop:
            # Held: the longest end of the text that a stop string begins with.
            held = next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
            text = text.partition(stop)[0] if stop in text else text[: len(text) - held]
        return self.tell(text.rstrip())

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def tell(self, text: str) -> str:
        """What is new in `text`, which is all that can be told by now."""
        if not text.startswith(self._told):  # it has begun again, or its decoder rewrites: wait
            return ""
        added = text[len(self._told) :]
        self._told = text
        return added


class TurnStreamer:
    """transformers' streamer (`BaseStreamer`) for a batch: tells the text of every row, then passes the model on.

    Args:
        rows: one for each completion, in the order in which batches have them.
        on_text: told of every piece of text.
        turnstile: held by this thread.
        cancelled: set by another thread to end this one.
    """

    def __init__(
        self, rows: Sequence[RowText], on_text: OnText, turnstile: Turnstile, cancelled: threading.Event
    ) -> None:
        self._rows = rows
        self._on_text = on_text
        self._turnstile = turnstile
        self._cancelled = cancelled
        self._first = self._end = 0
        """The batch at work is rows[first:end]: `n` completions may take several batches."""

    def put(self, value: torch.Tensor) -> None:
        """The prompts of a batch (B, T), then the next token of each row (B,).

        Raises:
            Cancelled: nobody waits any more.
        """
        if self._cancelled.is_set():
            raise Cancelled
        if value.dim() == 2:
            self._end = self._first + len(value)
            for row in self._rows[self._first : self._end]:
                row.restart()
            return
        for number, token in enumerate(value.tolist(), self._first):
            if added := self._rows[number].add(token):
                self._on_text(number, added)
        self._turnstile.pass_on()

    def end(self) -> None:
        """The batch is done. Not called after an out-of-memory error: its rows come again, in smaller batches."""
        self._first = self._end


def generate_in_turns(
    engine: HFEngine,
    prompt: str,
    params: SamplingParams,
    turnstile: Turnstile,
    *,
    on_text: OnText,
    cancelled: threading.Event,
) -> list[Completion]:
    """`params.n` completions of one prompt, their text stripped of the whitespace around it.

    `on_text` is told of every piece of text, from this thread; another thread sets `cancelled` to end this one. All
    threads that use the device share the turnstile.

    Raises:
        Cancelled: `cancelled` was set.
        InputError: the prompt and `max_new_tokens` do not fit the context.
        RunError: out of memory.
    """
    ends = end_ids(engine.model.generation_config.eos_token_id, engine.tokenizer)
    rows = [RowText(engine.tokenizer, ends, params.stop) for _ in range(params.n)]
    streamer = TurnStreamer(rows, on_text, turnstile, cancelled)
    with turnstile:
        # Copies that share the weights: the streamer, and the engine's report, are of this generation alone.
        model, streaming = copy.copy(engine.model), copy.copy(engine)
        model.generate = partial(engine.model.generate, streamer=streamer)
        streaming.__dict__["model"] = model
        streaming.share_prefixes = False  # the loop for rows behind one header does not know this streamer
        (completions,) = streaming.generate([prompt], params)
    stripped = [Completion(done.text.strip(), done.token_ids, done.finish_reason) for done in completions]
    for number, (row, done) in enumerate(zip(rows, stripped, strict=True)):
        if left := row.tell(done.text):
            on_text(number, left)
    return stripped
