"""Metrics of ranked lists, written `name@k`: averages over users, and measures of what the whole catalogue is shown.

Every metric is the same, bit for bit, for any number of ranks, any tiling and any order of the users. Sums are therefore
taken over integers, whose addition is associative: what is no whole number is first rounded to a fixed unit.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from sibra_dist.errors import ConfigError, nearest
from sibra_dist.evaluation import catalog_metrics, user_metrics
from sibra_dist.evaluation.catalog_metrics import Shown
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
