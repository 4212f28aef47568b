"""What the sampling stages share: the type that makes engines, their dtype, and derived seeds."""

from __future__ import annotations

import random
from collections.abc import Callable

from almost_eval.engines.base import GenerationEngine
from almost_train.common.stage import Stage

EngineFactory = Callable[[str], GenerationEngine]
"""Model (folder, hub id or built-in name) -> an engine for it; called when there is something to generate."""


def pin_dtype(stage: Stage, what: str, engine: GenerationEngine) -> None:
    """Hold a stage to the dtype of its engine, which `auto` settles by the machine; an endpoint's is its own affair.
    Raises StageChanged where the stage began in another.
    """
    if dtype := getattr(engine, "dtype", None):
        stage.pin(f"dtype of {what}", str(dtype))


def derived_seed(seed: int, what: str) -> int:
    """A seed for one part of a stage, below 2**31 (the largest that endpoints take)."""
    return derived_rng(seed, what).getrandbits(31)


def derived_rng(seed: int, what: str) -> random.Random:
    """A generator for one part of a stage: the same in every process, whatever was drawn before."""
    return random.Random(f"{seed}/{what}")  # a string is hashed by SHA-512
