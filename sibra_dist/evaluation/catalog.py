"""What training knows of a split's candidates: how popular each is, and whether it belongs to the long tail."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from sibra_dist.data.dataset import Feature
from sibra_dist.evaluation.diversity import Directions

HEAD_PARTS = 5
"""The head holds one of so many parts of the training interactions: 20 %."""


@dataclass(frozen=True)
class Catalog:
    """The C candidates of a split, as training saw them."""

    popularity: Tensor
    """int64 [C]: training interactions of each"""
    long_tail: Tensor
    """bool [C]: whether it is outside the head, which is the most popular items that hold 20 % of the training interactions"""
    num_users: int
    """users with training interactions"""
    num_interactions: int
    """training interactions, with whatever item"""
    least_popularity: int
    """training interactions of the item that has fewest, of those that have any; 0 where there are none"""
    directions: Mapping[str, Directions] = field(default_factory=dict)
    """of the features that metrics read, by name"""

    @classmethod
    def of(cls, popularity: Tensor, candidates: Tensor, num_users: int, features: Mapping[str, Feature] | None = None) -> Self:
        """Describe some candidates, int64 [C], of all items, given each item's training interactions: int64 [I].

        The head is made of whole items, from the most popular one down (of equally popular ones the lower item first), until
        it holds at least 20 % of the interactions. All items decide it, not the candidates alone: with cold items as
        candidates, all of them are in the long tail.
        """
        total = int(popularity.sum())
        descending, items = popularity.sort(descending=True, stable=True)
        before = descending.cumsum(0) - descending
        long_tail = torch.ones_like(popularity, dtype=torch.bool)
        long_tail[items[before * HEAD_PARTS < total]] = False
        seen = popularity[popularity > 0]
        return cls(
            popularity=popularity[candidates],
            long_tail=long_tail[candidates],
            num_users=num_users,
            num_interactions=total,
            least_popularity=int(seen.min()) if len(seen) else 0,
            directions={name: Directions.of(feature, candidates) for name, feature in (features or {}).items()},
        )

    @cached_property
    def unseen_share(self) -> Tensor:
        """The share of the training's users who have not seen a candidate: float64 [C], 1 where there are no users."""
        return 1 - self.popularity.double() / max(self.num_users, 1)

    @cached_property
    def information(self) -> Tensor:
        """-log2 of a candidate's share of the training interactions, in bits: float64 [C].

        A candidate without any counts as one of the item that has fewest; all are 0 where there are no interactions.
        """
        # On the host, so that no device's logarithm matters; there are few distinct popularities.
        counts, which = torch.unique(self.popularity.clamp(min=self.least_popularity), return_inverse=True)
        bits = [math.log2(self.num_interactions / count) if count else 0.0 for count in counts.tolist()]
        return torch.tensor(bits, dtype=torch.float64, device=counts.device)[which]


def of_listed(values: Tensor, items: Tensor) -> Tensor:
    """The values [C] of listed candidates, of any shape; zero where there is no candidate (-1)."""
    if not len(values):
        return values.new_zeros(items.shape)
    return values[items.clamp(min=0)].masked_fill_(items < 0, 0)
