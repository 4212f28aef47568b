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
from collections.abc import Iterable


class AlmostError(Exception):
    """Base of every error this toolkit raises on purpose."""

    exit_code = 1


class InputError(AlmostError):
    """The command cannot work with this input."""

    exit_code = 2


class ModelError(InputError):
    """The checkpoint is missing, unsafe to load, or of the wrong kind."""


class DataError(InputError):
    """A data set or prompt set is absent or malformed."""


class TemplateError(InputError):
    """A chat template cannot render this conversation, or breaks the BOS token."""


class StoreError(InputError):
    """The run folder is in use, or holds a different run."""


class MissingDependencyError(AlmostError):
    """An optional package is needed; the message holds its install line."""

    exit_code = 2


class RunError(AlmostError):
    """The run started and could not finish."""


def did_you_mean(name: str, known: Iterable[str], limit: int = 12) -> str:
    """The tail of an error about an unknown name: the nearest name, then what exists."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:limit])
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return f"{hint}known: {shown}{more}"
