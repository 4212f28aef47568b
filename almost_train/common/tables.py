"""Files and data sets as rows, whatever form they have: JSON Lines, JSON, CSV, Parquet, or a data set of the hub."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from almost_eval.data.sources import find_data, fingerprint, read_table
from almost_eval.errors import DataError, problem_of
from almost_eval.files import Row, not_text, read_rows

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Of the files that can be read. A file without one of them is read as JSON Lines."""
_ON_HUB = re.compile(r"(?P<dataset>[\w.-]+/[\w.-]+?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""How a text begins that holds messages: JSON, or what Python prints of them."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows and where they are from."""

    name: str
    """The file, or the data set with configuration and split."""
    rows: list[Row]
    """None-valued columns left out: Parquet writes them where a row has no such column."""
    input: Path | str
    """As an input of a stage: a file counts by its content, a data set by its name and the digest of its rows."""

    def where(self, number: int) -> str:
        """What to call a row in an error; rows count from 1."""
        return f"{self.name}, row {number}"


def read_any(source: Path | str) -> Table:
    """All rows of a file (by its suffix), or of a data set `org/name`, `org/name:config`, `org/name@split`.

    The split is `train` unless named. Data sets are looked for under `ALMOST_DATA_ROOT`, then on the hub.

    Raises:
        DataError: no such file or data set, or a row that cannot be read; with file and row.
    """
    file = Path(source)
    suffix = file.suffix.lower()
    on_hub = _ON_HUB.fullmatch(str(source))
    if not file.exists() and on_hub and suffix not in SUFFIXES:
        name, config, split = on_hub["dataset"], on_hub["config"], on_hub["split"] or "train"
        try:
            rows = _plain(str(source), find_data(None, None).read(name, config or "", split))
        except DataError as error:
            reason = str(error).partition(";")[0]
            raise DataError(f"{source} is no file, and as a data set: {reason}; see ALMOST_DATA_ROOT") from None
        return Table(str(source), rows, f"{name}:{config or ''}@{split} {fingerprint(rows)}")
    if file.is_dir():
        raise DataError(f"{file} is a folder; name the file in it ({', '.join(SUFFIXES)})")
    if file.exists() and suffix not in (*SUFFIXES, ""):
        raise DataError(f"{file} is no table; give {', '.join(SUFFIXES)}, or a data set of the hub (org/name)")
    reader = {".csv": _csv, ".parquet": read_table}.get(suffix, _json)
    return Table(str(file), _plain(str(file), reader(file), has_lists=suffix not in (".csv", ".parquet")), file)


def _json(file: Path) -> list[Row]:
    """A JSON array of objects, or one object a line: programs write either under both names, .json and .jsonl."""
    if not _is_array(file):
        rows = read_rows(file)
        with file.open(encoding="utf-8-sig", newline="\n") as lines:  # a JSON string may hold U+2028
            for number, line in enumerate((line for line in lines if line.strip()), 1):
                _refuse_repeated_key(file, number, line)
        return rows
    text = _text(file)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({problem_of(error)})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"malformed data: {file}, row {number}: not a JSON object")
    for number, item in enumerate(_items(text), 1):
        _refuse_repeated_key(file, number, item)
    return list(rows)


def _items(array: str) -> Iterator[str]:
    """The texts of the objects of a JSON array that is known to be one."""
    decoder, end = json.JSONDecoder(), 0
    while (begin := array.find("{", end)) >= 0:  # between two objects stand a comma and white space
        _, end = decoder.raw_decode(array, begin)
        yield array[begin:end]


class _RepeatedKey(Exception):
    """A key that an object of JSON has twice: Python's reader would take the last value."""


def _refuse_repeated_key(file: Path, number: int, text: str) -> None:
    try:
        json.loads(text, object_pairs_hook=_nothing)
    except _RepeatedKey as error:
        raise DataError(
            f"malformed data: {file}, row {number}: {error.args[0]!r:.60} is there twice in one object; keep one"
        ) from None


def _nothing(pairs: list[tuple[str, object]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise _RepeatedKey(next(name for name in names if names.count(name) > 1))


def _is_array(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except OSError:  # `read_rows` says what it is
        return False


def _csv(file: Path) -> list[Row]:
    # newline="": a quoted cell may hold line breaks, which stay as they are. Not splitlines: it splits at U+2028.
    csv.field_size_limit(sys.maxsize)  # its own, of 131,072 characters, is no limit of ours: long texts are counted
    lines = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        header = next(lines, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise DataError(f"malformed data: {file}: the header has {twice[0]!r} twice; keep one column")
        if header and header[0].startswith("{"):
            raise DataError(f"malformed data: {file} holds JSON and not CSV; name it .jsonl")
        if len(header) == 1 and (other := next((mark for mark in "\t;|" if mark in header[0]), None)):
            raise DataError(f"malformed data: {file}: the cells are separated by {other!r}; separate them by commas")
        rows = list(_cells(file, header, lines))
    except csv.Error as error:
        raise DataError(f"malformed data: {file}, line {lines.line_num}: not CSV ({error})") from None
    return rows


def _cells(file: Path, header: list[str], lines: Iterator[list[str]]) -> Iterator[Row]:
    for number, cells in enumerate((cells for cells in lines if cells), 1):
        if len(cells) != len(header):
            raise DataError(
                f"malformed data: {file}, row {number} has {len(cells)} cells and the header {len(header)}; quote "
                "cells that hold a comma"
            )
        yield dict(zip(header, cells, strict=True))


def _text(file: Path) -> str:
    if not file.exists():
        raise DataError(f"{file} is not there; run the stage that writes it first")
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        cure = not_text(content)
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); {cure}") from None


def _plain(name: str, rows: list[Row], *, has_lists: bool = False) -> list[Row]:
    """Without nulls; and messages as such where they stand as JSON in a text, as in tables that may hold no list."""
    plain = [{key: value for key, value in row.items() if value is not None} for row in rows]
    if has_lists:
        return plain
    return [
        {key: _messages(value, f"{name}, row {number}") for key, value in row.items()}
        for number, row in enumerate(plain, 1)
    ]


def _messages(value: object, where: str) -> object:
    if not isinstance(value, str) or not _MESSAGES.match(value):
        return value
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(
            f"malformed data: {where}: {value!r:.60} looks like messages and is not JSON; write them as json.dumps does"
        ) from None
    return items
