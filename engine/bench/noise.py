"""Statistics of a few noisy numbers: medians, quartiles, and whether two groups differ.

Theory of operation.  Times on a shared host have a floor and a long tail, so the figures are the median and the
quartiles.  An exact permutation test on ranks (Mann and Whitney's) decides whether two groups differ: if the group of
a number made no difference, how often would the ranks of the groups be as far apart?  The test assumes no
distribution, an outlier is only one rank, and nothing in it is random.

Pure.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# 9 and 9 make 48,620 ways to divide them, which takes a second; more are not needed for a chance of 1 in 1000.
GROUP_MAX = 9


class Spread(NamedTuple):
    """The median of some numbers, and their quartiles."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of one number, three times that number."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, middle, high)


def chance(first: Sequence[float], second: Sequence[float]) -> float:
    """How likely ranks this far apart are if the groups do not differ: 1 for none apart, never 0."""
    if not first or not second or max(len(first), len(second)) > GROUP_MAX:
        raise ValueError(f"groups of {len(first)} and {len(second)}; 1 to {GROUP_MAX} can be compared")
    pooled = [*first, *second]
    # Twice the mean rank of equal numbers, so that everything is a whole number: nothing is rounded.
    ranks = [sum((other < each) - (other > each) for other in pooled) for each in pooled]
    apart = abs(sum(ranks[: len(first)]))
    sums = [abs(sum(chosen)) for chosen in itertools.combinations(ranks, len(first))]
    return sum(each >= apart for each in sums) / len(sums)
