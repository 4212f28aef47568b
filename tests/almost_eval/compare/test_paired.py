"""Paired tests on numbers that a reader can check by hand."""

import math

import numpy as np
import pytest

from almost_eval.compare import paired
from almost_eval.compare.paired import holm, mcnemar_exact, paired_bootstrap


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_mcnemar_worked() -> None:
    # 9 pairs differ, 1 to 8: 2 * (C(9,0) + C(9,1)) / 2^9 = 2 * 10 / 512
    assert mcnemar_exact(1, 8) == pytest.approx(20 / 512)
    assert mcnemar_exact(8, 1) == mcnemar_exact(1, 8)
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(3, 3) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)


def test_holm_worked() -> None:
    # sorted 0.005 0.01 0.03 0.04, times 4 3 2 1 = 0.02 0.03 0.06 0.04; the last is lifted to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.1, math.nan])


def test_bootstrap_of_two_clusters() -> None:
    # Differences 0 and 1: a resample averages 0, 0.5, 1 with probability 1/4, 1/2, 1/4.
    # So the interval is 0 to 1, and p = 2 * P(mean <= 0) = 2 * 1/4.
    result = paired_bootstrap([0.0, 0.0], [0.0, 1.0], ["x", "y"], rng=rng())
    assert (result.difference, result.ci95, result.n) == (0.5, (0.0, 1.0), 2)
    assert result.p_value == pytest.approx(0.5, abs=0.03)


def test_bootstrap_weighs_clusters_by_their_size() -> None:
    # x has three pairs of difference 1, y one of 0: means 0, 3/4, 1, never the 1/2 of equal weights.
    a, b = [0.0] * 4, [1.0, 1.0, 1.0, 0.0]
    result = paired_bootstrap(a, b, list("xxxy"), n_resamples=1, rng=rng())
    assert result.difference == 0.75
    seen = {paired_bootstrap(a, b, list("xxxy"), n_resamples=1, rng=rng(s)).ci95 for s in range(40)}
    assert seen == {(0.0, 0.0), (0.75, 0.75), (1.0, 1.0)}


def test_bootstrap_is_determined_by_the_seed_and_not_by_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = rng(1)
    a, b, names = draw.random(30).tolist(), draw.random(30).tolist(), [f"c{i // 2}" for i in range(30)]
    first = paired_bootstrap(a, b, names, n_resamples=1000, rng=rng(7))
    assert paired_bootstrap(a, b, names, n_resamples=1000, rng=rng(7)) == first
    assert paired_bootstrap(a, b, names, n_resamples=1000, rng=rng(8)) != first
    monkeypatch.setattr(paired, "_BLOCK", 100)
    assert paired_bootstrap(a, b, names, n_resamples=1000, rng=rng(7)) == first


def test_clusters_keep_duplicated_data_from_narrowing_the_interval() -> None:
    draw = rng(2)
    a, b = draw.integers(0, 2, 40).astype(float).tolist(), draw.integers(0, 2, 40).astype(float).tolist()
    names = [f"c{i}" for i in range(40)]

    def width(a: list[float], b: list[float], clusters: list[str]) -> float:
        ci95 = paired_bootstrap(a, b, clusters, rng=rng()).ci95
        assert ci95
        return ci95[1] - ci95[0]

    once = width(a, b, names)
    copied = width(a * 4, b * 4, names * 4)
    believed = width(a * 4, b * 4, [f"c{i}" for i in range(160)])
    assert copied == pytest.approx(once)  # three copies tell nothing new
    assert believed == pytest.approx(once / 2, rel=0.15)  # four times the samples would halve it


def test_bootstrap_p_at_its_ends() -> None:
    names = [f"c{i}" for i in range(10)]
    same = paired_bootstrap([0.3] * 10, [0.3] * 10, names, n_resamples=999, rng=rng())
    assert (same.difference, same.ci95, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    # B ahead on every sample: no resample reaches zero, p = 2 * (0 + 1) / (999 + 1).
    assert paired_bootstrap([0.0] * 10, [1.0] * 10, names, n_resamples=999, rng=rng()).p_value == 0.002


def test_bootstrap_refuses_what_it_cannot_use() -> None:
    one = paired_bootstrap([0.0, 0.0], [1.0, 0.0], ["same", "same"], rng=rng())
    assert (one.difference, one.ci95, one.p_value, one.n) == (0.5, None, None, 2)
    with pytest.raises(ValueError, match="not paired"):
        paired_bootstrap([0.0], [1.0, 0.0], ["a"], rng=rng())
    with pytest.raises(ValueError, match="no pairs"):
        paired_bootstrap([], [], [], rng=rng())
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap([math.nan, 0.0], [1.0, 0.0], ["a", "b"], rng=rng())
