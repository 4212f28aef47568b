"""Training and held-out parts of a data set: no prompt is on both sides."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from almost_eval.types import Conversation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Split(Generic[T]):
    """Both parts, in their order."""

    training: list[T]
    held_out: list[T]
    dropped: int
    """Left out of training, as a held-out file has their prompt."""


def split_by_prompt(
    items: Sequence[T], held_out: Sequence[T] | None, key: Callable[[T], str], share: float, seed: int
) -> Split[T]:
    """Items with one key stay together.

    Args:
        items: to be split.
        held_out: the held-out part, where it is there already.
        key: what says that two items are about the same.
        share: of the keys that are held out, where there is no `held_out`: at least one, unless it is 0.
        seed: of which.
    """
    if held_out is not None:
        out = {key(item) for item in held_out}
        training = [item for item in items if key(item) not in out]
        return Split(training, list(held_out), len(items) - len(training))
    keys = sorted({key(item) for item in items})
    random.Random(seed).shuffle(keys)
    count = round(share * len(keys))
    out = set(keys[: max(count, 1 if share and len(keys) > 1 else 0)])
    return Split([i for i in items if key(i) not in out], [i for i in items if key(i) in out], 0)


def opening(dialogue: Conversation) -> str:
    """The key of a dialogue: all before its first answer."""
    end = next((at for at, message in enumerate(dialogue) if message.role == "assistant"), len(dialogue))
    return conversation_key(dialogue[:end])


def conversation_key(conversation: Conversation) -> str:
    """One text for the same roles and words."""
    return json.dumps([message.to_dict() for message in conversation])
