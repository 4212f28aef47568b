"""Progress on stderr: a bar in a terminal; elsewhere notices, and a line of progress every 30 seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from almost_eval.errors import InputError

LINE_SECONDS = 30.0
"""Between two lines where there is no terminal: a job's log shows within a minute whether it still moves."""
SECONDS_VARIABLE = "ALMOST_PROGRESS_SECONDS"
"""The environment variable that sets another interval; 0 for no lines."""


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
    """Notices as plain lines, and what is tracked as a line every `seconds`: done, rate, time left.

    A thread writes the lines, so a step that takes minutes does not silence them.

    Args:
        stream: where to.
        seconds: between two lines; 0 for none.
    """

    def __init__(self, stream: TextIO, seconds: float = LINE_SECONDS) -> None:
        self._stream = stream
        self._seconds = seconds

    def notice(self, message: str) -> None:
        """One line."""
        print(message, file=self._stream, flush=True)

    @contextmanager
    def track(self, description: str, total: int, done: int = 0) -> Iterator[Any]:
        """Lines while it lasts, and one at its end if there were any."""
        if not self._seconds:
            yield lambda count=1: None
            return
        began, finished, over, lines = time.monotonic(), done, threading.Event(), 0

        def line() -> None:
            nonlocal lines
            lines += 1
            self.notice(f"{description}: {progress_line(finished, total, finished - done, time.monotonic() - began)}")

        def advance(count: int = 1) -> None:
            nonlocal finished
            finished += count

        writer = threading.Thread(target=_every, args=(self._seconds, over, line), daemon=True)
        writer.start()
        try:
            yield advance
        finally:
            over.set()
            writer.join()
            if lines:
                line()


def _every(seconds: float, over: threading.Event, line: Callable[[], None]) -> None:
    while not over.wait(seconds):
        line()


def progress_line(finished: int, total: int, here: int, seconds: float) -> str:
    """What a line says of an amount of work.

    Args:
        finished: items that are finished.
        total: items in all.
        here: items that were finished in this process.
        seconds: that this process has worked on them.

    >>> progress_line(30, 100, 20, 40)
    '30 of 100, 0.50/s, 0:02:20 left'
    >>> progress_line(10, 100, 0, 40)
    '10 of 100, nothing finished in 0:00:40'
    """
    if not here:
        return f"{finished} of {total}, nothing finished in {_clock(seconds)}"
    rate = here / seconds if seconds else 0.0
    shown = f"{rate:.1f}/s" if rate >= 10 else f"{rate:.2g}/s" if rate < 0.1 else f"{rate:.2f}/s"
    left = _clock((total - finished) / rate) if rate else "?"
    return f"{finished} of {total}, {shown}, {left} left"


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


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
    """The terminal's progress where `stream` (stderr) is one, else lines; see `SECONDS_VARIABLE`.

    Raises:
        InputError: that variable is no number of seconds.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        return TerminalProgress()
    return PipeProgress(stream, _seconds())


def _seconds() -> float:
    text = os.environ.get(SECONDS_VARIABLE, "")
    try:
        seconds = float(text or LINE_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InputError(f"{SECONDS_VARIABLE} is {text!r}; it must be a number of seconds, 0 for no lines")
    return seconds
