"""Prompts that training must not see, because an evaluation uses them. Two texts with the same words are the same."""

from __future__ import annotations

import re
from pathlib import Path

from almost_train.common.formats import read_prompt_rows
from almost_train.common.tables import read_any

HeldOut = frozenset[tuple[str, ...]]
"""The words of each held-out prompt, in lower case and without punctuation."""

_WORD = re.compile(r"\w+(?:'\w+)*")


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation."""
    return tuple(word.lower() for word in _WORD.findall(text.replace("\u2019", "'")))


def read_held_out(file: Path | None) -> HeldOut:
    """The prompts of a file to keep out, in any format of prompts; none where there is no file.

    Of a prompt of several turns it is what the user says in each.

    Raises:
        DataError: absent, empty or malformed.
    """
    if file is None:
        return frozenset()
    prompts = (messages for _, messages in read_prompt_rows(read_any(file)).records)
    return frozenset(words_of(m.content) for messages in prompts for m in messages if m.role == "user")


def is_held_out(text: str, held_out: HeldOut) -> bool:
    """Whether a text says the same words as a held-out prompt.

    >>> is_held_out("where does the otter live", frozenset({("where", "does", "the", "otter", "live")}))
    True
    """
    return words_of(text) in held_out
