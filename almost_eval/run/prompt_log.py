"""`prompts.jsonl` of a run folder: what the model read, to the character. A report then needs neither data nor model.

Few-shot prompts repeat themselves. What neighbouring prompts begin with alike, up to a blank line, is a line of its own
(`{"piece": digest, "text": ...}`), written once and named by the prompts that begin with it. The file is written whole
or not at all before the first sample is scored: a run that goes on has the same prompts (its spec says so), and finds
it there. A run folder of an earlier version has none, and gets one when its command is repeated.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_eval.errors import RunError, StoreError

NAME = "prompts.jsonl"
SHORTEST_PIECE = 200
"""Characters. A shorter common beginning stays with its prompt."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text that the model read."""

    text: str
    continuations: tuple[str, ...] = ()
    """What was scored after it, if anything was."""
    shared: int = 0
    """Characters at the beginning that neighbouring prompts have too."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked about one sample."""

    id: str
    choices: tuple[str, ...]
    """The sample's own, as the data has them."""
    prompts: tuple[Prompt, ...]
    """Empty where the prompt did not fit the context, and nothing was asked."""


def write_prompts(folder: Path, asked: Iterable[Asked]) -> None:
    """Write `prompts.jsonl` unless it is there.

    Raises:
        RunError: the disk is full, or gone.
    """
    file = folder / NAME
    if file.exists():
        return
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as stream:
            for line in _lines(list(asked)):
                # Half a surrogate pair has no UTF-8, but its escape is JSON.
                stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        scratch.replace(file)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise RunError(f"cannot write to {folder} ({error.strerror}); the same command goes on") from None


def read_prompts(folder: Path) -> dict[str, Asked]:
    """Sample id -> what was asked; empty where the folder has no such file.

    Raises:
        StoreError: a line that is no prompt.
    """
    file = folder / NAME
    if not file.exists():
        return {}
    pieces: dict[str | None, str] = {None: ""}
    found: dict[str, Asked] = {}
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
                if "piece" in row:
                    pieces[row["piece"]] = row["text"]
                else:
                    found[row["id"]] = _asked(row, pieces)
            except (ValueError, LookupError, TypeError) as error:
                raise StoreError(
                    f"{file}, line {number} is no prompt ({error!r}); remove the file, and repeat the run's command to "
                    "write it anew"
                ) from None
    return found


def _asked(row: dict[str, Any], pieces: dict[str | None, str]) -> Asked:
    prompts = [
        Prompt(pieces[p["piece"]] + p["text"], tuple(p["continuations"]), len(pieces[p["piece"]]))
        for p in row["prompts"]
    ]
    return Asked(row["id"], tuple(row["choices"]), tuple(prompts))


def _lines(asked: list[Asked]) -> Iterator[dict[str, Any]]:
    """Each piece before the first sample that needs it."""
    shared = iter(_shared_lengths([prompt.text for one in asked for prompt in one.prompts]))
    written: set[str] = set()
    for one in asked:
        prompts = []
        for prompt in one.prompts:
            length = next(shared)
            piece = hashlib.sha256(prompt.text[:length].encode("utf-8", "surrogatepass")).hexdigest()[:16]
            if length and piece not in written:
                written.add(piece)
                yield {"piece": piece, "text": prompt.text[:length]}
            own = {"piece": piece if length else None, "text": prompt.text[length:]}
            prompts.append(own | {"continuations": list(prompt.continuations)})
        yield {"id": one.id, "choices": list(one.choices), "prompts": prompts}


def _shared_lengths(texts: list[str]) -> list[int]:
    """How much of each text begins its neighbour too, cut back to the last blank line; 0 where that is too little."""
    with_next = [_common(a, b) for a, b in itertools.pairwise(texts)]
    lengths = []
    for at, text in enumerate(texts):
        common = max(with_next[max(at - 1, 0) : at + 1], default=0)
        end = text.rfind("\n\n", 0, common)
        lengths.append(end + 2 if end + 2 >= SHORTEST_PIECE else 0)
    return lengths


def _common(a: str, b: str) -> int:
    """Length of the common beginning, by bisection: comparing slices is far faster than comparing characters."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
