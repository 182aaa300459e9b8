"""Publishes checkpoints: parts, receipts, and last the description that makes them a checkpoint.

Every rank writes a part with its rows of divided tables, rank 0 also all that ranks share. A rank whose part is durable leaves
a receipt beside it; when rank 0 has read all receipts it writes the description. So nothing is published unless all of it is
there.
"""

import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError
from sibra_dist.training.checkpoint import MISREAD, NAME, Description, published, read_description, rows_of, step_of
from sibra_dist.training.parts import Part, Rows, Tables, write_part
from sibra_dist.training.position import Position
from sibra_dist.training.ranks import Ranks

logger = logging.getLogger("sibra_dist")

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0
"""That rank 0 still waits for the parts of others when training has failed."""


@dataclass(frozen=True)
class Copy:
    """A state of training, as it was when it was copied."""

    name: str
    position: Position
    tensors: dict[str, Tensor]
    best: str | None
    """Name of the best model then"""
    again: int
    """How often a checkpoint of this name was written before"""

    def model(self) -> "Copy":
        """The model alone."""
        return replace(self, tensors={name: value for name, value in self.tensors.items() if name.startswith("model/")})


class Publisher:
    """One rank's share of the publication of checkpoints."""

    def __init__(
        self, dataset: str, config: dict[str, Any], training: str, keep: int, ranks: Ranks, tables: Tables, timeout: float
    ) -> None:
        """Prepare to publish; arguments as of `Saver`, but for `training`: what the names of its checkpoints end with."""
        self._dataset, self._config, self._training, self._keep = dataset, config, training, keep
        self._ranks, self._tables, self._timeout = ranks, tables, timeout
        self._hurried_at: float | None = None

    @property
    def takes_part(self) -> bool:
        """Whether this rank writes anything."""
        return self._ranks.leads or bool(self._tables)

    def mine(self, state: Mapping[str, Tensor]) -> list[str]:
        """The tensors that this rank writes: its rows of divided tables, and on rank 0 what all ranks share."""
        return [name for name, value in state.items() if self._ranks.leads or self._rows(name, value)]

    def hurry(self) -> None:
        """Training has ended: wait no longer for the others than `GRACE_SECONDS`."""
        self._hurried_at = time.monotonic()

    def publish(self, folder: Place, copy: Copy) -> None:
        """Write this rank's part, and on rank 0 the description once all parts are there.

        Raises:
            OSError: something cannot be written.
            CheckpointError: another rank could not write its part, or did not in time.
        """
        rank = self._ranks.rank
        count = self._ranks.world if self._tables else 1
        # Parts that are published already are still those of a whole checkpoint, if these cannot be written.
        again = f"-again-{copy.again}" if copy.again else ""
        receipts = [f"{copy.name}{again}-part-{number:05d}-of-{count:05d}.json" for number in range(count)]
        rows = {key: held for key, value in copy.tensors.items() if (held := self._rows(key, value))}
        try:
            part = write_part(folder, receipts[rank].replace(".json", ".safetensors"), copy.tensors, rows)
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
            folder.write(f"{copy.name}.json", description.to_json())
        except (OSError, CheckpointError):
            _deleted(folder, [*([] if again else [f"{copy.name}.json"]), part.file, *receipts[1:]])
            raise
        _deleted(folder, receipts[1:])

    def tidy(self, folder: Place, best_folder: Place, copy: Copy) -> None:
        """Delete what no checkpoint needs that is kept, once a copy is published.

        What lies further than the checkpoint just written belongs to a training that has been given up for this one; what is
        named after this one and lies further, another rank may be writing.
        """
        apart = set(_named(copy))
        now = step_of(copy.name)
        try:
            kept = [copy.name]
            for name in published(folder):
                if len(kept) < self._keep and step_of(name) < now:
                    with suppress(*MISREAD):
                        apart.update(_named(read_description(folder, name)))
                        kept.append(name)
            for place, names in ((folder, set(kept)), (best_folder, apart)):
                place.delete(file for file in place.files() if not self._is_needed(file, names, now))
        except (OSError, CheckpointError) as error:
            logger.warning("what is no longer needed in %s could not be deleted: %s", folder, error)

    def _rows(self, name: str, value: Tensor) -> Rows | None:
        """The rows of a tensor that this rank holds, if it is divided; a number that counts steps is not."""
        return rows_of(self._tables, name) if value.dim() else None

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
            if self._hurried_at is not None:
                limit = min(limit, self._hurried_at + GRACE_SECONDS)
            if time.monotonic() > limit:
                raise CheckpointError(
                    f"the part of rank {rank} did not appear in {folder} within {time.monotonic() - began:.0f} s; all ranks "
                    "must see this folder"
                )
            time.sleep(POLL_SECONDS)

    def _is_needed(self, file: str, kept: Collection[str | None], now: tuple[int, int]) -> bool:
        found = NAME.search(file)
        return found is None or found[0] in kept or (found[0].endswith(self._training) and step_of(file) > now)


def _named(said: Copy | Description) -> tuple[str | None, str | None]:
    """The models that a checkpoint names: the best one, and the one that is being evaluated."""
    candidate = said.position.candidate
    return said.best, candidate.name if candidate is not None else None


def _deleted(folder: Place, files: Iterable[str]) -> None:
    """Delete files as far as possible; what stays is deleted with the next checkpoint."""
    with suppress(OSError):
        folder.delete(files)
