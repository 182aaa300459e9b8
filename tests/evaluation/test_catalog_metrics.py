"""What all users are shown, against values worked out by hand; and the head and the long tail of a catalogue."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.catalog_metrics import Shown, entropy, gini
from sibra_dist.evaluation.metrics import CATALOG_METRICS
from sibra_dist.evaluation.tallies import CatalogTallies

exposures = st.lists(st.integers(0, 20), min_size=2, max_size=12).filter(any)
NO_PAIRS = torch.zeros(0, dtype=torch.int64)


def catalog(popularity: list[int]) -> Catalog:
    """A catalogue whose candidates are all items there are."""
    counts = torch.tensor(popularity, dtype=torch.int64)
    return Catalog.of(counts, torch.arange(len(counts)), num_users=max(popularity, default=0))


def shown(
    exposure: list[int],
    users: tuple[int, int] = (1, 1),
    hits: tuple[int, int] = (0, 0),
    relevant: tuple[int, int] = (0, 0),
    candidates: tuple[int, int] = (0, 0),
) -> Shown:
    """Candidates with 1, 2, 3, ... training interactions; users, and those with full lists; the others by group."""
    known = catalog([*range(1, len(exposure) + 1)])
    return Shown(torch.tensor(exposure, dtype=torch.int64), known, *users, hits, relevant, candidates)


@given(exposures)
def test_gini_is_the_mean_difference_between_candidates(exposure: list[int]) -> None:
    # Half the relative mean absolute difference, scaled so that one candidate with everything gives 1.
    size = len(exposure)
    differences = sum(abs(one - other) for one in exposure for other in exposure)
    expected = differences / (2 * size * sum(exposure)) * size / (size - 1)
    assert gini(shown(exposure)) == pytest.approx(expected, rel=1e-12)


@given(exposures)
def test_entropy_is_shannons(exposure: list[int]) -> None:
    shares = [count / sum(exposure) for count in exposure if count]
    expected = sum(-share * math.log2(share) for share in shares)
    assert entropy(shown(exposure)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


NOTHING = dict.fromkeys(CATALOG_METRICS, 0.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Of popularities 1 to 4, the fourth alone is the head: 4 of 10 interactions.
        (shown([5, 5, 5, 5]), {"coverage": 1.0, "gini": 0.0, "entropy": 2.0, "arp": 2.5, "user_coverage": 1.0}),
        (shown([0, 8, 0, 0], users=(8, 0)), {"coverage": 0.25, "gini": 1.0, "entropy": 0.0, "arp": 2.0, "user_coverage": 0.0}),
        (
            shown([3, 0, 0, 3], users=(4, 3)),
            {"coverage": 0.5, "gini": 2 / 3, "entropy": 1.0, "arp": 2.5, "user_coverage": 0.75},
        ),
        (shown([7]), {"coverage": 1.0, "gini": 0.0, "entropy": 0.0, "arp": 1.0}),
        (shown([0, 0], users=(0, 0)), NOTHING),
        (shown([], users=(0, 0)), NOTHING),
        # 3 of 6 against 1 of 10: shares of 1/2 and 1/10, a deviation of 1/5 and a mean of 3/10.
        (shown([1, 0, 0, 3], hits=(3, 1), relevant=(6, 10), candidates=(6, 10)), {"pop_reo": 2 / 3, "pop_rsp": 2 / 3}),
        (shown([3, 0, 3, 2], hits=(1, 3), relevant=(2, 6), candidates=(5, 15)), {"pop_reo": 0.0, "pop_rsp": 0.0}),
        # One group gets everything; one group is not there; nothing is found.
        (shown([0, 0, 0, 4], hits=(2, 0), relevant=(2, 9), candidates=(4, 9)), {"pop_reo": 1.0, "pop_rsp": 1.0}),
        (shown([0, 0, 4, 0], hits=(0, 2), relevant=(0, 9), candidates=(0, 9)), {"pop_reo": 0.0, "pop_rsp": 0.0}),
        (shown([0, 0, 0, 0], relevant=(2, 9), candidates=(4, 9)), {"pop_reo": 0.0, "pop_rsp": 0.0}),
    ],
)
def test_catalogue_metrics_worked_by_hand(given: Shown, expected: dict[str, float]) -> None:
    assert {name: CATALOG_METRICS[name](given) for name in expected} == pytest.approx(expected)


def test_gini_of_a_large_catalogue_is_exact() -> None:
    exposure = [0, *[10**6] * 999_999]
    # One of C candidates has nothing and the others share alike: (C - 1) differences of a mean share of 1 / (C - 1).
    assert gini(shown(exposure)) == pytest.approx(1 / 999_999, rel=1e-12)


@pytest.mark.parametrize(
    ("popularity", "head"),
    [
        ([2, 1, 1, 1, 5], {4}),
        ([1, 1, 1, 1, 1, 1], {0, 1}),  # one of six holds less than a fifth
        ([1, 1, 1, 1, 1], {0}),  # and one of five exactly that
        ([3, 0, 3, 4, 10, 80], {5}),
        ([0, 7, 0], {1}),
        ([0, 0], set()),
        ([], set()),
    ],
)
def test_the_head_is_the_fewest_most_popular_items_with_a_fifth_of_the_interactions(
    popularity: list[int], head: set[int]
) -> None:
    long_tail = catalog(popularity).long_tail.tolist()
    assert {item for item, outside in enumerate(long_tail) if not outside} == head


def test_all_items_decide_about_the_candidates() -> None:
    found = Catalog.of(torch.tensor([5, 0, 1, 0]), torch.tensor([1, 2]), num_users=4)
    assert found.popularity.tolist() == [0, 1]
    assert found.long_tail.tolist() == [True, True]
    assert (found.num_users, found.num_interactions, found.least_popularity) == (4, 6, 1)
    assert found.unseen_share.tolist() == [1, 0.75]
    assert found.information.tolist() == pytest.approx([math.log2(6)] * 2)


def test_nothing_is_novel_where_nobody_trained() -> None:
    found = catalog([0, 0])
    assert found.unseen_share.tolist() == [1, 1]
    assert found.information.tolist() == [0, 0]


def test_tallies_count_each_cutoff_and_no_missing_candidate() -> None:
    tallies = CatalogTallies(["coverage@1", "gini@3", "coverage@3", "user_coverage@3"], catalog([0, 1, 2, 3]))
    for items in ([[0, 1, -1], [0, 2, 1]], [[-1, -1, -1]]):
        tallies.update(torch.tensor(items), torch.zeros(len(items), 3, dtype=torch.bool), NO_PAIRS, NO_PAIRS)
    expected = {"coverage@1": 0.25, "gini@3": gini(shown([2, 2, 1, 0])), "coverage@3": 0.75, "user_coverage@3": 1 / 3}
    assert tallies.compute() == expected


def test_tallies_refuse_lists_shorter_than_a_cutoff() -> None:
    tallies = CatalogTallies(["coverage@3"], catalog([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="cutoff of 3"):
        tallies.update(torch.tensor([[0, 1]]), torch.zeros(1, 2, dtype=torch.bool), NO_PAIRS, NO_PAIRS)
