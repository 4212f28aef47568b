"""What can go wrong, and the exit code that says so.

AlmostError
 ├─ InputError              exit 2: bad usage or input; raised before any weight is loaded
 │   ├─ ModelError          the checkpoint is missing, unsafe, or of the wrong kind
 │   ├─ DataError           a data set or prompt set is absent or malformed
 │   ├─ TemplateError       a chat template cannot render, or loses or doubles the BOS token
 │   └─ StoreError          the run folder is locked, or belongs to another run
 ├─ MissingDependencyError  exit 2: an optional package is not installed (holds its install line)
 └─ RunError                exit 1: the run started and could not finish

Every message is one line: what is wrong, what exists, what to do next.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

# Bytes that a terminal obeys or hides: controls (not line ends and tabs), line separators, direction marks, halves of
# surrogate pairs, which no UTF-8 holds.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_ESCAPES = re.compile(r"(?P<one>\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\0)(?P=one){3,}")


class AlmostError(Exception):
    """Base of every error this toolkit raises on purpose. Its text is safe to print, whatever data it quotes."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(AlmostError):
    """The command cannot work with this input."""

    exit_code = 2


class ModelError(InputError):
    """The checkpoint is missing, unsafe to load, or of the wrong kind.

    Args:
        message: one line.
        consent: the option by which a user may take it all the same, such as `allow_pickle`. A command that has the
            flag names it; one that has not names none.
    """

    def __init__(self, message: str, consent: str = "") -> None:
        super().__init__(message)
        self.consent = consent


class DataError(InputError):
    """A data set or prompt set is absent or malformed."""


class TemplateError(InputError):
    """A chat template cannot render this conversation, or breaks the BOS token."""

    def about(self, what: str) -> TemplateError:
        """The same with what could not be written, and the way out."""
        return TemplateError(
            f"{what}: {self}; give --template FILE with a template that writes such turns, or --template almost for "
            "the plain dialogue format"
        )


class StoreError(InputError):
    """The run folder is in use, or holds a different run."""


class MissingDependencyError(AlmostError):
    """An optional package is needed; the message holds its install line."""

    exit_code = 2


class RunError(AlmostError):
    """The run started and could not finish."""


def printable(text: str) -> str:
    """A text that quotes data, with control bytes as escapes; one that repeats is written once and counted."""
    escaped = _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return _ESCAPES.sub(lambda match: f"{match['one']} ({len(match[0]) // len(match['one'])} times)", escaped)


def problem_of(error: Exception, limit: int = 160) -> str:
    """What an exception says of data, in short: the `repr` of a UnicodeDecodeError would hold all of the bytes."""
    is_plain = isinstance(error, UnicodeError | json.JSONDecodeError)
    text = printable(" ".join((str(error) if is_plain else repr(error)).split()))
    return text if len(text) <= limit else f"{text[:limit]}..."


def did_you_mean(name: str, known: Iterable[str], limit: int = 12) -> str:
    """The tail of an error about an unknown name: the nearest name, then what exists."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:limit])
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return f"{hint}known: {shown}{more}"
