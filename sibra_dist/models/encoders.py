"""Encoders: one a modality, each from an entity's input to a vector of the shared branch's input width h.

All take distinct `entities` int64 [n] and give float [n, h]. They are only ever asked about entities that have the
modality.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sibra_dist.data.dataset import Csr, Entities, Feature

# In the backward pass, gathering and sorting one entry costs about as much as adding up this many of the transposed
# matrix, which lie in order (measured on one CPU at width 256; see benchmarks/README.md).
SORTING_COST = 2.0


class InteractionsEncoder(nn.Module):
    """A linear layer and ReLU on the 0/1 row of training interactions, without ever making the row.

    The product of a 0/1 row and a weight matrix is the sum of those rows of the matrix that the 1s select: a bag sum.
    """

    def __init__(self, entities: Entities, other: Entities, width: int) -> None:
        """Read the histories of `entities` over the `other` side; `other.histories` is the same matrix transposed."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(other.count, width))
        self.bias = nn.Parameter(torch.empty(width))
        # torch's own initialisation of a linear layer with as many inputs.
        bound = 1 / math.sqrt(max(other.count, 1))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        _hold(self, "histories", entities.histories)
        _hold(self, "transposed", other.histories)

    def forward(self, entities: Tensor, excluded: Tensor | None = None) -> Tensor:
        """See the module's docstring; with `excluded` int64 [n], that entry is left out of each row (-1: none is).

        Entities may then repeat. An excluded entry must be in the row.
        """
        if excluded is None:
            return F.relu(self._bags(entities) + self.bias)
        distinct, inverse = torch.unique(entities, return_inverse=True)
        # One more row of zeros, for "none"; no encoder may lack a gradient, so it is made of the table.
        table = F.pad(self.weight, (0, 0, 0, 1))
        left_out = F.embedding(torch.where(excluded < 0, len(self.weight), excluded), table)
        return F.relu(F.embedding(inverse, self._bags(distinct)) - left_out + self.bias)

    def _bags(self, entities: Tensor) -> Tensor:
        bags: Tensor = BagSum.apply(self.weight, entities, _held(self, "histories"), _held(self, "transposed"))  # type: ignore[no-untyped-call]
        return bags


class BagSum(torch.autograd.Function):
    """Row e of the result is the sum of the rows of `weight` that history e names: `histories @ weight`, sparsely.

    The gradient with respect to `weight` is `transposed(histories)[:, batch] @ gradient`: a bag sum again. Two forms give
    it, both without atomic additions and so the same on every run:
    - over the whole transposed histories, which are in order already, when the batch reads much of them;
    - over the batch's own entries, sorted, when it reads few: the cost does not grow with the dataset.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, entities: Tensor, histories: Csr, transposed: Csr) -> Tensor:
        """Bag sums [n, h] of distinct `entities` int64 [n]."""
        columns, starts = histories.gather(entities)
        ctx.save_for_backward(entities, columns)
        ctx.histories, ctx.transposed = histories, transposed
        ctx.weight_shape = weight.shape
        return _bag_sum(columns, weight, starts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient with respect to `weight`."""
        (gradient,) = gradients
        entities, columns = ctx.saved_tensors
        if columns.numel() * SORTING_COST >= ctx.histories.nnz:
            by_entity = gradient.new_zeros(ctx.histories.num_rows, gradient.shape[1]).index_copy_(0, entities, gradient)
            return _bag_sum(ctx.transposed.indices, by_entity, ctx.transposed.indptr[:-1]), None, None, None
        columns, order = columns.sort(stable=True)
        rows = torch.repeat_interleave(ctx.histories.lengths(entities))[order]
        distinct, counts = torch.unique_consecutive(columns, return_counts=True)
        sums = _bag_sum(rows, gradient, counts.cumsum(0) - counts)
        return gradient.new_zeros(ctx.weight_shape).index_copy_(0, distinct.long(), sums), None, None, None


class CategoryEncoder(nn.Module):
    """An embedding of the category's code."""

    codes: Tensor

    def __init__(self, feature: Feature, width: int) -> None:
        """Read a `category` feature."""
        super().__init__()
        assert isinstance(feature.values, Tensor)
        self.embedding = nn.Embedding(feature.spec.size, width)
        self.register_buffer("codes", feature.values, persistent=False)

    def forward(self, entities: Tensor) -> Tensor:
        """See the module's docstring."""
        embedded: Tensor = self.embedding(self.codes[entities])
        return embedded


class TagsEncoder(nn.Module):
    """The sum of the embeddings of the tags."""

    def __init__(self, feature: Feature, width: int) -> None:
        """Read a `tags` feature."""
        super().__init__()
        assert isinstance(feature.values, Csr)
        self.embedding = nn.Embedding(feature.spec.size, width)
        _hold(self, "tags", feature.values)

    def forward(self, entities: Tensor) -> Tensor:
        """See the module's docstring."""
        codes, starts = _held(self, "tags").gather(entities)
        return _bag_sum(codes, self.embedding.weight, starts)


class DenseEncoder(nn.Module):
    """A linear layer and ReLU on a vector or on numbers."""

    inputs: Tensor

    def __init__(self, feature: Feature, width: int) -> None:
        """Read a `vector` or `numeric` feature."""
        super().__init__()
        assert isinstance(feature.values, Tensor)
        self.linear = nn.Linear(feature.spec.size, width)
        self.register_buffer("inputs", feature.values, persistent=False)

    def forward(self, entities: Tensor) -> Tensor:
        """See the module's docstring."""
        return F.relu(self.linear(self.inputs[entities]))


ENCODERS: dict[str, Callable[[Feature, int], nn.Module]] = {
    "category": CategoryEncoder,
    "tags": TagsEncoder,
    "numeric": DenseEncoder,
    "vector": DenseEncoder,
}


def _bag_sum(indices: Tensor, table: Tensor, starts: Tensor) -> Tensor:
    """Sums [len(starts), h] of the rows of `table` that consecutive stretches of `indices` name."""
    if indices.numel() == 0:
        # The product keeps `table` in the graph: a parameter without a gradient would differ between ranks.
        return table.new_zeros(starts.numel(), table.shape[1]) + 0 * table[:1].sum()
    return F.embedding_bag(indices, table, starts.to(indices.dtype), mode="sum")


def _hold(module: nn.Module, name: str, matrix: Csr) -> None:
    """Keep a sparse matrix as buffers, which follow the module to its device and are not saved with it."""
    module.register_buffer(f"{name}_indptr", matrix.indptr, persistent=False)
    module.register_buffer(f"{name}_indices", matrix.indices, persistent=False)


def _held(module: nn.Module, name: str) -> Csr:
    return Csr(module.get_buffer(f"{name}_indptr"), module.get_buffer(f"{name}_indices"))
