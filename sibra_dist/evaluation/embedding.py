"""Embeddings of many items: processes that know each other share the work, and then all have all of them."""

import torch
import torch.distributed
from torch import Tensor

from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.models.base import Recommender

ENCODE_TILE = 4096
"""Items embedded at once: whoever embeds a tile, its embeddings come from the same computation."""


def embed_items(model: Recommender, items: Tensor, hidden: Hidden = NOTHING_HIDDEN, ranks: tuple[int, int] = (0, 1)) -> Tensor:
    """Embeddings of items int64 [n], without what is hidden: [n, d], on the model's device.

    `ranks` is this rank and their number. Where they form a process group they share out the tiles, and all call this;
    otherwise each embeds all items.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        ranks = (0, 1)
    own = [model.encode_items(tile, hidden) for tile in shared_out(items, ENCODE_TILE, ranks)]
    if ranks[1] == 1:
        return torch.cat(own)
    tiles = items.split(ENCODE_TILE)
    embeddings = own[0].new_empty(len(own) * ranks[1], len(tiles[0]), *own[0].shape[1:])
    # A turn is one tile of each rank, of full length.
    for turn, found in zip(embeddings.split(ranks[1]), own, strict=True):
        padded = turn.new_zeros(turn.shape[1:])
        padded[: len(found)] = found
        torch.distributed.all_gather(list(turn.unbind()), padded)
    return embeddings.flatten(0, 1)[: len(items)]


def shared_out(entities: Tensor, tile: int, ranks: tuple[int, int]) -> list[Tensor]:
    """The tiles of this rank, which takes each `ranks[1]`-th; as many as the others', so the last may be empty."""
    rank, world = ranks
    tiles = entities.split(tile)
    return [*tiles[rank::world], *[entities[:0]] * (-len(tiles) % world > world - 1 - rank)]
