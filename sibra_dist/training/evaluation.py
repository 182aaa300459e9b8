"""Evaluates a run's best model and keeps the result in the run folder."""

import json
from dataclasses import dataclass
from typing import Any

import torch

from sibra_dist.data.dataset import HeldOut, open_dataset
from sibra_dist.data.storage import write_atomically
from sibra_dist.evaluation.evaluate import Evaluation, evaluate
from sibra_dist.training.ranks import Ranks, pick_device
from sibra_dist.training.run_folder import RunFolder

PREFIXES: dict[HeldOut, str] = {"validation": "val", "test": "test"}


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated."""

    split: HeldOut = "test"
    hide: tuple[str, ...] = ()
    """Modalities that the model does not see, such as `items.interactions`."""
    dataset: str | None = None
    """Folder of the dataset, where it is not the one the run names."""

    @property
    def name(self) -> str:
        """Name of the result's file, without suffix."""
        return "metrics" if not self.hide else "metrics-without-" + "-".join(sorted(self.hide))


def evaluate_run(run: RunFolder, request: EvaluationRequest, device: torch.device | None = None) -> Evaluation:
    """Evaluate a run's best model; rank 0 writes `evaluation/<split>/metrics.json`. Where there are ranks, all call this.

    Raises:
        SibraError: the run, its dataset or its best model cannot be used, or a hidden modality is not known.
    """
    ranks = Ranks.current()
    config = run.config()
    dataset = open_dataset(request.dataset or config.dataset)
    model, epoch = run.load_best(dataset, device or pick_device(config.training.device))
    found = evaluate(
        model, dataset, request.split, config.evaluation, hide=tuple(request.hide), ranks=(ranks.rank, ranks.world)
    )
    if ranks.leads:
        folder = run.evaluation(request.split)
        folder.mkdir(parents=True, exist_ok=True)
        prefix = PREFIXES[request.split]
        result: dict[str, Any] = {
            "split": request.split,
            "hidden": sorted(request.hide),
            "epoch": epoch,
            "dataset": dataset.manifest.digest,
            "counts": found.counts,
            "metrics": {f"{prefix}/{name}": value for name, value in found.metrics.items()},
        }
        write_atomically(folder / f"{request.name}.json", json.dumps(result, indent=2).encode() + b"\n")
    return found


def read_evaluation(run: RunFolder, request: EvaluationRequest) -> dict[str, Any]:
    """What `evaluate_run` wrote."""
    result: dict[str, Any] = json.loads((run.evaluation(request.split) / f"{request.name}.json").read_text())
    return result
