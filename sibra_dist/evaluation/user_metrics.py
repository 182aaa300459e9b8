"""Metrics of one user's ranked list, for a tile of users at once; see `sibra_dist.evaluation.metrics` for their names.

Sums within a list are taken over integers, multiples of 2**-40: then no order of addition, and no device, matters.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sibra_dist.evaluation.catalog import Catalog, of_listed
from sibra_dist.evaluation.comparisons import Comparisons
from sibra_dist.evaluation.diversity import mean_distance

TERM_BITS = 40


class Lists(NamedTuple):
    """What is known of the ranked lists of U users. Metrics of accuracy at a cutoff read the first two alone."""

    hits: Tensor
    """bool [U, K], best first"""
    num_relevant: Tensor
    """int64 [U]: relevant candidates"""
    items: Tensor | None = None
    """int64 [U, K], candidates best first; -1 where fewer than K are left"""
    catalog: Catalog | None = None
    """of these candidates"""
    comparisons: Comparisons | None = None
    """of all candidates of each user"""

    def shown(self, k: int) -> tuple[Tensor, Catalog]:
        """The first k of each user's items, [U, k], and what is known of the candidates."""
        if self.items is None or self.catalog is None:
            raise ValueError("a metric of what is shown needs items and catalog")
        return self.items[:, :k], self.catalog


def ndcg(lists: Lists, k: int) -> Tensor:
    """Normalised discounted cumulative gain: sum of 1/log2(rank + 1) at the hits over that of min(k, |R|) hits at the top.

    Binary relevance (Järvelin & Kekäläinen, 2002). In [0, 1], higher is better; 0 for a user with nothing relevant.
    """
    hits = lists.hits[:, :k]
    gain = _discounts(k, hits.device)
    ideal = gain.cumsum(0)[lists.num_relevant.clamp(1, k) - 1]
    return (hits * gain[: hits.shape[1]]).sum(dim=1).double() / ideal.double()


def recall(lists: Lists, k: int) -> Tensor:
    """Hits among the first k over |R|. In [0, 1], higher is better; 0 for a user with nothing relevant."""
    return _count(lists, k) / lists.num_relevant.clamp(min=1).double()


def precision(lists: Lists, k: int) -> Tensor:
    """Hits among the first k over k, however few candidates there are. In [0, 1], higher is better; 0 without hits."""
    return _count(lists, k) / k


def average_precision(lists: Lists, k: int) -> Tensor:
    """Average precision: sum of precision@rank at the hits over min(k, |R|); its average over users is `map`.

    In [0, 1], higher is better; 0 for a user with nothing relevant.
    """
    hits = lists.hits[:, :k]
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precisions = (hits.cumsum(dim=1) << TERM_BITS) // ranks
    return (hits * precisions).sum(dim=1).double() / (1 << TERM_BITS) / lists.num_relevant.clamp(1, k).double()


def hit_rate(lists: Lists, k: int) -> Tensor:
    """1 where there is a hit among the first k, else 0. Higher is better; 0 for a user with nothing relevant."""
    return lists.hits[:, :k].any(dim=1).double()


def mrr(lists: Lists, k: int) -> Tensor:
    """1/rank of the first hit among the first k (Voorhees, 1999). In [0, 1], higher is better; 0 without hits."""
    until_hit = (lists.hits[:, :k].cumsum(dim=1) == 0).sum(dim=1)
    return hit_rate(lists, k) / (until_hit + 1).double()


def f1(lists: Lists, k: int) -> Tensor:
    """Harmonic mean of precision and recall, 2·hits/(k + |R|). In [0, 1], higher is better; 0 without hits."""
    return 2 * _count(lists, k) / (lists.num_relevant + k).double()


def auc(lists: Lists, k: int) -> Tensor:
    """Area under the ROC curve: the share of pairs of a relevant and an irrelevant candidate that are in the right order.

    Over all candidates that are ranked for the user, so it has no cutoff; a tie counts half (Hanley & McNeil, 1982: the
    statistic of Mann & Whitney). In [0, 1], higher is better, and 0.5 is chance; 0.5 also where all candidates are relevant,
    so that there is no pair; 0 for a user with nothing relevant.
    """
    if lists.comparisons is None:
        raise ValueError("auc needs comparisons")
    num_pairs, twice_won = lists.comparisons
    chance = 0.5 * (lists.num_relevant > 0).double()
    return torch.where(num_pairs > 0, twice_won.double() / (2 * num_pairs.clamp(min=1)).double(), chance)


def aplt(lists: Lists, k: int) -> Tensor:
    """Average percentage of long-tail items: the share of the list that `Catalog.long_tail` holds.

    Abdollahpouri, Burke & Mobasher, RecSys 2017; of a list with fewer than k candidates, the share of those. In [0, 1], higher
    is less biased towards what is popular; 0 for a user without candidates.
    """
    items, catalog = lists.shown(k)
    return of_listed(catalog.long_tail, items).sum(dim=1).double() / (items >= 0).sum(dim=1).clamp(min=1).double()


def aclt(lists: Lists, k: int) -> Tensor:
    """Average coverage of long-tail items: how many items of the list `Catalog.long_tail` holds.

    Abdollahpouri, Burke & Mobasher, FLAIRS 2019. In [0, k], higher is less biased towards what is popular; 0 for a user without
    candidates.
    """
    items, catalog = lists.shown(k)
    return of_listed(catalog.long_tail, items).sum(dim=1).double()


def epc(lists: Lists, k: int) -> Tensor:
    """Expected popularity complement: the hits' share of users who have not seen them in training, discounted by rank.

    Vargas & Castells, RecSys 2011, with binary relevance and the discount of `ndcg`: the sum of (share of users)/log2(rank + 1)
    at the hits, over that of 1/log2(rank + 1) over the whole list. In [0, 1], higher is better: more hits, and more novel
    ones; 0 without hits.
    """
    return _discovery(lists, k, lists.shown(k)[1].unseen_share)


def efd(lists: Lists, k: int) -> Tensor:
    """Expected free discovery: as `epc`, of -log2 of the hits' share of the training interactions, in bits.

    Vargas & Castells, RecSys 2011. Of an item without training interactions, for which they define nothing, that of the least
    popular item that has some, as in Elliot. From 0 to log2 of the number of interactions, higher is better: more hits, and
    more novel ones; 0 without hits.
    """
    return _discovery(lists, k, lists.shown(k)[1].information)


def ild(lists: Lists, k: int, feature: str) -> Tensor:
    """Intra-list diversity over a feature: the mean of 1 - cosine over the pairs of the list's items that have the feature.

    Smyth & McClave, ICCBR 2001, with cosine distances. Tags are vectors of zeros and ones, and two categories are at a distance
    of 1, or of 0 where they are the same. In [0, 1], of vectors with negative coordinates in [0, 2]; higher is more diverse;
    0 where no two items of the list have the feature.
    """
    items, catalog = lists.shown(k)
    return mean_distance(catalog.directions[feature], items)


def _discovery(lists: Lists, k: int, novelty: Tensor) -> Tensor:
    """Mean novelty, float64 [C], of the hits, weighted by the discount of every place of the list: float64 [U]."""
    items, _ = lists.shown(k)
    discount = _discounts(k, items.device)[: items.shape[1]]
    found = of_listed(novelty, items) * discount.double() * lists.hits[:, :k]
    places = (discount * (items >= 0)).sum(dim=1)
    return found.round().long().sum(dim=1).double() / places.clamp(min=1).double()


def _discounts(k: int, device: torch.device) -> Tensor:
    """1/log2(rank + 1) of the first k ranks in units of 2**-40: int64 [k]."""
    # Made on the host, so that no device's logarithm matters.
    units = [round((1 << TERM_BITS) / math.log2(rank + 1)) for rank in range(1, k + 1)]
    return torch.tensor(units, dtype=torch.int64, device=device)


def _count(lists: Lists, k: int) -> Tensor:
    return lists.hits[:, :k].sum(dim=1).double()
