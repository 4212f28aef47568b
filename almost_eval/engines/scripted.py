"""An engine that answers from functions: the public test double for tasks, runners and judges. No model, no torch."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine, RequestScores, SamplingParams
from almost_eval.engines.prefix import EncodedContinuation, EncodedRequest, Ids, build_trie
from almost_eval.errors import InputError, TemplateError
from almost_eval.models.stops import first_stop
from almost_eval.types import Completion, ContinuationScore, EngineReport, LoglikelihoodRequest

_EMPTY_CONTEXT = np.zeros(1, dtype=np.int32)  # as a BOS token would


class ScriptedEngine(LoglikelihoodEngine, GenerationEngine):
    """Scores and continues text as told. Its tokens are words, split at white space.

    >>> from almost_eval.types import LoglikelihoodRequest
    >>> engine = ScriptedEngine(lambda context, continuation: -1.0 if continuation == " Paris" else -5.0)
    >>> [scores] = engine.loglikelihood([LoglikelihoodRequest("The capital of France is", (" Paris", " New York"))])
    >>> [(score.logprob, score.is_greedy, score.n_tokens) for score in scores]
    [(-1.0, True, 1), (-5.0, False, 2)]

    >>> engine = ScriptedEngine(lambda *_: 0.0, complete=lambda prompt: f" You said {prompt.split()[-1]}.")
    >>> engine.generate(["Human: hello"], SamplingParams(max_new_tokens=2))[0][0].text
    ' You said'

    Args:
        logprob: (context, continuation) -> log-probability in nats. NaN and infinities go through as they are.
        complete: prompt -> its completion; without it, `generate` refuses.
        context_length: the longest input in words, or None.
    """

    name = "scripted"

    def __init__(
        self,
        logprob: Callable[[str, str], float],
        *,
        complete: Callable[[str], str] | None = None,
        context_length: int | None = None,
    ) -> None:
        self._logprob = logprob
        self._complete = complete
        self._context_length = context_length
        self._report = EngineReport()

    @property
    def context_length(self) -> int | None:
        """The longest input in words, or None."""
        return self._context_length

    @property
    def report(self) -> EngineReport:
        """What the last `stream` did."""
        return self._report

    def encode(self, requests: Sequence[LoglikelihoodRequest]) -> list[EncodedRequest]:
        """Ids of the words; an empty context counts as one word.

        Raises:
            TemplateError: a continuation without a word, or a request without continuations.
        """
        encoded = []
        for request in requests:
            context = _word_ids(request.context)
            prefix = context if len(context) else _EMPTY_CONTEXT
            continuations = tuple(EncodedContinuation(prefix, _word_ids(text)) for text in request.continuations)
            if not continuations or not all(len(continuation.scored) for continuation in continuations):
                raise TemplateError(f"nothing to score in {request.continuations!r}; each continuation needs a word")
            encoded.append(EncodedRequest(request, continuations))
        return encoded

    def stream(
        self, requests: Sequence[EncodedRequest], wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, RequestScores]]:
        """Yield (index, scores) of each wanted request, in order.

        Raises:
            InputError: a request longer than the context.
        """
        trie = build_trie(requests)
        self._report = EngineReport("scripted", trie.tokens_plain, len(trie), len(trie))
        self._refuse_long(max((request.n_positions for request in requests), default=0))
        for index in sorted(range(len(requests)) if wanted is None else wanted):
            yield index, self._scores(requests[index])

    def stream_completions(
        self, prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield `params.n` times what `complete` says to a prompt, cut at stop strings and at `max_new_tokens` words.

        Raises:
            InputError: the engine was made without `complete`, or a prompt leaves no room for `max_new_tokens`.
        """
        if self._complete is None:
            raise InputError("this ScriptedEngine only scores; give it complete=... to generate")
        longest = max((len(_word_ids(prompt)) for prompt in prompts), default=0)
        self._refuse_long(longest + params.max_new_tokens)
        for index, prompt in enumerate(prompts):
            yield index, [_cut(self._complete(prompt), params)] * params.n

    def _scores(self, encoded: EncodedRequest) -> RequestScores:
        request = encoded.request
        values = [float(self._logprob(request.context, text)) for text in request.continuations]
        return [
            ContinuationScore(
                value,
                not math.isnan(value) and all(value > other for j, other in enumerate(values) if j != i),
                len(encoded.continuations[i].scored),
            )
            for i, value in enumerate(values)
        ]

    def _refuse_long(self, words: int) -> None:
        if self._context_length is not None and words > self._context_length:
            raise InputError(f"{words} words do not fit the context of {self._context_length}")


def _word_ids(text: str) -> Ids:
    return np.array([zlib.crc32(word.encode()) & 0x7FFFFFFF for word in text.split()], dtype=np.int32)


def _cut(text: str, params: SamplingParams) -> Completion:
    text = text[: first_stop(text, params.stop)]
    words = list(re.finditer(r"\S+", text))
    reason = "stop"
    if len(words) > params.max_new_tokens:
        text, reason = text[: words[params.max_new_tokens - 1].end()], "length"
    return Completion(text, tuple(_word_ids(text).tolist()), reason)
