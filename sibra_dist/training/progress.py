"""What the training loop tells its surroundings while it works."""

import time
from collections.abc import Callable
from dataclasses import dataclass

PROGRESS_SECONDS = 0.5

Counting = Callable[[int, int], None]
"""Told how much of something is done, and how much there is."""


def uncounted(done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    monitor: str
    metric: float | None
    """Its latest value ..."""
    evaluated: float
    """... after so many epochs"""
    best: float | None
    examples_per_second: float
    seconds_left: float
    """Until the last epoch is done, were training not to stop early."""


@dataclass(frozen=True)
class Callbacks:
    """What the loop tells its surroundings. Progress goes to rank 0 only; the others are called on every rank."""

    progress: Callable[[Progress], None] = lambda progress: None
    evaluated: Callable[[dict[str, float]], None] = lambda metrics: None
    leaving: Callable[[], frozenset[str]] | None = None
    """Asked of all ranks after the same step, about once a second: which machines are about to be taken away. When there is a
    new one, a checkpoint is written at once, and training goes on."""
    stepped: Callable[[int, int, float], None] | None = None
    """(epoch, step, loss of the global batch); reading the loss waits for the device."""


class Meter:
    """Measures the speed of training, and says when it is time to tell."""

    def __init__(self, batch_size: int) -> None:
        """Prepare to count batches of so many examples."""
        self._batch_size = batch_size
        self._started = self._told = time.monotonic()
        self._steps = 0
        self.rate = 0.0
        """Examples a second in this epoch, without evaluations"""

    def start(self) -> None:
        """An epoch begins, or goes on."""
        self._started, self._steps = time.monotonic(), 0

    def pause(self, began: float) -> None:
        """What has happened since `began`, of `time.monotonic`, was no training."""
        self._started += time.monotonic() - began

    def step(self) -> bool:
        """A step is done; whether it is time to tell of it: at most twice a second."""
        now = time.monotonic()
        self._steps += 1
        self.rate = self._steps * self._batch_size / max(now - self._started, 1e-9)
        if now - self._told < PROGRESS_SECONDS:
            return False
        self._told = now
        return True
