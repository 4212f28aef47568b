"""Torch's generator for a while: what draws from it depends on a seed that is handed in, and nothing after it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU generator starts at `seed` inside and is put back after it: new weights depend on the seed alone."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
