"""Seconds of a plan on this machine: each task's own requests, a few of them timed, the rest by their tokens.

A pilot is three stretches of neighbouring samples, for neighbours share prefixes as they will in the run.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from almost_eval.engines.base import SamplingParams
from almost_eval.judge.model_system import ModelSystem
from almost_eval.progress import Progress
from almost_eval.suite.plan import Planned, trie_tokens

TOKENS = 6000
"""Of a task's pilot, about."""
STRETCHES = 3
SHORT, LONG = 4, 20
"""New tokens of the two timed generations: their difference is the time of a step, free of the reading."""


@dataclass(slots=True)
class Pilot:
    """Times tasks, each model once warm."""

    progress: Progress
    loading: float = 0.0
    """Seconds in which weights were loaded and kernels made ready, by the first request of each model."""
    _warm: set[int] = field(default_factory=set)

    def seconds(self, one: Planned, answer_tokens: int | None = None) -> float | None:
        """Of what a task lacks, without loading; None for a kind of work that has no pilot.

        Args:
            one: a task that can run.
            answer_tokens: what an answer is expected to have; None is its budget.
        """
        self.progress.notice(f"measures {one.name}")
        run: Any = one.run
        if hasattr(run, "systems"):
            return self._written(run, answer_tokens)
        if run.task.requires == "reward":
            return self._rewards(run, one.read)
        return self._scores(run, one.read) if run.prepared is not None else None

    # --- log-likelihoods ---

    def _scores(self, run: Any, tokens: int) -> float:
        requests = run.prepared.requests

        def timed(indices: Sequence[int]) -> tuple[int, float]:
            mine = [requests[i] for i in indices]
            began = time.perf_counter()
            for _ in run.model.stream(mine):
                pass
            return trie_tokens(run.model, mine), time.perf_counter() - began

        return self._by_tokens(
            run.model, tokens, len(requests), timed, lambda at: trie_tokens(run.model, [requests[i] for i in at])
        )

    # --- rewards ---

    def _rewards(self, run: Any, tokens: int) -> float:
        conversations = [c for sample in run.samples for c in run.task.conversations(sample)]
        lengths = [len(ids) for ids in run.model.encode(conversations)]
        limit = run.model.context_length
        fitting = [i for i, length in enumerate(lengths) if limit is None or length <= limit]

        def timed(indices: Sequence[int]) -> tuple[int, float]:
            began = time.perf_counter()
            run.model.score([conversations[fitting[i]] for i in indices])
            return count(indices), time.perf_counter() - began

        def count(indices: Sequence[int]) -> int:
            return sum(lengths[fitting[i]] for i in indices)

        return self._by_tokens(run.model, tokens, len(fitting), timed, count)

    def _by_tokens(
        self,
        model: Any,
        tokens: int,
        count: int,
        timed: Callable[[Sequence[int]], tuple[int, float]],
        size: Callable[[Sequence[int]], int],
    ) -> float:
        if not count or not tokens:
            return 0.0
        self._warm_up(model, lambda: timed([0]))
        read, seconds = 0, 0.0
        for stretch in stretches(count, tokens, size):
            its_tokens, its_seconds = timed(stretch)
            read, seconds = read + its_tokens, seconds + its_seconds
        return tokens * seconds / read

    # --- answers ---

    def _written(self, run: Any, answer_tokens: int | None) -> float:
        return sum(
            self.answers(system.engine, system.prompts, answer_tokens or system.spec()["sampling"]["max_new_tokens"])
            for system in run.systems
            if isinstance(system, ModelSystem)
        )

    def answers(self, engine: Any, prompts: Sequence[str], new: int) -> float:
        """Seconds in which an engine reads the prompts, all together, and writes `new` tokens after each."""
        if not prompts:
            return 0.0

        def timed(tokens: int) -> float:
            began = time.perf_counter()
            engine.generate(prompts, SamplingParams(tokens, 1.0, 1.0))
            return time.perf_counter() - began

        self._warm_up(engine, lambda: engine.generate(prompts[:1], SamplingParams(1)))
        short, long = min(SHORT, new), min(LONG, new)
        first = timed(short)
        if long == short:
            return first
        step = max(0.0, timed(long) - first) / (long - short)
        return first + (new - short) * step

    def _warm_up(self, model: Any, first: Callable[[], object]) -> None:
        if id(model) in self._warm:
            return
        self._warm.add(id(model))
        began = time.perf_counter()
        first()
        self.loading += time.perf_counter() - began


def stretches(count: int, whole: int, size: Callable[[Sequence[int]], int], tokens: int = TOKENS) -> list[list[int]]:
    """Indices of neighbouring requests, some from each third; all of them where they are few.

    Args:
        count: of requests.
        whole: tokens of all of them.
        size: gives the tokens of some requests by their indices.
        tokens: of all stretches together, about.
    """
    if whole <= tokens:
        return [list(range(count))]
    chosen = []
    for number in range(STRETCHES):
        first, end = count * number // STRETCHES, count * (number + 1) // STRETCHES

        def is_enough(length: int, first: int = first, end: int = end) -> bool:
            return first + length >= end or size(range(first, first + length)) >= tokens // STRETCHES

        # A size is dear to know, as each is a trie of its own: lengths are doubled, then halved.
        longest = 1
        while not is_enough(longest):
            longest *= 2
        lengths = range(longest // 2 + 1, longest + 1)
        length = lengths[bisect_left(lengths, True, hi=len(lengths) - 1, key=is_enough)]
        chosen.append(list(range(first, min(end, first + length))))
    return chosen
