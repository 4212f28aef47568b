"""Tests of paired scores: is B better than A, and is it still where many are compared.

McNemar 1947 in its exact form, a bootstrap over clusters, and Holm 1979 for several p-values together. Pure: values in,
values out; randomness is handed in as a generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from almost_eval.stats import ROUNDING, cluster_codes, finite_values

_BLOCK = 1_000_000
"""Cluster draws held at once by the bootstrap (8 MB of indices), whatever the number of resamples."""


@dataclass(frozen=True, slots=True)
class BootstrapResult:
    """A paired difference with its bootstrap uncertainty."""

    difference: float
    """mean(b) - mean(a), in the unit of the scores."""
    ci95: tuple[float, float] | None
    """Percentile interval; None with fewer than two clusters, which show no variation to resample."""
    p_value: float | None
    """Two-sided, for a difference of zero; None where `ci95` is."""
    n: int
    """Pairs."""


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p that A and B are right equally often, from the pairs that only one of them has right.

    Under the null each such pair is a fair coin, so p is an exact binomial test; 1.0 where there is none.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts cannot be negative: only_a={only_a}, only_b={only_b}")
    if only_a + only_b == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[str],
    *,
    n_resamples: int = 10_000,
    rng: np.random.Generator,
) -> BootstrapResult:
    """Mean of b - a over paired scores, its uncertainty from resampling whole clusters with replacement.

    The interval is the percentile one. p is twice the smaller of the shares of resamples at or beyond zero on either
    side, the observed sample counted as one more: min(1, 2 * (1 + min(#{<= 0}, #{>= 0})) / (n_resamples + 1)), so it
    is never zero. Both are a little optimistic below some 20 clusters, as every percentile bootstrap is.
    """
    if not len(a) == len(b) == len(clusters):
        raise ValueError(f"scores are not paired: {len(a)} in a, {len(b)} in b, {len(clusters)} clusters")
    if not len(a):
        raise ValueError("there are no pairs to compare")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, not {n_resamples}")
    x, y = finite_values(a), finite_values(b)
    n, difference = len(x), float((y - x).mean())
    codes = cluster_codes(clusters)
    # A resample needs no more of a cluster than these two numbers.
    sums, sizes = np.bincount(codes, weights=y - x), np.bincount(codes)  # (G,), (G,)
    n_clusters = len(sizes)
    if n_clusters < 2:
        return BootstrapResult(difference, None, None, n)

    means = np.empty(n_resamples)
    rows = max(1, _BLOCK // n_clusters)
    for start in range(0, n_resamples, rows):
        stop = min(start + rows, n_resamples)
        drawn = rng.integers(n_clusters, size=(stop - start, n_clusters))  # (rows, G) clusters, with replacement
        means[start:stop] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)

    low, high = np.quantile(means, [0.025, 0.975])
    zero = ROUNDING * float(np.abs(sums).max())  # differences that cancel may leave rounding behind
    beyond = min(int((means <= zero).sum()), int((means >= -zero).sum()))
    p_value = min(1.0, 2 * (1 + beyond) / (n_resamples + 1))
    return BootstrapResult(difference, (float(low), float(high)), p_value, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values, in the same order: those at most alpha hold together at family-wise level alpha."""
    if not all(0.0 <= p <= 1.0 for p in p_values):  # NaN fails this too
        raise ValueError(f"p-values must lie in [0, 1]: {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    floor = 0.0  # an adjusted p is never below that of a smaller raw p
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted
