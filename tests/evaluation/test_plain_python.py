"""Novelty, popularity bias, coverage of users and AUC against a second implementation, in plain Python from the scores."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sibra_dist.data.dataset import Csr
from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.comparisons import rank_and_compare
from sibra_dist.evaluation.ranking import hits
from sibra_dist.evaluation.tallies import CatalogTallies, UserAverages
from sibra_dist.evaluation.user_metrics import Lists

OF_USERS = ("auc", "aplt", "aclt", "epc", "efd")
OF_CATALOG = ("user_coverage", "pop_reo", "pop_rsp", "arp")


@dataclass(frozen=True)
class Case:
    """A few users and items. Candidates are the items from `first` on; what a user has seen is masked."""

    num_items: int
    first: int
    seen: list[set[int]]
    relevant: list[set[int]]
    scores: list[list[float]]
    k: int

    @property
    def popularity(self) -> list[int]:
        return [sum(item in own for own in self.seen) for item in range(self.num_items)]

    @property
    def num_trained(self) -> int:
        return sum(bool(own) for own in self.seen)

    def candidates(self, user: int) -> list[int]:
        """Best first."""
        left = [item for item in range(self.first, self.num_items) if item not in self.seen[user]]
        return sorted(left, key=lambda item: (-self.scores[user][item], item))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_items = draw(st.integers(1, 9))
    # Each item has a place in a user's life: 0 seen, 1 relevant, 2 neither. Of users who have seen all, no candidate is left.
    roles = draw(st.lists(st.lists(st.integers(0, 2), min_size=num_items, max_size=num_items), min_size=1, max_size=6))
    score = st.sampled_from([-1.0, 0.0, 1.0])
    first = draw(st.integers(0, num_items))
    return Case(
        num_items,
        first,
        seen=[{item for item, role in enumerate(own) if role == 0} for own in roles],
        relevant=[{item for item, role in enumerate(own) if role == 1 and item >= first} for own in roles],
        scores=[draw(st.lists(score, min_size=num_items, max_size=num_items)) for _ in roles],
        k=draw(st.integers(1, 10)),
    )


def head_of(case: Case) -> set[int]:
    head: set[int] = set()
    held, total = 0, sum(case.popularity)
    for item in sorted(range(case.num_items), key=lambda item: (-case.popularity[item], item)):
        if 10 * held >= 2 * total:
            break
        head.add(item)
        held += case.popularity[item]
    return head


def of_user(case: Case, user: int) -> dict[str, float]:
    ranked, relevant, popularity = case.candidates(user), case.relevant[user], case.popularity
    shown = ranked[: case.k]
    tail = [item for item in shown if item not in head_of(case)]
    irrelevant = [item for item in ranked if item not in relevant]
    own = case.scores[user]
    won = sum((own[item] > own[other]) + 0.5 * (own[item] == own[other]) for item in relevant for other in irrelevant)
    weights = [1 / math.log2(place + 2) for place in range(len(shown))]
    found = [(weight, popularity[item]) for weight, item in zip(weights, shown, strict=True) if item in relevant]
    rarest = min((count for count in popularity if count), default=0)
    novelty = [-weight * math.log2((count or rarest) / sum(popularity)) if rarest else 0.0 for weight, count in found]
    return {
        "auc": won / (len(relevant) * len(irrelevant)) if irrelevant else 0.5,
        "aplt": len(tail) / len(shown) if shown else 0.0,
        "aclt": float(len(tail)),
        "epc": sum(weight * (1 - count / max(case.num_trained, 1)) for weight, count in found) / sum(weights),
        "efd": sum(novelty) / sum(weights),
    }


def of_catalog(case: Case) -> dict[str, float]:
    head = head_of(case)
    users = range(len(case.seen))
    ranked = {user: case.candidates(user) for user in users}
    shown = [(user, item) for user in users for item in ranked[user][: case.k]]
    relevant = [(user, item) for user in users for item in case.relevant[user]]
    every = [(user, item) for user in users for item in ranked[user]]

    def variation(some: list[tuple[int, int]], of: list[tuple[int, int]]) -> float:
        rates = []
        for in_head in (True, False):
            those = [pair for pair in of if (pair[1] in head) == in_head]
            if not those:
                return 0.0
            rates.append(sum(pair in those for pair in some) / len(those))
        mean = sum(rates) / 2
        return math.sqrt(sum((rate - mean) ** 2 for rate in rates) / 2) / mean if mean else 0.0

    return {
        "user_coverage": sum(len(ranked[user]) >= case.k for user in users) / len(users),
        "pop_reo": variation([pair for pair in shown if pair in relevant], relevant),
        "pop_rsp": variation(shown, every),
        "arp": sum(case.popularity[item] for _, item in shown) / max(len(shown), 1),
    }


@pytest.mark.parametrize("tile_size", [1, 4, 10**9])
@given(case=cases())
def test_metrics_agree_with_plain_python(tile_size: int, case: Case) -> None:
    width = case.num_items - case.first
    scores = torch.tensor(case.scores)[:, case.first :]
    masked = torch.tensor([[item in own for item in range(case.num_items)] for own in case.seen])[:, case.first :]
    scores[masked] = -math.inf
    relevant = [sorted(item - case.first for item in own) for own in case.relevant]
    lengths = torch.tensor([0, *map(len, relevant)])
    rows = Csr(lengths.cumsum(0), torch.tensor([item for own in relevant for item in own], dtype=torch.int32))
    catalog = Catalog.of(torch.tensor(case.popularity), torch.arange(case.first, case.num_items), case.num_trained)

    found, comparisons = rank_and_compare(lambda start, stop: scores[:, start:stop], rows, width, case.k, tile_size)
    found_hits = hits(found.items, rows, width)
    averages = UserAverages([name if name == "auc" else f"{name}@{case.k}" for name in OF_USERS])
    values = averages.per_user(Lists(found_hits, rows.lengths(), found.items, catalog, comparisons))
    for user, own in enumerate(values.tolist()):
        if not relevant[user]:
            assert all(map(math.isnan, own))
        else:
            assert dict(zip(OF_USERS, own, strict=True)) == pytest.approx(of_user(case, user), abs=1e-9)

    tallies = CatalogTallies([f"{name}@{case.k}" for name in OF_CATALOG], catalog)
    tallies.update(found.items, found_hits, rows.indices, masked.nonzero()[:, 1])
    expected = {f"{name}@{case.k}": value for name, value in of_catalog(case).items()}
    assert tallies.compute() == pytest.approx(expected, abs=1e-12)
