"""A reward model in each of several workers: `engines.pooled` for rewards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from almost_eval.engines.pooled import SCORING_UNITS, InWorkers, ModelServant, wanted_of
from almost_eval.models.chat import ChatTemplate
from almost_eval.rewards.base import CheckpointRewardModel, StreamedRewards
from almost_eval.types import Conversation
from almost_eval.workers.pool import Pool
from almost_eval.workers.work import Unit


@dataclass(frozen=True, slots=True)
class Rewarding:
    """A task: conversations, the sample that each belongs to, and how they are written."""

    conversations: list[Conversation]
    sample_of: list[int] | None
    template: ChatTemplate


class RewardServant(ModelServant):
    """A reward model in a worker."""

    def answer(self, task: Rewarding, unit: Unit) -> Iterator[tuple[int, float]]:
        """Rewards of conversations."""
        self._model.template = task.template
        yield from self._model.stream(task.conversations, unit.items, task.sample_of)

    def report(self) -> list[str]:
        """Warnings of the last unit."""
        return list(self._model.warnings)


class PooledRewardModel(InWorkers, StreamedRewards):
    """A reward model in each of several workers; arguments: see `InWorkers`."""

    def __init__(self, reader: CheckpointRewardModel, pool: Pool) -> None:
        super().__init__(reader, pool)
        self.warnings: list[str] = list(reader.warnings)
        """What the last `stream` did that its caller should show."""

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
        try:
            yield from self.answers(task, units)
        finally:
            warnings = [warning for report in self.pool.reports for warning in report] or self.reader.notes
            self.warnings = list(dict.fromkeys([*warnings, *self.pool.warnings]))


def _conversations(parts: Sequence[tuple[int, ...]], sample_of: Sequence[int] | None) -> list[tuple[int, ...]]:
    """The conversations of the samples of each part, ascending."""
    if sample_of is None:
        return list(parts)
    part_of = {sample: number for number, part in enumerate(parts) for sample in part}
    mine: list[list[int]] = [[] for _ in parts]
    for index, sample in enumerate(sample_of):
        mine[part_of[sample]].append(index)
    return [tuple(indices) for indices in mine]
