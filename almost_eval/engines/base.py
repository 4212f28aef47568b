"""The protocols an engine meets, and the sampling parameters it takes.

An engine encodes first and loads weights last: everything that can be refused (a prompt that does not fit, a label
that is not one token) is known after `encode`, before a single weight is read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from almost_eval.types import Completion, ContinuationScore, EngineReport, JSONObject, LoglikelihoodRequest

if TYPE_CHECKING:  # the command line imports this file; prefix.py imports numpy (0.1 s)
    from almost_eval.engines.prefix import EncodedRequest

RequestScores = list[ContinuationScore]
"""One score per continuation of a request, in its order."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    """Completions for each prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they are not part of its text."""
    seed: int = 0
    """Each (prompt, completion) draws from its own generator seeded by this: batching and resuming change no random
    number. In float32 they change no text either, as logits then differ in the last digits alone, and a draw would have
    to be tied to that. In half precision the logits of a prompt are rounded in another way beside other prompts, by
    hundredths of a nat and more, so a token now and then differs, and all of the text after it: a text is then repeated
    only by the same prompts in the same batches. An engine that draws by itself (vLLM, an endpoint) promises what its
    own `seed` does."""
    alone: bool = False
    """Read a completion as lm-eval does: decoded without its prompt, so that SentencePiece drops the space it begins
    with, and cut at one stop string after the other."""


class ModelIdentity(Protocol):
    """Which model it is: a `Checkpoint`, or what an endpoint says of one."""

    @property
    def name(self) -> str:
        """The name it was opened under."""
        ...

    @property
    def architecture(self) -> str:
        """The class its config names; empty where that is not at hand."""
        ...

    def weight_digest(self) -> str | None:
        """sha256 over the weight files; None where they are not at hand."""
        ...

    def file_digests(self) -> dict[str, str] | None:
        """sha256 of each file beside the weights that decides a number; None where they are not at hand."""
        ...


@runtime_checkable
class Described(Protocol):
    """What a run records of its model. Engines and reward models both meet it."""

    @property
    def checkpoint(self) -> ModelIdentity:
        """Which model."""
        ...

    def settings(self) -> JSONObject:
        """How it is run: everything that may change a number, as JSON."""
        ...


@runtime_checkable
class LoglikelihoodEngine(Protocol):
    """Scores continuations of contexts."""

    @property
    def context_length(self) -> int | None:
        """Tokens the model can attend to; None where the engine does not know."""
        ...

    @property
    def report(self) -> EngineReport:
        """What the last `stream` did."""
        ...

    def encode(self, requests: Sequence[LoglikelihoodRequest]) -> list[EncodedRequest]:
        """Token ids of every request, context and continuation encoded jointly. Loads no weights."""
        ...

    @abstractmethod
    def stream(
        self, requests: Sequence[EncodedRequest], wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, RequestScores]]:
        """Yield (index, scores) of each wanted request as soon as it is known, in any order.

        The plan depends on all `requests` and never on `wanted`: a resumed run computes the same batches, so it ends
        in the same bits as an uninterrupted one.
        """
        ...

    def loglikelihood(self, requests: Sequence[LoglikelihoodRequest]) -> list[RequestScores]:
        """Scores of all requests, in order; raises as `stream` does."""
        scores = dict(self.stream(self.encode(requests)))
        return [scores[i] for i in range(len(requests))]


@runtime_checkable
class GenerationEngine(Protocol):
    """Continues prompts."""

    @abstractmethod
    def stream_completions(
        self, prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index, `params.n` completions) of each rendered prompt as soon as they are known, in any order.

        A completion depends on its prompt, its number and `params` alone, up to rounding: handing in what is missing
        after a kill gives what the whole list would have given on transformers in float32. In half precision, and on
        engines that batch by themselves, the texts may differ; see `SamplingParams.seed`.
        """
        ...

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[list[Completion]]:
        """`params.n` completions for each rendered prompt, in order; raises as `stream_completions` does."""
        done = dict(self.stream_completions(prompts, params))
        return [done[i] for i in range(len(prompts))]
