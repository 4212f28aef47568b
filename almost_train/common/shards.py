"""Shards of a stage: a part of its rows in a folder of its own, and the whole stage of all of them.

A shard has the `stage.json` of the whole stage, `shard.json` (see `almost_eval.run.shards`), and the outputs with its
own rows. `MERGERS` of `cli/merge.py` says which stages have shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from almost_eval.errors import StoreError
from almost_eval.files import Row, read_json, read_rows, write_json, write_rows
from almost_eval.run.shards import Mark, Shard, check_marks
from almost_eval.types import JSONObject
from almost_train.common.stage import Stage

Rows = dict[str, list[Row]]
"""Name of an output -> its rows."""


def folder_of(output: Path, shard: Shard | None) -> Path:
    """Where a stage writes: its folder, or that of the shard inside it."""
    return shard.folder(output) if shard else output


def shard_result(mark: Mark, stage: str) -> JSONObject:
    """What the command of a shard shows in place of `result.json`."""
    return {
        "stage": f"{stage}, shard {mark.shard}",
        "metrics": {
            "prompts": len(mark.ids),
            "of": mark.total,
            "next": f"once all {mark.shard.of} are done: almost-train merge-shards {mark.folder.parent}",
        },
        "outputs": {},
    }


def read_stage(folder: Path) -> JSONObject:
    """`stage.json` of a shard.

    Raises:
        StoreError: absent or damaged.
    """
    absent = "give shards of a stage; those of an evaluation are joined by almost-eval merge"
    return read_json(folder / "stage.json", "stage", "settings", "inputs", absent=absent)


def check_stages(marks: Sequence[Mark]) -> None:
    """Refuse shards that are not the whole of one stage; see `check_marks`."""

    def change(one: Mark, other: Mark) -> str | None:
        was, now = read_stage(one.folder), read_stage(other.folder)
        differ = [
            f"{part} {key} was {str(was.get(part, {}).get(key))[:40]!r}, is {str(now.get(part, {}).get(key))[:40]!r}"
            for part in ("settings", "inputs", "pinned")
            for key in {**was.get(part, {}), **now.get(part, {})}
            if was.get(part, {}).get(key) != now.get(part, {}).get(key)
        ]
        return "; ".join(differ[:3]) or (None if was["stage"] == now["stage"] else f"{was['stage']}, {now['stage']}")

    check_marks(marks, change)


def joined_rows(marks: Sequence[Mark], names: Sequence[str], key: Callable[[Row, int], object]) -> Rows:
    """The rows of `<name>.jsonl` of all shards.

    Args:
        marks: all shards of one stage.
        names: of the outputs.
        key: row, place of its prompt in the whole stage -> what the rows of the whole are sorted by.

    Raises:
        StoreError: a row that is none of the shard's.
    """
    rows: Rows = {}
    for name in names:
        keyed = []
        for mark in marks:
            place = dict(zip(mark.ids, mark.places, strict=True))
            for row in read_rows(mark.folder / f"{name}.jsonl"):
                if row["id"] not in place:
                    raise StoreError(f"{mark.folder / name}.jsonl has a row of {row['id']!r}, which is another shard's")
                keyed.append((key(row, place[row["id"]]), row))
        keyed.sort(key=lambda pair: pair[0])  # type: ignore[arg-type, return-value]
        rows[name] = [row for _, row in keyed]
    return rows


@contextmanager
def whole_stage(marks: Sequence[Mark], output: Path, rows: Mapping[str, Sequence[Row]]) -> Iterator[Stage]:
    """The stage of all shards, open, with these rows as its outputs; the block is to `finish` it.

    Raises:
        StoreError: `output` holds something else.
    """
    stored = read_stage(marks[0].folder)
    with Stage.of_spec(output, stored) as stage:
        write_json(output / "stage.json", stored)
        for name, own in rows.items():
            write_rows(output / f"{name}.jsonl", own)
        yield stage
