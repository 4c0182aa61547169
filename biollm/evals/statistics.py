"""Whether a difference between two models may be chance: exact tests, bootstrap intervals, sample sizes.

SciPy has these, at 100 MB; the tests compare with it. Paired differences and errors by cluster follow Miller, "Adding
Error Bars to Evals" (arXiv 2411.00640).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from statistics import NormalDist

_RESAMPLES = 10_000
_SEED = 20260101  # so that a report says the same twice
_FEW = range(-8, 9)  # sums of a cluster whose resamples have so few sums that all of them are counted
_NEGLIGIBLE = 1e-15  # probability
_QUANTILES = sum(NormalDist().inv_cdf(share) for share in (0.975, 0.8))  # 5% two-sided, 80% power


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided exact p-value of so many wins and losses; of 0 and 1 scores it is McNemar's test."""
    count, least = wins + losses, min(wins, losses)
    tail = sum(math.comb(count, each) for each in range(least + 1))
    return min(1.0, 2 * tail / 2**count)


def bootstrap(clusters: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95% interval of the mean over all values, by resampling whole clusters (percentile method).

    Exact where clusters are equally large and their sums small whole numbers, as the differences of right and wrong
    answers are; else from 10,000 resamples.
    """
    sums, sizes = [math.fsum(each) for each in clusters], [len(each) for each in clusters]
    if len(set(sizes)) == 1 and all(each in _FEW for each in sums):
        means = {total / sum(sizes): share for total, share in _resampled(sums).items()}
    else:
        # A complex number sums both at once, in C: the values of a cluster, and their count.
        pairs, choose = list(map(complex, sums, sizes)), random.Random(_SEED).choices  # noqa: S311 # statistics
        drawn = (sum(choose(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
        means = Counter(each.real / each.imag for each in drawn)
    ordered = sorted(means)
    upto = list(accumulate(means[mean] for mean in ordered))
    low, high = (ordered[bisect_left(upto, share * upto[-1])] for share in (0.025, 0.975))
    return low, high


def _resampled(values: Sequence[float]) -> dict[float, float]:
    """Return each sum of as many values, drawn with replacement, with its probability."""
    one = {value: count / len(values) for value, count in Counter(values).items()}
    found = {0.0: 1.0}
    for bit in f"{len(values):b}":  # doubling the number of values, from one bit of it to the next
        found = _added(found, found)
        found = _added(found, one) if bit == "1" else found
    return found


def _added(one: Mapping[float, float], other: Mapping[float, float]) -> dict[float, float]:
    """Return the distribution of the sum of two independent variables."""
    found: defaultdict[float, float] = defaultdict(float)
    for (value, share), (more, other_share) in product(one.items(), other.items()):
        found[value + more] += share * other_share
    return {value: share for value, share in found.items() if share > _NEGLIGIBLE}


def standard_error(clusters: Sequence[Sequence[float]]) -> float:
    """Return the standard error of the mean over all values, which within a cluster may depend on each other."""
    values = [value for each in clusters for value in each]
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum(math.fsum(value - mean for value in each) ** 2 for each in clusters)) / len(values)


def inputs_needed(clusters: Sequence[Sequence[float]], difference: float) -> int:
    """Return how many inputs show a mean difference of that size with 80% power, as different as these are.

    Where none of n differs, as if 3 of n did: the upper 95% bound of what is possible (rule of three). One shows nothing.
    """
    count = sum(map(len, clusters))
    variance = standard_error(clusters) ** 2 * count or min(1.0, 3 / count)
    return max(2, math.ceil(_QUANTILES**2 * variance / difference**2))
