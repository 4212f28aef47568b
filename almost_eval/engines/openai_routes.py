"""The two ways in which servers tell log-probabilities of known tokens: what is sent, and how the answer is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from almost_eval.engines.prefix import EncodedRequest, Ids
from almost_eval.types import ContinuationScore, JSONObject

_MINUS_INFINITY = -9999.0
"""What vLLM's server writes for minus infinity, which JSON has not."""


@dataclass(frozen=True, slots=True)
class Whole:
    """One request of the route `echo`, and which continuations it answers."""

    ids: Ids
    """Context and continuation."""
    owners: list[tuple[int, int]] = field(default_factory=list)
    """(request, number of its continuation)."""


def plan_wholes(requests: Sequence[EncodedRequest], wanted: Sequence[int]) -> list[Whole]:
    """Every distinct sequence once, in the order of their tokens: neighbours share the longest prefixes."""
    wholes: dict[bytes, Whole] = {}
    for index in wanted:
        for number, continuation in enumerate(requests[index].continuations):
            ids = np.concatenate([continuation.prefix, continuation.scored])
            whole = wholes.setdefault(ids.astype(">i4").tobytes(), Whole(ids))
            whole.owners.append((index, number))
    return [wholes[key] for key in sorted(wholes)]


def read_ids(choice: JSONObject, start: int, scored: Ids) -> ContinuationScore:
    """Log p of `scored`, which begins at position `start` of the prompt and whose last token follows it."""
    last = int(scored[-1])
    rows = [choice["prompt_logprobs"][start + at][str(int(token))] for at, token in enumerate(scored[:-1])]
    logprobs = choice["logprobs"]
    values = [_value(row["logprob"]) for row in rows] + [_value(logprobs["top_logprobs"][0][token_name(last)])]
    greedy = all(row["rank"] == 1 for row in rows) and logprobs["tokens"][0] == token_name(last)
    return ContinuationScore(math.fsum(values), greedy, len(scored))


def read_echo(choice: JSONObject, start: int, scored: Ids) -> ContinuationScore:
    """Log p of `scored`, which begins at position `start` of the echoed prompt."""
    logprobs, here = choice["logprobs"], slice(start, start + len(scored))
    values = [_value(value) for value in logprobs["token_logprobs"][here]]
    best = [max(map(float, top.values())) for top in logprobs["top_logprobs"][here]]
    if len(values) != len(scored) or len(best) != len(scored):
        raise ValueError("fewer log-probabilities than tokens")
    greedy = all(value >= top for value, top in zip(values, best, strict=True))
    return ContinuationScore(math.fsum(values), greedy, len(scored))


def _value(value: float | str) -> float:
    return -math.inf if float(value) <= _MINUS_INFINITY else float(value)


def token_name(token: int) -> str:
    """How vLLM's server writes a token with `return_tokens_as_token_ids`: two tokens may have one text."""
    return f"token_id:{token}"
