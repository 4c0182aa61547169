"""The statistics of a comparison are SciPy's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from biollm.evals import statistics

CASES = 1_000


def test_the_sign_test_is_scipys() -> None:
    chance = random.Random(1)
    for _ in range(CASES):
        wins, losses = chance.randrange(60), chance.randrange(60)
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert statistics.sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_standard_error_is_scipys_where_each_input_is_its_own_cluster() -> None:
    chance = random.Random(2)
    for _ in range(CASES):
        values = [chance.choice((-1.0, 0.0, 0.5, 1.0)) for _ in range(chance.randrange(2, 80))]
        assert statistics.standard_error([[value] for value in values]) == pytest.approx(
            stats.sem(values, ddof=0), rel=1e-9, abs=1e-12
        )


def test_the_standard_error_of_clusters_is_that_of_their_sums() -> None:
    chance = random.Random(3)
    for _ in range(CASES):
        clusters = [[chance.gauss(0, 1) for _ in range(chance.randrange(1, 5))] for _ in range(chance.randrange(2, 30))]
        values = np.concatenate(clusters)
        sums = [np.sum(np.array(each) - values.mean()) for each in clusters]
        expected = math.sqrt(np.sum(np.square(sums))) / len(values)
        assert statistics.standard_error(clusters) == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_of_two_values_is_scipys_binomial_distribution() -> None:
    chance = random.Random(4)
    for _ in range(CASES):
        count = chance.randrange(2, 200)
        ones = chance.randrange(count + 1)
        found = statistics.bootstrap([[1.0]] * ones + [[0.0]] * (count - ones))
        assert found == tuple(stats.binom.ppf((0.025, 0.975), count, ones / count) / count)


DIFFERENCES: list[Callable[[random.Random], float]] = [
    lambda chance: chance.choice((-1.0, 0.0, 0.0, 1.0)),
    lambda chance: chance.choice((-1.0, -0.3, 0.0, 0.5, 0.7)),
    lambda chance: chance.gauss(0, 1),
]


def bounds(resamples: np.ndarray, low: float, high: float) -> bool:
    """Return whether 2.5% of resamples lie beyond each end, within four errors of two such shares of 10,000."""
    error, near = 4 * math.sqrt(2 * 0.025 * 0.975 / 10_000), 1e-9
    below, above = np.mean(resamples < low - near), np.mean(resamples > high + near)
    to_low, from_high = np.mean(resamples <= low + near), np.mean(resamples >= high - near)
    return bool(max(below, above) <= 0.025 + error and min(to_low, from_high) >= 0.025 - error)


@pytest.mark.parametrize("draw", DIFFERENCES)
def test_the_bootstrap_interval_is_scipys_within_its_own_error(draw: Callable[[random.Random], float]) -> None:
    chance = random.Random(4)
    for _ in range(10):
        values = [draw(chance) for _ in range(40)]
        found = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1)
        assert bounds(found.bootstrap_distribution, *statistics.bootstrap([[value] for value in values]))


def test_the_bootstrap_interval_of_unequal_clusters_is_scipys_of_their_sums() -> None:
    chance = random.Random(6)
    clusters = [[chance.choice((-1.0, 0.0, 1.0)) for _ in range(chance.randrange(1, 6))] for _ in range(40)]

    def mean(chosen: np.ndarray) -> float:
        return fmean(value for at in chosen for value in clusters[int(at)])

    found = stats.bootstrap((np.arange(40),), mean, vectorized=False, n_resamples=10_000, method="percentile", rng=1)
    assert bounds(found.bootstrap_distribution, *statistics.bootstrap(clusters))


def test_inputs_of_one_file_count_as_one() -> None:
    values = [1.0, -1.0, 0.0, 1.0, 0.0] * 4
    alone = statistics.bootstrap([[value] for value in values])
    together = statistics.bootstrap([[value] * 5 for value in values])
    assert together == alone, "five answers on one file say no more than one"


def test_the_interval_is_the_same_each_time() -> None:
    assert statistics.bootstrap([[1.0], [0.0]]) == statistics.bootstrap([[1.0], [0.0]])


@pytest.mark.slow
def test_so_many_inputs_show_the_difference_four_times_of_five() -> None:
    chance = random.Random(5)
    share, difference = 0.3, 0.1  # of inputs that differ, of the means

    def draw(count: int) -> list[float]:
        up = (share + difference) / 2
        return [1.0 if (x := chance.random()) < up else -1.0 if x < share else 0.0 for _ in range(count)]

    pilot = draw(4_000)
    needed = statistics.inputs_needed([[value] for value in pilot], fmean(pilot))
    shown = 0
    for _ in range(1_000):
        values = draw(needed)
        shown += abs(fmean(values)) > 1.96 * stats.sem(values)
    assert shown / 1_000 == pytest.approx(0.8, abs=0.05)


def test_where_nothing_differs_a_bound_is_used() -> None:
    assert statistics.inputs_needed([[0.0]] * 40, 0.05) == math.ceil((1.959964 + 0.841621) ** 2 * 3 / 40 / 0.05**2)
