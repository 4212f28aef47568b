"""An engine whose work is done by workers: the same protocol, no weights in this process, and the same numbers.

This process encodes, plans and records; the engine itself is opened in each worker. A worker is handed all requests of
a stream and computes the parts that it gets. An engine's plan is of all requests and never of what is wanted, so a part
has the batches of one process: in float32 on transformers the scores are equal in every bit, where each process has the
same number of threads. Texts are equal as those of a resumed run are (see `GenerationEngine`).
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine, RequestScores, SamplingParams
from almost_eval.engines.partition import partition_lengths, partition_prompts, partition_requests
from almost_eval.engines.prefix import EncodedRequest
from almost_eval.models.held import HeldCheckpoint
from almost_eval.types import Completion, EngineReport, LoglikelihoodRequest
from almost_eval.workers.pool import Pool
from almost_eval.workers.work import Servant, Unit

if TYPE_CHECKING:
    from almost_eval.engines.hf import HFEngine
    from almost_eval.engines.vllm import VLLMEngine

SCORING_UNITS = 4
"""Parts of the requests for each worker: a fast one takes more of them, and a lost one costs a quarter of its share."""
WRITING_UNITS = 2
"""The same for prompts that are continued: fewer, as rows that share a batch share the reading of all weights."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """A task: requests to score."""

    requests: list[EncodedRequest]
    longest: int = 0
    """See `HFEngine`, which also says what a part is."""
    is_part: bool = False
    probes: bytes = b""
    """What other workers have found out about the checkpoint, pickled: this process reads it without torch."""


@dataclass(frozen=True, slots=True)
class Writing:
    """A task: prompts to continue."""

    prompts: list[str]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What a worker did for a unit."""

    engine: EngineReport
    probes: bytes = b""
    """See `Scoring`."""


class ModelServant:
    """An engine or a reward model in a worker."""

    def __init__(self, model: HeldCheckpoint) -> None:
        self._model: Any = model

    def identity(self) -> Mapping[str, str | None]:
        """See `identity_of`."""
        return identity_of(self._model)

    def close(self) -> None:
        """End what the model itself has started: a process, on vLLM."""
        if hasattr(self._model, "close"):
            self._model.close()


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """How a worker opens the model."""

    servant: Callable[[Any], Servant]
    model_class: type
    model: str
    arguments: Mapping[str, Any]

    def open(self) -> Servant:
        """The model with its servant; weights load with the first unit."""
        return self.servant(self.model_class(self.model, **self.arguments))


class EngineServant(ModelServant):
    """An engine in a worker."""

    def answer(self, task: Scoring | Writing, unit: Unit) -> Iterator[tuple[int, Any]]:
        """Scores of requests, or completions of prompts."""
        if isinstance(task, Scoring):
            self._model.part, self._model.longest = unit.number or int(task.is_part), task.longest
            if task.probes:
                self._model.probes.update(pickle.loads(task.probes))  # written by a worker of this very command
            yield from self._model.stream(task.requests, unit.items)
            return
        prompts = [task.prompts[index] for index in unit.items]
        for place, completions in self._model.stream_completions(prompts, task.params):
            yield unit.items[place], completions

    def report(self) -> UnitReport:
        """Of the last unit."""
        probes = getattr(self._model, "probes", None)
        return UnitReport(self._model.report, pickle.dumps(probes) if probes else b"")


class InWorkers:
    """A model in each of several workers.

    Args:
        reader: the same model in this process. It encodes and says what it is; its weights are never loaded.
        pool: workers that hold a `ModelServant`.
    """

    def __init__(self, reader: HeldCheckpoint, pool: Pool) -> None:
        self.reader: Any = reader
        self.pool = pool
        self.last: tuple[Any, tuple[int, ...]] | None = None
        """The last task and a part of it."""

    def __getattr__(self, name: str) -> Any:
        """Tokenizer, checkpoint, settings and the like are the reader's own."""
        return getattr(self.__dict__["reader"], name)

    def answers(self, task: Any, parts: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, Any]]:
        """What the workers answer to a task, as they answer; raises as `Pool.run` does."""
        self.last = (task, parts[0]) if parts else None
        yield from self.pool.run(task, parts)

    def rehearse(self) -> None:
        """Have every worker compute a part of the last stream: all then have their weights, and know the checkpoint.

        Raises:
            RunError: see `Pool.run`.
        """
        if self.last is not None:
            self.pool.run_everywhere(*self.last)

    def close(self) -> None:
        """End the workers; the next stream starts others."""
        self.pool.close()


class PooledEngine(InWorkers, LoglikelihoodEngine, GenerationEngine):
    """An engine in each of several workers; arguments: see `InWorkers`."""

    def __init__(self, reader: HFEngine | VLLMEngine, pool: Pool) -> None:
        super().__init__(reader, pool)
        self._report = EngineReport()
        self._probes = b""

    @property
    def context_length(self) -> int:
        """Tokens the model can attend to."""
        return int(self.reader.context_length)

    @property
    def report(self) -> EngineReport:
        """What the workers did in the last stream: the plan is one, as all have the same."""
        return self._report

    def encode(self, requests: Sequence[LoglikelihoodRequest]) -> list[EncodedRequest]:
        """Token ids of every request, encoded in this process."""
        encoded: list[EncodedRequest] = self.reader.encode(requests)
        return encoded

    def stream(
        self, requests: Sequence[EncodedRequest], wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, RequestScores]]:
        """Yield (index, scores) of each wanted request as soon as a worker knows it; see `LoglikelihoodEngine.stream`.

        Raises:
            InputError: a request longer than the context; nothing is cut.
            RunError: see `Pool.run`; or whatever the engine refuses in a worker.
        """
        if any(request.continuations for request in requests):
            self.reader._refuse_long(requests)  # before a worker starts
        parts = self._parts(requests, SCORING_UNITS * self.pool.size)
        # An empty part where nothing is wanted: the report of the whole plan belongs in the results all the same.
        is_part = getattr(self.reader, "part", None) is not None
        task = Scoring(list(requests), getattr(self.reader, "longest", 0), is_part, self._probes)
        yield from self._run(task, wanted_of(parts, wanted) or [()])

    def _parts(self, requests: Sequence[EncodedRequest], parts: int) -> Sequence[tuple[int, ...]]:
        """Requests that begin alike together, unless the engine shares no prefix."""
        if not getattr(self.reader, "share_prefixes", True):
            tokens = [sum(c.n_positions for c in request.continuations) for request in requests]
            return partition_lengths(tokens, parts).parts
        limits = self.reader.pass_limits() if hasattr(self.reader, "pass_limits") else {}
        return partition_requests(requests, range(len(requests)), parts, **limits).parts

    def stream_completions(
        self, prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index, `params.n` completions) of each prompt; see `GenerationEngine.stream_completions`.

        Raises:
            InputError: a prompt that leaves no room for `max_new_tokens`.
            RunError: see `Pool.run`; or whatever the engine refuses in a worker.
        """
        if not prompts:
            return
        ids = self.reader._prompt_ids(prompts, params)
        parts = partition_prompts(
            ids, WRITING_UNITS * self.pool.size, new_tokens=params.n * params.max_new_tokens
        ).parts
        yield from self._run(Writing(list(prompts), params), wanted_of(parts, None))

    def _run(self, task: Scoring | Writing, parts: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, Any]]:
        try:
            yield from self.answers(task, parts)
        finally:
            self._report = merged([unit.engine for unit in self.pool.reports], self.pool.warnings)
            # The longest: units of one stream meet the same windows, and a worker keeps those of earlier streams.
            self._probes = max((self._probes, *(unit.probes for unit in self.pool.reports)), key=len)
            if self.last and isinstance(task, Scoring):
                self.last = replace(task, probes=self._probes), self.last[1]


def wanted_of(parts: Sequence[tuple[int, ...]], wanted: Collection[int] | None) -> list[tuple[int, ...]]:
    """What of each part is wanted (None: all), without the parts of which nothing is."""
    kept = None if wanted is None else frozenset(wanted)
    wanted_parts = [tuple(i for i in part if kept is None or i in kept) for part in parts]
    return [part for part in wanted_parts if part]


def merged(reports: Sequence[EngineReport], warnings: Sequence[str]) -> EngineReport:
    """One report of the parts of a stream, whose plan is one; each warning once."""
    whole = EngineReport()
    if reports:
        first = reports[0]
        whole = EngineReport(first.path, first.tokens_plain, first.tokens_in_trie, first.tokens_computed)
        whole.rounding = next((report.rounding for report in reports if report.rounding), None)
    whole.warnings = list(dict.fromkeys([w for report in reports for w in report.warnings] + list(warnings)))
    return whole


def identity_of(model: HeldCheckpoint) -> dict[str, str | None]:
    """What must not differ between processes that answer for one model."""
    versions = {name: metadata.version(name) for name in ("almost-toolkit", "torch", "transformers")}
    files = model.checkpoint.file_digests()
    return {
        **{f"version of {name}": version for name, version in versions.items()},
        "digest of the weights": model.checkpoint.weight_digest(),
        "digest of config and tokenizer": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
    }
