"""Sums of rows of a table, and the gradients of such sums.

A row of a sparse matrix times a table is the sum of those rows of the table that its entries name, each times what the entry
counts: a bag sum. Nothing here adds atomically, so sums are the same on every run.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.models.histories import Entries, Histories, at, values_at

# In the backward pass, gathering and sorting one entry costs about as much as adding up this many of the transposed
# matrix, which lie in order (measured on one CPU at width 256; see benchmarks/README.md).
SORTING_COST = 2.0

# On a CPU, a sum that reads rows of a table of at least so many bytes so many times over is computed some columns at a time, of
# which caches hold more rows: the bits are the same, and it takes 0.3 to 0.8 of the time (width 256, 2,000 to 200,000 rows).
READ_AGAIN, UNCACHED_BYTES, CACHED_WIDTH = 16, 2 * 2**20, 32

STRETCH = 2**14
"""Rows of a table whose gradient is summed, and followed, at once."""


class Whole(NamedTuple):
    """Says of entries that they are whole rows, each once, of a matrix that is held by column too."""

    rows: Tensor
    """int64 [n], distinct"""
    histories: Histories


class Boundary(NamedTuple):
    """Where a stretch of a table's rows begins, or the last one ends."""

    sum: int
    """among the sums"""
    entry: int
    """among the entries of the sums"""


class GradientPlan(NamedTuple):
    """How the gradient of a bag sum is summed: over `entries` of the rows of the upstream gradient [n, h]."""

    entries: Entries
    scattered: tuple[Tensor, int] | None = None
    """Where the upstream gradient's rows stand first, int64 [n], among how many, if `entries` name those places."""
    distinct: Tensor | None = None
    """int64 [m]: the rows of the table that the sums belong to; None: all, in order."""
    boundaries: tuple[Boundary, ...] = ()
    """Of stretches of `STRETCH` rows of the table; none if its number of rows was not given."""


class Bags(NamedTuple):
    """What is read of a matrix for a bag sum, and in training what its table makes of that in advance."""

    entries: Entries
    plan: Any = None
    """What `sibra_dist.models.tables.Table.plan` gives; a `GradientPlan` where there is no table"""


def plan_gradient(entries: Entries, whole: Whole | None = None, num_rows: int | None = None) -> GradientPlan:
    """How the gradient with respect to the table of `bag_sum(table, entries)` is summed.

    It is a bag sum again, over the transposed matrix. Three forms give it, all without atomic additions and so the same on
    every run:
    - over the whole transposed histories, which are in order already, when whole rows are read and much of them;
    - over the batch's own entries, sorted, when whole rows are read and few: the cost does not grow with the dataset;
    - the same when what is read are not whole rows.

    Given the table's `num_rows`, a gradient of most rows is summed in its place; otherwise by itself, to be copied there.
    """
    columns, _, values = entries
    if whole is not None:
        rows, histories = whole
        if columns.numel() * SORTING_COST >= histories.rows.nnz:
            transposed = histories.transposed
            by_column = Entries(transposed.indices, transposed.indptr[:-1], histories.transposed_values)
            return GradientPlan(by_column, (rows, histories.rows.num_rows), boundaries=_boundaries(by_column, None, num_rows))
    columns, order = columns.sort(stable=True)
    rows = at(torch.repeat_interleave(entries.lengths), order)
    values = values_at(values, order)
    distinct = None
    if num_rows is not None and columns.numel() >= num_rows:
        counts = torch.bincount(columns, minlength=num_rows)
    else:
        found, counts = torch.unique_consecutive(columns, return_counts=True)
        distinct = found.long()
    summed = Entries(rows, counts.cumsum(0) - counts, values)
    return GradientPlan(summed, None, distinct, _boundaries(summed, distinct, num_rows))


def _boundaries(entries: Entries, distinct: Tensor | None, num_rows: int | None) -> tuple[Boundary, ...]:
    if num_rows is None:
        return ()
    sums = torch.tensor([*range(0, num_rows, STRETCH), num_rows], device=entries.starts.device)
    if distinct is not None:
        sums = torch.searchsorted(distinct, sums)
    starts = F.pad(entries.starts, (0, 1), value=entries.columns.numel())[sums]
    return tuple(map(Boundary, sums.tolist(), starts.tolist()))


class PendingGradient:
    """The gradient of a bag sum with respect to its table, which is summed a stretch of rows at a time."""

    def __init__(self, upstream: Tensor, plan: GradientPlan) -> None:
        """Of an upstream gradient [n, h], with a plan that was given the table's number of rows."""
        self._upstream, self._plan = upstream, plan

    def stretches(self, num_rows: int) -> Iterator[Tensor]:
        """Of a table of so many rows, the gradients of `STRETCH` rows each, and of what is left: [rows, h]. Only once."""
        entries, scattered, distinct, boundaries = self._plan
        width = self._upstream.shape[1]
        parts = list(_parts(self._upstream, entries, scattered))
        del self._upstream
        for first, (begin, end) in zip(range(0, num_rows, STRETCH), pairwise(boundaries), strict=True):
            rows = slice(begin.sum, end.sum)
            sums = _summed(parts, width, entries.stretch(rows, slice(begin.entry, end.entry)))
            yield sums if distinct is None else _placed(sums, distinct[rows] - first, min(num_rows - first, STRETCH))


def bag_sum(
    table: Tensor,
    entries: Entries,
    plan: GradientPlan | None = None,
    *,
    sparse: bool = False,
    pending: list[PendingGradient] | None = None,
) -> Tensor:
    """Sums [n, h] of the rows of `table` that the entries of n rows name, each times what the entry counts.

    The gradient with respect to `table` is summed as `plan` says; without one it is planned in the backward pass. If it is to
    be `sparse` it has the plan's distinct rows alone, ascending, as a coalesced sparse tensor. Given an empty list for what is
    `pending`, it is not summed in the backward pass, but put there.
    """
    if not torch.is_grad_enabled():
        return _sums(table, entries)
    sums: Tensor = _BagSum.apply(table, entries, plan, sparse, pending)  # type: ignore[no-untyped-call]
    return sums


class _BagSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        entries: Entries,
        plan: GradientPlan | None,
        sparse: bool,
        pending: list[PendingGradient] | None,
    ) -> Tensor:
        ctx.entries = entries if plan is None else None  # which may be much
        ctx.plan, ctx.sparse, ctx.pending, ctx.table_shape = plan, sparse, pending, table.shape
        return _sums(table, entries)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        gradient = gradients[0].contiguous()  # else torch sums in another order
        plan = ctx.plan or plan_gradient(ctx.entries, num_rows=None if ctx.pending is None else ctx.table_shape[0])
        return _gradient(gradient, plan, ctx.sparse, ctx.pending, ctx.table_shape), None, None, None, None


def _gradient(
    upstream: Tensor, plan: GradientPlan, sparse: bool, pending: list[PendingGradient] | None, shape: torch.Size
) -> Tensor | None:
    if pending is not None and not pending:  # a second would keep more than the table's own does
        pending.append(PendingGradient(upstream, plan))
        return None
    sums = _sums(upstream, plan.entries, plan.scattered)
    if plan.distinct is None:
        return sums
    if sparse:
        return torch.sparse_coo_tensor(plan.distinct[None], sums, shape, is_coalesced=True, check_invariants=False)
    return _placed(sums, plan.distinct, shape[0])


def _placed(sums: Tensor, rows: Tensor, count: int) -> Tensor:
    """Zeros [count, h] with the sums in some rows."""
    return sums.new_zeros(count, sums.shape[1]).index_copy_(0, rows, sums)


def _sums(table: Tensor, entries: Entries, scattered: tuple[Tensor, int] | None = None) -> Tensor:
    if torch.compiler.is_exporting():  # for any number of entries
        return _embedding_bag(table, entries)
    return _summed(_parts(table, entries, scattered), table.shape[1], entries)


def _parts(table: Tensor, entries: Entries, scattered: tuple[Tensor, int] | None) -> Iterator[Tensor]:
    """As many columns of a table at a time as are to be summed at once; of a scattered table, with its rows in their places."""
    count = len(table) if scattered is None else scattered[1]
    uncached = count * table.shape[1] * table.element_size() >= UNCACHED_BYTES
    read_again = entries.columns.numel() >= READ_AGAIN * count
    width = CACHED_WIDTH if table.device.type == "cpu" and uncached and read_again else table.shape[1]
    for part in table.split(width, dim=1):
        yield part.contiguous() if scattered is None else _placed(part, *scattered)


def _summed(parts: Iterator[Tensor] | Sequence[Tensor], width: int, entries: Entries) -> Tensor:
    """The bag sums of a table of some width, of which some columns at a time are given."""
    parts = iter(parts)
    one = next(parts)
    count = entries.starts.numel()
    if entries.columns.numel() == 0:
        return one.new_zeros(count, width)
    if one.shape[1] == width:
        return _embedding_bag(one, entries)
    sums, first = one.new_empty(count, width), 0
    for part in chain([one], parts):
        last = first + part.shape[1]
        sums[:, first:last] = _embedding_bag(part, entries)
        first = last
    return sums


def _embedding_bag(table: Tensor, entries: Entries) -> Tensor:
    columns, starts, values = entries
    values = None if values is None else values.to(table.dtype)
    return F.embedding_bag(columns, table, starts.to(columns.dtype), mode="sum", per_sample_weights=values)
