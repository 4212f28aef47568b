"""Training that is stopped in mid-way, by an exception: nothing of it but its files is used afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from almost_eval.progress import Progress


class Stopped(Exception):
    """Stands for a kill."""


class StopAfter(Progress):
    """Raises `Stopped` as the so many-th step is reported."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @contextmanager
    def track(self, description: str, total: int, done: int = 0) -> Iterator[Any]:
        """A bar that counts down."""

        def advance(count: int = 1) -> None:
            self._left -= count
            if self._left <= 0:
                raise Stopped

        yield advance
