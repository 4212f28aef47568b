"""Workers that share a task: units are given out one at a time, and what a lost worker had goes to the others.

Nothing is lost but time: an answer is passed on as soon as it arrives, and of the unit of a lost worker only what is
missing is given out again. Restarts are bounded, and so are the workers that one unit may cost.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from almost_eval.errors import InputError, RunError
from almost_eval.types import JSONObject
from almost_eval.workers.work import Answer, Finished, Item, Lost, Message, Ready, Refused, Transport, Unit

MOST_LOSSES = 3
"""Workers that may end over one unit: samples that end every worker must not end them all."""
NOTICE_S = 300.0
"""Seconds of silence after which something is said of it."""
_LOOK_S = 5.0
"""Seconds between two looks at the clock."""


class Pool:
    """Workers behind a transport; they start when there is something to do, and end with the pool.

    Args:
        transport: what starts them.
        identity: what `Ready.identity` must be where a worker states one.
        silence_s: where no worker says anything for so long, those at work are ended; None waits for ever.
    """

    def __init__(
        self, transport: Transport, identity: dict[str, str | None] | None = None, *, silence_s: float | None = None
    ) -> None:
        self._transport = transport
        self._identity = identity or {}
        self._silence_s = silence_s
        self._silent_s = 0.0
        """How long nobody has said anything. What the caller does between two answers does not count."""
        self._restarts_left = transport.size
        self._tasks = 0
        self._is_running = False
        self._idle: set[int] = set()
        self._starting: set[int] = set()
        self._busy: dict[int, Unit] = {}
        self._vacant: set[int] = set()
        """Places whose worker was lost, and that may have another."""
        self._unused = set(range(transport.size))
        self.lost: list[str] = []
        """Reason of each worker that ended before its time."""
        self.restarted = 0
        self.reports: list[Any] = []
        """What the workers report of the units of the last task, in the order of the units."""
        self._ending = weakref.finalize(self, transport.close)

    @property
    def size(self) -> int:
        """Workers at most."""
        return self._transport.size

    def describe(self) -> JSONObject:
        """What a result records of it, beside its times."""
        return {
            **self._transport.describe(),
            "workers": self.size,
            "lost": list(self.lost),
            "restarted": self.restarted,
        }

    @property
    def warnings(self) -> list[str]:
        """What a reader of a result must know."""
        if not self.lost:
            return []
        workers = "worker" if len(self.lost) == 1 else "workers"
        return [
            f"{len(self.lost)} {workers} of {self.size} ended early, and the others took over ({'; '.join(self.lost)})"
        ]

    def run(self, task: Any, parts: Sequence[tuple[int, ...]]) -> Generator[tuple[int, Answer], None, None]:
        """Yield (item, answer) of all items of all parts as they arrive; parts are given out in their order.

        Raises:
            RunError: all workers have ended, or three over the same items.
            AlmostError: whatever a worker met that all would meet.
        """
        if self._is_running:
            raise RunError("these workers are in the middle of another stream; finish or close that one first")
        self._tasks += 1
        self._is_running = True
        waiting = deque(Unit(self._tasks, number, items) for number, items in enumerate(parts))
        left: dict[int, set[int]] = {}  # place -> items of its unit that are not answered
        reports: dict[int, Any] = {}
        is_done = False
        try:
            while waiting or self._busy:
                self._give(task, waiting, left)
                for place, message in self._heard():
                    if isinstance(message, Item):
                        left[place].remove(message.index)
                        yield message.index, message.answer
                    elif isinstance(message, Finished):
                        unit = self._busy.pop(place)
                        if left.pop(place):
                            raise RunError(f"worker {place + 1} left out items of its unit; this is a bug, report it")
                        reports.setdefault(unit.number, message.report)
                        self._idle.add(place)
                    else:
                        self._meet(place, message, waiting, left)
                if self._silence_s is not None and self._silent_s >= self._silence_s:
                    self._end_silent(waiting, left)
            is_done = True
        finally:
            self._is_running = False
            self.reports = [reports[number] for number in sorted(reports)]
            if not is_done:  # an error, or the caller left early: nobody wants what the workers are at
                self.close()

    def run_everywhere(self, task: Any, part: tuple[int, ...]) -> None:
        """Start all workers, and have each answer the same part of a task, unread; raises as `run` does."""
        for place in sorted(self._unused):
            self._starting.add(place)
            self._transport.start(place)
        self._unused.clear()
        try:
            while self._starting:
                for place, message in self._heard():
                    self._meet(place, message, deque(), {})
        except BaseException:
            self.close()
            raise
        for _ in self.run(task, [part] * len(self._idle)):  # all are idle, so each gets one
            pass

    def close(self) -> None:
        """End the workers; the next `run` starts others."""
        self._transport.close()
        self._unused |= self._idle | self._starting | self._busy.keys()
        self._idle.clear()
        self._starting.clear()
        self._busy.clear()

    def _give(self, task: Any, waiting: deque[Unit], left: dict[int, set[int]]) -> None:
        """Give units to those who have none, and start workers while there are more units than come to have one.

        Raises:
            RunError: nobody is left to take a unit.
        """
        while waiting and self._idle:
            place, unit = self._idle.pop(), waiting.popleft()
            self._busy[place], left[place] = unit, set(unit.items)
            self._transport.give(place, task, unit)
        while len(waiting) > len(self._starting) and (self._unused or self._vacant):
            if self._unused:
                place = min(self._unused)
                self._unused.discard(place)
            else:
                place = self._vacant.pop()
                self.restarted += 1
            self._starting.add(place)
            self._transport.start(place)
        if waiting and not (self._busy or self._starting):
            who = "the only worker has" if self.size == 1 else f"all {self.size} workers have"
            raise RunError(
                f"{who} ended ({self.lost[-1]}); what was done is kept, and the same command goes on from there"
            )

    def _meet(self, place: int, message: Message, waiting: deque[Unit], left: dict[int, set[int]]) -> None:
        """A worker is there, or will not be."""
        if isinstance(message, Ready):
            self._refuse_other(place, message)
            self._starting.discard(place)
            self._idle.add(place)
        elif isinstance(message, Refused):
            raise message.error
        elif isinstance(message, Lost):
            self._lose(place, message.reason, waiting, left)

    def _heard(self) -> Iterator[tuple[int, Message]]:
        """What the workers say now; where they say nothing for a while, the clock of their silence goes on."""
        began = time.monotonic()
        was_silent = True
        for place, message in self._transport.receive(min(_LOOK_S, self._silence_s or _LOOK_S)):
            self._silent_s, was_silent = 0.0, False
            yield place, message
        if not was_silent:
            return
        before = self._silent_s
        self._silent_s += time.monotonic() - began
        if before < NOTICE_S <= self._silent_s:
            places = ", ".join(str(place + 1) for place in sorted(self._busy.keys() | self._starting))
            sys.stderr.write(
                f"no worker has said anything for {NOTICE_S:.0f} s (at work or starting: {places}); one that hangs is "
                "ended, and its samples given on, where --worker-timeout says after how long\n"
            )
            sys.stderr.flush()

    def _end_silent(self, waiting: deque[Unit], left: dict[int, set[int]]) -> None:
        """End the workers that are at work or starting."""
        silence, self._silent_s = self._silent_s, 0.0
        for place in sorted(self._busy.keys() | self._starting):
            self._transport.end(place)
            self._lose(place, f"said nothing for {silence:.0f} s", waiting, left)

    def _refuse_other(self, place: int, message: Ready) -> None:
        for name, theirs in (message.identity or {}).items():
            if (own := self._identity.get(name)) != theirs:
                raise InputError(
                    f"worker {place + 1} has another {name} ({str(theirs)[:16]}) than this process ({str(own)[:16]}); "
                    "install the same packages and the same checkpoint on every node"
                )

    def _lose(self, place: int, reason: str, waiting: deque[Unit], left: dict[int, set[int]]) -> None:
        self.lost.append(f"worker {place + 1}: {reason}")
        sys.stderr.write(f"{self.lost[-1]}; its samples go to the others\n")
        sys.stderr.flush()
        self._idle.discard(place)
        self._starting.discard(place)
        if self._restarts_left:
            self._restarts_left -= 1
            self._vacant.add(place)
        if (unit := self._busy.pop(place, None)) is None:
            return
        missing = left.pop(place)
        rest = Unit(unit.task, unit.number, tuple(i for i in unit.items if i in missing), unit.losses + 1)
        if rest.losses >= MOST_LOSSES:
            raise RunError(
                f"{rest.losses} workers ended over the same {len(rest.items)} items (numbers {rest.items[:3]} ...), so "
                f"no other gets them ({self.lost[-1]}); what was done is kept, and the same command goes on from there"
            )
        waiting.appendleft(rest)  # even where only its report is missing
