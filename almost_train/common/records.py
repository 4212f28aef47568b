"""JSON Lines between the stages: read with the row in every error, written line by line and resumed after a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from almost_eval.errors import DataError, RunError

Row = dict[str, Any]


def read_rows(file: Path, required: Mapping[str, type] = {}) -> list[Row]:
    """All rows of a JSON Lines file.

    Args:
        file: the file; a half-written last line is an error here (`RowLog` is what repairs one).
        required: keys that every row must have, and the type of each.

    Raises:
        DataError: no such file, or a row that is not an object with those keys; with file and row.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{file} is not there; run the stage that writes it first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text ({error})") from None
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON text may hold U+2028
        if line.strip():
            rows.append(_row(file, number, line, required))
    return rows


def _row(file: Path, number: int, line: str, required: Mapping[str, type]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"malformed data: {file}, row {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"malformed data: {file}, row {number}: not a JSON object")
    for key, kind in required.items():
        if not isinstance(row.get(key), kind):
            has = type(row[key]).__name__ if key in row else "nothing"
            raise DataError(f"malformed data: {file}, row {number}: {key!r} must be {kind.__name__}, and is {has}")
    return row


class RowLog:
    """An append-only JSON Lines file. Use as a context manager; what an earlier process wrote is in `rows`.

    A line is handed to the kernel before `append` returns, so a killed process loses none. A last line that was cut
    short is removed on entry.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[Row] = []

    def __enter__(self) -> RowLog:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            with self.file.open("rb+") as stream:
                content = stream.read()
                if content and not content.endswith(b"\n"):
                    stream.truncate(content.rfind(b"\n") + 1)
            self.rows = read_rows(self.file)
        self._stream = self.file.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stream.close()

    def append(self, *rows: Row) -> None:
        """Add rows.

        Raises:
            RunError: the disk is full, or gone.
        """
        try:
            self._stream.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
            self._stream.flush()
        except OSError as error:
            raise RunError(
                f"cannot write to {self.file} ({error.strerror}); what was done is kept: the same command goes on"
            ) from None
        self.rows.extend(rows)


def write_rows(file: Path, rows: Iterable[Row], *, key: Callable[[Row], Any] | None = None) -> None:
    """Write a file whole or not at all, sorted by `key` where one is given."""
    ordered = sorted(rows, key=key) if key else rows
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    with scratch.open("w", encoding="utf-8") as stream:
        for row in ordered:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    scratch.replace(file)


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder's files by name (hidden files, logs and `README.md` left out): hex.

    Raises:
        DataError: there is no such file or folder.
    """
    if path.is_file():
        return _file_digest(path)
    if not path.is_dir():
        raise DataError(f"{path} is not there; run the stage that writes it first")
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
        name = file.relative_to(path).as_posix()
        if name != "README.md" and file.suffix != ".log":
            whole.update(f"{name}\0{_file_digest(file)}\n".encode())
    return whole.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
