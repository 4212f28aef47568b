"""What half precision does to the numbers of a run: a sample of its requests once more in float32, and one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch

from almost_eval.engines.hf_float32 import in_float32
from almost_eval.engines.hf_loglikelihood import AttentionWindow, Limits, PlainScorer, SharedPrefixScorer, plain_tokens
from almost_eval.engines.prefix import EncodedRequest, build_trie
from almost_eval.types import ContinuationScore, JSONObject

if TYPE_CHECKING:
    from almost_eval.models.loading import CausalLM

SHARE = 50
"""One token of the run in so many is computed again; at least `LEAST` tokens, and never less than one request."""
LEAST = 512


def rounding_sample(requests: Sequence[EncodedRequest], tokens: int, *, seed: int = 0) -> list[int]:
    """The requests that are scored again, ascending: the same for a whole run and for one that goes on.

    Requests of a run that computes so many tokens are taken in a random order until the share of these is spent.
    """
    left = max(LEAST, tokens // SHARE)
    chosen: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(requests)).tolist():
        if not requests[index].continuations:
            continue
        left -= plain_tokens([requests[index]])
        if chosen and left < 0:
            break
        chosen.append(index)
    return sorted(chosen)


def measure_rounding(
    model: CausalLM,
    requests: Sequence[EncodedRequest],
    shared: Mapping[int, Sequence[ContinuationScore]],
    limits: Limits,
    *,
    window: AttentionWindow,
    padding: bool,
) -> JSONObject:
    """How far the shared path and the plain path are from float32, in nats, and how often each changes a choice.

    Float32 is computed on the shared path: the probe has compared it with one row at a time on this checkpoint, and
    it costs a sixth of the plain path there, which is most of what this record takes on a CPU.

    Of all requests of the run, those in `shared` are compared: request -> its scores on the shared path.

    Returns:
        `requests` and `continuations` compared; for `shared` and `plain`: the median and the largest difference from
        float32 (None where no pair is finite), and the requests whose most likely continuation is another one
        (`flips`). `not_finite` counts the continuations that have no finite number, as float16 overflows; it is there
        where it counts something.
    """
    order = sorted(shared)
    sample = [requests[index] for index in order]  # alone: a batch of a plan for all would hold rows nobody reads
    rows = range(len(sample))
    plain_scores = dict(PlainScorer(model, padding=padding).stream(sample, rows, limits))
    with in_float32(model):
        scorer = SharedPrefixScorer(model, window, dtype=torch.float32)
        # A pass in float32 holds twice the bytes a number, and its logits twice while they are put together.
        small = Limits(max(64, limits.tokens // 4), max(8, limits.rows // 4))
        exact = dict(scorer.stream(build_trie(sample), sample, rows, small))
    plain = {index: plain_scores[row] for row, index in enumerate(order)}
    truth = {index: exact[row] for row, index in enumerate(order)}

    def against(scores: Mapping[int, Sequence[ContinuationScore]]) -> JSONObject:
        pairs = [(a.logprob, b.logprob) for r in truth for a, b in zip(scores[r], truth[r], strict=True)]
        off = [abs(a - b) for a, b in pairs if math.isfinite(a - b)]
        against: JSONObject = {
            "median": median(off) if off else None,
            "largest": max(off, default=None),
            "flips": sum(_best(scores[r]) != _best(truth[r]) for r in truth),
        }
        return against | ({"not_finite": len(pairs) - len(off)} if len(off) < len(pairs) else {})

    return {
        "requests": len(truth),
        "continuations": sum(map(len, truth.values())),
        "unit": "nats",
        "shared": against(shared),
        "plain": against(plain),
    }


def _best(scores: Sequence[ContinuationScore]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i].logprob)
