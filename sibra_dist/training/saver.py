"""Writes checkpoints while training goes on.

`save` copies the state to memory of the CPU and returns; a thread writes the copy. The next `save` waits for that thread, so
that there is one copy at most, and tells how it went. Every rank writes a part with its rows of divided tables, rank 0 also
all that ranks share. A rank whose part is durable leaves a receipt beside it; when rank 0 has read all receipts it writes the
description, which makes the parts a checkpoint. So nothing is published unless all of it is there, and the thread takes part
in no collective operation, which could come between those of training.

A checkpoint that cannot be written is told, and training goes on: what was published before is still there. Where the loss
would be for good, of the best model and of the last checkpoint before training ends, it is an error on every rank.
"""

import json
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError
from sibra_dist.training.checkpoint import (
    ALONE,
    MISREAD,
    NAME,
    Description,
    published,
    read_description,
    rows_of,
    step_of,
)
from sibra_dist.training.parts import Part, Rows, Tables, write_part
from sibra_dist.training.position import Position
from sibra_dist.training.ranks import Ranks

logger = logging.getLogger("sibra_dist")

POLL_SECONDS = 0.1
MEET_SECONDS = 1.0
GRACE_SECONDS = 30.0
"""That rank 0 still waits for the parts of others when training has failed."""


class Failure(NamedTuple):
    """A checkpoint that could not be written."""

    what: str
    reason: str
    fatal: bool


@dataclass(frozen=True)
class _Copy:
    """What a thread writes."""

    position: Position
    tensors: dict[str, Tensor]
    best: str | None
    beside_best: bool
    """Whether the model is written beside the best models too"""
    is_last: bool
    again: int
    """How often a checkpoint of this name was written before"""


class Saver:
    """The checkpoints that one training writes; every rank has one, and all make the same calls."""

    def __init__(
        self,
        checkpoints: Place,
        best: Place,
        dataset: str,
        config: dict[str, Any],
        *,
        keep: int = 1,
        best_name: str | None = None,
        ranks: Ranks = ALONE,
        tables: Tables | None = None,
        timeout: float = 600.0,
        published: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Prepare to write.

        Args:
            checkpoints: folder of the checkpoints.
            best: folder of the best models.
            dataset: digest of the dataset.
            config: what is trained.
            keep: so many of the newest checkpoints, with the best models that they name; all others are deleted.
            best_name: of the best model so far, where training resumes.
            ranks: this process among those that train.
            tables: the rows that this rank holds of each divided table.
            timeout: seconds that rank 0 waits for the parts of others.
            published: called on rank 0, in the thread that writes, with the name of each model that is kept apart, as soon as
                it can be read.
        """
        self._folder, self._best_folder = checkpoints, best
        self._dataset, self._config, self._keep = dataset, config, keep
        self.best = best_name
        """Name of the best model so far, for the checkpoints that are saved from now on"""
        self._published = published
        self._candidate: str | None = None
        self._ranks, self._tables, self._timeout = ranks, tables or {}, timeout
        self._saves = Counter[str]()
        self._training = ranks.agree(uuid.uuid4().hex[:8])
        self._thread: threading.Thread | None = None
        self._failure: Failure | None = None
        self._defect: Exception | None = None
        self._closed_at: float | None = None

    def save(self, position: Position, state: Mapping[str, Tensor], *, is_best: bool = False, is_last: bool = False) -> None:
        """Copy a state, and begin to write it once the former one is written.

        Args:
            position: where training stands; if its candidate is of this position, the model is kept apart from checkpoints.
            state: what is saved; it may be changed as soon as this returns.
            is_best: whether the model is the best so far, so that it is kept apart too.
            is_last: whether nothing is saved after this.

        Raises:
            CheckpointError: the former one could not be written, and that cannot be made good.
        """
        self.wait()
        name = self.name(position)
        if is_best:
            self.best = name
        is_new = position.candidate is not None and position.candidate.name == name != self._candidate
        if is_new:
            self._candidate = name
        # What all ranks share is rank 0's to write.
        mine = (name for name, value in state.items() if self._ranks.leads or self._rows(name, value))
        copied = {name: state[name].detach().to("cpu", copy=True) for name in mine}
        if self._ranks.leads or self._tables:
            job = _Copy(position, copied, self.best, is_best or is_new, is_last, self._saves[name])
            self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint")
            self._thread.start()
        self._saves[name] += 1

    def wait(self) -> None:
        """Wait until what was saved is written. Every rank has to call this, and each of them gets the same error.

        Raises:
            CheckpointError: it could not be written, and that cannot be made good.
        """
        failure = defect = None
        while True:
            if self._thread is not None:
                self._thread.join(MEET_SECONDS)
            done = self._thread is None or not self._thread.is_alive()
            if done and failure is None:
                try:
                    failure = self._joined()
                except Exception as error:  # the other ranks must hear of it before it is raised
                    failure, defect = Failure("of this run", f"{type(error).__name__}: {error}", fatal=True), error
            # Ranks meet again and again, so none of them waits longer for the others than it may.
            met = self._ranks.gather((done, failure))
            if all(done for done, _ in met):
                break
        if defect is not None:
            raise defect
        failures = [failure for _, failure in met if failure is not None]
        if not failures:
            return
        failure = max(failures, key=lambda failure: failure.fatal)
        if failure.fatal:
            raise CheckpointError(f"{_told(failure)}. Free some space, or put right what is in the way, and resume the run")
        if self._ranks.leads:
            logger.warning("%s; training goes on, and the checkpoint before is kept", _told(failure))

    def close(self) -> None:
        """Wait until what this rank has saved is written; does nothing after `wait`."""
        self._closed_at = time.monotonic()
        failure = self._joined()
        if failure is not None:
            logger.warning("%s", _told(failure))

    def _joined(self) -> Failure | None:
        if self._thread is not None:
            self._thread.join()
        failure, defect = self._failure, self._defect
        self._thread = self._failure = self._defect = None
        if defect is not None:
            raise defect
        return failure

    def name(self, position: Position) -> str:
        """The name that a checkpoint at a position has, and the model that is kept apart."""
        return f"{position.name}-{self._training}"

    def _rows(self, name: str, value: Tensor) -> Rows | None:
        """The rows of a tensor that this rank holds, if it is divided; a number that counts steps is not."""
        return rows_of(self._tables, name) if value.dim() else None

    def _write(self, copy: _Copy) -> None:
        """Write a copy, in a thread of its own."""
        folder, fatal = self._folder, copy.is_last
        try:
            if copy.beside_best:
                folder, fatal = self._best_folder, True
                model = {name: value for name, value in copy.tensors.items() if name.startswith("model/")}
                self._publish(folder, copy, model)
                if self._ranks.leads:
                    self._published(self.name(copy.position))
                folder, fatal = self._folder, copy.is_last
            self._publish(folder, copy, copy.tensors)
            if self._ranks.leads:
                self._tidy(copy)
        except (OSError, CheckpointError) as error:
            self._failure = Failure(str(folder / self.name(copy.position)), str(error), fatal)
        except Exception as error:  # a defect, which belongs to whoever waits
            self._defect = error

    def _publish(self, folder: Place, copy: _Copy, tensors: Mapping[str, Tensor]) -> None:
        """Write this rank's part, and on rank 0 the description once all parts are there."""
        name, rank = self.name(copy.position), self._ranks.rank
        count = self._ranks.world if self._tables else 1
        # Parts that are published already are still those of a whole checkpoint, if these cannot be written.
        again = f"-again-{copy.again}" if copy.again else ""
        receipts = [f"{name}{again}-part-{number:05d}-of-{count:05d}.json" for number in range(count)]
        rows = {key: held for key, value in tensors.items() if (held := self._rows(key, value))}
        try:
            part = write_part(folder, receipts[rank].replace(".json", ".safetensors"), tensors, rows)
        except OSError as error:
            if rank:
                with suppress(OSError):  # or else rank 0 waits for its time to be up
                    folder.write(receipts[rank], json.dumps({"error": str(error)}).encode())
            raise
        if rank:
            folder.write(receipts[rank], part.model_dump_json().encode())
            return
        try:
            parts = (part, *(self._received(folder, number, receipt) for number, receipt in enumerate(receipts) if number))
            description = Description(
                position=copy.position,
                best=copy.best,
                dataset=self._dataset,
                config=self._config,
                world=self._ranks.world,
                parts=parts,
            )
            folder.write(f"{name}.json", description.to_json())
        except (OSError, CheckpointError):
            _deleted(folder, [*([] if again else [f"{name}.json"]), part.file, *receipts[1:]])
            raise
        _deleted(folder, receipts[1:])

    def _received(self, folder: Place, rank: int, receipt: str) -> Part:
        """The part of another rank, when it is durable."""
        began = time.monotonic()
        while True:
            with suppress(FileNotFoundError):
                said = json.loads(folder.read(receipt))
                if "error" in said:
                    raise CheckpointError(f"rank {rank} could not write its part: {said['error']}")
                return Part.model_validate(said)
            limit = began + self._timeout
            if self._closed_at is not None:
                limit = min(limit, self._closed_at + GRACE_SECONDS)
            if time.monotonic() > limit:
                raise CheckpointError(
                    f"the part of rank {rank} did not appear in {folder} within {time.monotonic() - began:.0f} s; all ranks "
                    "must see this folder"
                )
            time.sleep(POLL_SECONDS)

    def _tidy(self, copy: _Copy) -> None:
        """Delete what no checkpoint needs that is kept.

        What lies further than the checkpoint just written belongs to a training that has been given up for this one; what is
        named after this one and lies further, another rank may be writing.
        """
        just, apart = self.name(copy.position), set(_named(copy))
        now = step_of(just)
        try:
            kept = [just]
            for name in published(self._folder):
                if len(kept) < self._keep and step_of(name) < now:
                    with suppress(*MISREAD):
                        apart.update(_named(read_description(self._folder, name)))
                        kept.append(name)
            for folder, names in ((self._folder, set(kept)), (self._best_folder, apart)):
                folder.delete(file for file in folder.files() if not self._is_needed(file, names, now))
        except (OSError, CheckpointError) as error:
            logger.warning("what is no longer needed in %s could not be deleted: %s", self._folder, error)

    def _is_needed(self, file: str, kept: Collection[str | None], now: tuple[int, int]) -> bool:
        found = NAME.search(file)
        return found is None or found[0] in kept or (found[0].endswith(self._training) and step_of(file) > now)


def _named(said: _Copy | Description) -> tuple[str | None, str | None]:
    """The models that a checkpoint names: the best one, and the one that is being evaluated."""
    candidate = said.position.candidate
    return said.best, candidate.name if candidate is not None else None


def _deleted(folder: Place, files: Iterable[str]) -> None:
    """Delete files as far as possible; what stays is deleted with the next checkpoint."""
    with suppress(OSError):
        folder.delete(files)


def _told(failure: Failure) -> str:
    return f"checkpoint {failure.what} could not be written: {failure.reason}"
