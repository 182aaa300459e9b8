"""What an interaction counts in a row: 1, or a weight that it has, or what text retrieval makes of it."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sibra_dist.data.dataset import Csr, Entities
from sibra_dist.errors import ConfigError
from sibra_dist.models.histories import Histories

# BM25 (Robertson and Zaragoza 2009): how fast a weight saturates, and how much a long row is damped.
SATURATION, LENGTH_DAMPING = 1.2, 0.75

Weighting = Literal["binary", "raw", "log", "tf_idf", "bm25"]


def weigh(weighting: Weighting, entities: Entities, other: Entities, where: str) -> Histories:
    """The histories of `entities` over the `other` side, with what their entries count.

    In the words of text retrieval, `entities` are documents, the other side terms, and weights (1 where the dataset has
    none) how often a term is in a document; so users' and items' matrices differ.
    - binary: 1.
    - raw: the weight w. log: log(1 + w).
    - tf_idf: sqrt(w) * (1 + log((1 + N) / (1 + n))), for n of N documents with the term: Spärck Jones (1972), with the root
      and the smoothing of Lucene's ClassicSimilarity.
    - bm25: w / (w + k1 * (1 - b + b * length / mean length)) * log(1 + (N - n + 0.5) / (n + 0.5)), length the sum of a
      document's weights, k1 = 1.2, b = 0.75: Robertson and Zaragoza (2009), with Lucene's idf, which is never negative.

    Newcomers are documents that are weighed by what the others show, and alter nothing of that.

    All but binary are then divided by their root mean square over all entries, so that a row of L entries has the squared
    length L on average, that of a 0/1 row: the same learning rate suits stars, play counts and any weighting.

    Raises:
        ConfigError: the dataset has no weights, or weights that the weighting is not made for; `where` is the key.
    """
    rows, transposed = entities.histories, other.histories
    if weighting == "binary":
        return Histories(rows, transposed)
    weights = entities.weights
    if weights is None:
        if weighting in ("raw", "log"):
            raise ConfigError(
                f"{where}: {weighting} is made of the interactions' weights, which the dataset has not; prepare it with "
                "interactions.weight, or choose binary, tf_idf or bm25"
            )
        weights = torch.ones_like(rows.indices, dtype=torch.float32)
    elif weighting != "raw" and rows.nnz and (smallest := float(weights.min())) < 0:
        raise ConfigError(
            f"{where}: {weighting} needs weights from 0 on, and the dataset has {smallest:g}; choose raw or binary"
        )
    known = entities.known_histories
    values = _VALUES[weighting](weights, rows, transposed, entities.known)
    # An average of squares of 0 means values of 0, which stay.
    average = values[: known.nnz].square().mean(dtype=torch.float64)
    values = values / average.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    # By column, and by row within a column: that is the order of the transposed matrix.
    return Histories(rows, transposed, values, values[known.indices.sort(stable=True).indices])


def _raw(weights: Tensor, rows: Csr, transposed: Csr, known: int) -> Tensor:
    return weights


def _log(weights: Tensor, rows: Csr, transposed: Csr, known: int) -> Tensor:
    return weights.log1p()


def _tf_idf(weights: Tensor, rows: Csr, transposed: Csr, known: int) -> Tensor:
    documents, with_term = _documents(rows, known), transposed.lengths().double()
    idf = 1 + torch.log((1 + documents) / (1 + with_term))
    return weights.sqrt() * idf.float()[rows.indices]


def _bm25(weights: Tensor, rows: Csr, transposed: Csr, known: int) -> Tensor:
    documents, with_term = _documents(rows, known), transposed.lengths().double()
    idf = torch.log1p((documents - with_term + 0.5) / (with_term + 0.5))
    row = torch.repeat_interleave(rows.lengths())
    lengths = torch.bincount(row, weights.double(), minlength=rows.num_rows)
    relative = lengths / (lengths[:known].sum() / max(documents, 1)).clamp(min=torch.finfo(torch.float64).tiny)
    damping = SATURATION * (1 - LENGTH_DAMPING + LENGTH_DAMPING * relative)
    return weights / (weights + damping.float()[row]) * idf.float()[rows.indices]


def _documents(rows: Csr, known: int) -> int:
    return int((rows.lengths()[:known] > 0).sum())


_VALUES: dict[str, Callable[[Tensor, Csr, Csr, int], Tensor]] = {"raw": _raw, "log": _log, "tf_idf": _tf_idf, "bm25": _bm25}
