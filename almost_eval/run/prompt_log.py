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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from almost_eval.errors import RunError
from almost_eval.files import placed_records, row_at, whole_file
from almost_eval.types import JSONObject

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
class SamplePrompts:
    """What the model read of one sample."""

    id: str
    choices: tuple[str, ...]
    """The sample's own, as the data has them."""
    prompts: tuple[Prompt, ...]
    """Empty where the prompt did not fit the context, and the model read nothing."""


def write_prompts(folder: Path, samples: Iterable[SamplePrompts]) -> None:
    """Write `prompts.jsonl` unless it is there.

    Raises:
        RunError: the disk is full, or gone.
    """
    file = folder / NAME
    if file.exists():
        return
    try:
        with whole_file(file) as stream:
            for line in _lines(list(samples)):
                # Half a surrogate pair has no UTF-8, but its escape is JSON.
                stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}); the same command goes on") from None


class StoredPrompts(Mapping[str, SamplePrompts]):
    """Sample id -> what the model read, from the `prompts.jsonl` of a folder; empty where there is none.

    Every line is checked when it is opened, and read again when its sample is looked up: what is held in memory is
    where the lines begin, and what neighbouring prompts share.

    Raises:
        StoreError: a line that is no prompt.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._pieces: dict[str | None, str] = {None: ""}
        self._places: dict[str, int] = {}
        mend = "remove the file, and repeat the run's command to write it anew"
        for _, place, id in placed_records(self._file, self._id_of, "a prompt", mend=mend):
            if id is not None:
                self._places[id] = place

    def _id_of(self, row: JSONObject) -> str | None:
        """The sample of a line; of a piece, which is kept, None."""
        if "piece" in row:
            self._pieces[row["piece"]] = row["text"]
            return None
        return _of_row(row, self._pieces).id

    def __getitem__(self, id: str) -> SamplePrompts:
        place = self._places[id]
        with self._file.open("rb") as stream:
            return _of_row(row_at(stream, place), self._pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping) or len(self) != len(other):
            return False
        return all(id in other and self[id] == other[id] for id in self)  # a pair at a time

    __hash__ = None  # type: ignore[assignment]


def read_prompts(folder: Path) -> dict[str, SamplePrompts]:
    """`StoredPrompts`, all in memory."""
    return dict(StoredPrompts(folder))


def _of_row(row: JSONObject, pieces: dict[str | None, str]) -> SamplePrompts:
    prompts = [
        Prompt(pieces[p["piece"]] + p["text"], tuple(p["continuations"]), len(pieces[p["piece"]]))
        for p in row["prompts"]
    ]
    return SamplePrompts(row["id"], tuple(row["choices"]), tuple(prompts))


def _lines(samples: list[SamplePrompts]) -> Iterator[JSONObject]:
    """Each piece before the first sample that needs it."""
    shared = iter(_shared_lengths([prompt.text for one in samples for prompt in one.prompts]))
    written: set[str] = set()
    for one in samples:
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
