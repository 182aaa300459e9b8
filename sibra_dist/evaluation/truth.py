"""What a split holds out, and what it masks, as positions in the list of its candidates."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from sibra_dist.data.dataset import Candidates, Csr, Dataset, HeldOut


class Tile(NamedTuple):
    """A few of the users that a ranking is judged by."""

    users: Tensor
    """int64 [U]"""
    relevant: Csr
    """a row each: candidates"""
    masked: tuple[Tensor, Tensor]
    """pairs (row, candidate) that are not ranked, int64 [Q] each; -1 is an item that is no candidate"""


class Truth(NamedTuple):
    """What rankings of a split are judged by."""

    dataset: Dataset
    split: HeldOut
    candidates: Tensor
    """int64 [C]: items, ascending"""
    position: Tensor
    """int64 [items]: of each among the candidates; -1 for an item that is none"""

    @classmethod
    def of(cls, dataset: Dataset, split: HeldOut, which: Candidates = "split") -> Self:
        """That of a split, on the dataset's device; `which` items are candidates is as for `Dataset.candidates`."""
        candidates = dataset.candidates(split, which)
        position = torch.full((dataset.items.count,), -1, device=dataset.device)
        position[candidates] = torch.arange(len(candidates), device=dataset.device)
        return cls(dataset, split, candidates, position)

    @property
    def users(self) -> Tensor:
        """Users that hold something out in the split, ascending; a tile is some rows of these."""
        return self.dataset.held_out[self.split][0]

    def tile(self, rows: Tensor) -> Tile:
        """That of some of `users`, int64 [U]."""
        users = self.users[rows].long()
        return Tile(users, self._relevant(rows), self._masked(users))

    def _relevant(self, rows: Tensor) -> Csr:
        """The relevant candidates; held-out items that are no candidates are left out."""
        held_out = self.dataset.held_out[self.split][1]
        items, _ = held_out.gather(rows)
        owner = torch.repeat_interleave(held_out.lengths(rows))
        places = self.position[items.long()]
        kept = places >= 0
        lengths = torch.bincount(owner[kept], minlength=len(rows))
        return Csr(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), places[kept].int())

    def _masked(self, users: Tensor) -> tuple[Tensor, Tensor]:
        rows, items = zip(*self.dataset.masked(self.split, users), strict=True)
        return torch.cat(rows), self.position[torch.cat(items)]
