"""Texts of the data that a tokenizer would read as control tokens: `<|im_end|>` or `</s>` within an answer.

A rendered dialogue is encoded whole, as in evaluation and by servers, so such a text is no text to the model: an answer
would end, or a turn open, in the middle. To encode it as plain text here alone (`split_special_tokens`) would teach ids
that no other program makes of it. So it is refused by its row, or left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from almost_eval.errors import DataError, TemplateError
from almost_eval.models.chat import ChatTemplate, special_tokens, stop_strings
from almost_eval.models.reasoning import marker_tokens
from almost_eval.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

SKIP_SPECIAL = (
    "leave out and count rows whose text holds a special token or the template's end of a turn; otherwise the first "
    "one is refused"
)
"""Help of the setting `skip_special`, which all trainers share."""


@dataclass(frozen=True, slots=True)
class SpecialText:
    """What a text of the data must not hold."""

    tokenizer: PreTrainedTokenizerBase
    tokens: re.Pattern[str] | None
    """Texts that the tokenizer may read as a special token, or as a mark that the template writes around a turn."""
    turns: tuple[str, ...]
    """Where a turn ends, or another begins, by the template's words."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> SpecialText:
        """Of a model and its template. Marks of a thought (`<think>`) are part of an answer."""
        added = list(tokenizer.added_tokens_decoder.values())
        special = {str(token) for token in added if token.special}
        frame = _frame(tokenizer, template)
        # A word may be a token of its own, and so may a letter that serves as the pad token: these are texts.
        written = {str(token) for token in added if str(token) in frame and not str(token).strip().isalnum()}
        names = {name for name in special | written if len(name.strip()) > 1} - marker_tokens(special)
        longest = sorted(names, key=len, reverse=True)
        return cls(
            tokenizer, re.compile("|".join(map(re.escape, longest))) if longest else None, stop_strings(template)
        )

    def within(self, messages: Conversation) -> tuple[str, str] | None:
        """(role, text) of the first message that holds one; None where none does."""
        for message in messages:
            if text := self._in_text(message.content):
                return message.role, text
        return None

    def _in_text(self, text: str) -> str:
        for turn in self.turns:
            if turn in text:
                return turn
        names = {match[0] for match in self.tokens.finditer(text)} if self.tokens else set()
        if not names:
            return ""
        # The tokenizer decides: some split such a text, or find it at the start of a word alone.
        ids = set(self.tokenizer.encode(text, add_special_tokens=False))
        return next((name for name in sorted(names) if self.tokenizer.convert_tokens_to_ids(name) in ids), "")


def without_special(
    items: Sequence[T],
    special: SpecialText,
    messages: Callable[[T], Conversation],
    where: Callable[[T], str],
    *,
    skip: bool,
) -> tuple[list[T], list[T]]:
    """(items whose text is text, the others).

    Args:
        items: rows of the data.
        special: of the model that reads them.
        messages: of an item, all that the model reads.
        where: what an error calls an item.
        skip: leave the others out; else there may be none.

    Raises:
        DataError: there is one.
    """
    plain: list[T] = []
    others: list[tuple[T, tuple[str, str]]] = []
    for item in items:
        held = special.within(messages(item))
        if held is None:
            plain.append(item)
        else:
            others.append((item, held))
    if others and not skip:
        item, (role, text) = others[0]
        raise DataError(
            f"malformed data: {where(item)}: the {role}'s message holds {text!r}, which the model would read as a "
            f"control token or the end of a turn, and not as text; write it in "
            "another way, or leave such rows out with --skip-special"
        )
    return plain, [item for item, _ in others]


def _frame(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str:
    """What a template writes around two turns."""
    tokens = special_tokens(tokenizer)
    turns = (Message("user", "1"), Message("assistant", "2"))
    try:
        prompt = template.render(turns[:1], add_generation_prompt=True, special_tokens=tokens)
        return prompt + template.render(turns, special_tokens=tokens)
    except TemplateError:
        return ""  # one that it cannot write is refused where it is asked to
