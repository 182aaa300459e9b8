"""Bag sums over a table whose rows are divided over the ranks: what each rank sends to which, and what comes back.

Rank r holds `rows_per_rank` rows from r * rows_per_rank on. A rank's bags fall into parts, one for each rank that holds rows
of the bag. Every entry goes to the rank that holds its row, which sums each part; the sums come back, and those of one bag
are added. So an id travels to one rank, a bag's sum from no more ranks than hold rows of it, and in the backward pass its
gradient to the same ranks: all of it is all-to-all, and no rank ever sees what does not concern it. (The sum over the batch
of the ranks' parts could as well be a reduce-scatter, and the ids all-gathered; that sends also what is zero.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from sibra_dist.models.bag_sums import GradientPlan, bag_sum, plan_gradient
from sibra_dist.models.histories import Entries
from sibra_dist.phases import phase

_rehearsed: ContextVar[bool] = ContextVar("rehearsed", default=False)


@contextmanager
def rehearsed() -> Iterator[None]:
    """Inside, nothing is sent: all ranks ask of this one what it asks of them, and what they send has no content."""
    token = _rehearsed.set(True)
    try:
        yield
    finally:
        _rehearsed.reset(token)


class Route(NamedTuple):
    """The entries of this rank's bags by the rank that they go to. It is a function of the entries, not of other ranks."""

    columns: Tensor
    """int32 [total]: the table's rows, by rank and in it by bag"""
    values: Tensor | None
    """float32 [total]: what each counts; None: 1"""
    lengths: Tensor
    """int32 [parts]: entries of each part of a bag"""
    bags: Tensor
    """int32 [parts]: whose part it is"""
    places: Entries
    """Of n bags, which parts they have."""
    num_columns: list[int]
    """Entries that go to each rank."""
    num_parts: list[int]
    """Parts that go to each rank."""
    gradient: GradientPlan | None = None
    """How the gradient of what is asked of this rank is summed, where it is known before others have asked: when rehearsed"""


def route(entries: Entries, rows_per_rank: int, world: int) -> Route:
    """Where the entries of n bags go."""
    columns, starts, values = entries
    count = max(starts.numel(), 1)
    owners = columns.long() // rows_per_rank
    names, order = (owners * count + torch.repeat_interleave(entries.lengths)).sort(stable=True)
    parts, lengths_of_parts = torch.unique_consecutive(names, return_counts=True)
    bags = parts % count
    numbers = torch.bincount(bags, minlength=starts.numel())
    columns, values = columns[order].int(), None if values is None else values[order].float()
    gradient = None
    if _rehearsed.get():
        asked = Entries(columns % rows_per_rank, lengths_of_parts.cumsum(0) - lengths_of_parts, values)
        gradient = plan_gradient(asked)
    return Route(
        columns,
        values,
        lengths_of_parts.int(),
        bags.int(),
        Entries(bags.argsort(stable=True), numbers.cumsum(0) - numbers),
        torch.bincount(owners, minlength=world).tolist(),
        torch.bincount(parts // count, minlength=world).tolist(),
        gradient,
    )


def divided_bag_sum(table: Tensor, first: int, route: Route, *, sparse: bool = False) -> Tensor:
    """Sums [n, h] of the rows that this rank's entries name, where it holds the rows of `table` from `first` on.

    Every rank must call it, and go backward, equally often. The gradient with respect to `table` is that of the sum of all
    ranks' losses.
    """
    with phase("communicate"):
        entries, num_parts = _asked_of_this_rank(route, first)
    sums = bag_sum(table, entries, route.gradient, sparse=sparse)
    with phase("communicate"):
        parts: Tensor = _Exchange.apply(sums, num_parts, route.num_parts)  # type: ignore[no-untyped-call]
    # The gradient of a part is that of its bag.
    one_each = torch.arange(len(route.bags), device=route.bags.device)
    return bag_sum(parts, route.places, GradientPlan(Entries(route.bags, one_each)))


def _asked_of_this_rank(route: Route, first: int) -> tuple[Entries, list[int]]:
    """The parts that all ranks ask for, in order of rank, with rows counted from `first`; and how many each asks for."""
    num_columns, num_parts = _asked_sizes(route)

    # One message for each rank: lengths, rows, and values by their bits.
    sent = [route.lengths.split(route.num_parts), route.columns.split(route.num_columns)]
    sizes_sent, sizes_asked = [route.num_parts, route.num_columns], [num_parts, num_columns]
    if route.values is not None:
        sent.append(route.values.view(torch.int32).split(route.num_columns))
        sizes_sent.append(route.num_columns)
        sizes_asked.append(num_columns)
    message = torch.cat([piece for pieces in zip(*sent, strict=True) for piece in pieces])
    by_rank = [[sum(of_rank) for of_rank in zip(*sizes, strict=True)] for sizes in (sizes_sent, sizes_asked)]
    received = _exchanged(message, *by_rank)
    pieces = received.split([size for of_rank in zip(*sizes_asked, strict=True) for size in of_rank])
    lengths, columns, *values = (torch.cat(pieces[number :: len(sent)]) for number in range(len(sent)))
    starts = lengths.cumsum(0) - lengths
    return Entries(columns - first, starts, values[0].view(torch.float32) if values else None), num_parts


def _asked_sizes(route: Route) -> tuple[list[int], list[int]]:
    """Of each rank, the entries and the parts that it asks of this one."""
    if _rehearsed.get():
        return route.num_columns, route.num_parts
    sizes = torch.tensor([route.num_columns, route.num_parts], device=route.columns.device).T.contiguous()
    asked = torch.empty_like(sizes)
    torch.distributed.all_to_all_single(asked, sizes)
    num_columns, num_parts = asked.T.tolist()
    return num_columns, num_parts


class _Exchange(torch.autograd.Function):
    """Sends so many rows to each rank, in order of rank, and receives so many from each; backward the other way round."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _exchanged(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with phase("communicate"):
            return _exchanged(gradients[0], ctx.received, ctx.sent), None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    if not _rehearsed.get():
        torch.distributed.all_to_all_single(found, rows.contiguous(), received, sent)
    return found
