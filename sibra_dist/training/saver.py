"""Writes checkpoints while training goes on.

`save` copies the state to memory of the CPU and returns; a thread publishes the copy (see `sibra_dist.training.publishing`).
The next `save` waits for that thread, so that there is one copy at most, and tells how it went. The thread takes part in no
collective operation, which could come between those of training.

A checkpoint that cannot be written is told, and training goes on: what was published before is still there. Where the loss
would be for good, of the best model and of the last checkpoint before training ends, it is an error on every rank.
"""

import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError
from sibra_dist.training.checkpoint import ALONE
from sibra_dist.training.parts import Tables
from sibra_dist.training.position import Position
from sibra_dist.training.publishing import Copy, Publisher
from sibra_dist.training.ranks import Ranks

logger = logging.getLogger("sibra_dist")

MEET_SECONDS = 1.0


class Failure(NamedTuple):
    """A checkpoint that could not be written."""

    what: str
    reason: str
    fatal: bool


@dataclass(frozen=True)
class _Job:
    """What a thread writes."""

    copy: Copy
    beside_best: bool
    """Whether the model is written beside the best models too"""
    is_last: bool


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
        self.best = best_name
        """Name of the best model so far, for the checkpoints that are saved from now on"""
        self._published = published
        self._candidate: str | None = None
        self._ranks = ranks
        self._saves = Counter[str]()
        self._training = ranks.agree(uuid.uuid4().hex[:8])
        self._publisher = Publisher(dataset, config, self._training, keep, ranks, tables or {}, timeout)
        self._thread: threading.Thread | None = None
        self._failure: Failure | None = None
        self._defect: Exception | None = None

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
        if self._publisher.takes_part:
            copied = {key: state[key].detach().to("cpu", copy=True) for key in self._publisher.mine(state)}
            copy = Copy(name, position, copied, self.best, self._saves[name])
            self._thread = threading.Thread(
                target=self._write, args=(_Job(copy, is_best or is_new, is_last),), name="checkpoint"
            )
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
        self._publisher.hurry()
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

    def _write(self, job: _Job) -> None:
        """Write a copy, in a thread of its own."""
        copy, folder, fatal = job.copy, self._folder, job.is_last
        try:
            if job.beside_best:
                folder, fatal = self._best_folder, True
                self._publisher.publish(folder, copy.model())
                if self._ranks.leads:
                    self._published(copy.name)
                folder, fatal = self._folder, job.is_last
            self._publisher.publish(folder, copy)
            if self._ranks.leads:
                self._publisher.tidy(self._folder, self._best_folder, copy)
        except (OSError, CheckpointError) as error:
            self._failure = Failure(str(folder / copy.name), str(error), fatal)
        except Exception as error:  # a defect, which belongs to whoever waits
            self._defect = error


def _told(failure: Failure) -> str:
    return f"checkpoint {failure.what} could not be written: {failure.reason}"
