"""Requests that fork at many depths, and which architectures share their prefixes: for the tests of scoring."""

from __future__ import annotations

from typing import Any

import numpy as np

from almost_eval.engines.prefix import EncodedContinuation, EncodedRequest
from almost_eval.types import LoglikelihoodRequest

WHY_NOT: dict[str, str | None] = {
    "llama-gqa": None,
    "llama-tied": None,
    "gpt2": None,
    "mistral-window": None,
    "gemma3": None,
    "gemma2": None,  # eager: it caps its attention logits
    "qwen2": None,
    "gpt-neox": None,
    "opt": None,
    "phi3": None,
    "mixtral": None,
    "phi3-longrope": "rotary embedding",
    "bloom": "failed on a probe",  # ALiBi is computed from a mask of its own, over places in the cache
    "gpt-neo": "window of its own",
    "mamba": "linear_attention",  # a state, not keys and values
}
"""Architecture -> why it falls back to the plain path, or None where it shares."""


def forking_requests(seed: int = 0, longest: int = 60) -> list[EncodedRequest]:
    """Contexts that leave each other at many depths, single-token choices, continuations that nest and repeat."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return rng.integers(3, 290, int(rng.integers(low, high)), dtype=np.int32)

    pool = [draw(longest - 8, longest - 7)]
    requests = []
    for i in range(14):
        base = pool[int(rng.integers(len(pool)))]
        fork = int(rng.integers(1, len(base))) if i else len(base)  # the first context is the whole trunk
        context = np.concatenate([base[:fork], draw(0, 6)])
        pool.append(np.concatenate([context, draw(4, 12)])[: longest - 8])
        tails = [draw(1, 2) if i % 3 == 0 else draw(1, 6) for _ in range(int(rng.integers(1, 5)))]
        if i % 4 == 0:
            tails += [tails[0], np.concatenate([tails[0], draw(1, 3)])]
        continuations = tuple(EncodedContinuation(context, tail) for tail in tails)
        requests.append(EncodedRequest(LoglikelihoodRequest("", ("",) * len(tails)), continuations))
    return requests


REQUESTS = forking_requests()
