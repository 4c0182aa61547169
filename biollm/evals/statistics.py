"""Whether a difference between two models may be chance: exact tests, bootstrap intervals, sample sizes.

SciPy has these, at 100 MB; the tests compare with it. Paired differences and errors by cluster follow Miller, "Adding
Error Bars to Evals" (arXiv 2411.00640).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist

RESAMPLES = 10_000
_SEED = 20260101  # so that a report says the same twice
_QUANTILES = sum(NormalDist().inv_cdf(share) for share in (0.975, 0.8))  # 5% two-sided, 80% power


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided exact p-value of so many wins and losses; of 0 and 1 scores it is McNemar's test."""
    count, least = wins + losses, min(wins, losses)
    tail = sum(math.comb(count, each) for each in range(least + 1))
    return min(1.0, 2 * tail / 2**count)


def bootstrap(clusters: Sequence[Sequence[float]], resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95% interval of the mean over all values, by resampling whole clusters (percentile method)."""
    # A complex number sums both at once, in C: the values of a cluster, and their count.
    sums = [complex(math.fsum(each), len(each)) for each in clusters]
    choose = random.Random(_SEED).choices  # noqa: S311 # statistics
    drawn = (sum(choose(sums, k=len(sums))) for _ in range(resamples))
    means = sorted(each.real / each.imag for each in drawn)
    return _percentile(means, 0.025), _percentile(means, 0.975)


def standard_error(clusters: Sequence[Sequence[float]]) -> float:
    """Return the standard error of the mean over all values, which within a cluster may depend on each other."""
    values = [value for each in clusters for value in each]
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum(math.fsum(value - mean for value in each) ** 2 for each in clusters)) / len(values)


def inputs_needed(clusters: Sequence[Sequence[float]], difference: float) -> int:
    """Return how many inputs show a mean difference of that size with 80% power, as different as these are.

    Where none of n differs, as if 3 of n did: the upper 95% bound of what is possible (rule of three).
    """
    count = sum(map(len, clusters))
    variance = standard_error(clusters) ** 2 * count or min(1.0, 3 / count)
    return math.ceil(_QUANTILES**2 * variance / difference**2)


def _percentile(ordered: Sequence[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
