"""What is found of ranked lists, tile by tile: every kind of metric from one look at them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sibra_dist.data.dataset import Csr, Dataset, Feature
from sibra_dist.data.transfer import to_device
from sibra_dist.errors import ConfigError, nearest
from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.comparisons import Comparisons
from sibra_dist.evaluation.metrics import OVER_ALL_CANDIDATES, features_of, parse_metric, split_metrics
from sibra_dist.evaluation.ranking import hits
from sibra_dist.evaluation.user_metrics import Lists

EachTile = Callable[[Tensor, Tensor, Tensor], None]
"""(users int64 [U], number of relevant candidates int64 [U], values float64 [U, M]: see `UserAverages.per_user`)"""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, float]
    counts: dict[str, int]
    """`users` averaged over, `users_without_relevant`, `candidates`, and what else was counted"""
    item_groups: dict[str, dict[str, Any]]
    """Recall by groups of items, if asked for: what `ItemRecalls` computes."""


class Findings:
    """Metrics of what the users of all ranks are recommended; every user is added once, on one rank."""

    def __init__(
        self,
        dataset: Dataset,
        candidates: Tensor,
        names: Sequence[str],
        device: torch.device,
        each: EachTile | None = None,
        item_cutoffs: Sequence[int] = (),
    ) -> None:
        """Begin without users.

        Args:
            dataset: what training knew, and the features of the items.
            candidates: items, int64 [C].
            names: metrics such as `ndcg@10`.
            device: where lists are, and what is found of them.
            each: called with every tile that is added, with the values of the metrics of users among `names`, in their order.
            item_cutoffs: cutoffs of the recall by groups of items; none leaves it out.

        Raises:
            ConfigError: a metric or its feature is not known.
        """
        # Here, so that only processes that evaluate import torchmetrics: where transformers, matplotlib and others that it can
        # use are installed they come with it, which takes 2 s and 130 MiB.
        from sibra_dist.evaluation.item_groups import ItemRecalls, candidate_groupings
        from sibra_dist.evaluation.tallies import CatalogTallies, UserAverages

        parsed = [parse_metric(metric) for metric in names]
        self.names = tuple(names)
        self.length = max(1, *(cutoff for _, cutoff in parsed), *item_cutoffs)
        """Of the lists that are needed."""
        self.compares = any(name in OVER_ALL_CANDIDATES for name, _ in parsed)
        """Whether comparisons are needed."""
        self._num_users, self._each = dataset.users.count, each
        num_trained = int(dataset.users.histories.lengths().count_nonzero())
        features = {name: _feature(dataset, name) for name in features_of(names)}
        catalog = Catalog.of(dataset.items.histories.lengths(), candidates, num_trained, features)
        self._catalog = to_device(catalog, device)
        of_users, of_catalog = split_metrics(names)
        self._averages = UserAverages(of_users).to(device)
        self._tallies = CatalogTallies(of_catalog, self._catalog).to(device)
        groupings = candidate_groupings(self._catalog) if item_cutoffs else ()
        self._recalls = ItemRecalls(groupings, len(candidates), item_cutoffs).to(device)

    def add(self, users: Tensor, items: Tensor, relevant: Csr, masked: Tensor, comparisons: Comparisons | None = None) -> None:
        """Add a tile of users.

        Args:
            users: int64 [U].
            items: candidates that they are recommended, best first, int64 [U, K] for K of at least `length`; -1 where fewer
                are left.
            relevant: a row each: candidates.
            masked: candidates of the pairs of a user and what is not ranked, each pair once, [Q]; -1 is no candidate.
            comparisons: of all candidates of each user, if they are needed.
        """
        found = hits(items, relevant, len(self._catalog.popularity))
        lists = Lists(found, relevant.lengths(), items, self._catalog, comparisons)
        values = self._averages.per_user(lists)
        self._averages.update(values, lists.num_relevant)
        self._tallies.update(items, found, relevant.indices, masked)
        self._recalls.update(items, found, relevant.indices)
        if self._each is not None:
            self._each(users, lists.num_relevant, values)

    def evaluation(self, counts: Mapping[str, int]) -> Evaluation:
        """What is found of the users of all ranks, which all call this; `counts` are told beside its own."""
        found = self._averages.compute()
        num_users = int(found["num_users"])
        own = {
            "users": num_users,
            "users_without_relevant": self._num_users - num_users,
            "candidates": len(self._catalog.popularity),
        }
        found |= self._tallies.compute()
        metrics = {name: found[name] for name in self.names}
        return Evaluation(metrics, own | dict(counts), self._recalls.compute() if self._recalls.cutoffs else {})


def _feature(dataset: Dataset, name: str) -> Feature:
    """A feature of the items in which two of them can be compared."""
    known = [feature for feature, held in dataset.items.features.items() if held.spec.kind != "numeric"]
    if name not in known:
        raise ConfigError(
            f"evaluation.metrics: items have no category, tags or vector {name!r} to be diverse in; {nearest(name, known)}"
        )
    return dataset.items.features[name]
