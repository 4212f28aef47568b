"""What the sampling stages share: how an engine is had, how a model enters `stage.json`, how seeds are derived."""

from __future__ import annotations

import random
from collections.abc import Callable

from almost_eval.engines.base import GenerationEngine

EngineFactory = Callable[[str], GenerationEngine]
"""Model (folder, hub id or built-in name) -> an engine for it; called when there is something to generate."""


def derived_seed(seed: int, what: str) -> int:
    """A seed of its own for one part of a stage, below 2**31 (endpoints take no more)."""
    return derived_rng(seed, what).getrandbits(31)


def derived_rng(seed: int, what: str) -> random.Random:
    """A generator of its own for one part of a stage: the same in every process, whatever was drawn before."""
    return random.Random(f"{seed}/{what}")  # a string is hashed by SHA-512
