"""What a checkpoint can do: sharing of prefixes and left padding, each measured against one unpadded row at a time.

In float32 always: a structure that is right agrees to the last digits there. In half precision it is off by rounding,
as the plain path is, and a difference would say nothing (`hf_rounding.py` measures that apart).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from almost_eval.engines.hf_float32 import HALF, in_float32
from almost_eval.engines.hf_loglikelihood import AttentionWindow, Limits, PlainScorer, Results, SharedPrefixScorer
from almost_eval.engines.prefix import EncodedContinuation, EncodedRequest, build_trie
from almost_eval.types import LoglikelihoodRequest

if TYPE_CHECKING:
    from almost_eval.models.loading import CausalLM


TOLERANCE = 1e-3
"""Nats between two orders of the same float32 operations; a foreign mask or position is off by 0.1 and more."""
SHORT = 24
"""Tokens of the sequences where no window is to be tried."""
BEYOND = 24
"""Tokens by which a sequence is longer than the window."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What this checkpoint can do, measured against one unpadded row at a time."""

    shared: float | None
    """Largest difference of a log-probability on the shared path, nats; None where the path failed outright."""
    padded: float | None
    """The same for left-padded batches."""

    @property
    def is_finite(self) -> bool:
        """Whether the model gives numbers at all: what it gives one row at a time is NaN where a weight is."""
        return self.padded is None or not math.isnan(self.padded)

    @property
    def sharing_is_exact(self) -> bool:
        """Whether the shared path agrees."""
        return self.shared is not None and self.shared <= TOLERANCE

    @property
    def padding_is_exact(self) -> bool:
        """Whether left-padded batches agree."""
        return self.padded is not None and self.padded <= TOLERANCE


def probe(model: CausalLM, window: AttentionWindow, vocabulary: int, *, seed: int = 0) -> Probe:
    """Score a dozen short random sequences that fork at several depths in three ways, and compare.

    Small on purpose (a few hundred tokens): it costs less than one batch, and a model that ignores the mask, the
    positions or the padding is off by orders of magnitude more than the tolerance. Where layers look through a window,
    two sequences are longer than it, or its edge would not be tried: on Gemma 3 270M an edge that is off by one token
    is off by 0.02 nats. A run has a window only where a prompt of its own is longer, and the probe costs five of those.
    """
    rng = np.random.default_rng(seed)
    length = SHORT if window.size is None else max(SHORT, window.size + BEYOND)
    trunk = rng.integers(0, vocabulary, length, dtype=np.int32)
    requests = []
    middle = min(length, SHORT) // 2
    for fork in (1, 3, middle, middle + 1, length - 2):
        tails = [rng.integers(0, vocabulary, int(rng.integers(2, 6)), dtype=np.int32) for _ in range(2)]
        continuations = tuple(EncodedContinuation(trunk[:fork], tail) for tail in tails)
        requests.append(EncodedRequest(LoglikelihoodRequest("", ("", "")), continuations))
    everything = range(len(requests))
    trie = build_trie(requests)
    small = Limits(max(11, length // 5), 4096)  # cuts through branches, so that the cache is exercised too
    pairs = Limits(max(512, 2 * (length + 8)), 4096)  # what is padded: all where all are short, else two at a time
    half = model.dtype in HALF

    def worst(results: Results) -> float | None:
        try:
            scores = dict(results)
        except Exception:  # architectures refuse foreign masks and caches in many ways; all mean the same
            return None
        off = [abs(a.logprob - b.logprob) for r in everything for a, b in zip(scores[r], truth[r], strict=True)]
        return float(np.max(off))  # NaN wherever one is, unlike the built-in max

    with in_float32(model) if half else nullcontext():
        one_by_one = PlainScorer(model, padding=False)
        truth = dict(one_by_one.stream(requests, everything, Limits(pairs.tokens, 4096, 1)))
        shared = SharedPrefixScorer(model, window, block=4, dtype=torch.float32 if half else None)
        return Probe(
            worst(shared.stream(trie, requests, everything, small)),
            worst(PlainScorer(model).stream(requests, everything, pairs)),
        )
