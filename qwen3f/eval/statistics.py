"""Intervals of 95% for scores, and the paired comparison of two models on the same questions."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5% quantile
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over n questions, and its interval of 95%: low … high."""

    value: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean: Wilson's interval where each value is 0 or 1, else the bootstrap's. At least one value."""
    mean = math.fsum(values) / len(values)
    low, high = wilson(sum(values), len(values)) if set(values) <= {0.0, 1.0} else bootstrap(values)
    return Estimate(mean, low, high, len(values))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share (1927, doi:10.1080/01621459.1927.10502953)."""
    share = successes / n
    middle = share + Z * Z / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + Z * Z / n) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of means of values drawn again, with a fixed seed; independent of their order."""
    sample, rand = np.sort(np.asarray(values, dtype=np.float64)), np.random.default_rng(0)
    means = [sample[rand.integers(0, len(sample), len(sample))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def difference(before: Estimate, after: Estimate) -> Estimate:
    """after less before, of two samples whose intervals are known; n is the smaller one's.

    Newcombe's (1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I, method 10), which Zou and
    Donner (2008, doi:10.1002/sim.3095) state for any intervals. For the same questions it is wider than `paired`.
    """
    value = after.value - before.value
    low = value - math.hypot(after.value - after.low, before.high - before.value)
    high = value + math.hypot(after.high - after.value, before.value - before.low)
    return Estimate(value, low, high, min(before.n, after.n))


@dataclasses.dataclass(frozen=True)
class Paired:
    """B against A on the same n questions.

    Attributes:
        difference: B's mean less A's. low, high: its interval of 95%.
        better, worse: questions on which B scores higher, and lower, than A.
        p: two-sided probability that a difference at least as large arises by chance: McNemar's exact test for right or
            wrong answers, the sign test for other values, which is the same.
    """

    difference: float
    low: float
    high: float
    better: int
    worse: int
    n: int
    p: float


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare question by question. Right or wrong answers get Agresti and Min's interval (2005, doi:10.1002/sim.1781:
    Wald's, with half an answer added to each cell of the table), other values the bootstrap's."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n, better, worse = len(differences), sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if {*a, *b} <= {0.0, 1.0}:
        total, up, down = n + 2, better + 0.5, worse + 0.5
        middle = (up - down) / total
        half = Z * math.sqrt(max(0.0, up + down - (up - down) ** 2 / total)) / total
        low, high = middle - half, middle + half
    else:
        low, high = bootstrap(differences)
    return Paired(math.fsum(differences) / n, low, high, better, worse, n, mcnemar(better, worse))


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p of McNemar's test (1947, doi:10.1007/BF02295996): a fair coin for each question that
    changed."""
    changed, least = better + worse, min(better, worse)
    if not changed:
        return 1.0
    tail = ways = 1  # ways to choose k of those that changed, each made of the one before
    for k in range(least):
        ways = ways * (changed - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)
