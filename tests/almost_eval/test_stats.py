import math
import subprocess
import sys

import numpy as np
import pytest

from almost_eval.stats import bradley_terry, mean_metric, mean_of_means, wilson


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- one mean


def test_plain_stderr_and_normal_interval() -> None:
    # mean 2.5; squared residuals 2.25 + 0.25 + 0.25 + 2.25 = 5; sd^2 = 5/3; stderr = sqrt(5/3 / 4) = 0.645497
    metric = mean_metric([1.0, 2.0, 3.0, 4.0])
    assert metric.value == 2.5
    assert metric.stderr == pytest.approx(math.sqrt(5 / 12))
    # 1.96 * 0.645497 = 1.265174
    assert metric.ci95 == pytest.approx((1.234826, 3.765174), abs=1e-6)
    assert (metric.n, metric.unscored) == (4, 0)


def test_unscored_are_counted_and_no_part_of_the_mean() -> None:
    metric = mean_metric([1.0, None, 0.0, None, None], ["a", "b", "c", "d", "e"])
    assert (metric.value, metric.n, metric.unscored) == (0.5, 2, 3)


def test_clustered_stderr_worked() -> None:
    # mean 0.5; residuals per cluster +0.5+0.5 = 1 and -1; sqrt(2/1 * (1 + 1)) / 4 = 0.5
    metric = mean_metric([1.0, 1.0, 0.0, 0.0], ["x", "x", "y", "y"])
    assert metric.stderr == pytest.approx(0.5)
    assert metric.ci95 == (0.0, 1.0)  # 0.5 ± 0.98, cut to what a proportion can be
    # Taken as independent it would be sqrt(4 * 0.25 / 3 / 4) = 0.288675: too sure.
    assert mean_metric([1.0, 1.0, 0.0, 0.0]).stderr == pytest.approx(0.288675, abs=1e-6)


@pytest.mark.parametrize("values", [[0.2, 0.9, 0.4, 0.7, 0.1], [1.0, 0.0, 1.0], [3.0, -7.5, 2.0, 11.0]])
def test_clusters_of_one_member_give_the_plain_formula(values: list[float]) -> None:
    plain, clustered = mean_metric(values), mean_metric(values, [f"c{i}" for i in range(len(values))])
    assert clustered.stderr == pytest.approx(plain.stderr)
    assert clustered.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))
    assert clustered.ci95 == pytest.approx(plain.ci95)


def test_copies_in_a_cluster_add_no_certainty() -> None:
    values, names = [0.0, 1.0, 1.0, 0.0, 1.0], list("abcde")
    assert mean_metric(values * 3, names * 3).stderr == pytest.approx(mean_metric(values).stderr)


def test_wilson_for_independent_right_or_wrong() -> None:
    # p = 1, n = 10: the lower end is n / (n + 1.96^2) = 10 / 13.8416 = 0.722460
    metric = mean_metric([1.0] * 10)
    assert metric.stderr == 0.0
    assert metric.ci95 == pytest.approx((0.722460, 1.0), abs=1e-6)
    assert mean_metric([0.0] * 10).ci95 == pytest.approx((0.0, 1 - 0.722460), abs=1e-6)
    # p = 0.5, n = 10: 0.5 ± 1.96 / 1.38416 * sqrt(0.25/10 + 3.8416/400) = 0.5 ± 0.263410
    assert mean_metric([1.0, 0.0] * 5).ci95 == pytest.approx((0.236590, 0.763410), abs=1e-6)


def test_wilson_counts_clusters_when_nothing_varies() -> None:
    # 10 of 10 right in 5 clusters: 5 / (5 + 3.8416) = 0.565508
    metric = mean_metric([1.0] * 10, list("aabbccddee"))
    assert metric.ci95 == pytest.approx((0.565508, 1.0), abs=1e-6)
    # One right and one wrong in every cluster: the residuals cancel, and the interval must not be a point.
    cancelled = mean_metric([1.0, 0.0] * 5, list("aabbccddee"))
    assert cancelled.stderr == 0.0
    assert cancelled.ci95 == pytest.approx(wilson(0.5, 5))


def test_rounding_is_no_spread() -> None:
    # 1/3 in every cluster, which binary floats only nearly cancel.
    metric = mean_metric([1.0, 0.0, 0.0] * 4, [str(i // 3) for i in range(12)])
    assert metric.stderr == 0.0
    assert metric.ci95 == pytest.approx(wilson(1 / 3, 4))


def test_interval_outside_the_unit_range_is_not_cut() -> None:
    assert mean_metric([7.0, 7.0, 7.0]).ci95 == (7.0, 7.0)
    metric = mean_metric([0.0, 2.0])  # 1 ± 1.96 * 1
    assert metric.ci95 == pytest.approx((-0.96, 2.96))


def test_nothing_one_value_and_one_cluster() -> None:
    nothing = mean_metric([None, None])
    assert (nothing.value, nothing.stderr, nothing.ci95, nothing.n, nothing.unscored) == (None, None, None, 0, 2)
    one = mean_metric([1.0, None])
    assert (one.value, one.stderr, one.ci95, one.n, one.unscored) == (1.0, None, None, 1, 1)
    one_cluster = mean_metric([1.0, 0.0], ["same", "same"])
    assert (one_cluster.value, one_cluster.stderr, one_cluster.ci95) == (0.5, None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"score 1 is .* must be None"):
        mean_metric([0.5, bad])


def test_every_value_needs_a_cluster() -> None:
    with pytest.raises(ValueError, match="2 values with 1 clusters"):
        mean_metric([0.5, 0.5], ["a"])


# --- macro average


def test_mean_of_means_worked() -> None:
    # means 0.5 and 0.75 -> 0.625; stderrs sqrt(0.5/2) = 0.5 and sqrt(0.25/4) = 0.25
    # -> sqrt(0.25 + 0.0625) / 2 = 0.279508
    metric = mean_of_means({"a": [1.0, 0.0, None], "b": [1.0, 1.0, 1.0, 0.0]})
    assert metric.value == pytest.approx(0.625)
    assert metric.stderr == pytest.approx(0.279508, abs=1e-6)
    assert metric.ci95 == pytest.approx((0.625 - 1.96 * 0.279508, 1.0), abs=1e-6)
    assert (metric.n, metric.unscored) == (6, 1)


def test_a_group_with_nothing_scored_is_left_out_and_counted() -> None:
    metric = mean_of_means({"a": [1.0, 0.0], "b": [None, None, None], "c": []})
    assert (metric.value, metric.n, metric.unscored) == (0.5, 2, 3)
    assert metric.stderr == pytest.approx(0.5)
    empty = mean_of_means({"a": [None]})
    assert (empty.value, empty.stderr, empty.ci95, empty.n, empty.unscored) == (None, None, None, 0, 1)


def test_a_group_of_one_hides_the_stderr_and_not_the_mean() -> None:
    metric = mean_of_means({"a": [1.0, 0.0], "b": [1.0]})
    assert (metric.value, metric.stderr, metric.ci95) == (0.75, None, None)


def test_all_right_in_every_group_is_not_certainty() -> None:
    # 2^2 / (1/4 + 1/12) = 12 effective samples: 12 / (12 + 3.8416) = 0.757499
    metric = mean_of_means({"a": [1.0] * 4, "b": [1.0] * 12})
    assert metric.ci95 == pytest.approx((0.757499, 1.0), abs=1e-6)


# --- rankings


def test_bradley_terry_two_players() -> None:
    # 3 wins to 1: odds 3, so the strengths are ln(3)/2 and -ln(3)/2.
    assert bradley_terry(np.array([[0, 3], [1, 0]])) == pytest.approx([math.log(3) / 2, -math.log(3) / 2])


def test_bradley_terry_recovers_exact_odds() -> None:
    # Strengths 4 : 2 : 1 over 15 games a pair give 10:5, 12:3, 10:5; in logs, centred: ln 2, 0, -ln 2.
    wins = np.array([[0, 10, 12], [5, 0, 10], [3, 5, 0]])
    assert bradley_terry(wins) == pytest.approx([math.log(2), 0.0, -math.log(2)], abs=1e-9)


def test_bradley_terry_ties_and_a_cycle_are_even() -> None:
    assert bradley_terry(np.array([[0, 0.5], [0.5, 0]])) == pytest.approx([0.0, 0.0])
    assert bradley_terry(np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])) == pytest.approx([0.0] * 3)
    assert bradley_terry(np.zeros((1, 1))) == pytest.approx([0.0])


def test_bradley_terry_needs_a_connected_graph() -> None:
    with pytest.raises(ValueError, match="fall into 2 parts"):
        bradley_terry(np.array([[0, 5], [0, 0]]))  # never lost: infinitely strong
    with pytest.raises(ValueError, match="square"):
        bradley_terry(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="diagonal"):
        bradley_terry(np.eye(2))


def test_import_needs_numpy_only() -> None:
    code = "import sys, almost_eval.stats; print([m for m in ('scipy', 'torch', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
