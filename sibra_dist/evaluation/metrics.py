"""Metrics of ranked lists, written `name@k`: averages over users, and measures of what the whole catalogue is shown.

Every metric is the same, bit for bit, for any number of ranks, any tiling and any order of the users. Sums are therefore
taken over integers, whose addition is associative: what is no whole number is first rounded to a fixed unit.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sibra_dist.errors import ConfigError, SibraError, nearest
from sibra_dist.evaluation import catalog_metrics, user_metrics
from sibra_dist.evaluation.catalog import Catalog, of_listed
from sibra_dist.evaluation.catalog_metrics import Shown
from sibra_dist.evaluation.sums import Sums
from sibra_dist.evaluation.user_metrics import Lists

# Users' values are multiples of 2**-36 when they are summed, so a mean is off by no more than 2**-37 (7e-12). Their whole parts
# are summed apart, so that an int64 holds the sums of 2**27 users, the most that are accepted, whatever a metric's range.
VALUE_BITS = 36
MAX_USERS = 2**27 - 1

UserMetric = Callable[[Lists, int], Tensor]
"""(lists of U users, k) -> float64 [U]"""
CatalogMetric = Callable[[Shown], float]
FeatureMetric = Callable[[Lists, int, str], Tensor]
"""(lists of U users, k, name of a feature of the items) -> float64 [U]"""

USER_METRICS: dict[str, UserMetric] = {
    "ndcg": user_metrics.ndcg,
    "recall": user_metrics.recall,
    "precision": user_metrics.precision,
    "map": user_metrics.average_precision,
    "hit_rate": user_metrics.hit_rate,
    "mrr": user_metrics.mrr,
    "f1": user_metrics.f1,
    "auc": user_metrics.auc,
    "aplt": user_metrics.aplt,
    "aclt": user_metrics.aclt,
    "epc": user_metrics.epc,
    "efd": user_metrics.efd,
}
CATALOG_METRICS: dict[str, CatalogMetric] = {
    "coverage": catalog_metrics.coverage,
    "user_coverage": catalog_metrics.user_coverage,
    "gini": catalog_metrics.gini,
    "entropy": catalog_metrics.entropy,
    "arp": catalog_metrics.arp,
    "pop_reo": catalog_metrics.pop_reo,
    "pop_rsp": catalog_metrics.pop_rsp,
}
FEATURE_METRICS: dict[str, FeatureMetric] = {"ild": user_metrics.ild}
"""The metrics of users that are named with a feature: `ild:genres`."""
OVER_ALL_CANDIDATES = ("auc",)
"""The metrics that compare all candidates, rather than read the first k: they have no cutoff."""
LARGEST_CUTOFF = 10_000
"""Lists are held for a tile of users at a time: memory grows with the cutoff."""
KNOWN_METRICS = (*USER_METRICS, *CATALOG_METRICS, *(f"{name}:FEATURE" for name in FEATURE_METRICS))


def of_users(name: str) -> UserMetric | None:
    """The metric of users with a name, such as `ndcg` or `ild:genres`; None if there is none."""
    kind, _, feature = name.partition(":")
    if feature and kind in FEATURE_METRICS:
        return partial(_of_feature, FEATURE_METRICS[kind], feature)
    return USER_METRICS.get(name)


def is_metric(name: str) -> bool:
    """Whether there is a metric, of users or of the catalogue, with a name."""
    return name in CATALOG_METRICS or of_users(name) is not None


def parse_metric(metric: str) -> tuple[str, int]:
    """Split `name@k` into a known name and its cutoff, a whole number from 1 to `LARGEST_CUTOFF`; 0 for a metric that has none.

    >>> parse_metric("ndcg@10")
    ('ndcg', 10)
    >>> parse_metric("auc")
    ('auc', 0)

    Raises:
        ConfigError: the name is not known, or there is no such cutoff.
    """
    name, at, cutoff = metric.partition("@")
    if not is_metric(name):
        raise ConfigError(f"there is no metric {name!r} (in {metric!r}); {nearest(name.lower(), KNOWN_METRICS)}")
    if name in OVER_ALL_CANDIDATES:
        if at:
            raise ConfigError(f"the metric {metric!r} is over all candidates, so it has no cutoff; write {name}")
        return name, 0
    if not re.fullmatch("[1-9][0-9]{0,9}", cutoff) or int(cutoff) > LARGEST_CUTOFF:
        raise ConfigError(
            f"the metric {metric!r} needs a cutoff, a whole number from 1 to {LARGEST_CUTOFF}; write for example {name}@10"
        )
    return name, int(cutoff)


def at_cutoffs(names: Sequence[str], cutoffs: Sequence[int]) -> list[str]:
    """Every metric of these names at every cutoff, `ndcg@10` and so on; those that have no cutoff, once.

    >>> at_cutoffs(["recall", "auc"], [5, 10])
    ['recall@5', 'recall@10', 'auc']
    """
    metrics: list[str] = []
    for name in names:
        metrics += [name] if name in OVER_ALL_CANDIDATES else [f"{name}@{cutoff}" for cutoff in cutoffs]
    return metrics


def split_metrics(metrics: Sequence[str]) -> tuple[list[str], list[str]]:
    """The metrics that average over users, and those of the catalogue, each in the given order; see `parse_metric`."""
    names = [parse_metric(metric)[0] for metric in metrics]
    users = [metric for metric, name in zip(metrics, names, strict=True) if name not in CATALOG_METRICS]
    return users, [metric for metric, name in zip(metrics, names, strict=True) if name in CATALOG_METRICS]


def features_of(metrics: Sequence[str]) -> list[str]:
    """The features of items that metrics read, each once."""
    named = [parse_metric(metric)[0].partition(":")[2] for metric in metrics]
    return list(dict.fromkeys(feature for feature in named if feature))


def _of_feature(metric: FeatureMetric, feature: str, lists: Lists, k: int) -> Tensor:
    return metric(lists, k, feature)


class UserAverages(Sums):
    """Averages of `metrics` (`name@k`) over the users of all ranks that have something relevant; the others are counted.

    Every user is given to one rank, once.
    """

    wholes: Tensor
    fractions: Tensor
    num_users: Tensor
    num_users_without_relevant: Tensor

    def __init__(self, metrics: Sequence[str]) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self._parsed = [(measure, k) for name, k in map(parse_metric, metrics) if (measure := of_users(name)) is not None]
        for name in ("wholes", "fractions"):
            self.add_state(name, torch.zeros(len(self.metrics), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_users", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_users_without_relevant", torch.tensor(0), dist_reduce_fx="sum")

    def per_user(self, lists: Lists) -> Tensor:
        """Every metric of every user, float64 [U, M] in the order of `metrics`; NaN for a user with nothing relevant.

        Lists are to be as long as the largest cutoff at least.
        """
        values = lists.hits.new_empty((len(lists.hits), len(self._parsed)), dtype=torch.float64)
        for column, (measure, k) in enumerate(self._parsed):
            if lists.hits.shape[1] < k:
                raise ValueError(f"{self.metrics[column]} of lists of {lists.hits.shape[1]}")
            values[:, column] = measure(lists, k)
        return values.masked_fill_((lists.num_relevant == 0)[:, None], torch.nan)

    def update(self, values: Tensor, num_relevant: Tensor) -> None:
        """Add users: what `per_user` gives, float64 [U, M], and how many candidates are relevant to each, int64 [U]."""
        without_relevant = num_relevant == 0
        values = values.masked_fill(without_relevant[:, None], 0.0)
        wholes = values.floor()
        self.wholes += wholes.long().sum(dim=0)
        self.fractions += ((values - wholes) * (1 << VALUE_BITS)).round().long().sum(dim=0)
        self.num_users += (~without_relevant).sum()
        self.num_users_without_relevant += without_relevant.sum()

    def compute(self) -> dict[str, float]:
        """The averages by metric, then `num_users` averaged and `num_users_without_relevant`.

        An average over no user is NaN. Raises:
            SibraError: there are more users than the sums can hold.
        """
        num_users = int(self.num_users)
        if num_users > MAX_USERS:
            raise SibraError(f"{num_users} users cannot be averaged over, only {MAX_USERS}; evaluate a sample of them")
        # Python's integers do not overflow, and their division rounds once, where a float64 could already be rounded.
        divisor = num_users << VALUE_BITS
        pairs = zip(self.wholes.tolist(), self.fractions.tolist(), strict=True)
        totals = [(whole << VALUE_BITS) + fraction for whole, fraction in pairs]
        averages = [total / divisor if divisor else math.nan for total in totals]
        return {
            **dict(zip(self.metrics, averages, strict=True)),
            "num_users": float(num_users),
            "num_users_without_relevant": float(self.num_users_without_relevant),
        }


class CatalogTallies(Sums):
    """Catalogue `metrics` (`name@k`) of what the users of all ranks are recommended.

    The catalogue of the candidates stays on the device where it is, and that is where the metric is to be.
    """

    exposure: Tensor
    full: Tensor
    hits: Tensor
    relevant: Tensor
    candidates: Tensor
    num_users: Tensor

    def __init__(self, metrics: Sequence[str], catalog: Catalog) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self._catalog = catalog
        self._parsed = [parse_metric(metric) for metric in metrics]
        self._cutoffs = sorted({k for _, k in self._parsed})
        shapes = {"exposure": (len(self._cutoffs), len(catalog.popularity)), "full": (len(self._cutoffs),)}
        shapes |= {"hits": (len(self._cutoffs), 2), "relevant": (2,), "candidates": (2,), "num_users": ()}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, items: Tensor, hits: Tensor, relevant: Tensor, masked: Tensor) -> None:
        """Count recommendations of U users.

        Args:
            items: int64 [U, K], candidates best first, K at least the largest cutoff; -1 is no candidate.
            hits: bool [U, K], which of them are relevant.
            relevant: candidates of the pairs of a user and a relevant candidate, [P].
            masked: candidates of the pairs of a user and what is masked, each pair once, [Q]; -1 is no candidate.
        """
        in_tail = of_listed(self._catalog.long_tail, items)
        for number, k in enumerate(self._cutoffs):
            if items.shape[1] < k:
                raise ValueError(f"a cutoff of {k} of lists of {items.shape[1]}")
            shown = items[:, :k]
            self.exposure[number] += torch.bincount(shown[shown >= 0], minlength=len(self._catalog.popularity))
            self.full[number] += (shown >= 0).all(dim=1).sum()
            self.hits[number] += _by_group(in_tail[:, :k], hits[:, :k])
        long_tail = self._catalog.long_tail
        self.relevant += _by_group(of_listed(long_tail, relevant), relevant >= 0)
        self.candidates += len(items) * _by_group(long_tail, torch.ones_like(long_tail))
        self.candidates -= _by_group(of_listed(long_tail, masked), masked >= 0)
        self.num_users += len(items)

    def compute(self) -> dict[str, float]:
        """The value of each metric; each function says what it is where nothing is recommended."""
        found = {}
        for name, k in self._parsed:
            number = self._cutoffs.index(k)
            shown = Shown(
                exposure=self.exposure[number],
                catalog=self._catalog,
                num_users=int(self.num_users),
                num_full=int(self.full[number]),
                hits=_pair(self.hits[number]),
                relevant=_pair(self.relevant),
                candidates=_pair(self.candidates),
            )
            found[f"{name}@{k}"] = CATALOG_METRICS[name](shown)
        return found


def _by_group(in_tail: Tensor, counted: Tensor) -> Tensor:
    """How many of those counted are in the head, and how many in the long tail: int64 [2] of bool of any shape."""
    return torch.stack([(counted & ~in_tail).sum(), (counted & in_tail).sum()])


def _pair(groups: Tensor) -> tuple[int, int]:
    head, tail = groups.tolist()
    return head, tail
