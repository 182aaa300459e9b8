"""An index that finds a user's best items without scoring all of them, and how many of them it finds.

It is a hierarchical navigable small world graph (Malkov and Yashunin, "Efficient and robust approximate nearest neighbor
search using hierarchical navigable small world graphs", IEEE TPAMI 2020), as FAISS makes it, over the items' embeddings by
dot product. Where the score is a cosine, embeddings of length 1 are indexed: the order is that of the cosines.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from sibra_dist.data.manifest import Shard
from sibra_dist.data.storage import Place
from sibra_dist.errors import ConfigError
from sibra_dist.evaluation.ranking import rank
from sibra_dist.exporting.folder import read_embeddings, write_file
from sibra_dist.exporting.manifest import INDEX, NeighbourIndex
from sibra_dist.models.base import SCORES, ScoreName

NEIGHBOURS, BUILD_BREADTH, SEARCH_BREADTH = 32, 100, 128
"""Links of an item, and the candidates that are kept in mind while one is added, and while one is searched."""
SAMPLED_USERS = 1000
BEST = 100


def require_faiss() -> None:
    """Raise a `ConfigError` unless FAISS is installed."""
    if find_spec("faiss") is None:
        raise ConfigError("an index is made with FAISS, which is not installed: pip install 'sibra-dist[ann]', or drop --index")


def write_index(
    place: Place, score: ScoreName, users: Sequence[Shard], items: Sequence[Shard], rows_per_shard: int
) -> NeighbourIndex:
    """Write the index over the items, and measure it on users at equal distances; `OSError` if it cannot be written.

    Args:
        place: the folder, where the shards are.
        score: which of `SCORES` the model's score is.
        users: shards of their embeddings.
        items: likewise.
        rows_per_shard: in all but the last.
    """
    import faiss

    prepare = SCORES[score].prepare
    count, num_users = sum(shard.rows for shard in items), sum(shard.rows for shard in users)
    threads = faiss.omp_get_max_threads()
    # Several threads would link items in the order in which they happen to come.
    faiss.omp_set_num_threads(1)
    index = None
    try:
        for shard in items:
            rows = prepare(read_embeddings(place, shard)).numpy()
            if index is None:
                index = faiss.IndexHNSWFlat(rows.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
                index.hnsw.efConstruction, index.hnsw.efSearch = BUILD_BREADTH, SEARCH_BREADTH
            index.add(rows)
    finally:
        faiss.omp_set_num_threads(threads)
    sample = torch.arange(min(SAMPLED_USERS, num_users)) * num_users // max(min(SAMPLED_USERS, num_users), 1)
    queries = prepare(_rows(place, users, sample))
    k = min(BEST, count)
    exact = rank(
        lambda start, stop: queries @ prepare(read_embeddings(place, items[start // rows_per_shard])).T,
        count,
        k,
        rows_per_shard,
    ).items
    assert index is not None
    found = torch.from_numpy(index.search(queries.numpy(), k)[1])
    return NeighbourIndex(
        file=write_file(place, INDEX, [faiss.serialize_index(index).data]),
        library=f"faiss {faiss.__version__}",
        kind=f"HNSW{NEIGHBOURS},Flat",
        unit_length=score == "cosine",
        k=k,
        recall=recall(found, exact),
        sampled_users=len(sample),
    )


def recall(found: Tensor, exact: Tensor) -> float:
    """Of the items int64 [U, k] that are the best, the share that was found, int64 [U, k] with -1 for none."""
    return float((exact[:, :, None] == found[:, None, :]).any(2).double().mean())


def _rows(place: Place, shards: Sequence[Shard], numbers: Tensor) -> Tensor:
    """Rows of the embeddings, int64 [n] ascending: each shard is read once."""
    found, first = [], 0
    for shard in shards:
        inside = numbers[(numbers >= first) & (numbers < first + shard.rows)] - first
        found.append(read_embeddings(place, shard)[inside])
        first += shard.rows
    return torch.cat(found)
