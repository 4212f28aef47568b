"""Which of several endpoints gets the next request: the one that is likely to answer it first.

What an endpoint is worth is measured: the requests that it has, times the seconds that its answers take. So a slow
endpoint gets few requests, and none waits at it while others are idle. One that fails rests, longer each time. Pure:
the threads' pool (`endpoint_pool`) and the judge's event loop keep one `EndpointLoad` for each endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_REST = 30.0
"""Seconds that an endpoint rests at most; the first time it is one."""
MEMORY = 0.8
"""Weight of the earlier answers in the mean of an endpoint's seconds."""


@dataclass(slots=True)
class EndpointLoad:
    """What is known of one endpoint. Times are seconds of one clock, whichever."""

    shown: str
    """The address, as it is shown."""
    running: int = 0
    """Requests on their way."""
    seconds: float | None = None
    """Of an answer: a mean in which the last ones weigh most; None before the first."""
    failures: int = 0
    """In a row; those of requests that were on their way when it failed are one."""
    rests_until: float = 0.0
    is_lost: bool = False
    """The last connection failed, or ended before the answer did."""
    was_lost: bool = False
    """The same of any connection."""

    def rests(self, now: float) -> bool:
        """Whether it gets no request while another one can have it."""
        return self.rests_until > now

    def answered(self, seconds: float) -> str:
        """Count an answer that came whole; a line for the user where it was lost before, else nothing."""
        old = seconds if self.seconds is None else self.seconds
        self.seconds = MEMORY * old + (1 - MEMORY) * seconds
        was, self.is_lost, self.failures = self.is_lost, False, 0
        return f"{self.shown} answers again" if was else ""

    def failed(self, now: float, pause: float = 0.0, *, lost: bool) -> str:
        """Count a failure, and rest; a line for the user where it is lost from now on, else nothing.

        Args:
            now: the time.
            pause: seconds that it asks for.
            lost: whether the connection failed; else it answered that it cannot work now.
        """
        if not self.rests(now):
            self.failures += 1
        rest = min(LONGEST_REST, max(pause, 2.0 ** (max(self.failures, 1) - 1)))
        self.rests_until = max(self.rests_until, now + rest)
        is_new = lost and not self.is_lost
        self.is_lost = self.is_lost or lost
        self.was_lost = self.was_lost or lost
        return f"{self.shown} is lost; what it had goes to the others" if is_new else ""


def first_to_answer(loads: Sequence[EndpointLoad], now: float) -> int:
    """The place of the endpoint that is likely to answer the next request first.

    Where all rest, it is the one whose rest ends first.
    """
    ready = [place for place, load in enumerate(loads) if not load.rests(now)]
    if not ready:
        return min(range(len(loads)), key=lambda place: loads[place].rests_until)
    known = [seconds for place in ready if (seconds := loads[place].seconds) is not None]
    usual = sum(known) / len(known) if known else 1.0

    def until_answered(place: int) -> tuple[float, int]:
        load = loads[place]
        return (load.running + 1) * (usual if load.seconds is None else load.seconds), load.running

    return min(ready, key=until_answered)
