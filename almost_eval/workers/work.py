"""What a pool and its workers say to each other.

A recipe travels to each worker and makes a servant there, which holds the model. A task (all requests of a stream)
travels to each worker once; units, which are parts of it, one at a time. The servant answers a unit item by item.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Answer = Any
"""What a servant gives for one item: scores, completions, a reward. Must be picklable, as tasks and reports are."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a task that a worker computes in one go."""

    task: int
    """Number of the task in its pool."""
    number: int
    """Of the unit in its task; what is left of a lost worker's unit keeps it."""
    items: tuple[int, ...]
    """Indices into the task."""
    losses: int = 0
    """Workers that ended while they had it."""


class Servant(Protocol):
    """What a worker holds."""

    def answer(self, task: Any, unit: Unit) -> Iterator[tuple[int, Answer]]:
        """Yield (item, answer) of each item of the unit as soon as it is known, in any order."""
        ...

    def report(self) -> Any:
        """What the last `answer` did."""
        ...

    def identity(self) -> Mapping[str, str | None]:
        """What must be the same in all workers: versions, the digest of the weights."""
        ...

    def close(self) -> None:
        """Give back what the process does not give back by ending."""
        ...


class ServantRecipe(Protocol):
    """Makes a servant, in the process of a worker."""

    def open(self) -> Servant:
        """The servant."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has its servant."""

    identity: Mapping[str, str | None] | None = None
    """None where the worker runs the same files as the pool's process."""


@dataclass(frozen=True, slots=True)
class Item:
    """A worker's answer to one item."""

    index: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Finished:
    """A worker has answered all items of its unit."""

    report: Any


@dataclass(frozen=True, slots=True)
class Refused:
    """A worker met an error that every other would meet: an error of this toolkit."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker has ended."""

    reason: str
    """In words."""


Message = Ready | Item | Finished | Refused | Lost


class Transport(Protocol):
    """Starts workers and carries messages. Workers have places, 0 to `size` - 1; an ended one's place is free."""

    size: int
    """Workers at most."""

    def start(self, place: int) -> None:
        """Start a worker; `Ready` follows, or `Refused`, or `Lost`."""
        ...

    def give(self, place: int, task: Any, unit: Unit) -> None:
        """Have a worker answer a unit; the task is sent where the worker does not have it."""
        ...

    def receive(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """Wait for so long at most until there is something, and yield what there is as (place, message)."""
        ...

    def end(self, place: int) -> None:
        """End a worker at once, whatever it is at; no message of it follows."""
        ...

    def close(self) -> None:
        """End all workers; `start` may follow."""
        ...

    def describe(self) -> dict[str, Any]:
        """Where and how the workers run, as JSON."""
        ...


def serve(servant: Servant, task: Any, unit: Unit) -> Iterator[Message]:
    """The messages of a worker that has got a unit; an error that is not this toolkit's goes through."""
    from almost_eval.errors import AlmostError

    try:
        for index, answer in servant.answer(task, unit):
            yield Item(index, answer)
    except AlmostError as error:
        yield Refused(error)
        return
    yield Finished(servant.report())
