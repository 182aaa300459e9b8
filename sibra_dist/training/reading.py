"""Supplies the steps of an epoch with what they read: the batch, and the data that the model needs for it.

What a step reads is a function of (seed, epoch, step) and of no parameter. So a thread can read for the next step while a
step is computed: on a GPU beside the computation, on a stream of its own, and from data that stay in main memory by way of
pinned memory. What depends on the data in its shape, and so has to wait for the device, is all in here.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sibra_dist.data.batches import Batches
from sibra_dist.data.transfer import map_tensors, to_device
from sibra_dist.data.user_batches import AnyBatch, UserBatches
from sibra_dist.models.base import Recommender
from sibra_dist.models.sharing import Sharer, Together, reading_together
from sibra_dist.phases import phase
from sibra_dist.training.placement import give_freed_memory_back


class Part(NamedTuple):
    """What is computed at once: a rank's share of a step, or where gradients are accumulated a part of it."""

    batch: AnyBatch
    read: Any
    """What the model reads of the data for this batch"""


class Step(NamedTuple):
    """What a step reads."""

    parts: list[Part]
    together: dict[Sharer, Together]
    """What the parts read together, if there are several"""


class _Arriving(NamedTuple):
    step: Step
    ready: Any
    """torch.cuda.Event after which they are there; None: they are"""


class Reader:
    """Reads for the steps of a model that trains on a device."""

    def __init__(
        self,
        batches: Batches | UserBatches,
        model: Recommender,
        device: torch.device,
        parts: int,
        *,
        together: bool,
        ahead: bool,
    ) -> None:
        """Prepare to read, each step in so many parts, `together` or each for itself; `ahead`: while the last is computed."""
        self._batches = batches
        self._model = model
        self._device = device
        self._parts, self._together = parts, together
        self._ahead = ahead
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None

    def epoch(self, epoch: int, first: int) -> Generator[Step, None, None]:
        """The steps of an epoch, from number `first` on."""
        steps = range(first, self._batches.steps_per_epoch)
        if not self._ahead:
            for step in steps:
                yield self._read(epoch, step).step
            return
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
            coming = [thread.submit(self._read, epoch, step) for step in steps[:1]]
            for step in steps:
                arriving = coming.pop().result()
                if step + 1 in steps:
                    coming.append(thread.submit(self._read, epoch, step + 1))
                yield self._arrived(arriving)

    @torch.no_grad()
    def _read(self, epoch: int, step: int) -> _Arriving:
        with phase("batch"), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if self._parts > 1:  # as one has to need less memory
                give_freed_memory_back(self._device)
            read = read_step(self._batches, self._model, epoch, step, self._parts, together=self._together)
            if self._device.type == "cuda":
                read = map_tensors(read, _pinned)
            return _Arriving(to_device(read, self._device), self._stream.record_event() if self._stream else None)

    def _arrived(self, arriving: _Arriving) -> Step:
        """Make the computation wait for what was read on the other stream, whose memory it uses from now on."""
        if arriving.ready is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(arriving.ready)

            def note(tensor: Tensor) -> Tensor:
                tensor.record_stream(computing)
                return tensor

            map_tensors(arriving.step, note)
        return arriving.step


def read_step(batches: Batches | UserBatches, model: Recommender, epoch: int, step: int, parts: int, *, together: bool) -> Step:
    """A step in so many parts, where the data lie, which share what they read if they read it `together`."""
    with reading_together() if parts > 1 and together else nullcontext() as asked:
        made = [batches.batch(epoch, step, part) for part in range(parts)]
        read = [Part(batch, model.read(batch)) for batch in made]
    return Step(read, asked.read() if asked is not None else {})


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else tensor.pin_memory()
