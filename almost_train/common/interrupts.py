"""Training that is told to end saves first: SIGINT and SIGTERM act after the step, and long steps save by the clock."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from almost_eval.errors import RunError
from almost_train.common.processes import world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveRequests:
    """When to save besides every so many steps: `minutes` after the last time, or since a signal asked for the end.

    Args:
        minutes: between two checkpoints; 0 for never by the clock.
    """

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._saved = time.monotonic()
        self._signal: signal.Signals | None = None

    def now(self) -> tuple[bool, bool]:
        """(save, and end after it): the same in every process, so each of them must call it at the same step."""
        by_clock = bool(self._minutes) and time.monotonic() - self._saved >= 60 * self._minutes
        ends = self._signal is not None
        if world_size() > 1:
            by_clock, ends = _any_process(by_clock, ends)
        return by_clock or ends, ends

    def saved(self) -> None:
        """A checkpoint was written to its end."""
        self._saved = time.monotonic()

    def handle(self, number: int, _: FrameType | None) -> None:
        """The first signal is remembered; another one ends the process where it is."""
        if self._signal is not None:
            raise RunError("ended at once; the same command goes on from the last checkpoint, or from the start")
        self._signal = signal.Signals(number)
        sys.stderr.write(f"{self._signal.name}: saves after this step and ends; once more ends at once\n")
        sys.stderr.flush()


def ended_at(step: int) -> RunError:
    """The error that ends a training which was told to end."""
    return RunError(f"ended after step {step} by a signal; it is saved, and the same command goes on from there")


def ended_before_any_step() -> RunError:
    """The same where there is nothing to save yet."""
    return RunError("ended by a signal before the first step; there is nothing to save yet")


def what_is_kept(checkpoints: Sequence[Path]) -> str:
    """What is left of a training that broke, for its error.

    Args:
        checkpoints: whole ones, oldest first.
    """
    return f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was saved before it"


@contextmanager
def save_requests(minutes: float) -> Iterator[SaveRequests]:
    """Inside, SIGINT and SIGTERM ask for a checkpoint and the end; outside, they act as before.

    In another thread than the main one Python lets nobody handle signals, and only the clock counts.
    """
    requests = SaveRequests(minutes)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    # The command line ends a process two seconds after Ctrl-C, told by this file descriptor: a checkpoint takes longer.
    watcher = signal.set_wakeup_fd(-1)
    earlier = {number: signal.signal(number, requests.handle) for number in SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(watcher)


def _any_process(*flags: bool) -> tuple[bool, bool]:
    import torch
    from accelerate import PartialState

    state = PartialState()
    tensor = torch.tensor([float(flag) for flag in flags], device=state.device)  # (2,) 1 where this process says so
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    first, second = (bool(value) for value in tensor.tolist())
    return first, second
