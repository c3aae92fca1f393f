"""Intervals and rank correlation."""

from __future__ import annotations

import numpy as np
import pytest

from oracles.ranks import ranks_slow, spearman_slow
from pocketsize.measurement.stats import bootstrap, bootstrap_mean, bootstrap_ratio, ranks, spearman


def test_the_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_mean(values, seed=1)
    expected = 1.96 * values.std() / 20
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * expected, rel=0.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(40):
        low, high = bootstrap_mean(rng.exponential(1, 50), seed)
        covered += low <= 1 <= high
    assert 33 <= covered <= 40


def test_the_seed_alone_decides_and_values_are_untouched():
    values = np.array([1.0, 5.0, 2.0, 8.0])
    copy = values.copy()
    assert bootstrap_mean(values, 7) == bootstrap_mean(values, 7) != bootstrap_mean(values, 8)
    assert np.array_equal(values, copy)


def test_the_interval_holds_the_value_itself():
    # The maximum of a draw is at most the maximum: without widening, high could only touch it.
    values = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0])
    low, high = bootstrap(8, lambda draw: float(values[draw].max()), 0)
    assert low <= 9.0 <= high
    assert bootstrap_mean(np.full(5, 2.5), 0) == (2.5, 2.5)


def test_a_ratio_weighs_windows_by_their_counts():
    low, high = bootstrap_ratio(np.array([10.0, 1.0]), np.array([10.0, 1.0]), 0)
    assert (low, high) == (1.0, 1.0)
    low, high = bootstrap_ratio(np.array([0.0, 3.0]), np.array([3.0, 1.0]), 0)
    assert (low, high) == (0.0, 3.0)


def test_a_ratio_of_which_draws_may_divide_by_nothing_has_no_interval():
    assert bootstrap_ratio(np.array([1.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0]), 0) is None
    assert bootstrap_ratio(np.zeros(4), np.zeros(4), 0) is None
    assert bootstrap_ratio(np.array([0.0, 1.0]), np.array([1.0, 1.0]), 0) == (0.0, 1.0)


def test_one_value_has_no_interval():
    assert bootstrap_mean(np.array([1.0]), 0) is None


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_correlation_equal_their_oracle(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 12, 40).astype(float), rng.normal(size=40).round(1)
    assert ranks(x.astype(int)).tolist() == ranks_slow(x.tolist())
    assert ranks(x).tolist() == ranks_slow(x.tolist())
    assert spearman(x, y) == pytest.approx(spearman_slow(x.tolist(), y.tolist()), abs=1e-12)


def test_correlation_sees_order_only():
    x = np.array([0.1, 0.7, 0.3, 0.9])
    assert spearman(x, np.exp(9 * x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert np.isnan(spearman(x, np.ones(4)))
