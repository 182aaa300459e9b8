"""What ranks are asked for while they train. They heed it together, after the same step."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sibra_dist.training.progress import Callbacks
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.stopping import StopRequest

LEAVING_SECONDS = 1.0


class Requests:
    """Finds out what one rank is asked for, and, by a sum over the ranks, what any of them is."""

    def __init__(self, ranks: Ranks, stop: StopRequest, callbacks: Callbacks, checkpoint_minutes: float) -> None:
        """Listen to requests to stop, to what says which machines are about to be taken away, and to the clock.

        Args:
            ranks: that train.
            stop: of this rank.
            callbacks: of which `leaving` is asked about once a second.
            checkpoint_minutes: without a checkpoint, after which one is due; 0: never.
        """
        self._ranks, self._stop = ranks, stop
        self._leaving: Callable[[], frozenset[str]] = callbacks.leaving or frozenset
        self._asks_who_leaves = callbacks.leaving is not None
        self._minutes = checkpoint_minutes
        self._wondered = self._saved = time.monotonic()
        self._known: frozenset[str] = frozenset()
        self._summed = torch.zeros(3)

    def mine(self, like: Tensor) -> Tensor:
        """What this rank is asked for, [3]: to stop, to find out who leaves, to save. Of the type and device of `like`."""
        now = time.monotonic()
        wonders = self._asks_who_leaves and self._ranks.leads and now - self._wondered > LEAVING_SECONDS
        late = self._ranks.leads and 0 < self._minutes < (now - self._saved) / 60
        asked = like.new_zeros(3)
        for number, asks in enumerate((bool(self._stop), wonders, late)):
            if asks:  # a copy from main memory in every step would wait for the device
                asked[number] = 1
        return asked

    def hear(self, summed: Tensor) -> None:
        """Take the sum [3] over all ranks, without waiting for the device."""
        self._summed = summed

    def heed(self) -> tuple[bool, bool]:
        """Whether all ranks have to stop, and whether they have to save. All call this after the same step."""
        stops, wonder, saves = (bool(asked) for asked in self._summed.tolist())
        if wonder and not stops:
            self._wondered = time.monotonic()
            known, self._known = self._known, self._leaving()
            saves = saves or bool(self._known - known)
        return stops, saves

    def saved(self) -> None:
        """A checkpoint has begun to be written."""
        self._saved = time.monotonic()
