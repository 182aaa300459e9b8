"""Whether two models differ on the same users, beyond what the choice of the users would explain.

Differences are rounded to multiples of 2**-36, the unit in which averages are taken, and told as how often each occurs. So
differences that are equal in truth are tied, the order of the users does not matter, and a test takes as long as there are
distinct differences, which with ranked lists are few.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

UNIT: float = 2.0**-36
EXACT_UP_TO = 50
"""Differences other than 0 for which Wilcoxon's test counts all signs; beyond, the normal distribution is close."""
CONFIDENCE = 0.95
BLOCK = 2**22
"""Counts that the bootstrap draws at once."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Differences:
    """Differences of pairs, by how often each occurs."""

    values: Values
    """[d], ascending and distinct"""
    counts: npt.NDArray[np.int64]
    """[d], from 1 on"""

    @property
    def pairs(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Their mean: the sum is exact, and rounded once."""
        units = zip((self.values / UNIT).astype(np.int64).tolist(), self.counts.tolist(), strict=True)
        total: int = sum(value * count for value, count in units)
        return total / self.pairs * UNIT

    @property
    def deviation(self) -> float:
        """Their standard deviation, of n - 1 degrees of freedom."""
        return math.sqrt(float(self.counts @ (self.values - self.mean) ** 2) / (self.pairs - 1))


@dataclass(frozen=True)
class Outcome:
    """Of a two-sided test that differences are centred at 0."""

    statistic: float
    p_value: float


def differences(values: Values, reference: Values) -> Differences:
    """`values` - `reference`, both float64 [n], of the same users in the same order.

    Raises:
        ValueError: there are fewer than two pairs, or not as many of one as of the other, or one is not finite.
    """
    if values.shape != reference.shape or values.ndim != 1 or len(values) < 2:
        raise ValueError(f"two pairs or more are needed, not values {values.shape} and {reference.shape}")
    units = np.rint(values / UNIT) - np.rint(reference / UNIT)
    if not np.isfinite(units).all():
        raise ValueError("a value is not finite")
    found, counts = np.unique(units, return_counts=True)
    return Differences(found * UNIT, counts.astype(np.int64))


def t_test(found: Differences) -> Outcome:
    """Student's paired t-test: mean / (deviation / sqrt n), with n - 1 degrees of freedom (Student, 1908).

    Where all differences are equal, p is 1 if they are 0 and else 0.
    """
    mean, error = found.mean, found.deviation / math.sqrt(found.pairs)
    if mean == 0 or error == 0:
        return Outcome(0.0, 1.0) if mean == 0 else Outcome(math.copysign(math.inf, mean), 0.0)
    statistic = mean / error
    return Outcome(statistic, 2 * float(special.stdtr(found.pairs - 1, -abs(statistic))))


def wilcoxon(found: Differences) -> Outcome:
    """Wilcoxon's signed-rank test (Wilcoxon, 1945); the statistic is the sum of the ranks of positive differences.

    Differences of 0 are left out, and equal sizes share the mean of their ranks. The distribution is exact, ties included, for
    up to 50 differences; beyond, normal with the variance corrected for ties, without correction for continuity. p is 1
    where every difference is 0.
    """
    values, counts = found.values[found.values != 0], found.counts[found.values != 0]
    sizes, place = np.unique(np.abs(values), return_inverse=True)
    ties = np.zeros(len(sizes), np.int64)
    np.add.at(ties, place, counts)
    # Twice the rank, which is a whole number.
    doubled = 2 * ties.cumsum() - ties + 1
    number = int(ties.sum())
    statistic = int((doubled[place] * counts)[values > 0].sum())
    if number == 0:
        return Outcome(0.0, 1.0)
    if number <= EXACT_UP_TO:
        p_value = _exact(np.repeat(doubled, ties).tolist(), statistic)
    else:
        spread = number * (number + 1) * (2 * number + 1) / 24 - sum(tie**3 - tie for tie in ties.tolist()) / 48
        distance = statistic / 2 - number * (number + 1) / 4
        p_value = min(1.0, 2 * float(special.ndtr(-abs(distance) / math.sqrt(spread))))
    return Outcome(statistic / 2, p_value)


def _exact(doubled: Sequence[int], statistic: int) -> float:
    """How likely a sum of ranks is as far from its middle as this one, where every sign is as likely as the other."""
    ways = [1]  # of the signs, to each sum
    for rank in doubled:
        longer = [*ways, *[0] * rank]
        ways = [count + (longer[total - rank] if total >= rank else 0) for total, count in enumerate(longer)]
    distance = abs(2 * statistic - sum(doubled))
    return sum(count for total, count in enumerate(ways) if abs(2 * total - sum(doubled)) >= distance) / (1 << len(doubled))


def effect_size(found: Differences) -> float:
    """Cohen's d of paired differences, d_z: mean / standard deviation (Cohen, 1988).

    0 where every difference is 0, and infinite where all are the same other number.
    """
    mean, deviation = found.mean, found.deviation
    if mean == 0 or deviation == 0:
        return 0.0 if mean == 0 else math.copysign(math.inf, mean)
    return mean / deviation


def bootstrap_interval(found: Differences, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of the mean difference, over `resamples` draws of as many users (Efron, 1979).

    The same for the same seed. How often each difference is drawn is multinomial, so no users are drawn one by one.
    """
    random = np.random.default_rng(seed)
    shares = found.counts / found.pairs
    rows = max(BLOCK // len(shares), 1)
    sums = [
        random.multinomial(found.pairs, shares, size=min(rows, resamples - start)) @ found.values
        for start in range(0, resamples, rows)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(sums) / found.pairs, [tail, 1 - tail])
    return float(low), float(high)


def bonferroni(p_values: Sequence[float]) -> list[float]:
    """P times the number of tests, at most 1 (Bonferroni, 1936; Dunn, 1961)."""
    return [min(1.0, len(p_values) * p_value) for p_value in p_values]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm, 1979): never greater than Bonferroni's, and as safe.

    The i-th smallest of m, counted from 0, is taken times m - i, but is never smaller than the one before; at most 1.
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for number, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (len(p_values) - number) * p_values[place]))
        corrected[place] = least
    return corrected
