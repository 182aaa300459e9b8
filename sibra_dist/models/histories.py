"""Rows of training interactions: which are read in a step, and the sums that they stand for.

A row times a table is the sum of those rows of the table that its entries name, each times what the entry counts: a bag
sum. Rows are read whole, or drawn: at most so many entries of each, by a hash, so that a row has the same draw on any rank
and in any batch. Nothing here adds atomically or depends on a global generator.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.data.batches import hash64, stream, uniform
from sibra_dist.data.dataset import Csr
from sibra_dist.data.user_batches import Shown

# In the backward pass, gathering and sorting one entry costs about as much as adding up this many of the transposed
# matrix, which lie in order (measured on one CPU at width 256; see benchmarks/README.md).
SORTING_COST = 2.0

# On a CPU, a sum that reads rows of a table of at least so many bytes so many times over is computed some columns at a time, of
# which caches hold more rows: the bits are the same, and it takes 0.3 to 0.8 of the time (width 256, 2,000 to 200,000 rows).
READ_AGAIN, UNCACHED_BYTES, CACHED_WIDTH = 16, 2 * 2**20, 32

# Streams of the hash under a step's key: who draws, how far a draw is turned, and the first of the rounds.
_ROWS, _TURNS, _FIRST_ROUND = 1, 2, 3
_ROUNDS = 6


class Entries(NamedTuple):
    """Entries of some rows of a sparse matrix, end to end."""

    columns: Tensor
    """int32 [total]"""
    starts: Tensor
    """int64 [n]: where each row starts"""
    values: Tensor | None = None
    """[total]: what each counts; None: 1"""

    def at_most(self, count: int, key: int, names: Tensor) -> "Entries":
        """At most so many of each row, drawn by a hash of the key, the row's name int64 [n] and the column."""
        total = len(self.columns)
        lengths = F.pad(self.starts, (0, 1), value=total).diff()
        rows = torch.repeat_interleave(lengths)
        random = uniform(key, hash64(key, names)[rows] + self.columns)
        # By row, and within a row by random number: two stable sorts, the minor one first.
        order = random.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]
        kept = torch.zeros(total, dtype=torch.bool, device=rows.device)
        kept[order[torch.arange(total, device=rows.device) - self.starts[rows] < count]] = True
        lengths = lengths.clamp(max=count)
        values = None if self.values is None else self.values[kept]
        return Entries(self.columns[kept], lengths.cumsum(0) - lengths, values)


@dataclass(frozen=True)
class Histories:
    """A sparse matrix by row and by column."""

    rows: Csr
    transposed: Csr
    values: Tensor | None = None
    """float32 [nnz], in the order of `rows`; None: all 1"""
    transposed_values: Tensor | None = None
    """The same values in the order of `transposed`."""

    def whole(self, rows: Tensor) -> Entries:
        """All entries of rows int64 [n]."""
        positions, starts = _positions(self.rows.indptr[rows], self.rows.lengths(rows))
        return Entries(_at(self.rows.indices, positions), starts, _values_at(self.values, positions))

    def some(self, rows: Tensor, shown: Shown) -> tuple[Entries, Tensor]:
        """The entries of rows int64 [n] that `shown` says of, asked from the side of the rows, and how many of each row."""
        lengths = self.rows.lengths(rows)
        positions, _ = _positions(self.rows.indptr[rows], lengths)
        owners = torch.repeat_interleave(lengths)
        kept = shown(rows[owners], self.rows.indices[positions])
        positions, counts = positions[kept], torch.bincount(owners[kept], minlength=len(rows))
        columns = _at(self.rows.indices, positions)
        return Entries(columns, counts.cumsum(0) - counts, _values_at(self.values, positions)), counts

    def drawn(self, rows: Tensor, excluded: Tensor | None, at_most: int, key: int) -> tuple[Entries, Tensor]:
        """At most so many entries of each row, each at most once, every choice about as likely as any other.

        The draw is a hash of the key, the row, what is excluded of it, and the place in the draw.

        Args:
            rows: int64 [n].
            excluded: int64 [n], the column of an entry of the row that is not there to be drawn; -1 for none.
            at_most: entries of a row; a shorter row is read whole.
            key: of the step.

        Returns:
            The entries, and int64 [n] how many there were of each row to draw from.
        """
        first, available = self.rows.indptr[rows], self.rows.lengths(rows)
        names = rows * (self.transposed.num_rows + 1)
        if excluded is not None:
            there = excluded >= 0
            # Places from here on are one further into the row.
            hole = torch.where(there, self.find(rows, excluded) - first, available)
            available = available - there.long()
            names = names + excluded + 1
        taken = available.clamp(max=at_most)
        places, starts = _positions(torch.zeros_like(taken), taken)
        longer = torch.nonzero(available > at_most).flatten()
        slots = torch.arange(at_most, device=rows.device)
        names_of_longer = hash64(stream(key, _ROWS), names[longer])
        places[starts[longer, None] + slots] = _distinct(slots, available[longer, None], names_of_longer[:, None], key)
        if excluded is not None:
            places += places >= torch.repeat_interleave(hole, taken)
        positions = places + torch.repeat_interleave(first, taken)
        return Entries(_at(self.rows.indices, positions), starts, _values_at(self.values, positions)), available

    def find(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Where in `rows.indices` the entries (row, column) are, int64 [n], by bisection; anywhere if they are not."""
        low, high = self.rows.indptr[rows], self.rows.indptr[rows + 1]
        longest = int((high - low).max()) if rows.numel() else 0
        for _ in range(longest.bit_length()):
            middle = (low + high) >> 1
            open_ = low < high
            before = open_ & (self.rows.indices[middle.clamp(max=self.rows.nnz - 1)] < columns)
            low, high = torch.where(before, middle + 1, low), torch.where(open_ & ~before, middle, high)
        return low


class Whole(NamedTuple):
    """Says of entries that they are whole rows, each once, of a matrix that is held by column too."""

    rows: Tensor
    """int64 [n], distinct"""
    histories: Histories


class GradientPlan(NamedTuple):
    """How the gradient of a bag sum is summed: over `entries` of the rows of the upstream gradient [n, h]."""

    entries: Entries
    scattered: tuple[Tensor, int] | None = None
    """Where the upstream gradient's rows stand first, int64 [n], among how many, if `entries` name those places."""
    distinct: Tensor | None = None
    """int64 [m]: the rows of the table that the sums belong to; None: all, in order."""


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
    columns, starts, values = entries
    if whole is not None:
        rows, histories = whole
        if columns.numel() * SORTING_COST >= histories.rows.nnz:
            transposed = histories.transposed
            by_column = Entries(transposed.indices, transposed.indptr[:-1], histories.transposed_values)
            return GradientPlan(by_column, scattered=(rows, histories.rows.num_rows))
    columns, order = columns.sort(stable=True)
    lengths = F.pad(starts, (0, 1), value=columns.numel()).diff()
    rows = _at(torch.repeat_interleave(lengths), order)
    values = _values_at(values, order)
    if num_rows is not None and columns.numel() >= num_rows:
        counts = torch.bincount(columns, minlength=num_rows)
        return GradientPlan(Entries(rows, counts.cumsum(0) - counts, values))
    distinct, counts = torch.unique_consecutive(columns, return_counts=True)
    return GradientPlan(Entries(rows, counts.cumsum(0) - counts, values), distinct=distinct.long())


def bag_sum(table: Tensor, entries: Entries, plan: GradientPlan | None = None, *, sparse: bool = False) -> Tensor:
    """Sums [n, h] of the rows of `table` that the entries of n rows name, each times what the entry counts.

    The gradient with respect to `table` is summed as `plan` says; without one it is planned in the backward pass. If it is to
    be `sparse` it has the plan's distinct rows alone, ascending, as a coalesced sparse tensor.
    """
    if not torch.is_grad_enabled():
        return _sums(table, entries)
    sums: Tensor = _BagSum.apply(table, entries, plan, sparse)  # type: ignore[no-untyped-call]
    return sums


class _BagSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, entries: Entries, plan: GradientPlan | None, sparse: bool) -> Tensor:
        ctx.entries, ctx.plan, ctx.sparse, ctx.table_shape = entries, plan, sparse, table.shape
        return _sums(table, entries)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].contiguous()  # else torch sums in another order
        entries, scattered, distinct = ctx.plan or plan_gradient(ctx.entries)
        if scattered is not None:
            rows, count = scattered
            gradient = gradient.new_zeros(count, gradient.shape[1]).index_copy_(0, rows, gradient)
        sums = _sums(gradient, entries)
        if distinct is not None:
            if ctx.sparse:
                sums = torch.sparse_coo_tensor(distinct[None], sums, ctx.table_shape, is_coalesced=True, check_invariants=False)
            else:
                sums = gradient.new_zeros(ctx.table_shape).index_copy_(0, distinct, sums)
        return sums, None, None, None


def _sums(table: Tensor, entries: Entries) -> Tensor:
    columns, starts, values = entries
    values, starts = None if values is None else values.to(table.dtype), starts.to(columns.dtype)

    def summed(part: Tensor) -> Tensor:
        return F.embedding_bag(columns, part, starts, mode="sum", per_sample_weights=values)

    if torch.compiler.is_exporting():  # for any number of entries
        return summed(table)
    if columns.numel() == 0:
        return table.new_zeros(starts.numel(), table.shape[1])
    if table.device.type == "cpu" and table.nbytes >= UNCACHED_BYTES and columns.numel() >= READ_AGAIN * len(table):
        return torch.cat([summed(part.contiguous()) for part in table.split(CACHED_WIDTH, dim=1)], dim=1)
    return summed(table)


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """values[positions], which on a CPU takes several times as long."""
    return values.index_select(0, positions)


def _values_at(values: Tensor | None, positions: Tensor) -> Tensor | None:
    return None if values is None else _at(values, positions)


def _positions(first: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Stretches first, first + 1, ... of some lengths, end to end: int64 [total], and where each starts int64 [n]."""
    starts = lengths.cumsum(0) - lengths
    shift = torch.repeat_interleave(first - starts, lengths)
    return shift.add_(torch.arange(shift.numel(), device=shift.device)), starts


def _distinct(slots: Tensor, sizes: Tensor, names: Tensor, key: int) -> Tensor:
    """What a pseudo-random permutation of range(size), one for each name, makes of slots [k]: distinct, int64 [n, k].

    A Feistel network with cycle walking as `sibra_dist.data.batches.permute`, of as many sizes as there are rows: what a
    draw costs does not grow with the row that it is from. In a short row such a network favours some places by a few
    percent; so its result is turned by a uniform number, which makes every place exactly as likely as any other.

    Args:
        slots: int64 [k], below every size.
        sizes: int64 [n, 1].
        names: random int64 [n, 1].
        key: of the step.
    """
    a = sizes.double().sqrt().ceil().long()
    b = (sizes + a - 1) // a
    places = _feistel(slots.expand(len(sizes), -1), a, b, names, key)
    row, column = torch.nonzero(places >= sizes, as_tuple=True)
    while row.numel():
        walked = _feistel(places[row, column], a[row, 0], b[row, 0], names[row, 0], key)
        places[row, column] = walked
        outside = walked >= sizes[row, 0]
        row, column = row[outside], column[outside]
    return (places + uniform(stream(key, _TURNS), names)) % sizes


def _feistel(values: Tensor, a: Tensor, b: Tensor, names: Tensor, key: int) -> Tensor:
    left, right = values // b, values % b
    for number in range(_FIRST_ROUND, _FIRST_ROUND + _ROUNDS, 2):
        left = (left + uniform(stream(key, number), names + right)) % a
        right = (right + uniform(stream(key, number + 1), names + left)) % b
    return left * b + right
