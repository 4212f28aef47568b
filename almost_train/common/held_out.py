"""Prompts that training must not see, as an evaluation will ask them: decontamination by the words of a prompt."""

from __future__ import annotations

from pathlib import Path

from almost_train.common.records import read_rows
from almost_train.self_play.rules import words_of

HeldOut = frozenset[tuple[str, ...]]
"""The words of each held-out prompt, in lower case and without punctuation."""


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
