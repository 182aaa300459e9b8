"""That sums over users are right, and the same for any number of ranks, order and tiling of users."""

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
from sibra_dist.errors import SibraError
from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.comparisons import Comparisons, rank_and_compare
from sibra_dist.evaluation.metrics import CATALOG_METRICS, MAX_USERS, USER_METRICS, VALUE_BITS, at_cutoffs
from sibra_dist.evaluation.ranking import hits as hits_of
from sibra_dist.evaluation.tallies import CatalogTallies, UserAverages
from sibra_dist.evaluation.user_metrics import Lists

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
    arguments = (world_size, str(tmp_path), shares)
    torch.multiprocessing.start_processes(run_rank, args=arguments, nprocs=world_size, start_method="forkserver")

    everyone = torch.arange(SPREAD)
    once, twice = measure([everyone], SPREAD), measure([everyone, everyone], SPREAD)
    for rank in range(world_size):
        assert json.loads(Path(tmp_path, f"{rank}.json").read_text(encoding="utf-8")) == [once, twice]
