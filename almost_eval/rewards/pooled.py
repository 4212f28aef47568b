"""A reward model in each of several workers: `engines.pooled` for rewards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from almost_eval.engines.pooled import SCORING_UNITS, identity_of, wanted_of
from almost_eval.models.chat import ChatTemplate
from almost_eval.rewards.base import CheckpointRewardModel
from almost_eval.types import Conversation
from almost_eval.workers.pool import Pool
from almost_eval.workers.work import Unit


@dataclass(frozen=True, slots=True)
class Rewarding:
    """A task: conversations, the sample that each belongs to, and how they are written."""

    conversations: list[Conversation]
    sample_of: list[int] | None
    template: ChatTemplate


class RewardServant:
    """A reward model in a worker."""

    def __init__(self, model: CheckpointRewardModel) -> None:
        self._model = model

    def answer(self, task: Rewarding, unit: Unit) -> Iterator[tuple[int, float]]:
        """Rewards of conversations."""
        self._model.template = task.template
        yield from self._model.stream(task.conversations, unit.items, task.sample_of)

    def report(self) -> list[str]:
        """Warnings of the last unit."""
        return list(self._model.warnings)

    def identity(self) -> Mapping[str, str | None]:
        """See `identity_of`."""
        return identity_of(self._model)

    def close(self) -> None:
        """End what the model itself has started: a process, on vLLM."""
        if hasattr(self._model, "close"):
            self._model.close()


@dataclass(frozen=True, slots=True)
class RewardRecipe:
    """How a worker opens the reward model."""

    reward: type[CheckpointRewardModel]
    model: str
    arguments: Mapping[str, Any]

    def open(self) -> RewardServant:
        """The reward model; weights load with the first unit."""
        return RewardServant(self.reward(self.model, **self.arguments))


class PooledRewardModel:
    """A reward model in each of several workers.

    Args:
        reader: the same model in this process. It writes and encodes conversations; its weights are never loaded.
        pool: workers that hold a `RewardServant`.
    """

    def __init__(self, reader: CheckpointRewardModel, pool: Pool) -> None:
        self.reader = reader
        self.pool = pool
        self.warnings: list[str] = list(reader.warnings)
        """What the last `stream` did that its caller should show."""
        self._last: tuple[Rewarding, tuple[int, ...]] | None = None
        """The last task and a part of it."""

    def __getattr__(self, name: str) -> Any:
        """Tokenizer, checkpoint, template, settings and the like are the reader's own."""
        return getattr(self.__dict__["reader"], name)

    def stream(
        self,
        conversations: Sequence[Conversation],
        wanted: Collection[int] | None = None,
        sample_of: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, float]]:
        """Yield (index, reward) of each wanted conversation as soon as a worker knows it.

        Raises:
            RunError: see `Pool.run`; or whatever the reward model refuses in a worker.
        """
        n_samples = len(conversations) if sample_of is None else 1 + max(sample_of, default=-1)
        parts = self.reader.partition(conversations, sample_of, n_samples, SCORING_UNITS * self.pool.size).parts
        task = Rewarding(list(conversations), None if sample_of is None else list(sample_of), self.reader.template)
        units = wanted_of(_conversations(parts, sample_of), wanted)
        self._last = (task, units[0]) if units else None
        try:
            yield from self.pool.run(task, units)
        finally:
            warnings = [warning for report in self.pool.reports for warning in report] or self.reader.notes
            self.warnings = list(dict.fromkeys([*warnings, *self.pool.warnings]))

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """Raw logits, in order; raises as `stream` does."""
        rewards = dict(self.stream(conversations))
        return [rewards[i] for i in range(len(conversations))]

    def rehearse(self) -> None:
        """Have every worker compute a part of the last stream: all then have their weights.

        Raises:
            RunError: see `Pool.run`.
        """
        if self._last is not None:
            self.pool.run_everywhere(*self._last)

    def close(self) -> None:
        """End the workers; the next stream starts others."""
        self.pool.close()


def _conversations(parts: Sequence[tuple[int, ...]], sample_of: Sequence[int] | None) -> list[tuple[int, ...]]:
    """The conversations of the samples of each part, ascending."""
    if sample_of is None:
        return list(parts)
    part_of = {sample: number for number, part in enumerate(parts) for sample in part}
    mine: list[list[int]] = [[] for _ in parts]
    for index, sample in enumerate(sample_of):
        mine[part_of[sample]].append(index)
    return [tuple(indices) for indices in mine]
