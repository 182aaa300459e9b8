"""Watches for a loss or a gradient that is not finite, and remembers where it was first, without waiting for the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from sibra_dist.errors import TrainingError

NEVER = -1


class NotFinite(NamedTuple):
    """Where something was first not finite."""

    step: int
    example: int
    """Its place among this rank's examples of that step; -1: their losses were finite here"""
    parameter: int
    """The one whose gradient was longest in that step, or where none was finite in the step before"""
    norm: float
    """And how long it was"""

    def error(self, epoch: int, where: str, parameter: str) -> TrainingError:
        """The error that ends the training, of what was found in an epoch at some example, and the parameter of that name."""
        return TrainingError(
            f"the loss or a gradient of epoch {epoch}, step {self.step} is not finite; first at {where}. The "
            f"largest gradient before was that of {parameter}, of length {self.norm:.3g}. "
            "Lower training.learning_rate, set training.clip_norm, or look for extreme values in numeric features; the last "
            "checkpoint is kept"
        )


class Watch:
    """What is remembered of an epoch's steps."""

    def __init__(self, parameters: int, device: torch.device) -> None:
        """Prepare to watch the gradients of so many parameters."""
        self._step = torch.full((), NEVER, device=device)
        self._example = torch.full((), NEVER, device=device)
        self._norms = torch.zeros(parameters, device=device)

    def note(self, step: int, losses: Tensor, loss: Tensor, norms: Tensor) -> None:
        """Look at a step: the losses of this rank's examples [B], that of the global batch, and the gradients' lengths [P]."""
        going = self._step == NEVER
        first = going & ~(loss.isfinite() & norms.isfinite().all())
        wrong = ~losses.isfinite()
        self._example = torch.where(first & wrong.any(), wrong.int().argmax(), self._example)
        self._step = torch.where(first, step, self._step)
        # From the step in which it went wrong those count that are finite still; else those of the step before.
        self._norms = torch.where(going & norms.isfinite(), norms, self._norms)

    def found(self) -> NotFinite | None:
        """What was first not finite since the beginning; None: nothing. Waits for the device."""
        step = int(self._step)
        if step == NEVER:
            return None
        largest = int(self._norms.argmax())
        return NotFinite(step, int(self._example), largest, float(self._norms[largest]))
