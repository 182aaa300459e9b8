"""How far apart listed candidates are by a feature of theirs: cosine distances, in integers, without looking at each pair.

Of unit vectors x_i the sum of all pairs' cosines is half of |sum of x_i|^2 - sum of |x_i|^2. Coordinates are rounded to
multiples of 2**-20, after which all sums are exact: for lists of up to 2048 candidates they fit an int64, and a mean distance
is right to about 1e-6.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sibra_dist.data.dataset import Csr, Feature

UNIT = 1 << 20


class Directions(NamedTuple):
    """Where the feature's values of C candidates point; those without a value, or with a zero vector, point nowhere."""

    vectors: Tensor | Csr
    """unit vectors, int32 [C, d] in units of 2**-20; or the places of equal coordinates"""
    coordinate: Tensor
    """for places: that coordinate of each candidate, int64 [C]"""

    @classmethod
    def of(cls, feature: Feature, candidates: Tensor) -> "Directions":
        """Those of some items: a category is a vector with a single 1, tags are one with several."""
        if isinstance(feature.values, Csr):
            codes, _ = feature.values.gather(candidates)
            lengths = feature.values.lengths(candidates)
        elif feature.spec.kind == "category":
            present = feature.present[candidates]
            codes, lengths = feature.values[candidates][present], present.long()
        else:
            vectors = feature.values[candidates].double() * feature.present[candidates, None]
            unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            return cls((unit * UNIT).round().int(), torch.zeros_like(candidates))
        coordinate = (UNIT / lengths.clamp(min=1).double().sqrt()).round().long()
        return cls(Csr(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), codes), coordinate)


def mean_distance(directions: Directions, items: Tensor) -> Tensor:
    """Mean of 1 - cosine over the pairs of each user's listed candidates [U, k] that point somewhere: float64 [U].

    -1 is no candidate. 0 where there is no pair.
    """
    squared, own, number = (items.new_zeros(len(items)) for _ in range(3))
    if isinstance(directions.vectors, Csr):
        rows, places = (items >= 0).nonzero(as_tuple=True)
        listed = items[rows, places]
        lengths, coordinate = directions.vectors.lengths(listed), directions.coordinate[listed]
        codes, _ = directions.vectors.gather(listed)
        owners = rows.repeat_interleave(lengths)
        width = int(codes.max()) + 1 if len(codes) else 1
        keys, which = torch.unique(owners * width + codes, return_inverse=True)
        sums = torch.zeros_like(keys).index_add_(0, which, coordinate.repeat_interleave(lengths))
        squared.index_add_(0, keys // width, sums**2)
        own.index_add_(0, rows, lengths * coordinate**2)
        number.index_add_(0, rows, (lengths > 0).long())
    elif len(directions.vectors):
        total = items.new_zeros(len(items), directions.vectors.shape[1])
        # Place by place, so that no list's vectors are all held at once.
        for column in items.unbind(dim=1):
            vectors = directions.vectors[column.clamp(min=0)].long() * (column >= 0)[:, None]
            total += vectors
            own += (vectors**2).sum(dim=1)
            number += vectors.any(dim=1)
        squared = (total**2).sum(dim=1)
    pairs = number * (number - 1)
    mean = 1 - (squared - own).double() / UNIT**2 / pairs.clamp(min=1).double()
    return torch.where(pairs > 0, mean.clamp(min=0), 0.0)
