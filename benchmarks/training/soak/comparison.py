"""Whether two runs have come to the same, bit for bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sibra_dist.errors import SibraError
from sibra_dist.training.checkpoint import Checkpoint, load_best, load_newest
from sibra_dist.training.run_folder import RunFolder

SPEED = ("examples_per_second", "memory")
"""Of a line in metrics.jsonl, what says how it was made, not what came out."""


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side."""

    steps: int
    """Done by the first one"""
    tensors: int
    """That were compared: parameters, the optimizer's state, losses"""
    bytes: int
    evaluations: int
    differences: list[str]
    """Nothing differs where it is empty."""


def compare(run: Path, other: Path) -> Comparison:
    """Compare the newest checkpoints, the best models and the recorded evaluations of two runs."""
    digest = RunFolder(other).dataset_digest()
    ours, theirs = (_checkpoints(RunFolder(path), digest) for path in (run, other))
    differences: list[str] = []
    tensors = size = 0
    for name in ours:
        mine, yours = ours[name], theirs[name]
        if mine.position != yours.position:
            differences.append(f"{name}: {mine.position} against {yours.position}")
        if mine.tensors.keys() != yours.tensors.keys():
            differences.append(f"{name}: other tensors, {sorted(mine.tensors.keys() ^ yours.tensors.keys())[:5]}")
        for key in mine.tensors.keys() & yours.tensors.keys():
            tensors, size = tensors + 1, size + mine.tensors[key].nbytes
            if not same_bits(mine.tensors[key], yours.tensors[key]):
                differences.append(f"{name}: {key} differs")
    lines, others = (_outcomes(RunFolder(path)) for path in (run, other))
    if len(lines) != len(others):
        differences.append(f"{len(lines)} evaluations against {len(others)}")
    differences += [f"evaluation {a} against {b}" for a, b in zip(lines, others, strict=False) if a != b]
    return Comparison(lines[-1]["steps"] if lines else 0, tensors, size, len(lines), differences)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one type and shape, and of the same bits: NaN is NaN, and -0 is not 0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def _checkpoints(run: RunFolder, digest: str) -> dict[str, Checkpoint]:
    found = {
        "newest checkpoint": load_newest(run.checkpoints, digest),
        "best model": load_best(run.checkpoints, run.best, digest),
    }
    for name, checkpoint in found.items():
        if checkpoint is None:
            raise SibraError(f"{run.name} has no {name}: train it first")
    return {name: checkpoint for name, checkpoint in found.items() if checkpoint is not None}


def _outcomes(run: RunFolder) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in SPEED} for line in run.metrics()]
