"""Metrics of ranked lists, written `name@k`: averages over users, and measures of what the whole catalogue is shown.

Every metric is the same, bit for bit, for any number of ranks, any tiling and any order of the users. Sums are therefore
taken over integers, whose addition is associative: what is no whole number is first rounded to a fixed unit.
"""

import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.distributed
from torch import Tensor
from torchmetrics import Metric

from sibra_dist.errors import ConfigError, SibraError, nearest

# Terms within a user's list are multiples of 2**-40, and users' values multiples of 2**-36 before they are summed. So a
# mean is off by no more than 2**-37 (7e-12), and an int64 holds the sum of 2**27 users, the most that are accepted.
TERM_BITS = 40
VALUE_BITS = 36
MAX_USERS = 2**27 - 1

UserMetric = Callable[[Tensor, Tensor, int], Tensor]
"""(hits bool [U, K >= k] best first, number of relevant candidates int64 [U], k) -> float64 [U]"""
CatalogMetric = Callable[[Tensor, Tensor], float]
"""(exposure int64 [C], how often each candidate was recommended among the first k; popularity int64 [C], its number of
training interactions) -> value"""


def ndcg(hits: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Normalised discounted cumulative gain: sum of 1/log2(rank + 1) at the hits over that of min(k, |R|) hits at the top.

    Binary relevance (Järvelin & Kekäläinen, 2002). In [0, 1], higher is better; 0 for a user with nothing relevant.
    """
    # Made on the host, so that no device's logarithm matters.
    gains = [round((1 << TERM_BITS) / math.log2(rank + 1)) for rank in range(1, k + 1)]
    gain = torch.tensor(gains, dtype=torch.int64, device=hits.device)
    ideal = gain.cumsum(0)[num_relevant.clamp(1, k) - 1]
    return (hits[:, :k] * gain[: hits.shape[1]]).sum(dim=1).double() / ideal.double()


def recall(hits: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Hits among the first k over |R|. In [0, 1], higher is better; 0 for a user with nothing relevant."""
    return _count(hits, k) / num_relevant.clamp(min=1).double()


def precision(hits: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Hits among the first k over k, however few candidates there are. In [0, 1], higher is better; 0 without hits."""
    return _count(hits, k) / k


def average_precision(hits: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Average precision: sum of precision@rank at the hits over min(k, |R|); its average over users is `map`.

    In [0, 1], higher is better; 0 for a user with nothing relevant.
    """
    hits = hits[:, :k]
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precisions = (hits.cumsum(dim=1) << TERM_BITS) // ranks
    return (hits * precisions).sum(dim=1).double() / (1 << TERM_BITS) / num_relevant.clamp(1, k).double()


def hit_rate(hits: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """1 where there is a hit among the first k, else 0. Higher is better; 0 for a user with nothing relevant."""
    return hits[:, :k].any(dim=1).double()


def mrr(hits: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """1/rank of the first hit among the first k (Voorhees, 1999). In [0, 1], higher is better; 0 without hits."""
    until_hit = (hits[:, :k].cumsum(dim=1) == 0).sum(dim=1)
    return hit_rate(hits, num_relevant, k) / (until_hit + 1).double()


def f1(hits: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Harmonic mean of precision and recall, 2·hits/(k + |R|). In [0, 1], higher is better; 0 without hits."""
    return 2 * _count(hits, k) / (num_relevant + k).double()


def _count(hits: Tensor, k: int) -> Tensor:
    return hits[:, :k].sum(dim=1).double()


def coverage(exposure: Tensor, popularity: Tensor) -> float:
    """Share of the candidates that are recommended to anyone. In [0, 1], higher is broader; 0 without candidates."""
    return int(exposure.count_nonzero()) / max(len(exposure), 1)


def gini(exposure: Tensor, popularity: Tensor) -> float:
    """Inequality of exposure: sum of (2j - C - 1) p_j over C - 1, with p_j the j-th smallest of C shares of exposure.

    In [0, 1], lower is more even: 0 where all are recommended equally often, 1 where one candidate takes every place. 0 where
    nothing is recommended or there is but one candidate. Gunawardana & Shani, Recommender Systems Handbook, 2015, which
    Elliot documents too, while it reports 1 minus this.
    """
    num_candidates, total = len(exposure), int(exposure.sum())
    if num_candidates < 2 or total == 0:
        return 0.0
    # In integers, so exact; an int64 is enough for 2**27 users with lists of 100 from 5e8 candidates.
    places = torch.arange(1 - num_candidates, num_candidates, 2, device=exposure.device)
    return int((exposure.sort().values * places).sum()) / (total * (num_candidates - 1))


def entropy(exposure: Tensor, popularity: Tensor) -> float:
    """Shannon entropy of the shares of exposure, in bits.

    In [0, log2 C], higher is more even; 0 where nothing is recommended. Gunawardana & Shani, Recommender Systems Handbook,
    2015.
    """
    # Equal exposures make equal terms, and there are few distinct ones: few enough for a sum that is exact in any order.
    counts, candidates = torch.unique(exposure[exposure > 0], return_counts=True)
    total = int(exposure.sum())
    pairs = zip(counts.tolist(), candidates.tolist(), strict=True)
    return math.fsum(number * (count / total) * math.log2(total / count) for count, number in pairs)


def arp(exposure: Tensor, popularity: Tensor) -> float:
    """Average recommendation popularity: the mean number of training interactions of what is recommended.

    From 0 on, lower is less biased towards what is popular; 0 where nothing is recommended, and where all candidates are
    cold. Yin et al., VLDB 2012; here over all recommendations, which is the mean over users where all have equally many.
    """
    return int((exposure * popularity).sum()) / max(int(exposure.sum()), 1)


USER_METRICS: dict[str, UserMetric] = {
    "ndcg": ndcg,
    "recall": recall,
    "precision": precision,
    "map": average_precision,
    "hit_rate": hit_rate,
    "mrr": mrr,
    "f1": f1,
}
CATALOG_METRICS: dict[str, CatalogMetric] = {"coverage": coverage, "gini": gini, "entropy": entropy, "arp": arp}


def parse_metric(metric: str) -> tuple[str, int]:
    """Split `name@k` into a known name and its cutoff, a positive whole number.

    >>> parse_metric("ndcg@10")
    ('ndcg', 10)

    Raises:
        ConfigError: the name is not known, or there is no such cutoff.
    """
    name, _, cutoff = metric.partition("@")
    known = [*USER_METRICS, *CATALOG_METRICS]
    if name not in known:
        raise ConfigError(f"there is no metric {name!r} (in {metric!r}); {nearest(name.lower(), known)}")
    if not re.fullmatch("[1-9][0-9]*", cutoff):
        raise ConfigError(f"the metric {metric!r} needs a cutoff that is a positive whole number; write for example {name}@10")
    return name, int(cutoff)


def split_metrics(metrics: Sequence[str]) -> tuple[list[str], list[str]]:
    """The metrics that average over users, and those of the catalogue, each in the given order; see `parse_metric`."""
    names = [parse_metric(metric)[0] for metric in metrics]
    of_users = [metric for metric, name in zip(metrics, names, strict=True) if name in USER_METRICS]
    return of_users, [metric for metric, name in zip(metrics, names, strict=True) if name in CATALOG_METRICS]


class _Sums(Metric):
    """A metric whose states are int64 sums, added up over the ranks when its value is computed."""

    full_state_update = False

    def __init__(self) -> None:
        # Summing in the collective itself holds one copy of a state, where torchmetrics' default gathers one a rank. No
        # cache: a rank that returned a cached value would leave the others waiting in the collective.
        super().__init__(dist_sync_fn=_all_reduce, compute_with_cache=False)

    @property
    def update_called(self) -> bool:
        """True: a rank without users has nothing to update with, and torchmetrics would warn that its zeros are wrong."""
        return True


class UserAverages(_Sums):
    """Averages of `metrics` (`name@k`) over the users of all ranks that have something relevant; the others are counted.

    Every user is given to one rank, once.
    """

    totals: Tensor
    num_users: Tensor
    num_users_without_relevant: Tensor

    def __init__(self, metrics: Sequence[str]) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self._parsed = [parse_metric(metric) for metric in metrics]
        self.add_state("totals", torch.zeros(len(self.metrics), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_users", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_users_without_relevant", torch.tensor(0), dist_reduce_fx="sum")

    def per_user(self, hits: Tensor, num_relevant: Tensor) -> Tensor:
        """Every metric of every user, float64 [U, M] in the order of `metrics`; NaN for a user with nothing relevant.

        hits: bool [U, K], best first, K at least the largest cutoff. num_relevant: int64 [U].
        """
        values = hits.new_empty((len(hits), len(self._parsed)), dtype=torch.float64)
        for column, (name, k) in enumerate(self._parsed):
            if hits.shape[1] < k:
                raise ValueError(f"{name}@{k} of lists of {hits.shape[1]}")
            values[:, column] = USER_METRICS[name](hits, num_relevant, k)
        return values.masked_fill_((num_relevant == 0)[:, None], torch.nan)

    def update(self, hits: Tensor, num_relevant: Tensor) -> None:
        """Add users; arguments as for `per_user`."""
        values = self.per_user(hits, num_relevant).nan_to_num(0.0)
        self.totals += (values * (1 << VALUE_BITS)).round().long().sum(dim=0)
        without_relevant = (num_relevant == 0).sum()
        self.num_users += len(hits) - without_relevant
        self.num_users_without_relevant += without_relevant

    def compute(self) -> dict[str, float]:
        """The averages by metric, then `num_users` averaged and `num_users_without_relevant`.

        An average over no user is NaN. Raises:
            SibraError: there are more users than the sums can hold.
        """
        num_users = int(self.num_users)
        if num_users > MAX_USERS:
            raise SibraError(f"{num_users} users cannot be averaged over, only {MAX_USERS}; evaluate a sample of them")
        # Division of Python's integers rounds once, where a total as a float64 could already be rounded.
        divisor = num_users << VALUE_BITS
        averages = [total / divisor if divisor else math.nan for total in self.totals.tolist()]
        return {
            **dict(zip(self.metrics, averages, strict=True)),
            "num_users": float(num_users),
            "num_users_without_relevant": float(self.num_users_without_relevant),
        }


class CatalogTallies(_Sums):
    """Catalogue `metrics` (`name@k`) of what the users of all ranks are recommended.

    popularity: int64 [C], the number of training interactions of each candidate.
    """

    exposure: Tensor
    popularity: Tensor

    def __init__(self, metrics: Sequence[str], popularity: Tensor) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self.num_candidates = len(popularity)
        self.register_buffer("popularity", popularity, persistent=False)
        self._parsed = [parse_metric(metric) for metric in metrics]
        self._cutoffs = sorted({k for _, k in self._parsed})
        exposure = torch.zeros(len(self._cutoffs), self.num_candidates, dtype=torch.int64)
        self.add_state("exposure", exposure, dist_reduce_fx="sum")

    def update(self, items: Tensor) -> None:
        """Count recommendations [U, K], candidates best first, K at least the largest cutoff; -1 is no candidate."""
        for tally, k in zip(self.exposure, self._cutoffs, strict=True):
            if items.shape[1] < k:
                raise ValueError(f"a cutoff of {k} of lists of {items.shape[1]}")
            shown = items[:, :k]
            tally += torch.bincount(shown[shown >= 0], minlength=self.num_candidates)

    def compute(self) -> dict[str, float]:
        """The value of each metric; each function says what it is where nothing is recommended."""
        exposure = {k: self.exposure[number] for number, k in enumerate(self._cutoffs)}
        return {f"{name}@{k}": CATALOG_METRICS[name](exposure[k], self.popularity) for name, k in self._parsed}


def _all_reduce(state: Tensor, group: torch.distributed.ProcessGroup | None = None) -> list[Tensor]:
    """The sum over the ranks, as the list of addends that torchmetrics expects and adds up."""
    total = state.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]
