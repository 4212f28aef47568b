"""Server-sent events: read from a stream, and the text that they carry put together."""

from __future__ import annotations

import re
from codecs import BOM_UTF8

MAX_EVENT_BYTES = 4 << 20
"""Of one event. The largest real ones hold a prompt's token ids or the log-probabilities of a whole answer."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
_HIGH_HALF = re.compile("[\ud800-\udbff]$")


class EventTooLong(Exception):
    """An event is longer than `MAX_EVENT_BYTES`."""


class EventReader:
    """Takes the bytes of a stream as they come, and returns the data of each event once it is whole.

    A line ends at CR, LF or both and nowhere else, as the standard has it (WHATWG HTML, 9.2.6). `str.splitlines`, and
    with it httpx's `aiter_lines`, also ends one at U+0085, U+2028 and U+2029, which may stand in an answer as they are.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        """A line that has not ended."""
        self._data: list[bytes] = []
        """The data lines of an event that has not ended."""
        self._size = 0
        self._after_cr = False
        self._is_first = True

    def feed(self, part: bytes) -> list[bytes]:
        """The events that end in `part`.

        Raises:
            EventTooLong: an event does not end in time.
        """
        if self._after_cr and part.startswith(b"\n"):  # the second half of a CR LF
            part = part[1:]
            self._after_cr = False
        if not part:
            return []
        self._after_cr = part.endswith(b"\r")
        *lines, rest = _LINE_END.split(part)
        events = []
        for line in lines:
            self._line += line
            if (event := self._end_line()) is not None:
                events.append(event)
        self._line += rest
        if self._size + len(self._line) > MAX_EVENT_BYTES:
            raise EventTooLong(f"an event of more than {MAX_EVENT_BYTES >> 20} MiB")
        return events

    def finish(self) -> list[bytes]:
        """What is left at the end of the stream: an event whose closing blank line was not sent."""
        last = self._end_line() if self._line else None
        left = b"\n".join(self._data)
        return [event for event in (last, left) if event]

    def _end_line(self) -> bytes | None:
        line = bytes(self._line)
        self._line.clear()
        if self._is_first:
            line, self._is_first = line.removeprefix(BOM_UTF8), False
        if not line:
            event, self._size = b"\n".join(self._data), 0
            self._data.clear()
            return event or None
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._size += len(line)
        return None


class TextJoiner:
    r"""Puts pieces of a text together where a character was split: `\ud83d` in one event and `\ude00` in the next.

    JSON writes what lies beyond U+FFFF as two halves (a surrogate pair). Alone, a half can neither be stored nor shown.
    """

    def __init__(self) -> None:
        self._half = ""

    def add(self, piece: str) -> str:
        """What can be told now; a half at the end waits for the next piece."""
        text = self._half + piece
        self._half = text[-1:] if _HIGH_HALF.search(text) else ""
        return joined(text[: len(text) - len(self._half)])

    def rest(self) -> str:
        """What still waits, at the end."""
        half, self._half = self._half, ""
        return joined(half)


def joined(text: str) -> str:
    """The text with surrogate pairs as the characters that they stand for, and single halves as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
