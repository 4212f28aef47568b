"""What a reward is worth: where it stands among the rewards of answers that are known to be good or bad.

A raw logit says nothing by itself; not even its sign does. So the reward model scores known answers once, and a badge
shows the percentile of its reward among them: half of them are good, so that 50 is where good and bad meet.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from almost_eval.errors import AlmostError
from almost_eval.files import write_json
from almost_eval.nano.data import cache_dir
from serving.chat.client import Endpoint
from serving.chat.toyworld import known_answers, knows

GOOD, POOR = 60.0, 40.0
"""Percentiles from which an answer reads as the good ones do, and below which as the bad ones do."""
KNOWN = 200
"""Known answers of either kind: the percentile is right within some 3 points."""
_BATCH = 50
"""Conversations in one request."""
_LOG = logging.getLogger("almost.chat")


@dataclass(frozen=True, slots=True)
class KnownRewards:
    """Rewards of the known answers, each list sorted."""

    good: tuple[float, ...]
    bad: tuple[float, ...]

    def percentile(self, reward: float) -> float:
        """Share of the known answers with a lower reward, 0 to 100, the good and the bad ones weighed alike."""
        lower = [bisect_left(rewards, reward) / len(rewards) for rewards in (self.good, self.bad)]
        return 100 * sum(lower) / 2


class RewardScale:
    """The scale of one reward model on the built-in world; computed on first use, then kept on disk.

    Args:
        endpoint: what answers `/v1/rewards` with that reward model.
        digest: of its weights; another model has another file.
        folder: where the rewards are kept; None is the toolkit's cache.
    """

    def __init__(self, endpoint: Endpoint, digest: str, folder: Path | None = None) -> None:
        self._endpoint = endpoint
        self._good, self._bad = known_answers(KNOWN)
        texts = hashlib.sha256(json.dumps([self._good, self._bad]).encode()).hexdigest()
        self._file = (folder or cache_dir()) / f"reward-scale-{digest[:16]}-{texts[:8]}.json"
        self._task: asyncio.Task[KnownRewards | None] | None = None

    async def percentile(self, question: str, reward: float | None) -> float | None:
        """Where the reward of an answer to `question` stands; None where that cannot be said.

        That is so where there is no reward, where the question is outside the world, whose answers the reward model
        alone can judge, and where the known answers could not be scored.
        """
        if reward is None or not knows(question):
            return None
        known = await self.rewards()
        return None if known is None else known.percentile(reward)

    async def begin(self) -> None:
        """Start scoring the known answers, so that the first visitor need not wait for it."""
        self._task = asyncio.create_task(self._make())

    async def rewards(self) -> KnownRewards | None:
        """Rewards of the known answers; None where they cannot be had now. Whoever comes next tries again."""
        if self._task is None or (self._task.done() and self._failed(self._task)):
            self._task = asyncio.create_task(self._make())
        # Shielded: a visitor who leaves must not take the scale from those who wait for it too.
        return await asyncio.shield(self._task)

    @staticmethod
    def _failed(task: asyncio.Task[KnownRewards | None]) -> bool:
        return task.cancelled() or task.exception() is not None or task.result() is None

    async def _make(self) -> KnownRewards | None:
        if (kept := _read(self._file)) is not None:
            return kept
        try:
            known = KnownRewards(await self._score(self._good), await self._score(self._bad))
        except AlmostError as error:
            _LOG.warning("the known answers have no rewards, so badges have no scale: %s", error)
            return None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {"good": known.good, "bad": known.bad})
        except (OSError, AlmostError) as error:  # a cache that cannot be written costs the next start a second
            _LOG.warning("%s cannot be written: %s", self._file, error)
        return known

    async def _score(self, answers: Sequence[tuple[str, str]]) -> tuple[float, ...]:
        conversations = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in answers
        ]
        rewards: list[float] = []
        for first in range(0, len(conversations), _BATCH):
            rewards += await self._endpoint.rewards(conversations[first : first + _BATCH])
        return tuple(sorted(rewards))


def _read(file: Path) -> KnownRewards | None:
    """What is kept; None where there is nothing that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        good, bad = (tuple(sorted(float(reward) for reward in content[kind])) for kind in ("good", "bad"))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return KnownRewards(good, bad) if len(good) == len(bad) == KNOWN else None
