"""The answers of several configurations, read prompt by prompt from their files.

What is held in memory of a prompt is where its rows begin, and digests of its id and text while the files are checked:
about 200 bytes, however long the answers are. So a million prompts are read in bounded memory, and as often as needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from almost_eval.errors import DataError
from almost_eval.files import Row, row_at
from almost_train.synthetic.ranking import RankedAnswer
from almost_train.synthetic.row_index import Numbers, RowIndex, as_digests, digest, digests_of


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
        first, *others = self._files.values()
        self._first = _Answers(first)
        self._places: list[Numbers] = [self._first.places]
        """Of each file: the byte at which the row of each prompt begins, prompts in the order of the first file."""
        texts = np.sort(self._first.texts)
        del self._first.texts
        for file in others:
            scan = _Answers(file)
            if not np.array_equal(np.sort(scan.texts), texts):
                raise DataError(f"{file} does not answer the same prompts as {first}; finish or redo its responses")
            self._places.append(scan.places[scan.find(self._first.ids)])

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

    def numbers(self, ids: Sequence[str]) -> Numbers:
        """The number of the prompt of each id; -1 where there is none."""
        return self._first.find(digests_of(ids))


class _Answers(RowIndex):
    """One file: its rows are checked, and what tells their prompts apart is kept."""

    def __init__(self, file: Path) -> None:
        self._unanswered: int | None = None  # number of the first row without an answer
        self._texts = bytearray()
        super().__init__(file, {"prompt": str})
        self.texts = as_digests(bytes(self._texts))
        """Digests of id and prompt."""
        del self._texts
        self.check_prompts()
        if self._unanswered is not None:
            [row] = self.read([self._unanswered])
            raise DataError(f"{file}: the row of {row['id']!r} has no 'response' or no 'rejected'; redo its responses")

    def look(self, number: int, row: Row) -> None:
        """Keep the digest, and whether there is an answer."""
        if self._unanswered is None and (not isinstance(row.get("response"), str) or "rejected" not in row):
            self._unanswered = number
        self._texts += digest(row["id"], row["prompt"])
