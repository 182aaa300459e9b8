"""Metrics whose states are integer sums: the same for any number of ranks."""

import torch
import torch.distributed
from torch import Tensor
from torchmetrics import Metric


class Sums(Metric):
    """A metric whose states are int64 sums, added up over the ranks when its value is computed."""

    full_state_update = False

    def __init__(self) -> None:
        # Summing in the collective itself holds one copy of a state, where torchmetrics' default gathers one a rank. No
        # cache: a rank that returned a cached value would leave the others waiting in the collective.
        super().__init__(dist_sync_fn=_all_reduce, compute_with_cache=False)

    @property
    def update_called(self) -> bool:
        """True: a rank without users has nothing to update with, and torchmetrics would warn that its zeros are wrong."""
        return True


def _all_reduce(state: Tensor, group: torch.distributed.ProcessGroup | None = None) -> list[Tensor]:
    """The sum over the ranks, as the list of addends that torchmetrics expects and adds up."""
    total = state.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]
