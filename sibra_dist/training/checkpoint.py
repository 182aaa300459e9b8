"""Checkpoints: what they hold, how they are found and read, and the one before when one is damaged.

    <run>/checkpoints/
      epoch-0002-step-00000100-3f9a1c2b-part-00000-of-00004.safetensors   tensors that all ranks share; rank 0's rows
      epoch-0002-step-00000100-3f9a1c2b-part-00001-of-00004.safetensors   rank 1's rows of divided tables
      epoch-0002-step-00000100-3f9a1c2b.json                              written last: without it there is no checkpoint
    <run>/best/                                                           the same, of models alone: the best, and candidates

A name is a position and eight digits that are drawn whenever a training starts or resumes: what one of these has written is
never mistaken for the work of another. There is a single part where no table is divided. The description holds the position
(with what early stopping remembers), the configuration, the dataset's digest, the number of ranks, the size and checksum of
each part with the rows in it, a checksum of its own, and the names of the best model so far and of the one that is being
evaluated, if any is. A checkpoint thus says which of these belong to it: a run that resumes from an earlier position returns
to the best model of that position, and has the same candidate evaluated again.

Tensors are `model/NAME` by name in the state dict, `optimizer/NAME/STATE`, and `losses` of the epoch so far. Learning rates,
batches, negatives and dropout are functions of (seed, epoch, step), so there is no state of a schedule, of a sampler or of
random numbers, and nothing else that belongs to one rank. `sibra_dist.training.saver` and `publishing` write all this.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn

from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError
from sibra_dist.models.tables import tables_of
from sibra_dist.training.parts import Part, Rows, Tables, read_parts
from sibra_dist.training.position import Position
from sibra_dist.training.ranks import Ranks

logger = logging.getLogger("sibra_dist")

NAME = re.compile(r"epoch-(\d+)-step-(\d+)-[0-9a-f]{8}")
ALONE = Ranks()
MISREAD = (ValueError, KeyError, TypeError, SafetensorError)
DAMAGE = (OSError, *MISREAD)
"""What reading a damaged checkpoint may raise."""


class HasState(Protocol):
    """An optimizer."""

    @property
    def state(self) -> Any:
        """By parameter, tensors by name."""


class Description(BaseModel):
    """What a checkpoint's description says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    position: Position
    best: str | None
    """Name of the best model so far"""
    dataset: str
    """Digest of the dataset"""
    config: dict[str, Any]
    world: int
    """Number of ranks that trained"""
    parts: tuple[Part, ...]

    def to_json(self) -> bytes:
        """As the content of a file."""
        plain = self.model_dump(mode="json")
        return json.dumps({"sha256": _checksum(plain), **plain}, indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Description":
        """Read the content of a file; `ValueError`, `KeyError` or `TypeError` where it is not as it was written."""
        plain = json.loads(content)
        if plain.pop("sha256") != _checksum(plain):
            raise ValueError("the checksum of its description is wrong")
        return cls.model_validate(plain)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read."""

    name: str
    position: Position
    best: str | None
    """Name of the best model so far"""
    tensors: dict[str, Tensor]
    """`model/...`, `optimizer/...`, `losses`; of divided tables the rows that were asked for"""

    def restore(self, model: nn.Module, optimizer: HasState | None = None) -> None:
        """Put the saved state into a model, and into its optimizer if one is given."""
        try:
            model.load_state_dict(_with_prefix(self.tensors, "model/"))
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint belongs to another model: {' '.join(str(error).split())[:300]}") from error
        if optimizer is None:
            return
        saved = _with_prefix(self.tensors, "optimizer/")
        for name, parameter in model.named_parameters():
            entries = _with_prefix(saved, f"{name}/")
            optimizer.state[parameter].update({key: value.to(parameter.device, copy=True) for key, value in entries.items()})


def state_of(model: nn.Module, optimizer: HasState | None = None, losses: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint: those of the model, its optimizer and the losses themselves, not copies."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    if losses is not None:
        tensors["losses"] = losses
    return tensors


def divided_tables(model: nn.Module) -> Tables:
    """The rows that this rank holds of a model's divided tables."""
    tables = tables_of(model).items()
    return {name: Rows(table.first, table.last, table.rows) for name, table in tables if table.divided}


def rows_of(tables: Tables, name: str) -> Rows | None:
    """The rows that this rank holds of a checkpoint's tensor, if it belongs to a divided table."""
    kind, _, rest = name.partition("/")
    return tables.get(rest.rpartition("/")[0] if kind == "optimizer" else rest)


def load_newest(
    folder: Place | str | Path, dataset: str, ranks: Ranks = ALONE, tables: Tables | None = None
) -> Checkpoint | None:
    """The newest checkpoint in `folder` that is whole, or None if there never was one. A damaged one is told and passed over.

    Args:
        folder: of checkpoints, or of best models.
        dataset: digest of the dataset it must have been made from.
        ranks: that all call this; they agree on one checkpoint.
        tables: the divided tables of the model, whatever they were when it was saved; of all others every row is read.

    Raises:
        CheckpointError: it was made from another dataset, or all there are are damaged.
    """
    folder = Place.at(folder)
    return _first_whole(folder, published(folder), dataset, ranks, tables or {})


def load_candidate(best: Place, name: str, dataset: str) -> Checkpoint:
    """The model of this name among the best models.

    Raises:
        CheckpointError: it is not there, is damaged, or was made from another dataset.
    """
    found = _read(best, name, dataset, {})
    if isinstance(found, str):
        raise CheckpointError(
            f"the model {best / name}, which is to be evaluated, is damaged ({found}). Remove the newest checkpoint of the run "
            "to go on from the one before, or start the training again under another name"
        )
    if isinstance(found, CheckpointError):
        raise found
    return found


def load_best(
    checkpoints: Place, best: Place, dataset: str, ranks: Ranks = ALONE, tables: Tables | None = None
) -> Checkpoint | None:
    """The best model that belongs to the newest checkpoint, or to the one before where it is damaged; None if there is none.

    Raises:
        CheckpointError: it was made from another dataset, or all there are are damaged.
    """
    names: dict[str, None] = {}
    read = 0
    for name in published(checkpoints):
        try:
            description = read_description(checkpoints, name)
        except DAMAGE as error:
            logger.warning("checkpoint %s is damaged (%s)", checkpoints / name, error)
            continue
        read += 1
        _require_dataset(checkpoints / name, description, dataset)
        if description.best is not None:
            names[description.best] = None
    # Without any checkpoint left to say which, the newest, if only a candidate.
    return _first_whole(best, list(names) if read else published(best), dataset, ranks, tables or {})


def published(folder: Place) -> list[str]:
    """Names of the checkpoints in a folder, the newest first.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        names = [file.removesuffix(".json") for file in folder.files() if file.endswith(".json")]
    except OSError as error:
        raise CheckpointError(f"the checkpoints in {folder} cannot be read: {error}") from error
    return sorted((name for name in names if NAME.fullmatch(name)), key=lambda name: (step_of(name), name), reverse=True)


def step_of(name: str) -> tuple[int, int]:
    """Epoch and step of the checkpoint that a file belongs to, by the file's name; (-1, -1) if to none."""
    found = NAME.search(name)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def read_description(folder: Place, name: str) -> Description:
    """Read the description of a checkpoint; one of `DAMAGE` where it cannot be."""
    return Description.from_json(folder.read(f"{name}.json"))


def _first_whole(folder: Place, names: Sequence[str], dataset: str, ranks: Ranks, tables: Tables) -> Checkpoint | None:
    # All ranks must continue from one place, even if a file appeared while they were looking.
    names = ranks.agree(names)
    reason: str | CheckpointError | None = None
    for name in names:
        found = _read(folder, name, dataset, tables)
        reasons = ranks.gather(None if isinstance(found, Checkpoint) else found)
        reason = next((reason for reason in reasons if reason is not None), None)
        if isinstance(reason, CheckpointError):
            raise reason
        if isinstance(found, Checkpoint) and reason is None:
            return found
        if ranks.leads:
            logger.warning("checkpoint %s is damaged (%s); trying the one before", folder / name, reason)
    if names:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged, or not seen by every rank ({reason}). "
            "Start the training again under another name"
        )
    return None


def _read(folder: Place, name: str, dataset: str, tables: Tables) -> Checkpoint | str | CheckpointError:
    """A checkpoint, or why it cannot be used: what is damaged in it, or the error that it is."""
    try:
        description = read_description(folder, name)
        _require_dataset(folder / name, description, dataset)
        tensors = read_parts(folder, description.parts, lambda name: rows_of(tables, name))
        return Checkpoint(name, description.position, description.best, tensors)
    except CheckpointError as error:
        return error
    except DAMAGE as error:
        return " ".join(f"{error or type(error).__name__}".split())[:300]


def _require_dataset(where: Place, description: Description, dataset: str) -> None:
    if description.dataset != dataset:
        raise CheckpointError(
            f"checkpoint {where} was made from another dataset ({description.dataset[:12]}, not {dataset[:12]}). "
            "Give the dataset it was trained on, or start a new run"
        )


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
