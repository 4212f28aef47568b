"""Several generations on one model at once, a token each in turn, every token told as soon as it is known.

transformers' `generate` runs in a thread for each request. A stopping criterion, which it calls after every token,
tells the new text and lets the next thread have the model: nobody waits for somebody else's long answer. What comes
out is what `HFEngine.generate` gives for the same prompt and seed, since it is the same code on the same batches.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.types import Completion

OnText = Callable[[int, str, int], None]
"""Takes the number of a completion, the text that was added to it, and how many tokens it has now."""


class Cancelled(Exception):
    """Nobody waits for this generation any more. Never leaves this module's callers."""


class Turnstile:
    """Lets one thread through at a time, in the order of arrival."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[Callable[[], None]]:
        """Wait for a turn; yields a function that goes to the end of the line and waits for the next one."""
        me = object()

        def wait() -> None:
            self._line.append(me)
            self._changed.wait_for(lambda: self._line[0] is me)

        def pass_on() -> None:
            with self._changed:
                if len(self._line) > 1:
                    self._line.popleft()
                    self._changed.notify_all()
                    wait()

        with self._changed:
            wait()
        try:
            yield pass_on
        finally:
            with self._changed:
                self._line.remove(me)
                self._changed.notify_all()


class RowText:
    """What of a growing completion can be told already: it is never taken back.

    Whitespace around a completion is no part of the answer; half a character, and what may become a stop string, are
    held back.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._stop = stop
        self._told = ""

    def grow(self, ids: Sequence[int]) -> tuple[str, int]:
        """The text to tell now that the completion is `ids`, and how many tokens it has."""
        at = next((i for i, token in enumerate(ids) if token in self._end_ids), None)
        whole = self._tokenizer.decode(ids[:at], skip_special_tokens=True).lstrip()
        for stop in self._stop:
            cut = whole.find(stop)
            # Held: the longest end of the text that a stop string begins with.
            held = next((n for n in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:n])), 0)
            whole = whole[:cut] if cut >= 0 else whole[: len(whole) - held]
        return self._tell(whole.rstrip("\ufffd").rstrip()), len(ids[:at]) if at is not None else len(ids)

    def close(self, text: str) -> str:
        """What is left to tell of the finished text."""
        return self._tell(text)

    def _tell(self, text: str) -> str:
        if not text.startswith(self._told):  # a decoder that rewrites what it has said: wait for the end
            return ""
        added = text[len(self._told) :]
        self._told = text
        return added


class _Stepped:
    """A model whose `generate` calls `on_step(first_row, token ids of the completions (B, T))` after every token."""

    def __init__(self, model: Any, on_step: Callable[[int, Any], None]) -> None:
        self._model = model
        self._on_step = on_step
        self._rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *, input_ids: Any, stopping_criteria: Any, **options: Any) -> Any:
        """The model's `generate`, which is called for one batch after another."""
        first, length = self._rows, input_ids.shape[1]

        def step(ids: Any, scores: Any, **_: Any) -> Any:
            self._on_step(first, ids[:, length:])
            return ids.new_zeros(len(ids)).bool()

        output = self._model.generate(input_ids=input_ids, stopping_criteria=[*stopping_criteria, step], **options)
        self._rows += len(input_ids)  # not after an out-of-memory error: the same rows come again, in smaller batches
        return output


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

    Args:
        engine: what generates; its weights are loaded.
        prompt: as the chat template wrote it.
        params: how to sample.
        turnstile: shared by all threads that use the device.
        on_text: told of every piece of text, from this thread.
        cancelled: set by another thread to end this one.

    Raises:
        Cancelled: `cancelled` was set.
        InputError: the prompt and `max_new_tokens` do not fit the context.
        RunError: out of memory.
    """
    rows: dict[int, RowText] = {}
    ends = engine.model.generation_config.eos_token_id
    end_ids = frozenset([*(ends if isinstance(ends, list) else [ends]), engine.tokenizer.eos_token_id])

    with turnstile.turn() as pass_on:

        def on_step(first: int, ids: Any) -> None:
            if cancelled.is_set():
                raise Cancelled
            for number, row in enumerate(ids.tolist(), first):
                text = rows.setdefault(number, RowText(engine.tokenizer, end_ids, params.stop))
                added, tokens = text.grow(row)
                if added:
                    on_text(number, added, tokens)
            pass_on()

        stepped = copy.copy(engine)  # shares weights and tokenizer; the report and the stepping are its own
        stepped.__dict__["model"] = _Stepped(engine.model, on_step)
        (completions,) = stepped.generate([prompt], params)
    stripped = [Completion(done.text.strip(), done.token_ids, done.finish_reason) for done in completions]
    for number, done in enumerate(stripped):
        text = rows.setdefault(number, RowText(engine.tokenizer, end_ids, params.stop))
        if left := text.close(done.text):
            on_text(number, left, len(done.token_ids))
    return stripped
