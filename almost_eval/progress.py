"""Progress on stderr: a bar with rate and remaining time in a terminal; in a pipe, notices alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Progress:
    """Where a long step reports to. The base class is silent."""

    def note(self, message: str) -> None:
        """Say what begins."""

    def notice(self, message: str) -> None:
        """Say what a user must know at once, wherever it is read: a wait of minutes, a setting that was changed."""

    @contextmanager
    def track(self, description: str, total: int, done: int = 0) -> Iterator[Any]:
        """Yield a function that takes how many items were finished."""
        yield lambda count=1: None


class PipeProgress(Progress):
    """Notices as plain lines, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def notice(self, message: str) -> None:
        """One line."""
        print(message, file=self._stream, flush=True)


class TerminalProgress(Progress):
    """rich's progress bar."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, emoji=False)

    def note(self, message: str) -> None:
        """Say what begins."""
        self._console.print(message, style="dim", highlight=False, markup=False)

    def notice(self, message: str) -> None:
        """One line above the bar."""
        self._console.print(message, style="yellow", highlight=False, markup=False)

    @contextmanager
    def track(self, description: str, total: int, done: int = 0) -> Iterator[Any]:
        """A bar with count, rate and remaining time."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(description, total=total, completed=done, rate="")

            def advance(count: int = 1) -> None:
                bar.advance(task, count)
                speed = bar.tasks[0].speed
                bar.update(task, rate=f"{speed:.1f}/s" if speed else "")

            yield advance


def progress_for(stream: Any = None) -> Progress:
    """The terminal's progress where `stream` (stderr) is one, else notices alone."""
    stream = stream or sys.stderr
    return TerminalProgress() if stream.isatty() else PipeProgress(stream)
