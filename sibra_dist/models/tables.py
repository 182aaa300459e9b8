"""The large parameters: tables with a row for each user or item, which may be divided over the ranks.

A model's interactions tables and id embeddings are most of its parameters, and a step touches few of their rows. So there
are two choices, which a `TableLayout` makes for all tables of a model: whether each rank holds all rows or a stretch of
them, and whether a gradient has the table's shape or is that of the touched rows alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sibra_dist.models.bag_sums import Bags, GradientPlan, PendingGradient, Whole, bag_sum, plan_gradient
from sibra_dist.models.exchange import Route, divided_bag_sum, route
from sibra_dist.models.histories import Entries

CHUNK_ELEMENTS = 2**20
_VECTOR = 16
"""Numbers that torch's `normal_` draws at once on a CPU: chunks of a multiple of them are drawn as the whole is."""


@dataclass(frozen=True)
class TableLayout:
    """How the tables of a model are held."""

    rank: int = 0
    """this rank"""
    world: int = 1
    """ranks that the rows are divided over; 1: this rank has all"""
    sparse: bool = False
    """whether a gradient is a sparse tensor of the touched rows"""


class Lookup(NamedTuple):
    """Which rows of a table are looked up."""

    places: Tensor
    """int64 [*]: of each, its number, or where there are bags its place among them"""
    bags: Bags | None = None
    """Each distinct row, if the table is divided or sparse."""


WHOLE_TABLES = TableLayout()
_layout: ContextVar[TableLayout] = ContextVar("layout", default=WHOLE_TABLES)


@contextmanager
def tables_held_as(layout: TableLayout) -> Iterator[None]:
    """Tables that are built inside are held so."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


class Table(nn.Module):
    """A table [rows, width] of which sums of rows, and single rows, are read.

    Where it is divided, rank r of W has ceil(rows / W) rows from r * ceil(rows / W) on, and the last ranks what is left. Then
    every sum and every lookup communicates, so all ranks must do the same ones in the same order, of no rows if need be; and
    the gradient is already summed over the ranks.
    """

    def __init__(self, rows: int, width: int, initialize: Callable[[Tensor], object]) -> None:
        """Hold the rows that `tables_held_as` says; by default all.

        Args:
            rows: of the whole table.
            width: of a row.
            initialize: fills a tensor of any shape with numbers of one distribution, one after the other from torch's global
                generator. The whole table is drawn whatever is held of it, so a row, and what is drawn after the table,
                do not depend on that; no rank has more of the others' rows at once than `CHUNK_ELEMENTS` numbers.
        """
        super().__init__()
        layout = _layout.get()
        self.rows = rows
        self.sparse = layout.sparse
        self.pending: list[PendingGradient] | None = None
        """Where the gradients of sums wait for an optimizer that sums them itself; None: the backward pass sums them."""
        self._world = layout.world
        self._rows_per_rank = max(-(-rows // layout.world), 1)
        self.first = min(layout.rank * self._rows_per_rank, rows)
        self.last = min(self.first + self._rows_per_rank, rows)
        self.weight = nn.Parameter(torch.empty(self.last - self.first, width))
        with torch.no_grad():
            if not self.divided:
                initialize(self.weight)
                return
            own = self.weight.view(-1)
            for start, chunk in drawn(rows * width, initialize):
                low = max(start, self.first * width)
                high = max(min(start + len(chunk), self.last * width), low)
                own[low - self.first * width : high - self.first * width] = chunk[low - start : high - start]

    @property
    def divided(self) -> bool:
        """Whether this rank has a part of the rows, from `first` to before `last`."""
        return self._world > 1

    def plan(self, entries: Entries, whole: Whole | None = None) -> GradientPlan | Route:
        """What `bag_sum` can know in advance of a training step: nothing of it communicates.

        If the entries are whole rows of a matrix, `whole` says which; only a table that is neither divided nor sparse asks.
        """
        if self.divided:
            return route(entries, self._rows_per_rank, self._world)
        return plan_gradient(entries) if self.sparse else plan_gradient(entries, whole, self.rows)

    def bag_sum(self, bags: Bags) -> Tensor:
        """Sums [n, width] of the rows that the entries of n bags name, each times what the entry counts."""
        entries, plan = bags
        if self.divided:
            planned = plan if isinstance(plan, Route) else route(entries, self._rows_per_rank, self._world)
            return divided_bag_sum(self.weight, self.first, planned, sparse=self.sparse)
        assert not isinstance(plan, Route)
        return bag_sum(self.weight, entries, plan, sparse=self.sparse, pending=self.pending)

    def plan_lookup(self, rows: Tensor) -> Lookup:
        """What `lookup` can know in advance of rows int64 [*], which may repeat: nothing of it communicates."""
        if not self.divided and not self.sparse:
            return Lookup(rows)
        # Each once: so often it is sent, and so many rows its gradient has.
        distinct, places = torch.unique(rows, return_inverse=True)
        one_each = Entries(distinct.int(), torch.arange(len(distinct), device=distinct.device))
        return Lookup(places, Bags(one_each, self.plan(one_each)))

    def lookup(self, rows: Tensor | Lookup) -> Tensor:
        """The rows [*, width] of numbers int64 [*]."""
        places, bags = rows if isinstance(rows, Lookup) else self.plan_lookup(rows)
        return F.embedding(places, self.weight if bags is None else self.bag_sum(bags))

    def extra_repr(self) -> str:
        """For a printed model."""
        return f"rows {self.first} to {self.last} of {self.rows}, width {self.weight.shape[1]}, sparse={self.sparse}"


def tables_of(model: nn.Module) -> dict[str, Table]:
    """The tables of a model, by the name of the parameter that holds their rows."""
    return {f"{name}.weight".lstrip("."): module for name, module in model.named_modules() if isinstance(module, Table)}


def drawn(count: int, initialize: Callable[[Tensor], object]) -> Iterator[tuple[int, Tensor]]:
    """The numbers that `initialize` gives a tensor of `count` elements, in chunks, and where each chunk starts."""
    size = CHUNK_ELEMENTS // _VECTOR * _VECTOR
    start = 0
    while start < count:
        # Fewer than a vector would be drawn in another way.
        stop = start + size if count - start - size >= _VECTOR else count
        chunk = torch.empty(stop - start)
        initialize(chunk)
        yield start, chunk
        start = stop
