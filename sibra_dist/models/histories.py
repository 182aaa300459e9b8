"""Rows of training interactions: which entries of them are read in a step.

Rows are read whole, or drawn: at most so many entries of each, by a hash, so that a row has the same draw on any rank and in
any batch. Nothing here depends on a global generator.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.data.batches import hash64, stream, uniform
from sibra_dist.data.dataset import Csr
from sibra_dist.data.user_batches import Shown

ROWS_AT_ONCE = 2048
"""Rows whose entries are looked up at once."""

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

    @property
    def lengths(self) -> Tensor:
        """Entries of each row, int64 [n]."""
        return F.pad(self.starts, (0, 1), value=self.columns.numel()).diff()

    def stretch(self, rows: slice, entries: slice) -> "Entries":
        """Those of some consecutive rows, which are these entries."""
        values = None if self.values is None else self.values[entries]
        return Entries(self.columns[entries], self.starts[rows] - entries.start, values)

    def at_most(self, count: int, key: int, names: Tensor) -> "Entries":
        """At most so many of each row, drawn by a hash of the key, the row's name int64 [n] and the column."""
        total, lengths = len(self.columns), self.lengths
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
        first, lengths = self.rows.indptr[rows], self.rows.lengths(rows)
        ends = lengths.cumsum(0)
        entries = int(ends[-1]) if len(rows) else 0
        columns = torch.empty(entries, dtype=torch.int32, device=rows.device)
        values = None if self.values is None else torch.empty(entries, device=rows.device)
        # Positions take six times the memory of what they find, so they are made for some rows at a time; a GPU would wait.
        at_once = ROWS_AT_ONCE if rows.device.type == "cpu" else max(len(rows), 1)
        start = 0
        for some, of_some in zip(first.split(at_once), lengths.split(at_once), strict=True):
            positions, _ = _positions(some, of_some)
            stop = start + len(positions)
            columns[start:stop] = at(self.rows.indices, positions)
            if values is not None and self.values is not None:
                values[start:stop] = at(self.values, positions)
            start = stop
        return Entries(columns, ends - lengths, values)

    def some(self, rows: Tensor, shown: Shown) -> tuple[Entries, Tensor]:
        """The entries of rows int64 [n] that `shown` says of, asked from the side of the rows, and how many of each row."""
        lengths = self.rows.lengths(rows)
        positions, _ = _positions(self.rows.indptr[rows], lengths)
        owners = torch.repeat_interleave(lengths)
        kept = shown(rows[owners], self.rows.indices[positions])
        positions, counts = positions[kept], torch.bincount(owners[kept], minlength=len(rows))
        columns = at(self.rows.indices, positions)
        return Entries(columns, counts.cumsum(0) - counts, values_at(self.values, positions)), counts

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
        return Entries(at(self.rows.indices, positions), starts, values_at(self.values, positions)), available

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


def at(values: Tensor, positions: Tensor) -> Tensor:
    """values[positions], which on a CPU takes several times as long."""
    return values.index_select(0, positions)


def values_at(values: Tensor | None, positions: Tensor) -> Tensor | None:
    """Likewise, if there are any."""
    return None if values is None else at(values, positions)


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
