"""The statistics against values worked out by hand, closed forms, and the same written in plain Python."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sibra_dist.comparison import significance
from sibra_dist.comparison.significance import (
    UNIT,
    Differences,
    bonferroni,
    bootstrap_interval,
    differences,
    effect_size,
    holm,
    t_test,
    wilcoxon,
)

pairs_of_users = st.lists(st.tuples(*[st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])] * 2), min_size=2, max_size=9)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def of(*found: float) -> Differences:
    return differences(np.array(found, dtype=np.float64), np.zeros(len(found)))


def by_pairs(pairs: list[tuple[float, float]]) -> Differences:
    return differences(*(np.array(side) for side in zip(*pairs, strict=True)))


def test_equal_differences_are_counted_together_though_rounding_made_them_unlike() -> None:
    first, second = np.array([0.3, 0.2, 1.0]), np.array([0.1, 0.0, 1.0])
    assert 0.3 - 0.1 != 0.2 - 0.0
    found = differences(first, second)
    assert found.counts.tolist() == [1, 2]
    assert found.values.tolist() == pytest.approx([0, 0.2], abs=UNIT)
    assert found.pairs == 3


def test_the_mean_is_exact() -> None:
    values = [1.0, *[UNIT] * 3, -1.0]
    assert of(*values).mean == 3 * UNIT / 5


@pytest.mark.parametrize(
    ("values", "reference"),
    [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, math.nan], [0.0, 0.0]), ([1.0, 0.0], [math.inf, 0.0]), ([], [])],
)
def test_what_is_no_sample_of_pairs_is_refused(values: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError, match=r"two pairs|not finite"):
        differences(np.array(values), np.array(reference))


def student(t: float, degrees: int) -> float:
    """Two-sided p from the closed forms of Student's distribution for 1, 2 and 4 degrees of freedom."""
    t = abs(t)
    if degrees == 1:
        return 1 - 2 * math.atan(t) / math.pi
    if degrees == 2:
        return 1 - t / math.sqrt(2 + t * t)
    square = t * t / (1 + t * t / 4)
    return 1 - 2 * (3 / 8) * math.sqrt(square) * (1 - square / 12)


@pytest.mark.parametrize(
    ("found", "t"),
    [
        ([1, 3], 2.0),  # mean 2, deviation sqrt 2, error 1
        ([0, 1, 2], math.sqrt(3)),  # mean 1, deviation 1
        ([1, 2, 3, 4, 5], 3 * math.sqrt(2)),  # mean 3, deviation sqrt 2.5
        ([-1, -2, -3, -4, -5], -3 * math.sqrt(2)),
        ([-1, 1], 0.0),
    ],
)
def test_the_t_test_by_hand(found: list[float], t: float) -> None:
    outcome = t_test(of(*found))
    assert outcome.statistic == pytest.approx(t, rel=1e-12)
    assert outcome.p_value == pytest.approx(student(t, len(found) - 1), rel=1e-10)


def test_the_t_test_of_equal_differences() -> None:
    assert t_test(of(0, 0, 0)) == significance.Outcome(0.0, 1.0)
    assert t_test(of(0.5, 0.5)) == significance.Outcome(math.inf, 0.0)
    assert t_test(of(-0.5, -0.5)) == significance.Outcome(-math.inf, 0.0)


@given(pairs_of_users)
def test_the_t_test_and_the_effect_in_plain_python(pairs: list[tuple[float, float]]) -> None:
    found = [first - second for first, second in pairs]
    mean = sum(found) / len(found)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / (len(found) - 1))
    if deviation == 0 or mean == 0:
        assert math.isinf(effect_size(by_pairs(pairs))) == (mean != 0)
        return
    outcome = t_test(by_pairs(pairs))
    assert effect_size(by_pairs(pairs)) == pytest.approx(mean / deviation)
    assert outcome.statistic == pytest.approx(mean / deviation * math.sqrt(len(found)))
    expected = stats.ttest_rel(*zip(*pairs, strict=True)).pvalue
    assert outcome.p_value == pytest.approx(expected)


def wilcoxon_by_enumeration(found: list[float]) -> tuple[float, float]:
    """The statistic, and the share of all ways to choose signs in which it is as far from the middle."""
    sizes = [abs(value) for value in found if value]
    ranks = [sum(other < size for other in sizes) + (sizes.count(size) + 1) / 2 for size in sizes]
    statistic = sum(rank for rank, value in zip(ranks, [value for value in found if value], strict=True) if value > 0)
    middle = sum(ranks) / 2
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(ranks))]
    return statistic, sum(abs(total - middle) >= abs(statistic - middle) for total in sums) / len(sums)


@pytest.mark.parametrize(
    ("found", "statistic", "p_value"),
    [
        ([1, 2, 3, 4, 5], 15, 2 / 32),  # all signs alike: one way of 32, and its mirror image
        ([-1, 2, 3, 4, 5], 14, 4 / 32),
        ([0, 0, -1, 2], 2, 1.0),  # sums 0, 1, 2, 3 around 1.5: none is nearer than 2
        ([1, 1, -1], 4, 1.0),  # three ranks of 2
        ([0, 0], 0, 1.0),
    ],
)
def test_wilcoxon_by_hand(found: list[float], statistic: float, p_value: float) -> None:
    assert wilcoxon(of(*found)) == significance.Outcome(statistic, p_value)


@given(pairs_of_users)
def test_wilcoxon_by_enumeration_with_ties_and_zeros(pairs: list[tuple[float, float]]) -> None:
    statistic, p_value = wilcoxon_by_enumeration([first - second for first, second in pairs])
    outcome = wilcoxon(by_pairs(pairs))
    assert outcome.statistic == statistic
    assert outcome.p_value == pytest.approx(p_value, rel=1e-12)


def test_wilcoxon_is_exact_for_50_differences() -> None:
    draw = np.random.default_rng(0)
    found = draw.normal(0.3, 1, 50)
    expected = stats.wilcoxon(found, method="exact")
    assert wilcoxon(of(*found)).p_value == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize("distinct", [5, 1000])
def test_wilcoxon_of_many_is_the_normal_one_with_ties(distinct: int) -> None:
    draw = np.random.default_rng(1)
    found = draw.integers(-distinct, distinct + 2, 400) / 1024
    expected = stats.wilcoxon(found, zero_method="wilcox", correction=False, method="approx")
    outcome = wilcoxon(of(*found))
    assert outcome.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert min(outcome.statistic, (found != 0).sum() * ((found != 0).sum() + 1) / 2 - outcome.statistic) == expected.statistic


@given(pairs_of_users, st.randoms(use_true_random=False))
def test_neither_the_order_of_users_nor_which_comes_first_matters(
    pairs: list[tuple[float, float]], shuffle: random.Random
) -> None:
    found, mirrored = by_pairs(pairs), by_pairs([(second, first) for first, second in pairs])
    shuffled = pairs.copy()
    shuffle.shuffle(shuffled)
    again = by_pairs(shuffled)
    for test in (t_test, wilcoxon):
        assert test(again) == test(found)
        assert test(mirrored).p_value == pytest.approx(test(found).p_value, rel=1e-12)
        assert 0 <= test(found).p_value <= 1
    assert mirrored.mean == -found.mean
    assert effect_size(mirrored) == pytest.approx(-effect_size(found))
    assert bootstrap_interval(again, 50, 0) == bootstrap_interval(found, 50, 0)


def test_the_bootstrap_is_that_of_users_drawn_one_by_one() -> None:
    """Its quantiles lie as near to those of plain resampling as two of these lie to each other."""
    draw = random.Random(0)
    found = [draw.choice([-0.5, -0.125, 0.0, 0.0, 0.25, 1.0]) for _ in range(60)]
    means = sorted(sum(draw.choices(found, k=60)) / 60 for _ in range(20_000))
    low, high = bootstrap_interval(of(*found), 20_000, 7)
    assert (low, high) == pytest.approx((means[500], means[19_500]), abs=0.005)
    assert high - low == pytest.approx(2 * 1.96 * np.std(found) / math.sqrt(60), rel=0.05)


def test_the_bootstrap_is_that_of_its_seed_whatever_it_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of(*np.random.default_rng(0).normal(0.1, 1, 100))
    first = bootstrap_interval(found, 300, 0)
    assert bootstrap_interval(found, 300, 0) == first
    assert bootstrap_interval(found, 300, 1) != first
    monkeypatch.setattr(significance, "BLOCK", 700)
    assert bootstrap_interval(found, 300, 0) == pytest.approx(first, rel=1e-12)


def test_the_bootstrap_of_one_difference_is_that_difference() -> None:
    assert bootstrap_interval(of(0.25, 0.25, 0.25), 20, 0) == (0.25, 0.25)


def test_corrections_by_hand() -> None:
    found = [0.01, 0.04, 0.03, 0.005]
    assert bonferroni(found) == pytest.approx([0.04, 0.16, 0.12, 0.02])
    assert holm(found) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 0.04 alone would be 0.04, less than 2 * 0.03
    assert holm([0.5, 0.6]) == bonferroni([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == bonferroni([]) == []


@given(p_values)
def test_corrections_raise_and_keep_the_order(found: list[float]) -> None:
    for raw, safe, stepped in zip(found, bonferroni(found), holm(found), strict=True):
        assert raw <= stepped <= safe <= 1
    for one, other in itertools.combinations(range(len(found)), 2):
        if found[one] < found[other]:
            assert holm(found)[one] <= holm(found)[other]
    assert holm(found[:1]) == found[:1]
