"""How far apart a model places what two modalities say of the same entities: the gap between modalities.

The embedding of an entity in one modality is its embedding with all others hidden. The gap of two modalities is the distance
between the centroids of their embeddings, scaled to length 1 (Liang, Zhang, Kwon, Yeung and Zou, "Mind the Gap", NeurIPS
2022). Whether the two still agree on which entity is which is told by retrieval: the share of entities whose embedding in
the second modality is among the k nearest, by cosine, to that in the first. Entities that have both modalities count.

All of it is exact. Coordinates are rounded to multiples of 2^-25, float32's own precision at 1, so a product of two
embeddings is a multiple of 2^-50 no larger than 1 and so is every part of its sum: float64 holds them without rounding, and
any tiling, any order and any number of ranks find the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from sibra_dist.data.batches import COMPARED, stream, uniform
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.presence import Hidden, SideName
from sibra_dist.errors import ConfigError, SibraError
from sibra_dist.evaluation.sums import Sums
from sibra_dist.models.base import Recommender
from sibra_dist.models.linear import unit_length

ONE = 2**25
"""Length 1, in the units of rounded coordinates."""
ENCODE_TILE = 4096
"""Entities embedded at once."""
TILE = 2048
"""Entities whose embeddings are compared with as many others at once."""


@dataclass(frozen=True)
class Gap:
    """Between the embeddings of two modalities."""

    side: SideName
    modalities: tuple[str, str]
    entities: int
    """That have both"""
    compared: int
    """Of these, the ones among which they are searched for: fewer where a sample was asked for"""
    distance: float | None
    """Between the centroids, from 0 to 2; None where no entity has both"""
    recalls: tuple[dict[int, float], dict[int, float]]
    """Recall by cutoff, of the second modality's embeddings from the first's, and the other way round; empty likewise"""


class SideView:
    """The modalities of one side of a model, one at a time."""

    def __init__(self, model: Recommender, dataset: Dataset, hidden: Hidden) -> None:
        """See a side of a model in evaluation mode, of which something may be hidden anyway."""
        self.side: SideName = hidden.side
        self.names = model.modalities()[hidden.side == "items"]
        self._model, self._dataset, self._hidden = model, dataset, hidden
        self._seen = model.seen(hidden.side == "items", hidden)

    def having(self, *names: str) -> Tensor:
        """The entities that have some modalities, int64 ascending."""
        columns = [self.names.index(name) for name in names]
        return torch.nonzero(self._seen[:, columns].all(1)).flatten()

    def tiles(self, entities: Tensor, name: str) -> Iterator[Tensor]:
        """Embeddings of entities in one modality, in units of 2^-25 of their length: int32 [n, d], tile by tile.

        One of length 0 stays there. Where tables are divided over ranks, all call this together.

        Raises:
            SibraError: an embedding is not a number; the message names the entity.
        """
        others = {other: 1.0 for other in self.names if other != name}
        hidden = Hidden(self.side, {**self._hidden.shares, **others}, self._hidden.seed)
        encode = self._model.encode_items if self.side == "items" else self._model.encode_users
        for tile in entities.split(ENCODE_TILE) if len(entities) else ():
            embeddings = encode(tile, hidden)
            bad = torch.nonzero(~embeddings.isfinite().all(1)).flatten().tolist()
            if bad:
                entity = self._dataset.ids(self.side)[int(tile[bad[0]])].as_py()
                raise SibraError(
                    f"the embedding of {self.side[:-1]} {entity!r} in {name} is not a number; the model has diverged: use an "
                    "earlier checkpoint, or train with a lower learning rate"
                )
            yield (unit_length(embeddings.double()) * ONE).round().int()

    def embeddings(self, entities: Tensor, name: str) -> Tensor:
        """All of `tiles`, [n, d]; [0, 1] of nobody."""
        return torch.cat([*self.tiles(entities, name)] or [torch.zeros(0, 1, dtype=torch.int32, device=self._model.device)])


class Placed(Sums):
    """How many candidates come before each entity's own, in both directions of retrieval."""

    ahead: Tensor

    def __init__(self, count: int) -> None:
        """Of so many entities."""
        super().__init__()
        self.add_state("ahead", torch.zeros(2, count, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor, start: int) -> None:
        """Compare the entities from `start` on, a tile, with all of them: embeddings int32 [n, d] in two modalities.

        Of equally near ones, the lower entity comes first.
        """
        rows = slice(start, start + TILE)
        own = torch.cat([_dots(a, b) for a, b in zip(first.split(TILE), second.split(TILE), strict=True)])
        queries = first[rows].double()
        # Products are whole numbers: those that equal an entity's own are ahead of it once that is lowered by a half.
        lower = own.new_full((len(queries), len(queries)), 0.5).tril(-1)
        for at in range(0, len(first), TILE):
            columns = slice(at, at + TILE)
            scores = queries @ second[columns].double().T
            there, back = (lower, lower.T) if at == start else (0.5 * (at < start), 0.5 * (at > start))
            self.ahead[0, rows] += (scores > own[rows, None] - there).sum(1, dtype=torch.int32)
            self.ahead[1, columns] += (scores > own[columns] - back).sum(0, dtype=torch.int32)

    def compute(self) -> Tensor:
        """Int64 [2, n]: of the second modality's candidates for the first's embedding, and the other way round."""
        return self.ahead


@torch.inference_mode()
def modality_gaps(
    views: Sequence[SideView],
    cutoffs: Sequence[int],
    *,
    sample: int | None = None,
    ranks: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Gap]:
    """The gap of every two modalities of a side.

    Memory holds the embeddings of two modalities, 4 bytes a coordinate, and a tile of `TILE` x `TILE` products.

    Args:
        views: the sides.
        cutoffs: of the recall.
        sample: the most entities that are searched among, drawn by a hash of the entity; all by default. Centroids are of
            all in any case.
        ranks: this rank and their number; where there are several, all call this together.
        progress: told how many entities have been searched for, and their number over all pairs.

    Raises:
        ConfigError: no side of the model has two modalities.
        SibraError: an embedding is not a number.
    """
    pairs = [(view, first, second) for view in views for first, second in combinations(view.names, 2)]
    if not pairs:
        raise ConfigError("the model reads fewer than two modalities of users, and of items: there is no gap to measure")
    having = [view.having(first, second) for view, first, second in pairs]
    compared = [sampled(entities, sample) for entities in having]
    total, done = sum(map(len, compared)), 0
    gaps = []
    for (view, *names), entities, chosen in zip(pairs, having, compared, strict=True):
        centroids = [centroid(view.tiles(entities, name), len(entities)) for name in names]
        first, second = (view.embeddings(chosen, name) for name in names)
        placed = Placed(len(chosen)).to(first.device)
        for start in range(ranks[0] * TILE, len(chosen), ranks[1] * TILE):
            placed.update(first, second, start)
            progress(min(done + start + TILE * ranks[1], done + len(chosen)), total)
        ahead, done = placed.compute(), done + len(chosen)
        there, back = ({k: float((row < k).double().mean()) for k in cutoffs} if len(chosen) else {} for row in ahead)
        distance = float((centroids[0] - centroids[1]).norm()) if len(entities) else None
        gaps.append(Gap(view.side, (names[0], names[1]), len(entities), len(chosen), distance, (there, back)))
    return gaps


def centroid(tiles: Iterator[Tensor], count: int) -> Tensor:
    """The mean of so many embeddings in units of 2^-25: float64 [d], from sums of integers; [1] of nobody."""
    total = torch.zeros(1, dtype=torch.int64)
    for tile in tiles:
        total = total + tile.sum(0, dtype=torch.int64).cpu()
    return total.double() / max(count, 1) / ONE


def sampled(entities: Tensor, most: int | None) -> Tensor:
    """So many of the entities int64 [n], ascending: those of the lowest hashes, so that a larger sample holds a smaller."""
    if most is None or len(entities) <= most:
        return entities
    return entities[uniform(stream(COMPARED), entities).argsort(stable=True)[:most]].sort().values


def _dots(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() * second.double()).sum(1)
