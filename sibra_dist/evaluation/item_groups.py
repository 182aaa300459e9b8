"""Recall by groups of items: of what is relevant in a group, how much is found; by cold start and by popularity."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.groups import COLD_START, Grouping
from sibra_dist.evaluation.sums import Sums


def candidate_groupings(catalog: Catalog) -> list[Grouping]:
    """Candidates with and without training interactions, and those of the head and of the long tail."""
    everyone = torch.ones_like(catalog.long_tail)
    return [
        Grouping(COLD_START, ("cold", "warm"), catalog.popularity > 0, everyone),
        Grouping("popularity", ("head", "long tail"), catalog.long_tail, everyone),
    ]


class ItemRecalls(Sums):
    """Of the pairs of a user and a relevant candidate, the share that is found, by groups of candidates.

    In [0, 1], higher is better. Each pair counts alike, whatever the user: groups of items are small, and most users have
    nothing relevant in some of them. The groupings stay on the device where they are, and that is where the metric is to be.
    """

    hits: Tensor
    relevant: Tensor

    def __init__(self, groupings: Sequence[Grouping], num_candidates: int, cutoffs: Sequence[int]) -> None:
        super().__init__()
        self.cutoffs = tuple(cutoffs)
        self._labels = {grouping.name: grouping.labels for grouping in groupings}
        self._groups = [grouping.groups(torch.arange(num_candidates, device=grouping.values.device)) for grouping in groupings]
        most = max((len(labels) for labels in self._labels.values()), default=0)
        self.add_state("hits", torch.zeros(len(groupings), len(cutoffs), most, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("relevant", torch.zeros(len(groupings), most, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, items: Tensor, hits: Tensor, relevant: Tensor) -> None:
        """Count users.

        Args:
            items: int64 [U, K], candidates best first, K at least the largest cutoff.
            hits: bool [U, K], which of them are relevant.
            relevant: candidates of the pairs of a user and a relevant candidate, [P].
        """
        for number, groups in enumerate(self._groups):
            self.relevant[number] += _count(groups[relevant.long()], self.relevant.shape[1])
            for place, k in enumerate(self.cutoffs):
                if items.shape[1] < k:
                    raise ValueError(f"a cutoff of {k} of lists of {items.shape[1]}")
                self.hits[number, place] += _count(groups[items[:, :k][hits[:, :k]]], self.relevant.shape[1])

    def compute(self) -> dict[str, dict[str, Any]]:
        """By grouping: `groups`, by label, with `candidates`, `relevant` pairs and `recall`, by `recall@k`; `gap` likewise.

        A group of which nothing is relevant has no recall. The gap is that of the others, 0 if there is but one.
        """
        found: dict[str, dict[str, Any]] = {}
        states = zip(self._labels.items(), self._groups, self.hits.tolist(), self.relevant.tolist(), strict=True)
        for (name, labels), candidates, hits, relevant in states:
            sizes = _count(candidates, len(labels)).tolist()
            groups = {
                label: {
                    "candidates": sizes[number],
                    "relevant": relevant[number],
                    "metrics": {
                        f"recall@{k}": hits[place][number] / relevant[number]
                        for place, k in enumerate(self.cutoffs)
                        if relevant[number]
                    },
                }
                for number, label in enumerate(labels)
                if sizes[number]
            }
            recalls = [group["metrics"] for group in groups.values() if group["metrics"]]
            gap = {
                metric: max(recall[metric] for recall in recalls) - min(recall[metric] for recall in recalls)
                for metric in (recalls[0] if recalls else ())
            }
            found[name] = {"groups": groups, "gap": gap}
        return found


def _count(groups: Tensor, size: int) -> Tensor:
    return groups.bincount(minlength=size)
