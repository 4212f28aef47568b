"""The arithmetic behind every reported figure: means with their uncertainty, rankings, agreement.

Paired tests are in `compare/paired.py`. Sources: Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640) for
(clustered) standard errors; Wilson 1927 for proportions near 0 and 1; Hunter 2004, "MM algorithms for generalized
Bradley-Terry models" (Annals of Statistics 32); Cohen 1960 for agreement beyond chance; Liang and Zeger 1986 for the
clustered variance of a logistic model. Pure: values in, values out; randomness is handed in as a generator.

Departures from Miller: the clustered variance carries the factor G/(G-1), so that it equals the plain one when every
cluster has one member; and the interval is Wilson's where mean ± 1.96 stderr is known to be wrong (see `mean_metric`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from almost_eval.types import Metric

Floats = NDArray[np.float64]

Z95 = 1.96
"""Two-sided 95 % point of the standard normal."""

ROUNDING = 1e-12
"""Relative to the largest value: what is smaller than this is rounding and reads as zero."""


def mean_metric(values: Sequence[float | None], clusters: Sequence[str] | None = None) -> Metric:
    """The mean of the scored values, with standard error and 95 % interval.

    None is unscored: counted, and no part of the mean. A non-finite value is an error of the caller (ValueError).

    Without clusters, stderr = sample sd / sqrt(n). With them (one name per value; samples of one cluster are not
    independent), stderr = sqrt(G/(G-1) * sum over clusters of (sum of the cluster's residuals)^2) / n, G the number
    of clusters: CR0 of Miller 2024 with a small-sample factor; clusters of one member give the plain formula back.

    The interval is value ± 1.96 stderr, cut to [0, 1] where all values lie in it, except that it is Wilson's

    - for independent 0/1 values: 10 of 10 right is no proof of 100 %;
    - for any values in [0, 1] with a stderr of zero, the clusters taken as the sample size. This errs on the wide side,
      as no variable on [0, 1] varies more than a 0/1 variable of the same mean.

    With fewer than two clusters (or values) neither stderr nor interval can be known: both are None.
    """
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"{len(values)} values with {len(clusters)} clusters; each value needs one cluster")
    scored = [i for i, value in enumerate(values) if value is not None]
    x = finite_values([values[i] for i in scored])  # (n,)
    n, unscored = len(x), len(values) - len(x)
    if n == 0:
        return Metric(None, None, None, n=0, unscored=unscored)

    mean = float(x.mean())
    codes = np.arange(n) if clusters is None else cluster_codes([clusters[i] for i in scored])  # (n,) 0..G-1
    n_clusters = int(codes.max()) + 1
    if n_clusters < 2:
        return Metric(mean, None, None, n, unscored)

    residuals = np.bincount(codes, weights=x - mean)  # (G,) summed within each cluster
    stderr = math.sqrt(n_clusters / (n_clusters - 1) * float(residuals @ residuals)) / n
    if stderr <= ROUNDING * float(np.abs(x).max()):
        stderr = 0.0

    in_unit = _in_unit(x)
    if in_unit and (stderr == 0.0 or (n_clusters == n and is_binary(x))):
        interval = wilson(mean, n_clusters)
    else:
        interval = _normal(mean, stderr, clip=in_unit)
    return Metric(mean, stderr, interval, n, unscored)


def mean_difference(values: Sequence[float | None], clusters: Sequence[str] | None = None) -> Metric:
    """The mean of differences of two values in [0, 1]: `mean_metric`, its interval cut to [-1, 1] and not to [0, 1]."""
    halved = mean_metric([None if value is None else (value + 1) / 2 for value in values], clusters)
    if halved.value is None:
        return halved
    interval = (2 * halved.ci95[0] - 1, 2 * halved.ci95[1] - 1) if halved.ci95 else None
    stderr = None if halved.stderr is None else 2 * halved.stderr
    return Metric(2 * halved.value - 1, stderr, interval, halved.n, halved.unscored)


def majority(scores: Sequence[float | None]) -> float | None:
    """What more than half of the scores say, of three things: 1 (above one half), 0 (below it) or 0.5; else 0.5.

    None is no score, and counts for nothing; where there is no other, the majority is None too.
    """
    said = [1.0 if score > 0.5 else 0.0 if score < 0.5 else 0.5 for score in scores if score is not None]
    if not said:
        return None
    return next((value for value in (1.0, 0.0) if 2 * said.count(value) > len(said)), 0.5)


def mean_of_means(groups: Mapping[str, Sequence[float | None]]) -> Metric:
    """Macro average: the mean of each group counts the same, whatever its size.

    The groups are independent, so stderr = sqrt(sum of the squared group stderrs) / number of groups; None where a
    group has a single scored value, for its share cannot be known. Where it is zero and the values lie in [0, 1], the
    interval is Wilson's with the sample size k^2 / sum(1/n_g), at which a plain mean varies as much as this one.

    A group with nothing scored is no part of the mean; its unscored samples are still counted.
    """
    every = [mean_metric(values) for values in groups.values()]
    n, unscored = sum(group.n for group in every), sum(group.unscored for group in every)
    scored = [group for group in every if group.n]
    if not scored:
        return Metric(None, None, None, n=0, unscored=unscored)

    k = len(scored)
    mean = math.fsum(group.value for group in scored if group.value is not None) / k
    stderrs = [group.stderr for group in scored if group.stderr is not None]
    if len(stderrs) < k:
        return Metric(mean, None, None, n, unscored)

    stderr = math.hypot(*stderrs) / k
    in_unit = all(0.0 <= value <= 1.0 for values in groups.values() for value in values if value is not None)
    if in_unit and stderr == 0.0:
        interval = wilson(mean, k**2 / sum(1 / group.n for group in scored))
    else:
        interval = _normal(mean, stderr, clip=in_unit)
    return Metric(mean, stderr, interval, n, unscored)


def wilson(proportion: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion seen in `n` independent trials."""
    z2 = Z95**2
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(max(proportion * (1 - proportion), 0.0) / n + z2 / (4 * n**2))
    # At 0 and 1 one end is the proportion itself, which rounding may miss.
    return max(0.0, min(centre - half, proportion)), min(1.0, max(centre + half, proportion))


def bradley_terry(wins: NDArray[Any]) -> Floats:
    """Log strengths s (mean zero) with P(i beats j) = 1 / (1 + exp(s_j - s_i)), by the MM algorithm of Hunter 2004.

    `wins` is (players, players), [i, j] how often i beat j; a tie counts 0.5 for each. The estimate is finite only if
    every player can be reached from every other along wins (a strongly connected graph); else ValueError.
    """
    wins = np.asarray(wins, dtype=np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not len(wins):
        raise ValueError(f"wins must be a square matrix, players x players, not of shape {wins.shape}")
    if not np.isfinite(wins).all() or (wins < 0).any() or np.diagonal(wins).any():
        raise ValueError("wins must be finite and not negative, with zeros on the diagonal (nobody plays themselves)")
    from scipy.sparse.csgraph import connected_components

    n_components, component = connected_components(wins > 0, directed=True, connection="strong")
    if n_components > 1:
        parts = [np.flatnonzero(component == c).tolist() for c in range(n_components)]
        raise ValueError(
            f"no finite strengths: the comparisons fall into {n_components} parts (players {parts}) that did not both "
            "win and lose against each other; add comparisons between them or rank each part alone"
        )

    games, won = wins + wins.T, wins.sum(axis=1)  # (P, P), (P,)
    log_strength = np.zeros(len(wins))
    for _ in range(100_000):
        # games * P(i beats j) summed over j: at the maximum every player wins as often as the model expects.
        expected = (games / (1.0 + np.exp(log_strength[None, :] - log_strength[:, None]))).sum(axis=1)
        step = np.log(won / expected) if len(wins) > 1 else np.zeros(1)
        log_strength += step
        log_strength -= log_strength.mean()
        if np.abs(step).max() < 1e-11:
            return log_strength
    raise ValueError("strengths did not converge: some players are linked by too few comparisons")


def draw_counts(n_clusters: int, n_resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(R, G) how often each of G clusters is in each of R resamples, drawn with replacement."""
    return rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_resamples)


def draw_members(n_clusters: int, n_resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The same as `draw_counts`, drawn one member at a time: other resamples of the same distribution."""
    members = rng.integers(n_clusters, size=(n_resamples, n_clusters))
    return np.stack([np.bincount(row, minlength=n_clusters) for row in members])


Draw = Callable[[int, int, np.random.Generator], NDArray[np.int64]]
"""`draw_counts` or `draw_members`."""


def bradley_terry_bootstrap(
    wins: NDArray[Any],
    *,
    n_resamples: int = 1000,
    rng: np.random.Generator,
    draw: Draw = draw_counts,
    max_failed: float = 0.025,
) -> tuple[Floats, int] | None:
    """95 % percentile intervals of `bradley_terry` from resampling whole clusters with replacement.

    `wins` is (clusters, players, players). Returns ((players, 2) low and high, resamples without finite strengths). The
    latter are left out; None where their share is above `max_failed` (from 2.5 % on, an end of the interval may lie at
    infinity), or where there are fewer than two clusters.
    """
    wins = np.asarray(wins, dtype=np.float64)
    n_clusters = len(wins)
    if n_clusters < 2:
        return None
    fitted, failed = [], 0
    for times in draw(n_clusters, n_resamples, rng):  # (G,)
        try:
            fitted.append(bradley_terry(np.tensordot(times, wins, axes=1)))
        except ValueError:
            failed += 1
            if failed > max_failed * n_resamples:
                return None
    return np.quantile(np.array(fitted), [0.025, 0.975], axis=0).T, failed


def cohen_kappa(
    pairs: Sequence[tuple[str, str]],
    clusters: Sequence[str],
    *,
    n_resamples: int = 2000,
    rng: np.random.Generator,
    draw: Draw = draw_counts,
    max_failed: float = 1.0,
) -> Metric:
    """Agreement of two raters beyond chance, (p_o - p_e) / (1 - p_e), unweighted, with a clustered bootstrap interval.

    p_o is the share of pairs with equal labels, p_e what two raters with these shares of labels would reach by chance.
    Where both use one and the same label throughout, p_e is 1 and kappa has no value: None. The interval is the
    percentile one over resampled clusters, those without a value left out; stderr is their standard deviation. There is
    neither where the share of those without a value is above `max_failed`.
    """
    if len(pairs) != len(clusters):
        raise ValueError(f"{len(pairs)} pairs with {len(clusters)} clusters; each pair needs one cluster")
    if not pairs:
        return Metric(None, None, None, n=0)
    labels = {label: k for k, label in enumerate(sorted({label for pair in pairs for label in pair}))}
    codes = cluster_codes(clusters)
    n_clusters, n_labels = int(codes.max()) + 1, len(labels)
    tables = np.zeros((n_clusters, n_labels, n_labels))
    for code, (a, b) in zip(codes, pairs, strict=True):
        tables[code, labels[a], labels[b]] += 1
    value = float(_kappa(tables.sum(axis=0)[None])[0])
    if math.isnan(value):
        return Metric(None, None, None, n=len(pairs))
    if n_clusters < 2:
        return Metric(value, None, None, n=len(pairs))
    resampled = _kappa(np.tensordot(draw(n_clusters, n_resamples, rng), tables, axes=1))  # (R,)
    resampled = resampled[~np.isnan(resampled)]
    if len(resampled) < (1 - max_failed) * n_resamples:
        return Metric(value, None, None, n=len(pairs))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Metric(value, float(resampled.std(ddof=1)), (float(low), float(high)), n=len(pairs))


def _kappa(tables: NDArray[Any]) -> Floats:
    """(R, K, K) counts to (R,) kappa, NaN where chance alone explains everything."""
    shares = tables / tables.sum(axis=(1, 2), keepdims=True)
    observed = np.trace(shares, axis1=1, axis2=2)
    chance = (shares.sum(axis=1) * shares.sum(axis=2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1.0 - ROUNDING, (observed - chance) / (1.0 - chance), np.nan)


@dataclass(frozen=True, slots=True)
class LogisticFit:
    """A logistic model of an outcome in [0, 1]: logit P = intercept + coefficients @ x, fitted without a penalty."""

    coefficients: Floats
    """(k + 1,) the intercept first."""
    covariance: Floats
    """(k + 1, k + 1) clustered sandwich with the factor G/(G-1)."""

    def mean_probability(self, rows: NDArray[Any]) -> Metric:
        """The mean of P over `rows` (m, k), with the delta method's standard error; `n` is not known here: 0."""
        x = np.column_stack([np.ones(len(rows)), rows])
        p = 1.0 / (1.0 + np.exp(-x @ self.coefficients))
        gradient = (p * (1 - p)) @ x / len(x)
        stderr = math.sqrt(max(float(gradient @ self.covariance @ gradient), 0.0))
        return Metric(float(p.mean()), stderr, _normal(float(p.mean()), stderr, clip=True), n=0)


def fit_logistic(x: NDArray[Any], outcome: Sequence[float], clusters: Sequence[str]) -> LogisticFit | None:
    """Maximum likelihood by scikit-learn; x is (n, k), an outcome of 0.5 is half a win and half a loss.

    None where there is no maximum or no variance to be had: fewer than two clusters, one outcome only, columns that
    depend on each other, or outcomes that the columns separate.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    codes = cluster_codes(clusters)
    if len(y) == 0 or int(codes.max()) < 1 or (y == 0.0).all() or (y == 1.0).all():
        return None
    full = np.column_stack([np.ones(len(y)), x])  # (n, k + 1)
    if np.linalg.matrix_rank(full) < full.shape[1]:
        return None
    from sklearn.linear_model import LogisticRegression

    twice = np.concatenate([x, x])
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", max_iter=200, tol=1e-10)
    model.fit(twice, np.repeat([1, 0], len(y)), sample_weight=np.concatenate([y, 1 - y]))
    coefficients = np.concatenate([model.intercept_, model.coef_[0]])
    p = 1.0 / (1.0 + np.exp(-np.clip(full @ coefficients, -500, 500)))
    gradient = full * (y - p)[:, None]  # (n, k + 1), sums to zero at a maximum
    if np.abs(gradient.sum(axis=0)).max() > 1e-4 * len(y) or np.abs(coefficients).max() > 20:
        return None
    bread = np.linalg.inv((full * (p * (1 - p))[:, None]).T @ full)
    by_cluster = np.zeros((int(codes.max()) + 1, full.shape[1]))
    np.add.at(by_cluster, codes, gradient)
    n_clusters = len(by_cluster)
    covariance = n_clusters / (n_clusters - 1) * bread @ (by_cluster.T @ by_cluster) @ bread
    return LogisticFit(coefficients, covariance)


def is_binary(x: Floats) -> bool:
    """Whether every value is 0 or 1."""
    return bool(((x == 0.0) | (x == 1.0)).all())


def _in_unit(x: Floats) -> bool:
    return bool(((x >= 0.0) & (x <= 1.0)).all())


def finite_values(values: Sequence[float | None]) -> Floats:
    """(n,) as an array; NaN and infinity are refused here, so that they can never reach a mean."""
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        at = int(np.flatnonzero(~np.isfinite(x))[0])
        raise ValueError(f"score {at} is {x[at]}; a score that is not a finite number must be None (unscored)")
    return x


def cluster_codes(clusters: Sequence[str]) -> NDArray[np.int64]:
    """(n,) cluster names as 0..G-1, in order of first appearance."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in clusters], dtype=np.int64)


def _normal(value: float, stderr: float, *, clip: bool) -> tuple[float, float]:
    low, high = value - Z95 * stderr, value + Z95 * stderr
    return (max(0.0, low), min(1.0, high)) if clip else (low, high)
