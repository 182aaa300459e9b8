"""Judges the modalities of a run's best model: hidden in turn and alone, and how far apart their embeddings are."""

import json
from dataclasses import dataclass
from typing import Any

import torch

from sibra_dist.data.presence import describe_hide, parse_hide
from sibra_dist.data.storage import Place
from sibra_dist.evaluation.gap import Gap, SideView, modality_gaps
from sibra_dist.evaluation.gap_plot import draw, project
from sibra_dist.evaluation.modalities import evaluate_each
from sibra_dist.training.evaluation import EvaluationRequest, open_best, prefixed, write_result
from sibra_dist.training.progress import Counting, uncounted
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder

GAP, PLOT = "modality-gap.json", "modality-gap.svg"


def evaluate_modalities(
    run: RunFolder, request: EvaluationRequest, progress: Counting = uncounted, device: torch.device | None = None
) -> None:
    """Evaluate a run's best model with every modality hidden in turn and alone; rank 0 writes `modalities.json`.

    Model and dataset are opened once. Where there are ranks, all call this.

    Raises:
        SibraError: the run, its dataset or its best model cannot be used, it reads no modality or not one that is to be
            hidden in every row, or the result cannot be written.
    """
    ranks = Ranks.current()
    config, dataset, model, epoch = open_best(run, request.dataset, device, ranks)
    parse_hide(request.hide, model.modalities(), config.seed, "--hide")
    settings = request.settings(config)
    shared = (ranks.rank, ranks.world)
    found = evaluate_each(model, dataset, request.split, settings, seed=config.seed, ranks=shared, progress=progress)
    full = found[0][1].metrics
    result = {
        "split": request.split,
        "candidates": settings.candidates,
        "hidden": describe_hide(settings.hide),
        "epoch": epoch,
        "dataset": dataset.manifest.digest,
        "rows": [
            {
                "kind": row.kind,
                "modality": row.modality,
                "hidden": describe_hide(row.hide),
                "counts": outcome.counts,
                "metrics": prefixed(outcome.metrics, request.split),
                "differences": prefixed({name: value - full[name] for name, value in outcome.metrics.items()}, request.split),
            }
            for row, outcome in found
        ],
    }
    _write_alone(run, ranks, run.evaluation(request.split), {f"{request.modalities_name(config)}.json": _json(result)})


def read_modalities(run: RunFolder, request: EvaluationRequest) -> dict[str, Any]:
    """What `evaluate_modalities` wrote."""
    return _read(run.evaluation(request.split), f"{request.modalities_name(run.config())}.json")


@dataclass(frozen=True)
class GapRequest:
    """What is asked about the gap."""

    sample: int | None = None
    """The most entities that are searched among; all by default"""
    dataset: str | None = None
    """Folder of the dataset, where it is not the one the run names."""


def measure_gap(
    run: RunFolder, request: GapRequest, progress: Counting = uncounted, device: torch.device | None = None
) -> None:
    """Measure the gap between the modalities of a run's best model; rank 0 writes `modality-gap.json` and `.svg`.

    What the run hides in evaluation is hidden. Where there are ranks, all call this.

    Raises:
        SibraError: the run, its dataset or its best model cannot be used, no side of it has two modalities, an embedding is
            not a number, or the result cannot be written.
    """
    ranks = Ranks.current()
    config, dataset, model, epoch = open_best(run, request.dataset, device, ranks)
    hide = EvaluationRequest().hidden(config)
    views = [SideView(model, dataset, hidden) for hidden in parse_hide(hide, model.modalities(), config.seed)]
    views = [view for view in views if len(view.names) > 1]
    cutoffs = sorted(set(config.evaluation.cutoffs))
    shared = (ranks.rank, ranks.world)
    gaps = modality_gaps(views, cutoffs, sample=request.sample, ranks=shared, progress=progress)
    plot = draw([project(view) for view in views])
    result = {
        "hidden": describe_hide(hide),
        "epoch": epoch,
        "dataset": dataset.manifest.digest,
        "plot": PLOT,
        "pairs": [_told_of(gap) for gap in gaps],
    }
    # The plot first: a result that names one has one.
    _write_alone(run, ranks, run.place / "evaluation", {PLOT: plot.encode(), GAP: _json(result)})


def read_gap(run: RunFolder) -> dict[str, Any]:
    """What `measure_gap` wrote."""
    return _read(run.place / "evaluation", GAP)


def _told_of(gap: Gap) -> dict[str, Any]:
    first, second = gap.modalities
    # What is searched among a sample is not what is searched among all.
    suffix = f"/sampled-{gap.compared}" if gap.compared < gap.entities else ""
    return {
        "side": gap.side,
        "modalities": [first, second],
        "entities": gap.entities,
        "compared": gap.compared,
        "distance": gap.distance,
        "retrieval": [
            {"from": start, "to": end, "metrics": {f"recall@{k}{suffix}": value for k, value in recalls.items()}}
            for (start, end), recalls in zip(((first, second), (second, first)), gap.recalls, strict=True)
        ],
    }


def _json(result: dict[str, Any]) -> bytes:
    return json.dumps(result, indent=2).encode() + b"\n"


def _read(folder: Place, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(folder.read(name))
    return result


def _write_alone(run: RunFolder, ranks: Ranks, folder: Place, files: dict[str, bytes]) -> None:
    """Let rank 0 write files, each as a whole, in their order."""

    def write() -> None:
        for name, content in files.items():
            folder.write(name, content)

    ranks.alone(lambda: write_result(run, write))
