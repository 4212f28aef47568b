"""Seconds of a plan on this machine: each task's own requests, a few of them timed, the rest by their tokens.

A pilot is three stretches of neighbouring samples, for neighbours share prefixes as they will in the run.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.prefix import EncodedRequest
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
    """Seconds in which weights were loaded, kernels made ready and checkpoints tried, by the first request of each."""
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
        engine, requests = run.model, run.prepared.requests
        scored = [i for i, request in enumerate(requests) if request.continuations]
        if not scored or not tokens:
            return 0.0

        def few(indices: Sequence[int]) -> list[EncodedRequest]:
            return [requests[scored[i]] for i in indices]

        def read(indices: Sequence[int]) -> None:
            for _ in engine.stream(few(indices)):
                pass

        count: Callable[[Sequence[EncodedRequest]], int] = partial(trie_tokens, engine)
        with _as_parts(engine, requests):
            # Before the first request of a kind (longer than a window, say) an engine finds out what the checkpoint can
            # do: that is done once, however many requests follow.
            shortest = min(range(len(scored)), key=lambda i: requests[scored[i]].n_positions)
            self._warm_up(engine, lambda: read([shortest]), again=True)
            if engine.report.path == "plain":  # no prefix is shared after all
                from almost_eval.engines.hf_loglikelihood import plain_tokens as count

                tokens = round(tokens * count(requests) / trie_tokens(engine, requests))
            chosen = stretches(len(scored), tokens, lambda indices: count(few(indices)))
            rate = _seconds_a_token(chosen, read, lambda indices: count(few(indices)))
        return tokens * rate + self._rounding(engine, requests, few(chosen[0]), rate)

    def _rounding(
        self, engine: Any, requests: Sequence[EncodedRequest], few: list[EncodedRequest], rate: float
    ) -> float:
        """Seconds in which a run in half precision measures its rounding, on a sample that grows with the run."""
        if getattr(engine, "dtype", None) not in ("bfloat16", "float16") or engine.report.path != "shared-prefix":
            return 0.0
        from almost_eval.engines.hf_loglikelihood import plain_tokens
        from almost_eval.engines.hf_rounding import rounding_sample

        def sampled(requests: Sequence[EncodedRequest]) -> int:
            places = rounding_sample(requests, trie_tokens(engine, requests))
            return sum(plain_tokens([requests[i]]) for i in places)

        began = time.perf_counter()
        for _ in engine.stream(few):
            pass
        measured = time.perf_counter() - began - rate * trie_tokens(engine, few)
        return max(0.0, measured) * sampled(requests) / sampled(few)

    # --- rewards ---

    def _rewards(self, run: Any, tokens: int) -> float:
        conversations = [c for sample in run.samples for c in run.task.conversations(sample)]
        lengths = [len(ids) for ids in run.model.encode(conversations)]
        limit = run.model.context_length
        fitting = [i for i, length in enumerate(lengths) if limit is None or length <= limit]
        if not fitting or not tokens:
            return 0.0

        def read(indices: Sequence[int]) -> None:
            run.model.score([conversations[fitting[i]] for i in indices])

        def count(indices: Sequence[int]) -> int:
            return sum(lengths[fitting[i]] for i in indices)

        self._warm_up(run.model, lambda: read([0]))
        return tokens * _seconds_a_token(stretches(len(fitting), tokens, count), read, count)

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

    def _warm_up(self, model: Any, first: Callable[[], object], *, again: bool = False) -> None:
        if id(model) in self._warm and not again:
            return
        self._warm.add(id(model))
        began = time.perf_counter()
        first()
        if hasattr(model, "rehearse"):  # one worker has read it, and the others would load within a stretch
            model.rehearse()
        self.loading += time.perf_counter() - began


def _seconds_a_token(
    chosen: Sequence[Sequence[int]], read: Callable[[Sequence[int]], object], size: Callable[[Sequence[int]], int]
) -> float:
    """Of reading some stretches, each of which has `size` tokens."""
    began = time.perf_counter()
    for stretch in chosen:
        read(stretch)
    return (time.perf_counter() - began) / sum(size(stretch) for stretch in chosen)


@contextmanager
def _as_parts(engine: Any, requests: Sequence[EncodedRequest]) -> Iterator[None]:
    """Streams of some requests take the path of a run of all: its windows, and no measure of rounding for each."""
    from almost_eval.engines.hf import HFEngine
    from almost_eval.engines.pooled import PooledEngine

    engine = engine.reader if isinstance(engine, PooledEngine) else engine  # which says it to its workers
    if not isinstance(engine, HFEngine):
        yield
        return
    before = engine.part, engine.longest
    engine.part, engine.longest = 1, max(request.n_positions for request in requests)
    try:
        yield
    finally:
        engine.part, engine.longest = before


def stretches(count: int, whole: int, size: Callable[[Sequence[int]], int], tokens: int = TOKENS) -> list[list[int]]:
    """Indices of neighbouring requests, some from each third; all of them where they are few.

    All `count` requests have `whole` tokens; `size` gives those of some, by their indices; the stretches together have
    about `tokens`.
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
