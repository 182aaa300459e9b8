"""Evaluates a run's best model and keeps the result in the run folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sibra_dist.data.dataset import HeldOut, open_dataset
from sibra_dist.data.presence import describe_hide, parse_hide
from sibra_dist.errors import CheckpointError
from sibra_dist.evaluation.evaluate import Evaluation, evaluate
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.placement import pick_device
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder

PREFIXES: dict[HeldOut, str] = {"validation": "val", "test": "test"}


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated."""

    split: HeldOut = "test"
    hide: Mapping[str, float] = field(default_factory=dict)
    """Share of the entities that lose a modality, by name such as `items.interactions`, beside what the run itself hides
    in evaluation; of two shares of one modality this counts."""
    dataset: str | None = None
    """Folder of the dataset, where it is not the one the run names."""

    def hidden(self, config: TrainConfig) -> dict[str, float]:
        """What is hidden in all when a run of this configuration is evaluated; of each modality a share above 0."""
        return {name: share for name, share in {**config.evaluation.hide, **self.hide}.items() if share > 0}

    def name(self, config: TrainConfig) -> str:
        """Name of the result's file, without suffix, for a run of this configuration."""
        return "-".join(["metrics-without", *hidden]) if (hidden := describe_hide(self.hidden(config))) else "metrics"


def evaluate_run(run: RunFolder, request: EvaluationRequest, device: torch.device | None = None) -> Evaluation:
    """Evaluate a run's best model; rank 0 writes `evaluation/<split>/metrics.json`. Where there are ranks, all call this.

    Raises:
        SibraError: the run, its dataset or its best model cannot be used, or a hidden modality is not known.
    """
    ranks = Ranks.current()
    config = run.config()
    dataset = open_dataset(request.dataset or config.dataset)
    model, epoch = run.load_best(dataset, device or pick_device(config.training.device), ranks)
    parse_hide(request.hide, model.modalities(), config.seed, "--hide")
    settings = config.evaluation.model_copy(update={"hide": request.hidden(config)})
    found = evaluate(model, dataset, request.split, settings, seed=config.seed, ranks=(ranks.rank, ranks.world))
    if ranks.leads:
        prefix = PREFIXES[request.split]
        result: dict[str, Any] = {
            "split": request.split,
            "hidden": describe_hide(settings.hide),
            "epoch": epoch,
            "dataset": dataset.manifest.digest,
            "counts": found.counts,
            "metrics": {f"{prefix}/{name}": value for name, value in found.metrics.items()},
        }
        content = json.dumps(result, indent=2).encode() + b"\n"
        try:
            run.evaluation(request.split).write(f"{request.name(config)}.json", content)
        except OSError as error:
            raise CheckpointError(f"the evaluation of {run.name} cannot be written: {error}") from error
    return found


def read_evaluation(run: RunFolder, request: EvaluationRequest) -> dict[str, Any]:
    """What `evaluate_run` wrote."""
    name = request.name(run.config())
    result: dict[str, Any] = json.loads(run.evaluation(request.split).read(f"{name}.json"))
    return result
