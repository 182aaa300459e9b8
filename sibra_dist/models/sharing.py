"""What the parts of a step share where gradients are accumulated: sums of histories that are read whole.

Such sums are most of a step's memory traffic, and its parts read many of the same rows. So a row that any part reads is summed
once: each part takes what it needs of the sums and passes back what is theirs, and the gradient of the table is summed once,
after the last part. The sums and what was passed back are held until then; of everything else one part at a time.

A step that reads a pool of candidates to train on few of them shares nothing: rows of the others would have gradients of zero.

Where a step is read, `reading_together` gathers the rows that its parts want; where it is computed, `summed_together` holds the
sums of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sibra_dist.models.bag_sums import Bags
from sibra_dist.phases import phase


class Sharer(Protocol):
    """What has sums that parts share."""

    def read_together(self, rows: Tensor) -> Bags:
        """What a training step reads of rows int64 [n], distinct."""

    def sum_together(self, bags: Bags) -> Tensor:
        """Their sums [n, h]."""


class Wanted(NamedTuple):
    """Stands in a part of a step for what is read together."""

    rows: Tensor
    """int64 [n], distinct"""


class Together(NamedTuple):
    """What all parts of a step want, read."""

    rows: Tensor
    """int64 [N], ascending"""
    bags: Bags


class _Asked(dict[Sharer, list[Tensor]]):
    """The rows that each part has asked for."""

    def read(self) -> dict[Sharer, Together]:
        """Read each row once."""
        together = {}
        for sharer, wanted in self.items():
            rows = torch.cat(wanted).unique()
            together[sharer] = Together(rows, sharer.read_together(rows))
        return together


class _Sums:
    """The sums of N rows, and the gradient that parts have passed back so far."""

    def __init__(self, rows: Tensor, sums: Tensor) -> None:
        self._rows, self._sums = rows, sums
        self._values = sums.detach().requires_grad_()
        self._gradient = torch.zeros_like(sums)

    def of(self, rows: Tensor) -> Tensor:
        taken: Tensor = _Taken.apply(self._values, torch.searchsorted(self._rows, rows), self._gradient)  # type: ignore[no-untyped-call]
        return taken

    def backward(self) -> None:
        self._sums.backward(self._gradient)


class _Taken(torch.autograd.Function):
    """Rows of a tensor, whose gradient is added up in its place: not made as large as the tensor for each part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, gradient: Tensor) -> Tensor:
        ctx.places, ctx.gradient = places, gradient
        return values.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.gradient.index_add_(0, ctx.places, gradients[0])  # to distinct rows, so in any order the same
        return None, None, None


_asked: ContextVar[_Asked | None] = ContextVar("asked", default=None)
_held: ContextVar[Mapping[Sharer, _Sums] | None] = ContextVar("held", default=None)


@contextmanager
def reading_together() -> Iterator[_Asked]:
    """What parts read inside is read together: by what is given, once all of them have asked."""
    asked = _Asked()
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def wanted(sharer: Sharer, rows: Tensor) -> Wanted | None:
    """Asks for rows int64 [n], distinct, on behalf of a part. None: parts share nothing, and each reads for itself."""
    asked = _asked.get()
    if asked is None:
        return None
    asked.setdefault(sharer, []).append(rows)
    return Wanted(rows)


@contextmanager
def summed_together(together: dict[Sharer, Together]) -> Iterator[None]:
    """What was read together, which this takes, is summed for the parts inside; then gradients go back from their sums.

    Where tables are divided every rank comes here, and leaves, equally often.
    """
    held = {}
    for sharer in list(together):
        rows, bags = together.pop(sharer)
        with phase("encode"):
            held[sharer] = _Sums(rows, sharer.sum_together(bags))
        del bags
    token = _held.set(held)
    try:
        yield
    finally:
        _held.reset(token)
    while held:
        with phase("backward"):
            held.pop(next(iter(held))).backward()


def taken(sharer: Sharer, read: Wanted) -> Tensor:
    """The sums [n, h] that a part wants."""
    held = _held.get()
    assert held is not None
    return held[sharer].of(read.rows)
