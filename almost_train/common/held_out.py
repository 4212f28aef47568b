"""Prompts that training must not see, because an evaluation uses them. Two texts with the same words are the same."""

from __future__ import annotations

import re
from pathlib import Path

from almost_eval.files import read_rows

HeldOut = frozenset[tuple[str, ...]]
"""The words of each held-out prompt, in lower case and without punctuation."""

_WORD = re.compile(r"\w+(?:'\w+)*")


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation."""
    return tuple(word.lower() for word in _WORD.findall(text.replace("\u2019", "'")))


def read_held_out(file: Path | None) -> HeldOut:
    """The prompts of a `prompts.jsonl` to keep out; none where there is no file.

    Raises:
        DataError: absent or malformed.
    """
    if file is None:
        return frozenset()
    return frozenset(words_of(row["prompt"]) for row in read_rows(file, {"prompt": str}))


def is_held_out(text: str, held_out: HeldOut) -> bool:
    """Whether a text says the same words as a held-out prompt.

    >>> is_held_out("where does the otter live", frozenset({("where", "does", "the", "otter", "live")}))
    True
    """
    return words_of(text) in held_out
