"""Files that survive a kill: JSON lines, whole-file writes and folder locks. The one place for all three packages.

Three rules. A line that was appended is handed to the kernel before the call returns, and a last line that a kill cut
short is removed when the file is opened again. A file that is written at once goes through a scratch file beside it,
so a reader sees the old content or the new, never half. A folder of work is held by one process at a time.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from almost_eval.errors import DataError, InputError, RunError, StoreError, problem_of
from almost_eval.types import JSONObject

Row = JSONObject
"""One JSON object, a line of a file."""

Record = TypeVar("Record")

_TAIL = 1 << 16
"""Bytes read at once where the end of a file is looked for."""
_HALVES = "backslashreplace"
"""How half a surrogate pair is written, as in the name of a folder that is no UTF-8: by its escape, which is JSON."""


# --- JSON lines ---


def json_line(value: Any, *, ascii_only: bool = False) -> str:
    """A JSON value as one line, with its line end. Text stays as it is, unless `ascii_only`.

    Raises:
        ValueError: NaN or infinity, which JSON has not.
    """
    return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False) + "\n"


def iterate_lines(file: Path, *, torn_end: bool = False, absent: str = "") -> Iterator[tuple[int, Any]]:
    """Line number and JSON value of each line, read as a stream; blank lines are passed over.

    Args:
        file: UTF-8 text, with or without a byte order mark.
        torn_end: leave out a last line without its end, which a kill may have cut short; else it is read too.
        absent: the end of the error of a file that is not there: what to do.

    Raises:
        DataError: the file is absent or no UTF-8, or a line is no JSON; with file and row.
    """
    for number, _, value in _placed_lines(file, torn_end, absent):
        yield number, value


def _placed_lines(file: Path, torn_end: bool, absent: str) -> Iterator[tuple[int, int, Any]]:
    """`iterate_lines`, with the byte at which each line begins between its number and its value."""
    place, first = 0, True
    try:
        with file.open("rb") as stream:  # bytes: half a line may end inside a character
            for number, line in enumerate(stream, 1):
                if torn_end and not line.endswith(b"\n"):
                    return
                text = _decoded(file, number, line)
                if text.strip():
                    if first:
                        _refuse_spread(file, number, text.strip())
                    first = False
                    yield number, place, parse_line(file, number, text)
                place += len(line)
    except FileNotFoundError:
        problem = f"is a link to {file.readlink()}, which is not there" if file.is_symlink() else "is not there"
        raise DataError(f"{file} {problem}" + (f"; {absent}" if absent else "")) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None


def _decoded(file: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        cure = not_text(line) if number == 1 else "save the file as UTF-8"
        raise DataError(
            f"{file}, row {number} is not UTF-8 ({error.reason} at byte {error.start} of it); {cure}"
        ) from None


def not_text(beginning: bytes) -> str:
    """What to do about a file that is no UTF-8, by its first bytes."""
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is UTF-16: save it as UTF-8"
    for name, mark in {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "zip": b"PK\x03\x04"}.items():
        if beginning.startswith(mark):
            return f"it is packed ({name}): unpack it"
    return "save the file as UTF-8"


def _refuse_spread(file: Path, number: int, text: str) -> None:
    """A first line that shows JSON whose values do not stand on a line each."""
    whole = "a JSON array" if text.startswith("[") else "a JSON object that goes on below" if text == "{" else ""
    if whole:
        raise DataError(
            f"malformed data: {file}, row {number}: not a JSON object on one line, but the beginning of {whole}; write "
            "one object a line"
        )


def parse_line(file: Path | str, number: int, text: str, *, unit: str = "row") -> Any:
    """The JSON value of one line.

    Raises:
        DataError: it is no JSON; with file and row (or what `unit` calls it).
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"malformed data: {file}, {unit} {number}: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"malformed data: {file}, {unit} {number}: not JSON ({error})") from None


def parse_lines(file: Path | str, text: str, *, unit: str = "row") -> Iterator[tuple[int, Any]]:
    """`iterate_lines` of a text that is in memory already; `file` and `unit` are for errors.

    Raises:
        DataError: see `parse_line`.
    """
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may hold U+2028
        if line.strip():
            yield number, parse_line(file, number, line, unit=unit)


def read_rows(
    file: Path,
    required: Mapping[str, type] = {},
    *,
    torn_end: bool = False,
    absent: str = "run the stage that writes it first",
) -> list[Row]:
    """All rows of a JSON Lines file.

    Args:
        file: as in `iterate_lines`.
        required: keys that every row must have, and the type of each.
        torn_end: as in `iterate_lines`.
        absent: as in `iterate_lines`.

    Raises:
        DataError: no such file, or a row that is not an object with those keys; with file and row.
    """
    return [row for _, row in iterate_rows(file, required, torn_end=torn_end, absent=absent)]


def iterate_rows(
    file: Path,
    required: Mapping[str, type] = {},
    *,
    torn_end: bool = False,
    absent: str = "run the stage that writes it first",
) -> Iterator[tuple[int, Row]]:
    """`read_rows` as a stream: the byte at which each row begins (see `row_at`), and the row."""
    for number, place, row in _placed_lines(file, torn_end, absent):
        if not isinstance(row, dict):
            raise DataError(f"malformed data: {file}, row {number}: not a JSON object")
        for key, kind in required.items():
            if not isinstance(row.get(key), kind):
                has = type(row[key]).__name__ if key in row else "nothing"
                raise DataError(f"malformed data: {file}, row {number}: {key!r} must be {kind.__name__}, and is {has}")
        yield place, row


def row_at(stream: IO[bytes], place: int) -> Row:
    """The row that `iterate_rows` named this place of, in the same file, open.

    Raises:
        DataError: the file was changed since.
    """
    stream.seek(place)
    try:
        return dict(json.loads(stream.readline().decode("utf-8" if place else "utf-8-sig")))
    except (ValueError, TypeError):
        raise DataError(f"{stream.name} was changed while it was read; run the command again") from None


def read_records(
    file: Path, parse: Callable[[Any], Record], a: str, *, mend: str = "remove the line"
) -> Iterator[tuple[int, Record]]:
    """Line number and record of each line that this toolkit wrote itself, as a stream; a torn last line is left out.

    Args:
        file: JSON lines; none where it is absent.
        parse: makes a record of a JSON value; it may raise ValueError, LookupError, TypeError or AttributeError.
        a: what a line is, for the error: `a sample`.
        mend: what to do about a line that is none.

    Raises:
        StoreError: a line that is no record; with file and line.
    """
    for number, _, record in placed_records(file, parse, a, mend=mend):
        yield number, record


def placed_records(
    file: Path, parse: Callable[[Any], Record], a: str, *, mend: str = "remove the line"
) -> Iterator[tuple[int, int, Record]]:
    """`read_records`, with the byte at which each line begins (see `row_at`) between its number and its record."""
    if not file.exists():
        return
    place = 0
    try:
        stream = file.open("rb")  # bytes: half a line may end inside a character
    except OSError as error:
        raise StoreError(f"{file} cannot be read ({error.strerror})") from None
    with stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = parse(json.loads(line.decode()))  # not of bytes: json takes NULs for UTF-32
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise StoreError(f"{file}, line {number} is not {a} ({_damage(line, error)}); {mend}") from None
            yield number, place, record
            place += len(line)


def _damage(content: bytes, error: Exception) -> str:
    """Why a file or line is none of this toolkit's, in words."""
    if not content.strip():
        return "it is empty"
    if nul := content.count(0):
        return f"{nul} NUL bytes: the disk kept its length and lost what was in it"
    return problem_of(error)


def repair_end(file: Path) -> None:
    """Cut off a last line without its end: the process was killed while it wrote it."""
    if not file.exists():
        return
    with file.open("rb+") as stream:
        end = place = stream.seek(0, os.SEEK_END)
        while place:  # backwards: the file may be long, and its last line is not
            before = max(0, place - _TAIL)
            stream.seek(before)
            line_end = stream.read(place - before).rfind(b"\n")
            if line_end >= 0:
                place = before + line_end + 1
                break
            place = before
        if place < end:
            stream.truncate(place)


class LineWriter:
    """An append-only JSON Lines file, open. Use as a context manager; a torn last line is removed on entry.

    A line is handed to the kernel before `append` returns, so a killed process loses none.

    Args:
        file: made if absent, its folder too.
        ascii_only: see `json_line`.
        advice: the end of the error of a disk that is full: what is kept, and what to do.
    """

    def __init__(
        self, file: Path, *, ascii_only: bool = False, advice: str = "what was done is kept: the same command goes on"
    ) -> None:
        self.file = file
        self._ascii_only = ascii_only
        self._advice = advice

    def __enter__(self) -> LineWriter:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        repair_end(self.file)
        self._stream = self._open()
        return self

    def _open(self) -> IO[str]:
        return self.file.open("a", encoding="utf-8", errors=_HALVES)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with suppress(OSError):  # a full disk has been reported by then
            self._stream.close()

    def append(self, *values: Any) -> None:
        """Add a line for each value.

        Raises:
            RunError: the disk is full, or gone.
        """
        lines = "".join(json_line(value, ascii_only=self._ascii_only) for value in values)
        with self._writing():
            self._stream.write(lines)
            self._stream.flush()

    def rewrite(self, values: Iterable[Any]) -> None:
        """Put these lines in the place of all, whole or not at all.

        Raises:
            RunError: the disk is full, or gone.
        """
        with self._writing():
            with whole_file(self.file) as scratch:
                lines = (json_line(value, ascii_only=self._ascii_only) for value in values)
                scratch.writelines(line.encode(errors=_HALVES) for line in lines)
            self._stream.close()
            self._stream = self._open()

    def sync(self) -> None:
        """Return when all lines are on the disk itself.

        Raises:
            RunError: the disk is full, or gone.
        """
        with self._writing():
            os.fsync(self._stream.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.failure(error) from None

    def failure(self, error: OSError) -> RunError:
        """What to raise where the file's folder cannot be written."""
        return RunError(f"cannot write to {self.file.parent} ({error.strerror}); {self._advice}")


# --- whole files and folders ---


@contextmanager
def whole_file(file: Path) -> Iterator[IO[bytes]]:
    """A scratch file that becomes `file` when the block ends well, and is removed otherwise.

    Raises:
        OSError: the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as stream:
            yield stream
        scratch.replace(file)
    except BaseException as error:
        with suppress(OSError):
            scratch.unlink()
        if (
            isinstance(error, OSError) and error.filename is None
        ):  # a disk that is full says so of a write, not of a file
            error.filename = str(file)
        raise


def write_whole(file: Path, content: bytes) -> None:
    """Write a file at once, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    with whole_file(file) as stream:
        stream.write(content)


def write_rows(
    file: Path, rows: Iterable[Any], *, key: Callable[[Any], Any] | None = None, ascii_only: bool = False
) -> None:
    """Write JSON lines whole or not at all, sorted by `key` where one is passed.

    Raises:
        RunError: the disk is full, or gone.
    """
    try:
        with whole_file(file) as stream:
            ordered = sorted(rows, key=key) if key else rows
            stream.writelines(json_line(row, ascii_only=ascii_only).encode(errors=_HALVES) for row in ordered)
    except OSError as error:
        raise RunError(f"cannot write to {file} ({error.strerror}); the same command goes on") from None


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    content = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(file, content.encode(errors=_HALVES))


def read_json(
    file: Path,
    *keys: str,
    absent: str = "give the folder of a run (spec.json, samples.jsonl)",
    mend: str = "choose another --output, or put back a whole copy of the file",
) -> Row:
    """A JSON object, with `keys` in it.

    Args:
        file: the file.
        keys: those it must have.
        absent: the end of the error of a file that is not there: what to do.
        mend: the end of the error of a damaged file: what to do.

    Raises:
        StoreError: absent, or not such an object.
    """
    content = b""
    try:
        content = file.read_bytes()
        value = json.loads(content.decode())
    except FileNotFoundError:
        raise StoreError(f"{file} is not there; {absent}") from None
    except OSError as error:
        raise StoreError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} cannot be read as JSON ({_damage(content, error)}); {mend}") from None
    lacking = [key for key in keys if key not in value] if isinstance(value, dict) else ["a JSON object"]
    if lacking:
        raise StoreError(f"{file} is not a run's: it lacks {', '.join(lacking)}; {mend}")
    return dict(value)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends well; `path` is never seen half-written.

    Raises:
        InputError: `path` is there, and is no empty folder.
    """
    taken = InputError(f"{path} exists and is not an empty folder: give a new one, or remove it")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise taken
    path.parent.mkdir(parents=True, exist_ok=True)
    # The scratch folder is private (0700); the one inside it has the user's ordinary permissions, and is what moves.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        folder = Path(scratch) / "whole"
        folder.mkdir()
        yield folder
        try:
            folder.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise taken from None


@contextmanager
def locked_folder(folder: Path, of: str, *, patience: float = 0) -> Iterator[None]:
    """Hold a folder of work, made if absent, until the block ends.

    Args:
        folder: the folder; its lock is the file `.lock` inside.
        of: whose folder it is, for the error: `run`, `stage`.
        patience: seconds to wait for a process that holds it.

    Raises:
        StoreError: another process holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=patience)
        lock.acquire()
    except Timeout:
        raise StoreError(f"{folder} is in use by another process; wait for it, or choose another --output") from None
    except FileExistsError:
        kind = f"a link to {folder.readlink()}, which is not there" if folder.is_symlink() else "a file"
        raise StoreError(f"{folder} is {kind}; --output names the folder of a {of}") from None
    except OSError as error:
        raise StoreError(f"cannot write to {folder} ({error.strerror}); choose another --output") from None
    try:
        yield
    finally:
        lock.release()


# --- digests ---


def digest_path(path: Path) -> str:
    """sha256 of a file, or of a folder's files by name (hidden files, logs and `README.md` left out): hex.

    Raises:
        DataError: there is no such file or folder.
    """
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.is_dir():
        raise DataError(f"{path} is not there; run the stage that writes it first")
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
        name = file.relative_to(path).as_posix()
        if name != "README.md" and file.suffix != ".log":
            whole.update(f"{name}\0{digest_path(file)}\n".encode())
    return whole.hexdigest()
