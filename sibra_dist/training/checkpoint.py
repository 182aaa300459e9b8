"""Checkpoints: written aside, published by their description, verified when read, and the one before when damaged.

    <folder>/
      epoch-0002-step-000100.safetensors   model and optimizer tensors
      epoch-0002-step-000100.json          written last: position, early stopping, dataset digest, checksum of the tensors

A checkpoint is there when its description is. The tensors carry no code, so reading one from a stranger is safe.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sibra_dist.data.manifest import sha256_of
from sibra_dist.data.storage import write_atomically
from sibra_dist.errors import CheckpointError

logger = logging.getLogger("sibra_dist")


@dataclass(frozen=True)
class Position:
    """Where training stands: `step` steps of `epoch` are done, and this is what early stopping remembers."""

    epoch: int = 0
    step: int = 0
    best: float | None = None
    """Best value of the monitored metric so far"""
    best_epoch: int = -1
    evaluations_since_best: int = 0
    finished: bool = False

    @property
    def name(self) -> str:
        """File name of a checkpoint at this position; names sort in the order of training."""
        return f"epoch-{self.epoch:04d}-step-{self.step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read."""

    position: Position
    tensors: dict[str, Tensor]
    """`model/...`, `optimizer/...`, `losses`"""

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
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
            # The step counter stays where a new optimizer would keep it, other states beside their parameter.
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" and not _capturable(optimizer) else value.to(parameter.device, copy=True)
                for key, value in entries.items()
            }


def save_checkpoint(
    folder: Path,
    position: Position,
    dataset_digest: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    losses: Tensor | None = None,
    keep: int = 1,
) -> None:
    """Write a checkpoint into `folder` and, once it is published, delete all but the newest `keep`.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    if losses is not None:
        tensors["losses"] = losses
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    target = folder / f"{position.name}.safetensors"
    aside = target.with_suffix(f".{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        description = {**asdict(position), "dataset": dataset_digest, "sha256": sha256_of(aside)}
        aside.replace(target)
        write_atomically(target.with_suffix(".json"), json.dumps(description, indent=2).encode())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"no checkpoint could be written to {folder}: {error}. Free some space and resume the run"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    # What was just written stays, even if a run that went another way once came further.
    others = sorted(path for path in folder.glob("epoch-*.json") if path.stem != position.name)
    for old in others[: len(others) + 1 - keep]:
        old.unlink(missing_ok=True)
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_newest(folder: Path, dataset_digest: str) -> Checkpoint | None:
    """The newest checkpoint in `folder` that is whole, or None if there never was one. A damaged one is told and passed over.

    Raises:
        CheckpointError: it was made from another dataset, or all there are are damaged.
    """
    descriptions = sorted(folder.glob("epoch-*.json"), reverse=True)
    for path in descriptions:
        try:
            return _load(path, dataset_digest)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("checkpoint %s is damaged (%s); trying the one before", path.with_suffix(""), error)
    if descriptions:
        raise CheckpointError(f"every checkpoint in {folder} is damaged. Start the training again under another name")
    return None


def _load(path: Path, dataset_digest: str) -> Checkpoint:
    description = json.loads(path.read_text())
    made_from = description.pop("dataset")
    checksum = description.pop("sha256")
    if made_from != dataset_digest:
        raise CheckpointError(
            f"checkpoint {path.with_suffix('')} was made from another dataset ({made_from[:12]}, not {dataset_digest[:12]}). "
            "Give the dataset it was trained on, or start a new run"
        )
    tensors = path.with_suffix(".safetensors")
    if sha256_of(tensors) != checksum:
        raise ValueError("its checksum is wrong")
    return Checkpoint(Position(**description), load_file(tensors))


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _capturable(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("capturable")) or bool(optimizer.defaults.get("fused"))
