"""Log-likelihoods on vLLM that use its prefix cache.

vLLM's `prompt_logprobs`, which lm-eval uses, read every prompt anew. Here a continuation's last token is scored as a
*next* token (`logprob_token_ids`), the last tokens of all continuations that differ in nothing else in one request: a
choice between letters is one short request, and nothing else. What lies between context and last token is read from
`prompt_logprobs` with the prefix cache on. The rows of cached positions are then not computed (vLLM leaves memory
uninitialised there), so a row counts only past `num_cached_tokens`. Where one is missing, the prompt runs again with
the cache off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from almost_eval.engines.base import RequestScores
from almost_eval.engines.checkpoint_engine import collected
from almost_eval.engines.prefix import EncodedRequest, Ids, build_trie
from almost_eval.engines.vllm_process import Output, Params, Requests
from almost_eval.errors import RunError
from almost_eval.types import ContinuationScore, EngineReport

Results = Callable[[Requests], Iterator[tuple[str, Output]]]
"""Takes requests by name (token ids, vLLM's sampling parameters); yields name and vLLM's output as each finishes."""

MAX_IDS = 128
"""Token ids whose log-probability one request may return."""


@dataclass(slots=True)
class ScoringPrompt:
    """One request to vLLM, and the continuations that it scores."""

    ids: Ids
    """(T,) everything but the last token of each of its continuations."""
    last: set[int] = field(default_factory=set)
    """Last tokens, at most `MAX_IDS`."""
    first_row: int | None = None
    """The first position whose own log-probability is needed; None where only the last tokens are scored."""
    owners: list[tuple[int, int]] = field(default_factory=list)
    """(request, number of its continuation)."""

    def is_read(self, cached: int) -> bool:
        """Whether every row it needs was computed: row p comes of position p - 1, which no cache held."""
        return self.first_row is None or self.first_row > cached


def stream_scores(
    results: Results, requests: Sequence[EncodedRequest], wanted: Collection[int], report: EngineReport
) -> Iterator[tuple[int, RequestScores]]:
    """Yield (index, scores) of each wanted request when its last continuation is known; `report` counts the tokens.

    `results` is called once with the prefix cache, and once without it for what the cache held.

    Raises:
        RunError: vLLM read its cache although it was switched off.
    """
    trie = build_trie(requests)
    report.tokens_plain, report.tokens_in_trie = trie.tokens_plain, len(trie)
    sizes = {index: len(requests[index].continuations) for index in wanted}
    return collected(_scores(results, requests, wanted, report), sizes)


def _scores(
    results: Results, requests: Sequence[EncodedRequest], wanted: Collection[int], report: EngineReport
) -> Iterator[tuple[tuple[int, int], ContinuationScore]]:
    """((request, number of its continuation), score) as they come."""
    prompts = {str(number): prompt for number, prompt in enumerate(plan_prompts(requests, wanted))}
    for use_cache in (True, False):
        batch = {name: (prompt.ids, _sampling(prompt, use_cache)) for name, prompt in prompts.items()}
        again: dict[str, ScoringPrompt] = {}
        for name, output in results(batch) if batch else ():
            prompt, cached = prompts[name], output.num_cached_tokens or 0
            report.tokens_computed += len(prompt.ids) - cached
            if not prompt.is_read(cached):
                if not use_cache:
                    raise RunError("vLLM read its prefix cache where it was told not to; its scores cannot be trusted")
                again[name] = prompt
                continue
            for index, number in prompt.owners:
                continuation = requests[index].continuations[number]
                yield (index, number), _score(output, len(continuation.prefix), continuation.scored)
        prompts = again


def plan_prompts(requests: Sequence[EncodedRequest], wanted: Collection[int]) -> list[ScoringPrompt]:
    """Every distinct prompt once, in the order of their tokens: neighbours share the longest prefixes."""
    open_prompts: dict[bytes, ScoringPrompt] = {}
    prompts: list[ScoringPrompt] = []
    for index in sorted(wanted):
        for number, continuation in enumerate(requests[index].continuations):
            ids = np.concatenate([continuation.prefix, continuation.scored[:-1]])
            last, key = int(continuation.scored[-1]), ids.tobytes()
            prompt = open_prompts.get(key)
            if prompt is None or (len(prompt.last) == MAX_IDS and last not in prompt.last):
                prompt = open_prompts[key] = ScoringPrompt(ids)
                prompts.append(prompt)
            prompt.last.add(last)
            prompt.owners.append((index, number))
            if len(continuation.scored) > 1:
                start = len(continuation.prefix)
                prompt.first_row = start if prompt.first_row is None else min(start, prompt.first_row)
    prompts.sort(key=lambda prompt: prompt.ids.astype(">i4").tobytes())
    return prompts


def _sampling(prompt: ScoringPrompt, use_cache: bool) -> Params:
    import vllm

    return vllm.SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        logprob_token_ids=sorted(prompt.last),
        prompt_logprobs=None if prompt.first_row is None else 0,
        skip_reading_prefix_cache=not use_cache,
    )


def _score(output: Output, start: int, scored: Ids) -> ContinuationScore:
    """Log p of `scored`, which begins at position `start` of the prompt and whose last token follows it."""
    last = int(scored[-1])
    rows = [output.prompt_logprobs[start + at][int(token)] for at, token in enumerate(scored[:-1])]
    [following] = output.outputs[0].logprobs
    greedy = all(row.rank == 1 for row in rows) and output.outputs[0].token_ids[0] == last
    return ContinuationScore(math.fsum([*(row.logprob for row in rows), following[last].logprob]), greedy, len(scored))
