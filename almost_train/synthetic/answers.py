"""The answers of several configurations, read prompt by prompt from their files.

What is held in memory of a prompt is where its rows begin, and digests of its id and text while the files are checked:
about 200 bytes, however long the answers are. So a million prompts are read in bounded memory, and as often as needed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from almost_eval.errors import DataError
from almost_eval.files import iterate_rows, row_at
from almost_train.synthetic.ranking import RankedAnswer

_DIGEST = 16
"""Bytes. That two of a million ids share one has a probability of 1e-27."""

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """A prompt with its answers."""

    id: str
    prompt: str
    answers: dict[str, RankedAnswer]
    """By configuration, in the order of the files."""


class AnswerFiles:
    """Files of answers to the same prompts, in any order of their rows.

    Args:
        files: configuration -> its file, as `synthesize responses` writes it.

    Raises:
        DataError: a file that is absent, empty or malformed, has an id twice or a row without an answer, or does not
            answer the prompts of the first file.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._places: list[Places] = []
        """Of each file: the byte at which the row of each prompt begins, prompts in the order of the first file."""
        first: _Scan | None = None
        for file in self._files.values():
            scan = _Scan(file)
            if first is None:
                first = scan
                self._ids = scan.ids
                self._places.append(scan.places)
            else:
                if scan.texts.size != first.texts.size or not np.array_equal(np.sort(scan.texts), np.sort(first.texts)):
                    other = next(iter(self._files.values()))
                    raise DataError(f"{file} does not answer the same prompts as {other}; finish or redo its responses")
                self._places.append(scan.places[_positions(first.ids, scan.ids)])
            if scan.unanswered is not None:
                id = scan.row(scan.unanswered)["id"]
                raise DataError(f"{file}: the row of {id!r} has no 'response' or no 'rejected'; redo its responses")

    def __len__(self) -> int:
        """Prompts."""
        return len(self._places[0])

    def read(self, numbers: Iterable[int]) -> Iterator[AnsweredPrompt]:
        """The prompts of these numbers (from 0, in the order of the first file), with their answers."""
        with ExitStack() as stack:
            streams = [stack.enter_context(file.open("rb")) for file in self._files.values()]
            for number in numbers:
                places = [int(of_file[number]) for of_file in self._places]
                rows = [row_at(stream, place) for stream, place in zip(streams, places, strict=True)]
                answers = {
                    name: RankedAnswer(name, row["response"], row["rejected"])
                    for name, row in zip(self._files, rows, strict=True)
                }
                yield AnsweredPrompt(rows[0]["id"], rows[0]["prompt"], answers)

    def numbers(self, ids: Sequence[str]) -> Places:
        """The number of the prompt of each id; -1 where there is none."""
        wanted = np.array([_digest(id) for id in ids], f"S{_DIGEST}")
        at = np.minimum(np.searchsorted(self._ids, wanted, sorter=self._order), len(self) - 1)
        return np.where(self._ids[self._order[at]] == wanted, self._order[at], -1)

    @cached_property
    def _order(self) -> Places:
        return np.argsort(self._ids, kind="stable")


class _Scan:
    """One pass over a file: its rows are checked, and what tells them apart is kept."""

    def __init__(self, file: Path) -> None:
        self._file = file
        places, ids, texts = array("q"), bytearray(), bytearray()
        self.unanswered: int | None = None
        """Number of the first row without an answer."""
        for place, row in iterate_rows(file, {"id": str, "prompt": str}):
            if self.unanswered is None and (not isinstance(row.get("response"), str) or "rejected" not in row):
                self.unanswered = len(places)
            places.append(place)
            ids += _digest(row["id"])
            texts += _digest(row["id"], row["prompt"])
        if not places:
            raise DataError(f"{file} is empty; mine prompts first")
        self.places: Places = np.array(places, np.int64)
        self.ids = np.frombuffer(ids, f"S{_DIGEST}")
        self.texts = np.frombuffer(texts, f"S{_DIGEST}")
        """Digests of id and prompt."""
        _, firsts, counts = np.unique(self.ids, return_index=True, return_counts=True)
        if (twice := firsts[counts > 1]).size:
            id = self.row(int(twice.min()))["id"]
            raise DataError(f"{file} has the id {id!r} more than once; every prompt needs its own")

    def row(self, number: int) -> Mapping[str, object]:
        """A row, read again."""
        with self._file.open("rb") as stream:
            return row_at(stream, int(self.places[number]))


def _digest(*texts: str) -> bytes:
    digest = blake2b(digest_size=_DIGEST)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8) + data)
    return digest.digest()


def _positions(wanted: npt.NDArray[np.bytes_], ids: npt.NDArray[np.bytes_]) -> Places:
    """Where each wanted id is among these, which hold them all."""
    order = np.argsort(ids, kind="stable")
    return order[np.searchsorted(ids, wanted, sorter=order)]
