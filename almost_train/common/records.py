"""The records that stages write for one another: messages and preferences, as JSON rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from almost_eval.errors import DataError, did_you_mean
from almost_eval.files import Row
from almost_eval.types import Conversation, Message


class EmptyAnswer(DataError):
    """A prompt or an answer without a word. Real data has a few; whether they are left out is the reader's choice."""


UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message that say more than its text: without them a model would learn another answer."""

MOST_MARGIN = 3.4e38
"""The loss is computed in float32."""
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Of messages. Another one (`User`, `human`, `bot`) would be no user's or assistant's, and its row left out. What a
template does not write, as most do not a tool's, it refuses."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, the better one named: a row of `comparisons.jsonl`, in TRL's preference format."""

    prompt: Conversation
    chosen: Conversation
    """The better answer: what follows the prompt."""
    rejected: Conversation
    chosen_source: str = ""
    """The configuration, model or person that wrote `chosen`."""
    rejected_source: str = ""
    prompt_id: str = ""
    """Pairs with one prompt have one id."""
    margin: float | None = None
    """By how much `chosen` is better, in units of the reward; None where the file does not say."""

    @classmethod
    def from_row(cls, row: Row, where: str) -> Preference:
        """The preference of a row; the id of a prompt without one is made of its text.

        Raises:
            DataError: the row is not in the format; `where` says where it stands.
        """
        prompt, chosen, rejected = (messages_of(row[key], where) for key in ("prompt", "chosen", "rejected"))
        return cls.of(row, prompt, chosen, rejected, where)

    @classmethod
    def of(cls, row: Row, prompt: Conversation, chosen: Conversation, rejected: Conversation, where: str) -> Preference:
        """The preference of these messages, with what else the row says: sources, `prompt_id`, `margin`.

        Raises:
            EmptyAnswer: what the user says last, or the last message of an answer, has no words.
            DataError: no prompt, an answer that does not end in an assistant's message, a margin that is no number or
                is below 0.
        """
        prompt = with_system(row, prompt, where)
        if not prompt or any(not answer or answer[-1].role != "assistant" for answer in (chosen, rejected)):
            raise DataError(f"malformed data: {where}: needs a prompt, and answers that end in an assistant's message")
        if not has_question(prompt):
            raise EmptyAnswer(f"malformed data: {where}: the prompt is empty: no user says anything in it")
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer[-1].content.strip():
                raise EmptyAnswer(f"malformed data: {where}: the {side} answer is empty")
        margin = _margin(row, where)
        chosen_source, rejected_source = (str(row.get(f"{side}_source") or "") for side in ("chosen", "rejected"))
        prompt_id = row.get("prompt_id") or hashlib.sha256(json.dumps(_as_json(prompt)).encode()).hexdigest()[:12]
        return cls(prompt, chosen, rejected, chosen_source, rejected_source, str(prompt_id), margin)

    def to_row(self) -> Row:
        """The row that `from_row` reads."""
        return {
            "prompt": _as_json(self.prompt),
            "chosen": _as_json(self.chosen),
            "rejected": _as_json(self.rejected),
            "chosen_source": self.chosen_source,
            "rejected_source": self.rejected_source,
            "prompt_id": self.prompt_id,
            **({} if self.margin is None else {"margin": self.margin}),
        }


def _margin(row: Row, where: str) -> float | None:
    value = row.get("margin")
    if value is None:
        return None
    try:
        # A text too: a cell of a CSV is one. Not true, which Python takes for 1.
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(f"malformed data: {where}: 'margin' must be a number, and is {value!r:.40}")
    if margin > MOST_MARGIN:
        raise DataError(f"malformed data: {where}: 'margin' is {margin:g}, which float32 does not hold")
    if margin < 0:
        raise DataError(
            f"malformed data: {where}: 'margin' is {margin:g}, and must not be below 0: it says by how much the chosen "
            "answer is better; swap the two answers, or leave the row out"
        )
    return margin


def messages_of(items: Sequence[object], where: str) -> Conversation:
    """Messages of a JSON list of `{"role", "content"}`.

    Raises:
        DataError: an item is not one; `where` says where it stands.
    """
    messages = []
    for item in items:
        role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
        unread = [key for key in UNREAD if item.get(key)] if isinstance(item, dict) else []
        if unread:
            what = "calls tools" if unread[0] in ("tool_calls", "function_call") else f"has {unread[0]!r}"
            raise DataError(
                f"malformed data: {where}: a message {what}, which chat templates here do not write; leave such "
                "dialogues out"
            )
        if isinstance(item, dict) and item.get("weight") == 0:
            raise DataError(
                f"malformed data: {where}: a message has the weight 0, and every answer is learned; give prompt and "
                "completion, of which only the completion is"
            )
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"malformed data: {where}: a message must be {{'role', 'content'}}, and is {item!r:.60}")
        if role not in ROLES:
            known = did_you_mean(role, ROLES)
            raise DataError(f"malformed data: {where}: a message has the role {role!r:.40}; {known}")
        messages.append(Message(role, content))
    return tuple(messages)


def with_system(row: Row, messages: Conversation, where: str) -> Conversation:
    """The messages of a row, headed by its column `system`, where it has one.

    Raises:
        DataError: they begin with another system message, or it holds no text.
    """
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"malformed data: {where}: 'system' must be a text, and is {system!r:.40}")
    if system is None or not system.strip():
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content.strip() == system.strip():
            return messages
        raise DataError(f"malformed data: {where}: the column 'system' and the first message are two system messages")
    return (Message("system", system.strip()), *messages)


def refuse_half(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which a JSON text may hold (`"\\ud83d"`): no UTF-8 has it, and no tokenizer.

    Raises:
        DataError: there is one; `where` says where the text stands.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"malformed data: {where}: half of a surrogate pair ({half!a}), which is no character; the text was cut "
            "inside one"
        ) from None


def has_question(messages: Conversation) -> bool:
    """Whether what a user says last has words."""
    return next((bool(m.content.strip()) for m in reversed(messages) if m.role == "user"), False)


def _as_json(conversation: Conversation) -> list[dict[str, str]]:
    return [message.to_dict() for message in conversation]
