"""Shards: a part of a run's samples in a folder of its own, which `merge` joins with the others to the whole run.

A shard's folder holds what the whole run's would (`spec.json`, the lines), with the lines of its own samples alone, and
`shard.json`: which part it is, and of how many. It holds no results, so nothing takes it for a run. Stages of
`almost_train` have shards of the same form.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from almost_eval.errors import InputError, StoreError
from almost_eval.files import locked_folder, read_json, write_json
from almost_eval.types import JSONMapping, JSONObject

MARK = "shard.json"
_SHARD = re.compile(r"(\d{1,6})/(\d{1,6})")
_FOLDERS = "shard-*-of-*"


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several parts of a run."""

    number: int
    """From 1."""
    of: int
    """How many there are."""

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that `--shard 3/8` names.

        Raises:
            InputError: not such a text, or a number that is not among them.
        """
        matched = _SHARD.fullmatch(text.strip())
        shard = cls(int(matched[1]), int(matched[2])) if matched else None
        if shard is None or not 1 <= shard.number <= shard.of:
            raise InputError(f"--shard {text!r} is not K/N with K from 1 to N; write 3/8 for the third of eight")
        return shard

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def folder(self, whole: Path) -> Path:
        """Its folder, in the folder of the whole run: the merged run will lie where the whole one would."""
        return whole / f"shard-{self.number}-of-{self.of}"

    def part(self, parts: Sequence[Sequence[int]], what: str = "samples") -> Sequence[int]:
        """Its own of the parts.

        Raises:
            InputError: there are fewer samples than shards, so that one or another would have none.
        """
        most = sum(bool(part) for part in parts)
        if most < self.of:
            raise InputError(f"--shard {self}: there are {what} for {most} shards only; take N of {most} or fewer")
        return parts[self.number - 1]


def without_shard(command: Sequence[str], option: str = "shard") -> list[str]:
    """A command line as that of the whole run: without `--shard`, or another option, and its value."""
    flag, skip = f"--{option}", False
    kept: list[str] = []
    for argument in command:
        if skip or argument.startswith(f"{flag}="):
            skip = False
        elif argument == flag:
            skip = True
        else:
            kept.append(argument)
    return kept


@dataclass(frozen=True, slots=True)
class Mark:
    """The content of `shard.json`."""

    folder: Path
    shard: Shard
    total: int
    """Samples of the whole run."""
    places: tuple[int, ...]
    """Of the shard's samples among them, ascending."""
    ids: tuple[str, ...]
    """Of these samples."""
    whole: JSONObject
    """What shards of one run have in common besides the spec."""
    finished: JSONObject | None
    """What the shard reports of itself; None while samples are missing."""

    def write(self, finished: JSONMapping | None = None) -> Mark:
        """Write it, and give it back as it now is; raises OSError where the folder cannot be written."""
        mark = self if finished is None else replace(self, finished=dict(finished))
        content = {
            "shard": self.shard.number,
            "of": self.shard.of,
            "total": self.total,
            "places": list(self.places),
            "ids": list(self.ids),
            "whole": self.whole,
            "finished": mark.finished,
        }
        write_json(self.folder / MARK, content)
        return mark


def begin_shard(folder: Path, shard: Shard, places: Sequence[int], ids: Sequence[str], whole: JSONMapping) -> Mark:
    """Mark a folder, which the caller has locked, as that of a shard; or read the mark that it has.

    Args:
        folder: of the shard.
        shard: which one.
        places: of its samples in the whole run, ascending.
        ids: of all samples of the run.
        whole: what shards of one run must have in common besides the spec.

    Raises:
        StoreError: the folder is that of another shard, or of a whole run.
    """
    mine = Mark(folder, shard, len(ids), tuple(places), tuple(ids[at] for at in places), dict(whole), None)
    if not (folder / MARK).exists():
        if (folder / "results.json").exists() or (folder / "result.json").exists():
            raise StoreError(f"{folder} holds a whole run; choose another --output")
        return mine.write()
    stored = read_mark(folder)
    if (stored.shard, stored.ids) != (shard, mine.ids):
        raise StoreError(
            f"{folder} is shard {stored.shard} with {len(stored.ids)} samples, not shard {shard} with {len(mine.ids)}; "
            "choose another --output"
        )
    return stored


def read_mark(folder: Path) -> Mark:
    """The mark of a shard's folder.

    Raises:
        StoreError: none, or a damaged one.
    """
    row = read_json(folder / MARK, "shard", "of", "total", "places", "ids", "whole", "finished")
    shard, total, places, ids = row["shard"], row["total"], row["places"], row["ids"]
    if problem := _problem(row):
        raise StoreError(f"{folder / MARK} is not a shard's ({problem}); run the shard's command in a new folder")
    return Mark(folder, Shard(shard, row["of"]), total, tuple(places), tuple(ids), row["whole"], row["finished"])


def _problem(row: JSONMapping) -> str | None:
    """What is wrong with the content of a mark; None where it may be one."""
    if any(type(row[key]) is not int for key in ("shard", "of", "total")) or not 1 <= row["shard"] <= row["of"]:
        return "its shard, of and total are no numbers of one"
    places, ids = row["places"], row["ids"]
    if not isinstance(places, list) or any(type(at) is not int or not 0 <= at < row["total"] for at in places):
        return f"its places are not among {row['total']} samples"
    if any(one >= other for one, other in itertools.pairwise(places)):
        return "its places do not ascend"
    if not isinstance(ids, list) or any(not isinstance(id, str) for id in ids) or len(ids) != len(places):
        return "its ids are not those of its places"
    if not isinstance(row["whole"], dict) or not isinstance(row["finished"], dict | None):
        return "its whole or finished is no object"
    return None


def file_names(mark: Mark, key: str) -> list[str]:
    """The names of files that a mark has in common with the other shards, each of a file in one folder.

    Raises:
        StoreError: there are none, or one leads elsewhere.
    """
    names = mark.whole.get(key)
    if not isinstance(names, list) or not all(isinstance(n, str) and n and Path(n).name == n for n in names):
        raise StoreError(f"{mark.folder / MARK} is damaged: its {key} are no names of files; put back a whole copy")
    return names


def refuse_shard(folder: Path) -> None:
    """Raise StoreError for a shard where a whole run is wanted, and for a folder of nothing but shards: merge first."""
    if (folder / MARK).is_file():
        mark = read_mark(folder)
        raise StoreError(
            f"{folder} is shard {mark.shard}, not a whole run; join the shards first: almost-eval merge {folder.parent}"
        )
    if not (folder / "spec.json").exists() and any(folder.glob(f"{_FOLDERS}/{MARK}")):
        raise StoreError(f"{folder} holds shards that are not joined; join them first: almost-eval merge {folder}")


@contextmanager
def beginning(whole: Path, shard: Shard) -> Iterator[Path | None]:
    """Hold the folder of the whole run while a shard writes its spec: of shards that start together one is the first.

    Yields:
        The folder of this shard, or of another that has begun, or None: what all have in common is in its spec.

    Raises:
        StoreError: see `locked_folder`.
    """
    with locked_folder(whole, "run", patience=600):
        every = [shard, *(Shard(number, shard.of) for number in range(1, shard.of + 1))]
        yield next((one.folder(whole) for one in every if (one.folder(whole) / "spec.json").is_file()), None)


def whole_folder(marks: Sequence[Mark], output: Path | None) -> Path:
    """Where the joined run goes: `output`, else the folder that holds all shards.

    Raises:
        StoreError: they lie in several folders and `output` is None, or it is a shard's own.
    """
    parents = {mark.folder.resolve().parent: mark.folder.parent for mark in marks}
    if output is None and len(parents) > 1:
        one, other = list(parents.values())[:2]
        raise StoreError(f"there are shards in {one} and in {other}: say with --output where the run goes")
    whole = output or marks[0].folder.parent
    if (whole / MARK).is_file():
        raise StoreError(
            f"{whole} is a shard's own folder, which the joined run would replace; choose another --output"
        )
    return whole


def find_marks(folders: Iterable[Path]) -> list[Mark]:
    """The shards in these folders, each a shard's or one that holds shards, by number.

    Raises:
        StoreError: a folder without a shard.
    """
    marks = []
    for folder in folders:
        if (folder / MARK).is_file():
            marks.append(read_mark(folder))
            continue
        inside = sorted(folder.glob(f"{_FOLDERS}/{MARK}"))
        if not inside:
            raise StoreError(f"{folder} holds no shard (no {MARK}); give the folders that --shard K/N made")
        marks += [read_mark(file.parent) for file in inside]
    return sorted(marks, key=lambda mark: (mark.shard.number, str(mark.folder)))


def _change(one: Mark, other: Mark) -> str:
    """The first thing outside their specs in which two marks differ."""
    was, now = ({"total": mark.total, **mark.whole} for mark in (one, other))
    key = next(key for key in {**was, **now} if was.get(key) != now.get(key))
    if isinstance(was.get(key), dict) and isinstance(now.get(key), dict):
        part = next(part for part in {**was[key], **now[key]} if was[key].get(part) != now[key].get(part))
        return f"{key}.{part} was {was[key].get(part)}, is {now[key].get(part)}"
    return f"{key} was {was.get(key)}, is {now.get(key)}"


def check_marks(marks: Sequence[Mark], change: Callable[[Mark, Mark], str | None]) -> None:
    """Refuse shards that are not the whole of one run.

    Args:
        marks: as `find_marks` gave them.
        change: what differs between the runs of two shards, in words; None where they are of one run.

    Raises:
        StoreError: one that is missing, twice there, not finished, of another run, or whose samples overlap.
    """
    first = marks[0]
    for mark in marks[1:]:
        if mark.shard.of != first.shard.of:
            raise StoreError(f"{first.folder} is shard {first.shard}, {mark.folder} is {mark.shard}: give all of one")
        if (differs := change(first, mark)) or mark.total != first.total or mark.whole != first.whole:
            raise StoreError(
                f"{mark.folder} is a shard of another run than {first.folder}: {differs or _change(first, mark)}"
            )
    for one, other in itertools.pairwise(marks):
        if one.shard == other.shard:
            raise StoreError(f"shard {one.shard} is there twice: {one.folder} and {other.folder}; leave one out")
    present = {mark.shard.number for mark in marks}
    if missing := [str(number) for number in range(1, first.shard.of + 1) if number not in present]:
        plural = "s" if len(missing) > 1 else ""
        raise StoreError(
            f"shard{plural} {', '.join(missing[:8])} of {first.shard.of} missing; run the command with --shard "
            f"{missing[0]}/{first.shard.of}, or name its folder"
        )
    owner: dict[int, Mark] = {}
    for mark in marks:
        if twice := next((at for at in mark.places if at in owner), None):
            raise StoreError(f"{mark.folder} and {owner[twice].folder} overlap: both hold sample {twice + 1}")
        owner |= dict.fromkeys(mark.places, mark)
    if len(owner) != first.total:
        gap = next(at for at in range(first.total) if at not in owner)
        raise StoreError(f"sample {gap + 1} of {first.total} is in no shard; the shards were cut by different versions")
    if unfinished := [mark for mark in marks if mark.finished is None]:
        raise StoreError(
            f"shard {unfinished[0].shard} in {unfinished[0].folder} is not finished; run its command again, and it "
            "goes on"
        )
