import json
import math
import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional import retrieval

from sibra_dist.errors import ConfigError, SibraError
from sibra_dist.evaluation.metrics import (
    CATALOG_METRICS,
    MAX_USERS,
    USER_METRICS,
    VALUE_BITS,
    CatalogTallies,
    UserAverages,
    entropy,
    gini,
    parse_metric,
    split_metrics,
)

# Relevance of all candidates of one user in ranked order, at least one relevant.
ranked_relevance = st.lists(st.booleans(), min_size=1, max_size=12).filter(any)
cutoffs = st.integers(1, 15)


def value(name: str, relevance: list[bool], k: int) -> float:
    """The metric of one user: its list is cut or filled up to k, as ranking does."""
    hits = torch.tensor([(relevance + [False] * k)[:k]])
    found = USER_METRICS[name](hits, torch.tensor([sum(relevance)]), k)
    assert found.dtype == torch.float64
    assert found.shape == (1,)
    return float(found)


# ---------------------------------------------------------------------------------------------------- one user's list


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("ndcg", retrieval.retrieval_normalized_dcg),
        ("recall", retrieval.retrieval_recall),
        ("precision", retrieval.retrieval_precision),
        ("hit_rate", retrieval.retrieval_hit_rate),
        ("mrr", retrieval.retrieval_reciprocal_rank),
    ],
)
@given(relevance=ranked_relevance, k=cutoffs)
def test_metric_agrees_with_torchmetrics(name: str, oracle: Callable[..., Tensor], relevance: list[bool], k: int) -> None:
    scores = torch.arange(len(relevance), 0, -1).float()
    expected = float(oracle(scores, torch.tensor(relevance), top_k=k))
    assert value(name, relevance, k) == pytest.approx(expected, abs=1e-6)


@given(relevance=ranked_relevance, k=cutoffs)
def test_map_is_torchmetrics_over_what_could_be_hit_rather_than_what_was(relevance: list[bool], k: int) -> None:
    scores = torch.arange(len(relevance), 0, -1).float()
    over_hits = float(retrieval.retrieval_average_precision(scores, torch.tensor(relevance), top_k=k))
    expected = over_hits * sum(relevance[:k]) / min(k, sum(relevance))
    assert value("map", relevance, k) == pytest.approx(expected, abs=1e-6)


@given(relevance=ranked_relevance, k=cutoffs)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(relevance: list[bool], k: int) -> None:
    precision, recall = sum(relevance[:k]) / k, sum(relevance[:k]) / sum(relevance)
    expected = 2 * precision * recall / (precision + recall) if precision else 0.0
    assert value("f1", relevance, k) == pytest.approx(expected, rel=1e-12)


# Three relevant candidates, of which those at ranks 2 and 4 of the first five are found.
TABLE = {
    "ndcg": (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / math.log2(4)),
    "recall": 2 / 3,
    "precision": 2 / 5,
    "map": (1 / 2 + 2 / 4) / 3,
    "hit_rate": 1.0,
    "mrr": 1 / 2,
    "f1": 4 / 8,
}


@pytest.mark.parametrize("name", USER_METRICS)
def test_metric_of_a_list_worked_by_hand(name: str) -> None:
    hits = torch.tensor([[False, True, False, True, False, True]])  # a hit after the cutoff counts for nothing
    found = USER_METRICS[name](hits, torch.tensor([3]), 5)
    assert found.item() == pytest.approx(TABLE[name], abs=1e-11)


@pytest.mark.parametrize("name", USER_METRICS)
@given(relevance=ranked_relevance, k=cutoffs)
def test_metric_is_a_share_and_never_falls_when_a_hit_moves_up(name: str, relevance: list[bool], k: int) -> None:
    before = value(name, relevance, k)
    assert 0 <= before <= 1
    for place in range(1, len(relevance)):
        if relevance[place] > relevance[place - 1]:
            better = [*relevance]
            better[place - 1], better[place] = True, False
            assert value(name, better, k) >= before


@pytest.mark.parametrize("name", USER_METRICS)
def test_metric_of_a_perfect_list_is_one(name: str) -> None:
    assert value(name, [True] * 4 + [False] * 3, 4) == 1


@pytest.mark.parametrize("name", USER_METRICS)
@pytest.mark.parametrize("num_relevant", [0, 2])
def test_metric_without_hits_is_zero(name: str, num_relevant: int) -> None:
    assert USER_METRICS[name](torch.zeros(1, 3, dtype=torch.bool), torch.tensor([num_relevant]), 3).tolist() == [0]


@pytest.mark.parametrize("function", [*USER_METRICS.values(), *CATALOG_METRICS.values()])
def test_metric_says_its_direction_and_its_empty_case(function: Callable[..., object]) -> None:
    text = " ".join((function.__doc__ or "").lower().split())
    assert "higher is" in text or "lower is" in text
    assert re.search("[;.] 0 (for|where|without) ", text)


# ------------------------------------------------------------------------------------------------------ the catalogue

NOBODYS = torch.tensor([])
"""The popularity of candidates, for metrics that do not read it."""
exposures = st.lists(st.integers(0, 20), min_size=2, max_size=12).filter(any)


@given(exposures)
def test_gini_is_the_mean_difference_between_candidates(exposure: list[int]) -> None:
    # Half the relative mean absolute difference, scaled so that one candidate with everything gives 1.
    size = len(exposure)
    differences = sum(abs(one - other) for one in exposure for other in exposure)
    expected = differences / (2 * size * sum(exposure)) * size / (size - 1)
    assert gini(torch.tensor(exposure), NOBODYS) == pytest.approx(expected, rel=1e-12)


@given(exposures)
def test_entropy_is_shannons(exposure: list[int]) -> None:
    shares = [count / sum(exposure) for count in exposure if count]
    expected = sum(-share * math.log2(share) for share in shares)
    assert entropy(torch.tensor(exposure), NOBODYS) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("exposure", "expected"),
    [
        ([5, 5, 5, 5], {"coverage": 1.0, "gini": 0.0, "entropy": 2.0, "arp": 2.5}),
        ([0, 8, 0, 0], {"coverage": 0.25, "gini": 1.0, "entropy": 0.0, "arp": 2.0}),
        ([3, 0, 0, 3], {"coverage": 0.5, "gini": 2 / 3, "entropy": 1.0, "arp": 2.5}),
        ([7], {"coverage": 1.0, "gini": 0.0, "entropy": 0.0, "arp": 1.0}),
        ([0, 0], {"coverage": 0.0, "gini": 0.0, "entropy": 0.0, "arp": 0.0}),
        ([], {"coverage": 0.0, "gini": 0.0, "entropy": 0.0, "arp": 0.0}),
    ],
)
def test_catalogue_metrics_worked_by_hand(exposure: list[int], expected: dict[str, float]) -> None:
    """Candidates have 1, 2, 3, ... training interactions."""
    tally = torch.tensor(exposure, dtype=torch.int64)
    popularity = torch.arange(1, len(exposure) + 1)
    assert {name: function(tally, popularity) for name, function in CATALOG_METRICS.items()} == pytest.approx(expected)


def test_gini_of_a_large_catalogue_is_exact() -> None:
    exposure = torch.full((1_000_000,), 10**6)
    exposure[0] = 0
    # One of C candidates has nothing and the others share alike: (C - 1) differences of a mean share of 1 / (C - 1).
    assert gini(exposure, NOBODYS) == pytest.approx(1 / 999_999, rel=1e-12)


def test_tallies_count_each_cutoff_and_no_missing_candidate() -> None:
    tallies = CatalogTallies(["coverage@1", "gini@3", "coverage@3"], torch.arange(4))
    tallies.update(torch.tensor([[0, 1, -1], [0, 2, 1]]))
    tallies.update(torch.tensor([[-1, -1, -1]]))
    assert tallies.compute() == {"coverage@1": 0.25, "gini@3": gini(torch.tensor([2, 2, 1, 0]), NOBODYS), "coverage@3": 0.75}


def test_tallies_refuse_lists_shorter_than_a_cutoff() -> None:
    with pytest.raises(ValueError, match="cutoff of 3"):
        CatalogTallies(["coverage@3"], torch.arange(4)).update(torch.tensor([[0, 1]]))


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("metric", ["ndcg@10", "hit_rate@1", "coverage@100"])
def test_known_metrics_are_parsed(metric: str) -> None:
    name, k = parse_metric(metric)
    assert f"{name}@{k}" == metric


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("ndgc@10", "did you mean ndcg?"),
        ("NDCG@10", "did you mean ndcg?"),
        ("@10", "known here: arp"),
        ("ndcg", "write for example ndcg@10"),
        ("ndcg@", "positive whole number"),
        ("ndcg@0", "positive whole number"),
        ("ndcg@-1", "positive whole number"),
        ("ndcg@1.5", "positive whole number"),
        ("ndcg@010", "positive whole number"),
        ("ndcg@٣", "positive whole number"),
        ("ndcg@10\n", "positive whole number"),
    ],
)
def test_other_names_are_refused_with_what_to_write(metric: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_metric(metric)
    assert message in str(caught.value)


def test_metrics_are_split_by_what_they_measure_and_keep_their_order() -> None:
    names = ["gini@5", "recall@10", "coverage@10", "ndcg@5"]
    assert split_metrics(names) == (["recall@10", "ndcg@5"], ["gini@5", "coverage@10"])


def test_no_name_is_in_both_tables() -> None:
    assert not USER_METRICS.keys() & CATALOG_METRICS.keys()


# ----------------------------------------------------------------------------------------------------------- averages

AVERAGED = [f"{name}@{k}" for name in USER_METRICS for k in (1, 3, 10)]
COUNTED = [f"{name}@{k}" for name in CATALOG_METRICS for k in (3, 10)]
NUM_CANDIDATES = 40
SPREAD = 61
"""Users that ranks divide among them."""


def users(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Recommended candidates, hits and numbers of relevant candidates of some users; a few have nothing relevant."""
    generator = torch.Generator().manual_seed(count)
    items = torch.rand(count, NUM_CANDIDATES, generator=generator).argsort(dim=1)[:, :10]
    num_relevant = torch.randint(0, 9, (count,), generator=generator)
    hits = torch.rand(count, 10, generator=generator) < 0.3
    hits &= hits.cumsum(dim=1) <= num_relevant[:, None]
    return items, hits, num_relevant


def measure(parts: list[Tensor], count: int) -> dict[str, float]:
    """All metrics of the users of `parts`, added part by part."""
    averages, tallies = UserAverages(AVERAGED), CatalogTallies(COUNTED, torch.arange(NUM_CANDIDATES) ** 2)
    items, hits, num_relevant = users(count)
    for part in parts:
        averages.update(hits[part], num_relevant[part])
        tallies.update(items[part])
    return averages.compute() | tallies.compute()


def test_an_average_is_that_of_the_users_with_something_relevant() -> None:
    averages = UserAverages(["recall@2", "mrr@1"])
    averages.update(torch.tensor([[True, False], [False, False], [False, True]]), torch.tensor([2, 0, 1]))
    expected = {"recall@2": 0.75, "mrr@1": 0.5, "num_users": 2, "num_users_without_relevant": 1}
    assert averages.compute() == expected


def test_values_by_user_are_in_the_order_of_the_metrics_and_nan_where_nothing_is_relevant() -> None:
    averages = UserAverages(["precision@2", "recall@1"])
    found = averages.per_user(torch.tensor([[True, False], [False, False]]), torch.tensor([4, 0]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.25], [math.nan] * 2], dtype=torch.float64), equal_nan=True)


def test_an_average_over_no_user_is_nan() -> None:
    found = UserAverages(["ndcg@2"]).compute()
    assert math.isnan(found.pop("ndcg@2"))
    assert found == {"num_users": 0, "num_users_without_relevant": 0}


def test_averages_refuse_lists_shorter_than_a_cutoff() -> None:
    with pytest.raises(ValueError, match="ndcg@3 of lists of 2"):
        UserAverages(["ndcg@3"]).update(torch.zeros(1, 2, dtype=torch.bool), torch.tensor([1]))


def test_a_value_is_as_close_as_the_unit_promises() -> None:
    averages = UserAverages(AVERAGED)
    _, hits, num_relevant = users(60)
    for user in (num_relevant > 0).nonzero():
        averages.reset()
        averages.update(hits[user], num_relevant[user])
        exact = averages.per_user(hits[user], num_relevant[user]).squeeze(0).tolist()
        found = averages.compute()
        assert [found[name] for name in AVERAGED] == pytest.approx(exact, rel=0, abs=2 ** -(VALUE_BITS + 1))


def test_the_largest_sum_is_held_and_more_users_are_refused() -> None:
    averages = UserAverages(["recall@1"])
    averages.num_users.fill_(MAX_USERS)
    averages.totals.fill_(MAX_USERS << VALUE_BITS)
    assert averages.compute()["recall@1"] == 1
    averages.num_users += 1
    with pytest.raises(SibraError, match="evaluate a sample"):
        averages.compute()


@given(order=st.permutations(range(30)), size=st.integers(1, 31))
def test_any_order_and_tiling_of_users_gives_the_same_bits(order: list[int], size: int) -> None:
    assert measure(list(torch.tensor(order).split(size)), 30) == measure([torch.arange(30)], 30)


def test_reset_forgets_everything() -> None:
    averages = UserAverages(["recall@1"])
    averages.update(torch.tensor([[True]]), torch.tensor([1]))
    averages.reset()
    averages.update(torch.tensor([[False]]), torch.tensor([1]))
    assert averages.compute() == {"recall@1": 0, "num_users": 1, "num_users_without_relevant": 0}


def run_rank(rank: int, world_size: int, folder: str, shares: list[list[int]]) -> None:
    """What one rank does: measure its share of the users in tiles, then again after rank 0 alone has seen more."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    items, hits, num_relevant = users(SPREAD)
    averages, tallies, nothing = (
        UserAverages(AVERAGED),
        CatalogTallies(COUNTED, torch.arange(NUM_CANDIDATES) ** 2),
        CatalogTallies([], torch.arange(3)),
    )
    for part in torch.tensor(shares[rank], dtype=torch.int64).split(7) if shares[rank] else ():
        averages.update(hits[part], num_relevant[part])
        tallies.update(items[part])
    found = [averages.compute() | tallies.compute() | nothing.compute()]
    if rank == 0:
        averages.update(hits, num_relevant)
        tallies.update(items)
    found.append(averages.compute() | tallies.compute())
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("world_size", "idle"), [(1, 0), (2, 0), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_bits(world_size: int, idle: int, tmp_path: Path) -> None:
    # A random and uneven division of the users; `idle` ranks get none.
    generator = torch.Generator().manual_seed(world_size)
    owners = torch.randint(idle, world_size, (SPREAD,), generator=generator)
    shares = [(owners == rank).nonzero().squeeze(1).tolist() for rank in range(world_size)]
    torch.multiprocessing.spawn(run_rank, (world_size, str(tmp_path), shares), nprocs=world_size)

    everyone = torch.arange(SPREAD)
    once, twice = measure([everyone], SPREAD), measure([everyone, everyone], SPREAD)
    for rank in range(world_size):
        assert json.loads(Path(tmp_path, f"{rank}.json").read_text(encoding="utf-8")) == [once, twice]
