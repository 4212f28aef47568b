"""Where the rows of a file are, so that none needs to be held.

Of a row 24 bytes stay in memory, however long it is: the byte at which it begins, and a digest of its id. It is read
again when it is wanted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from almost_eval.errors import DataError
from almost_eval.files import Row, iterate_rows, row_at

_DIGEST = 16
"""Bytes. That two of a million ids share one has a probability of 1e-27."""

Numbers = npt.NDArray[np.int64]
"""Of rows in their file, from 0; or the bytes at which rows begin."""
Digests = npt.NDArray[np.bytes_]


class RowIndex:
    """The rows of a JSON Lines file, by number and by id.

    Args:
        file: as `iterate_rows` takes it. It may grow meanwhile; the rows that it has now must stay as they are.
        required: keys that every row must have, and the type of each; an `id` is one of them.

    Raises:
        DataError: no such file, or a malformed row.
    """

    def __init__(self, file: Path, required: Mapping[str, type]) -> None:
        self.file = file
        places, ids = array("q"), bytearray()
        for place, row in iterate_rows(file, {"id": str, **required}):
            self.look(len(places), row)
            places.append(place)
            ids += digest(row["id"])
        self.places: Numbers = np.frombuffer(places, np.int64)
        """The byte at which each row begins."""
        self.ids = as_digests(ids)

    def look(self, number: int, row: Row) -> None:
        """Called with each row, once; for what else is to be known of it."""

    def __len__(self) -> int:
        return self.places.size

    def read(self, numbers: Iterable[int]) -> Iterator[Row]:
        """These rows, one after the other; raises DataError where the file was changed since."""
        with self.file.open("rb") as stream:
            for number in numbers:
                yield row_at(stream, int(self.places[number]))

    def find(self, ids: Digests) -> Numbers:
        """The number of the row of each id, the last where several have it; -1 where there is none."""
        if not len(self):
            return np.full(ids.size, -1)
        at = np.maximum(np.searchsorted(self.ids, ids, "right", sorter=self._order) - 1, 0)
        return np.where(self.ids[self._order[at]] == ids, self._order[at], -1)

    def check_prompts(self) -> None:
        """Raise DataError for a file that is empty, or has an id twice: it must have one row for each prompt."""
        if not len(self):
            raise DataError(f"{self.file} is empty; mine prompts first")
        _, firsts, counts = np.unique(self.ids, return_index=True, return_counts=True)
        if (twice := firsts[counts > 1]).size:
            [row] = self.read([int(twice.min())])
            raise DataError(f"{self.file} has the id {row['id']!r} more than once; every prompt needs its own")

    @cached_property
    def _order(self) -> Numbers:
        return np.argsort(self.ids, kind="stable")


def digest(*texts: str) -> bytes:
    """What stands for texts: 16 bytes."""
    of_all = blake2b(digest_size=_DIGEST)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        of_all.update(len(data).to_bytes(8) + data)
    return of_all.digest()


def as_digests(joined: bytes | bytearray) -> Digests:
    """An array of what `digest` gave, one after the other."""
    return np.frombuffer(joined, f"S{_DIGEST}")


def digests_of(ids: Sequence[str]) -> Digests:
    """The digest of each id, as `RowIndex.find` takes them."""
    return as_digests(b"".join(map(digest, ids)))
