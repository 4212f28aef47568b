"""What stands before a text: the special tokens that the tokenizer's post-processor really writes, exactly once.

A chat template may write them itself, and the tokenizer would then write them again. So the whole special prefix is
read off the tokenizer, whatever its config names (`bos_token` may be absent, `add_bos_token` may be ignored by the
tokenizer's class), and a text that begins with it gets no second one. A text that brings it twice is refused: its
template is wrong, and every number would be off. Every path asks here: scoring, generation, rewards, training, and what
a server is told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from almost_eval.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS_LINE = "{{- bos_token -}}\n"
"""Writes a BOS that has a name, in front of a template."""


@dataclass(frozen=True, slots=True)
class Opening:
    """The special tokens that a tokenizer puts before a text."""

    ids: tuple[int, ...]
    """Empty where it puts none."""
    text: str
    """The same as a template would write them."""
    bos: str
    """The BOS token by name; empty where the config names none."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Opening:
        """Read off the tokenizer by one letter with and without its special tokens.

        A letter, not "": where BOS and EOS are one token, an empty text cannot tell which of the two was added.
        """
        bare = list(tokenizer.encode("a", add_special_tokens=False))
        whole = list(tokenizer.encode("a"))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        ids = tuple(int(i) for i in whole[:at])
        text = "".join(map(str, tokenizer.convert_ids_to_tokens(list(ids)))) if ids else ""
        # The map holds only what is set; asking for an attribute that is not makes transformers log an error.
        return cls(ids, text, str(tokenizer.special_tokens_map.get("bos_token") or ""))

    def is_written(self, text: str) -> bool:
        """Whether a text brings its own opening: all of the prefix, or the named BOS."""
        # As it is, too: the mark of some tokenizers is white space itself.
        marks = tuple(mark for mark in (self.text, self.bos) if mark)
        return text.startswith(marks) or text.lstrip().startswith(marks)

    def refuse_twice(self, text: str) -> None:
        """Raise TemplateError where a text begins with more BOS tokens than the tokenizer would write."""
        mark = self.bos or self.text
        if not mark.strip():
            return  # none, or one that is white space, of which a text may begin with more
        front = re.match(rf"(?:\s*{re.escape(mark)})*", text)
        count, own = front[0].count(mark) if front else 0, max(1, self.text.count(mark))
        if count > own:
            raise TemplateError(
                f"the prompt begins with {count} BOS tokens, the tokenizer's own encoding with {own}: the "
                f"template writes {mark!r} once too often; mend it, or choose another template"
            )

    def before(self, text: str, ids: Sequence[int]) -> list[int]:
        """The ids of a text, encoded without special tokens, with the opening in front where it has none.

        Raises:
            TemplateError: the text brings it twice.
        """
        self.refuse_twice(text)
        written = self.is_written(text) or (self.ids and tuple(ids[: len(self.ids)]) == self.ids)
        return list(ids) if written else [*self.ids, *ids]

    @property
    def line(self) -> str:
        """Jinja that writes the opening, to stand in front of a template that leaves it to the tokenizer."""
        if not self.ids:
            return ""
        return BOS_LINE if self.text == self.bos else "{{- " + repr(self.text) + " -}}\n"
