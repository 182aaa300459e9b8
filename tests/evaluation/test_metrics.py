"""Names of metrics, and that their sums are the same for any number of ranks, order and tiling of users."""

import json
import math
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sibra_dist.data.dataset import Csr
from sibra_dist.errors import ConfigError, SibraError
from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.comparisons import Comparisons, rank_and_compare
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.metrics import (
    CATALOG_METRICS,
    MAX_USERS,
    USER_METRICS,
    VALUE_BITS,
    CatalogTallies,
    UserAverages,
    at_cutoffs,
    features_of,
    parse_metric,
    split_metrics,
)
from sibra_dist.evaluation.ranking import hits as hits_of
from sibra_dist.evaluation.user_metrics import Lists

# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("metric", ["ndcg@10", "hit_rate@1", "coverage@100", "user_coverage@7", "ild:genres@3"])
def test_known_metrics_are_parsed(metric: str) -> None:
    name, k = parse_metric(metric)
    assert f"{name}@{k}" == metric


def test_a_metric_over_all_candidates_has_no_cutoff_and_appears_once() -> None:
    assert parse_metric("auc") == ("auc", 0)
    names = EvaluationConfig(metrics=("recall", "auc", "gini"), cutoffs=(5, 10)).names
    assert names == ["recall@5", "recall@10", "auc", "gini@5", "gini@10"]


def test_the_configuration_accepts_every_metric() -> None:
    names = EvaluationConfig(metrics=(*USER_METRICS, *CATALOG_METRICS), cutoffs=(1,)).names
    assert [parse_metric(name)[0] for name in names] == [*USER_METRICS, *CATALOG_METRICS]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("ndgc@10", "did you mean ndcg?"),
        ("NDCG@10", "did you mean ndcg?"),
        ("@10", "known here: aclt"),
        ("auc@10", "it has no cutoff; write auc"),
        ("auc@", "it has no cutoff; write auc"),
        ("ndcg@10/sampled-100", "whole number from 1 to 10000"),
        ("auc/sampled-100", "known here: aclt"),
        ("popreo@5", "did you mean pop_reo?"),
        ("ild@10", "ild:FEATURE"),
        ("ild:@10", "ild:FEATURE"),
        ("ndcg:genres@10", "there is no metric 'ndcg:genres'"),
        ("ild:genres", "write for example ild:genres@10"),
        ("ndcg", "write for example ndcg@10"),
        ("ndcg@", "whole number from 1 to 10000"),
        ("ndcg@0", "whole number from 1 to 10000"),
        ("ndcg@10001", "whole number from 1 to 10000"),
        ("ndcg@99999999999", "whole number from 1 to 10000"),
        ("ndcg@-1", "whole number from 1 to 10000"),
        ("ndcg@1.5", "whole number from 1 to 10000"),
        ("ndcg@010", "whole number from 1 to 10000"),
        ("ndcg@٣", "whole number from 1 to 10000"),
        ("ndcg@10\n", "whole number from 1 to 10000"),
    ],
)
def test_other_names_are_refused_with_what_to_write(metric: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_metric(metric)
    assert message in str(caught.value)


def test_metrics_are_split_by_what_they_measure_and_keep_their_order() -> None:
    names = ["gini@5", "recall@10", "coverage@10", "ndcg@5", "ild:genres@2", "auc"]
    assert split_metrics(names) == (["recall@10", "ndcg@5", "ild:genres@2", "auc"], ["gini@5", "coverage@10"])


def test_features_that_metrics_read_are_named_once() -> None:
    assert features_of(["ild:genres@5", "ndcg@5", "ild:cover@5", "ild:genres@10"]) == ["genres", "cover"]


def test_no_name_is_in_both_tables() -> None:
    assert not USER_METRICS.keys() & CATALOG_METRICS.keys()


# ----------------------------------------------------------------------------------------------------------- averages

AVERAGED = at_cutoffs([*USER_METRICS], (1, 3, 10))
COUNTED = at_cutoffs([*CATALOG_METRICS], (3, 10))
NUM_CANDIDATES = 40
SPREAD = 61
"""Users that ranks divide among them."""
CATALOG = Catalog.of(torch.arange(NUM_CANDIDATES + 5) ** 2, torch.arange(NUM_CANDIDATES), num_users=NUM_CANDIDATES**2)


def add(averages: UserAverages, lists: Lists) -> None:
    averages.update(averages.per_user(lists), lists.num_relevant)


class Users(NamedTuple):
    """Users who may have fewer than ten candidates left; a few have nothing relevant."""

    lists: Lists
    relevant: Tensor
    """bool [U, C]"""
    masked: Tensor
    """bool [U, C]"""

    def add(self, part: Tensor, averages: UserAverages, tallies: CatalogTallies) -> None:
        """Add those of some rows."""
        hits, num_relevant, items, catalog, comparisons = self.lists
        assert items is not None
        assert comparisons is not None
        compared = Comparisons(*(counts[part] for counts in comparisons))
        add(averages, Lists(hits[part], num_relevant[part], items[part], catalog, compared))
        relevant, masked = (pairs[part].nonzero()[:, 1] for pairs in (self.relevant, self.masked))
        tallies.update(items[part], hits[part], relevant, masked)


def users(count: int) -> Users:
    """Some users, ranked by scores with many ties."""
    generator = torch.Generator().manual_seed(count)
    shape = count, NUM_CANDIDATES
    scores = torch.randint(9, shape, generator=generator).float()
    masked = torch.rand(shape, generator=generator) < torch.rand(count, 1, generator=generator)
    relevant = ~masked & (torch.rand(shape, generator=generator) < 0.2 * torch.rand(count, 1, generator=generator))
    scores[masked] = -math.inf
    lengths = relevant.sum(dim=1)
    rows = Csr(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), relevant.nonzero()[:, 1].int())
    found, comparisons = rank_and_compare(lambda start, stop: scores[:, start:stop], rows, NUM_CANDIDATES, 10, 7)
    found_hits = hits_of(found.items, rows, NUM_CANDIDATES)
    return Users(Lists(found_hits, lengths, found.items, CATALOG, comparisons), relevant, masked)


def measure(parts: list[Tensor], count: int) -> dict[str, float]:
    """All metrics of the users of `parts`, added part by part."""
    averages, tallies = UserAverages(AVERAGED), CatalogTallies(COUNTED, CATALOG)
    everyone = users(count)
    for part in parts:
        everyone.add(part, averages, tallies)
    return averages.compute() | tallies.compute()


def test_an_average_is_that_of_the_users_with_something_relevant() -> None:
    averages = UserAverages(["recall@2", "mrr@1"])
    add(averages, Lists(torch.tensor([[True, False], [False, False], [False, True]]), torch.tensor([2, 0, 1])))
    expected = {"recall@2": 0.75, "mrr@1": 0.5, "num_users": 2, "num_users_without_relevant": 1}
    assert averages.compute() == expected


def test_values_by_user_are_in_the_order_of_the_metrics_and_nan_where_nothing_is_relevant() -> None:
    averages = UserAverages(["precision@2", "recall@1"])
    found = averages.per_user(Lists(torch.tensor([[True, False], [False, False]]), torch.tensor([4, 0])))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.25], [math.nan] * 2], dtype=torch.float64), equal_nan=True)


def test_an_average_over_no_user_is_nan() -> None:
    found = UserAverages(["ndcg@2"]).compute()
    assert math.isnan(found.pop("ndcg@2"))
    assert found == {"num_users": 0, "num_users_without_relevant": 0}


def test_averages_refuse_lists_shorter_than_a_cutoff() -> None:
    with pytest.raises(ValueError, match="ndcg@3 of lists of 2"):
        UserAverages(["ndcg@3"]).per_user(Lists(torch.zeros(1, 2, dtype=torch.bool), torch.tensor([1])))


def test_a_value_is_as_close_as_the_unit_promises() -> None:
    averages = UserAverages(AVERAGED)
    everyone = users(60)
    values = averages.per_user(everyone.lists)
    for user in (everyone.lists.num_relevant > 0).nonzero():
        averages.reset()
        everyone.add(user, averages, CatalogTallies([], CATALOG))
        exact = values[user].squeeze(0).tolist()
        found = averages.compute()
        assert [found[name] for name in AVERAGED] == pytest.approx(exact, rel=0, abs=2 ** -(VALUE_BITS + 1))


def test_the_largest_sum_is_held_and_more_users_are_refused() -> None:
    averages = UserAverages(["aclt@100"])
    averages.num_users.fill_(MAX_USERS)
    averages.wholes.fill_(MAX_USERS * 100)
    averages.fractions.fill_(MAX_USERS << VALUE_BITS)
    assert averages.compute()["aclt@100"] == 101
    averages.num_users += 1
    with pytest.raises(SibraError, match="evaluate a sample"):
        averages.compute()


@given(order=st.permutations(range(30)), size=st.integers(1, 31))
def test_any_order_and_tiling_of_users_gives_the_same_bits(order: list[int], size: int) -> None:
    assert measure(list(torch.tensor(order).split(size)), 30) == measure([torch.arange(30)], 30)


def test_reset_forgets_everything() -> None:
    averages = UserAverages(["recall@1"])
    add(averages, Lists(torch.tensor([[True]]), torch.tensor([1])))
    averages.reset()
    add(averages, Lists(torch.tensor([[False]]), torch.tensor([1])))
    assert averages.compute() == {"recall@1": 0, "num_users": 1, "num_users_without_relevant": 0}


def run_rank(rank: int, world_size: int, folder: str, shares: list[list[int]]) -> None:
    """What one rank does: measure its share of the users in tiles, then again after rank 0 alone has seen more."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    everyone = users(SPREAD)
    averages, tallies, nothing = UserAverages(AVERAGED), CatalogTallies(COUNTED, CATALOG), CatalogTallies([], CATALOG)
    for part in torch.tensor(shares[rank], dtype=torch.int64).split(7) if shares[rank] else ():
        everyone.add(part, averages, tallies)
    found = [averages.compute() | tallies.compute() | nothing.compute()]
    if rank == 0:
        everyone.add(torch.arange(SPREAD), averages, tallies)
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
