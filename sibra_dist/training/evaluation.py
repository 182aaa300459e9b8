"""Evaluates a run's best model and keeps the result in the run folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sibra_dist.data.dataset import Candidates, Dataset, HeldOut, open_dataset
from sibra_dist.data.presence import describe_hide, parse_hide
from sibra_dist.errors import CheckpointError
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.evaluation.findings import Evaluation
from sibra_dist.evaluation.groups import GroupAverages, user_groupings
from sibra_dist.evaluation.metrics import split_metrics
from sibra_dist.evaluation.per_user import UserParts, publish_users
from sibra_dist.models.base import Recommender
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.placement import keep_freed_memory, pick_device
from sibra_dist.training.progress import Counting, uncounted
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder

PREFIXES: dict[HeldOut, str] = {"validation": "val", "test": "test"}
FILES = ("metrics.json", "users.parquet")
"""Names of a result and of the table of its users, where nothing is hidden."""
ALWAYS_TOLD = {"dataset", "hidden", "metrics"}
"""By a result, whatever version wrote it."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated."""

    split: HeldOut = "test"
    hide: Mapping[str, float] = field(default_factory=dict)
    """Share of the entities that lose a modality, by name such as `items.interactions`, beside what the run itself hides
    in evaluation; of two shares of one modality this counts."""
    dataset: str | None = None
    """Folder of the dataset, where it is not the one the run names."""
    candidates: Candidates | None = None
    """What is ranked, where it is not what the run's configuration says."""

    def settings(self, config: TrainConfig) -> EvaluationConfig:
        """How a run of this configuration is evaluated."""
        candidates = self.candidates or config.evaluation.candidates
        return config.evaluation.model_copy(update={"hide": self.hidden(config), "candidates": candidates})

    def hidden(self, config: TrainConfig) -> dict[str, float]:
        """What is hidden in all when a run of this configuration is evaluated; of each modality a share above 0."""
        return {name: share for name, share in {**config.evaluation.hide, **self.hide}.items() if share > 0}

    def name(self, config: TrainConfig) -> str:
        """Name of the result's file, without suffix, for a run of this configuration."""
        return self._named("metrics", config)

    def users_name(self, config: TrainConfig) -> str:
        """Name of the file of all users' values beside it."""
        return f"{self._named('users', config)}.parquet"

    def modalities_name(self, config: TrainConfig) -> str:
        """Name of the file, without suffix, that tells of every modality."""
        return self._named("modalities", config)

    def _named(self, what: str, config: TrainConfig) -> str:
        settings = self.settings(config)
        hidden = describe_hide(settings.hide)
        ranked = ["all-items"] if settings.candidates == "all" else []
        return "-".join([what, *ranked, *(["without", *hidden] if hidden else [])])


class Best(NamedTuple):
    """The best model of a run, with what it belongs to."""

    config: TrainConfig
    dataset: Dataset
    model: Recommender
    epoch: int


def open_best(run: RunFolder, dataset: str | None, device: torch.device | None, ranks: Ranks) -> Best:
    """Load the best model of a run, for much computing: a process on a CPU keeps the memory that it frees from now on.

    Args:
        run: with a trained model.
        dataset: folder of the dataset, where it is not the one the run names.
        device: by default what the run's configuration says.
        ranks: all call this.

    Raises:
        SibraError: the run, its dataset or its best model cannot be used.
    """
    config = run.config()
    opened = open_dataset(dataset or config.dataset)
    model, epoch = run.load_best(opened, device or pick_device(config.training.device), ranks)
    keep_freed_memory(model.device)
    return Best(config, opened, model, epoch)


def evaluate_run(
    run: RunFolder, request: EvaluationRequest, progress: Counting = uncounted, device: torch.device | None = None
) -> Evaluation:
    """Evaluate a run's best model; rank 0 writes `evaluation/<split>/metrics.json` and `users.parquet`.

    Where there are ranks, all call this. A result that was there before stays as it is until all of the new one is known.

    Raises:
        SibraError: the run, its dataset or its best model cannot be used, a hidden modality is not known, or the result
            cannot be written.
    """
    ranks = Ranks.current()
    config, dataset, model, epoch = open_best(run, request.dataset, device, ranks)
    parse_hide(request.hide, model.modalities(), config.seed, "--hide")
    settings = request.settings(config)
    names = list(dict.fromkeys(settings.names))
    of_users, _ = split_metrics(names)
    folder, beside = run.evaluation(request.split), f"{request.name(config)}.parts"
    parts = UserParts(folder, beside, ranks.rank, of_users)
    done, total = 0, len(dataset.held_out[request.split][0])

    def add(users: Tensor, num_relevant: Tensor, values: Tensor) -> None:
        nonlocal done
        parts.add(users, num_relevant, values)
        done += len(users) * ranks.world  # the others are as far as this one
        progress(min(done, total), total)

    def publish() -> None:
        result = {
            "split": request.split,
            "candidates": settings.candidates,
            "hidden": describe_hide(settings.hide),
            "epoch": epoch,
            "dataset": dataset.manifest.digest,
            "counts": found.counts,
            "metrics": prefixed(found.metrics, request.split),
            "item_groups": found.item_groups,
        }
        files, counts = (f"{request.name(config)}.json", request.users_name(config)), [count for count, _ in written]
        publish_evaluation(run, files, result, (beside, counts), dataset, of_users, settings.max_groups)

    # What an evaluation that was killed has left; another one of the same name is not to run at the same time.
    ranks.alone(lambda: write_result(run, (folder / beside).delete_all))
    try:
        found = evaluate(
            model,
            dataset,
            request.split,
            settings,
            names=names,
            seed=config.seed,
            ranks=(ranks.rank, ranks.world),
            each=add,
            item_cutoffs=settings.cutoffs,
        )
        parts.flush()
        written = ranks.gather((parts.count, parts.error))
        for _, error in written:
            if error is not None:
                raise _unwritten(run, error) from error
        ranks.alone(publish)
    finally:
        with suppress(OSError):
            parts.delete()
    return found


def publish_evaluation(
    run: RunFolder,
    files: tuple[str, str],
    result: dict[str, Any],
    parts: tuple[str, Sequence[int]],
    dataset: Dataset,
    metrics: Sequence[str],
    max_groups: int,
) -> None:
    """Write a result and the table of its users.

    Args:
        run: the folder.
        files: names of both in the folder of the split's evaluation.
        result: what the result tells besides groups and the table.
        parts: the folder of the users' parts, and how many parts each rank wrote.
        dataset: what was evaluated.
        metrics: the metrics of users, in their order in the parts.
        max_groups: results tell of the groups of a grouping that has at most so many.

    Raises:
        CheckpointError: it cannot be written.
    """
    folder, groupings = run.evaluation(result["split"]), user_groupings(dataset)
    told = [grouping for grouping in groupings if len(grouping.labels) <= max_groups]
    averages = GroupAverages(told, metrics)

    def write() -> None:
        users = publish_users(folder, files[1], *parts, dataset, groupings, averages)
        groups = averages.compute(lambda values: prefixed(values, result["split"]))
        content = json.dumps({**result, "groups": groups, "users": users.model_dump()}, indent=2).encode() + b"\n"
        folder.write(files[0], content)

    write_result(run, write)


def prefixed(metrics: Mapping[str, float], split: HeldOut) -> dict[str, float]:
    """Metrics with `val/` or `test/` before their names."""
    return {f"{PREFIXES[split]}/{name}": value for name, value in metrics.items()}


def write_result(run: RunFolder, write: Callable[[], None]) -> None:
    """Write; raise a `CheckpointError` where that is not possible."""
    try:
        write()
    except OSError as error:
        raise _unwritten(run, error) from error


def _unwritten(run: RunFolder, error: OSError) -> CheckpointError:
    return CheckpointError(f"the evaluation of {run.name} cannot be written: {error}")


def read_evaluation(run: RunFolder, request: EvaluationRequest) -> dict[str, Any]:
    """What `evaluate_run` wrote."""
    name = request.name(run.config())
    result: dict[str, Any] = json.loads(run.evaluation(request.split).read(f"{name}.json"))
    return result


def read_result(run: RunFolder, split: HeldOut) -> dict[str, Any]:
    """The evaluation of a split that a run's configuration asks for, or that of recommendations, which have no configuration.

    Raises:
        CheckpointError: there is none that can be read; the message says how to make it.
    """
    try:
        if not run.exists and run.place.files("evaluation"):
            result = json.loads(run.evaluation(split).read(FILES[0]))
        else:
            run.config()
            result = read_evaluation(run, EvaluationRequest(split))
    except (OSError, ValueError) as error:
        raise _no_evaluation(run, split) from error
    if not isinstance(result, dict) or not result.keys() >= ALWAYS_TOLD:
        raise _no_evaluation(run, split)
    return result


def _no_evaluation(run: RunFolder, split: HeldOut) -> CheckpointError:
    return CheckpointError(f"{run.name} has no evaluation of the {split} split: {remedy(run, split)}")


def remedy(run: RunFolder, split: HeldOut) -> str:
    """How to evaluate a run, or recommendations, in words."""
    what = run.name if run.exists else f"--recommendations FILE --dataset DATASET --to {run.name}"
    return f"run `sibra-dist evaluate {what}{'' if split == 'test' else f' --split {split}'}`"
