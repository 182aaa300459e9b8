"""Trainings on MovieLens 1M that a benchmark compares: datasets and runs are made once, and kept."""

import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.measure import sibra_dist
from sibra_dist.config import load_config
from sibra_dist.data.manifest import Manifest
from sibra_dist.data.storage import write_atomically
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.publish import recorded
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.evaluation import EvaluationRequest, read_evaluation
from sibra_dist.training.run_folder import RunFolder, open_run

MEASURED = "evaluation.metrics=[ndcg, recall, precision, map, coverage, gini, arp]"
"""Of every run. Which of its epochs is the best does not hang on them."""

One = TypeVar("One")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Experiment:
    """A training, and the evaluations of what it learns."""

    protocol: str
    """`split.protocol` of the dataset"""
    seed: int
    """of the split and of the training"""
    recipe: str
    settings: tuple[str, ...] = ()
    """what differs from the recipe"""
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: {"test": {}})
    """of the test split; by name, what is hidden: shares by modality, such as `{"items.genres": 0.5}`"""


class ByUser(NamedTuple):
    """Values of users, in the order of the held-out split."""

    recall: NDArray[np.float64]
    """recall@10: [U]"""
    average_precision: NDArray[np.float64]
    """AP@10 over the number of relevant items, however many: [U]. `map@10` is over 10 of them at the most."""


class Laboratory:
    """A folder of datasets and runs."""

    def __init__(self, data: Path, work: Path) -> None:
        """Use the files of MovieLens 1M in `data`, and the folder `work`.

        Raises:
            SystemExit: the files are not there.
        """
        if not (data / "interactions.tsv").is_file():
            raise SystemExit(f"{data} holds no MovieLens 1M: name its folder with --data DIR (see the recipe ml-1m)")
        self.data, self.work = data.resolve(), work
        # Every process gets one core: results are then the same on any machine's number of them.
        os.environ["OMP_NUM_THREADS"] = "1"

    def dataset(self, protocol: str, seed: int) -> Path:
        """The folder of a dataset; it is made unless it is there.

        Raises:
            SystemExit: one that was made otherwise is there.
        """
        folder = self.dataset_folder(protocol, seed)
        asked = [f"source={self.data}", f"split.protocol={protocol}", f"split.seed={seed}"]
        if not (folder / "manifest.json").exists():
            sibra_dist("prepare", "ml-1m", *asked, "--to", str(folder), log=folder.with_suffix(".log"))
        elif Manifest.read(folder).config != recorded(load_config(PrepareConfig, "ml-1m", asked)):
            raise SystemExit(f"{folder} was made by another configuration than the recipe ml-1m; remove it to make it anew")
        return folder

    def run(self, name: str, experiment: Experiment) -> dict[str, Any]:
        """Train and evaluate, unless that was done before with the same recipe and settings; the dataset must be there.

        Returns:
            `recipe`, `settings`, `seed`, `commit`, `epoch` (the best), `validation` (its ndcg@10), `train` (seconds and peak
            memory), and by evaluation `metrics` and `counts`.
        """
        folder = self.folder(name, experiment.seed)
        done = folder / "measured.json"
        asked = {"recipe": experiment.recipe, "settings": list(experiment.settings), "seed": experiment.seed}
        dataset = f"dataset={self.dataset_folder(experiment.protocol, experiment.seed)}"
        start = [experiment.recipe, dataset, f"seed={experiment.seed}", MEASURED, *experiment.settings]
        if (folder / "config.yaml").exists():
            _require_same(RunFolder(folder).config(), load_config(TrainConfig, start[0], start[1:]), folder)
        if done.exists():
            kept: dict[str, Any] = json.loads(done.read_text())
            if {key: kept[key] for key in asked} != asked or kept["evaluations"].keys() != experiment.evaluations.keys():
                raise SystemExit(f"{folder} was made with other settings: {kept['settings']}; remove it to make it anew")
            return kept
        log = folder.with_suffix(".log")
        if (folder / "config.yaml").exists():
            trained = sibra_dist("train", "--resume", str(folder), log=log)
        else:
            trained = sibra_dist("train", *start, "--to", str(folder), log=log)
        found = {}
        for evaluation, hide in experiment.evaluations.items():
            options = [word for name, share in hide.items() for word in ("--hide", f"{name}={share}")]
            sibra_dist("evaluate", str(folder), *options, log=log)
            read = read_evaluation(RunFolder(folder), EvaluationRequest(hide=hide))
            metrics = {metric.partition("/")[2]: value for metric, value in read["metrics"].items()}
            found[evaluation] = {"metrics": metrics, "counts": read["counts"]}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        best = max(lines, key=lambda line: float(line["val/ndcg@10"]))
        result = asked | {
            "commit": json.loads((folder / "environment.json").read_text())["commit"],
            "epoch": best["epoch"],
            "validation": best["val/ndcg@10"],
            "train": vars(trained),
            "evaluations": found,
        }
        write_atomically(done, json.dumps(result, indent=1).encode() + b"\n")
        return result

    def dataset_folder(self, protocol: str, seed: int) -> Path:
        """Where a dataset is or will be."""
        return self.work / "datasets" / f"{protocol}-{seed}"

    def folder(self, name: str, seed: int) -> Path:
        """The run folder of an experiment."""
        return self.work / "runs" / re.sub(r"\W+", "-", name) / str(seed)

    def by_user(self, name: str, seed: int) -> ByUser:
        """What the test split gives for each user who has something relevant in it, of an experiment that was run."""
        kept = self.folder(name, seed) / "by_user.npy"
        if not kept.exists():
            run, config, dataset = open_run(self.folder(name, seed))
            found: list[Tensor] = []

            def note(users: Tensor, num_relevant: Tensor, values: Tensor) -> None:
                num_relevant, values = num_relevant[num_relevant > 0], values[num_relevant > 0].T
                found.append(torch.stack([values[0], values[1] * num_relevant.clamp(max=10) / num_relevant]))

            model, _ = run.load_best(dataset, torch.device("cpu"))
            evaluate(model, dataset, "test", config.evaluation, names=["recall@10", "map@10"], seed=config.seed, each=note)
            file = io.BytesIO()
            np.save(file, torch.cat(found, dim=1).numpy())
            write_atomically(kept, file.getvalue())
        return ByUser(*np.load(kept))

    def run_all(self, experiments: Mapping[str, Sequence[Experiment]], jobs: int) -> dict[str, list[dict[str, Any]]]:
        """`run` for every name and experiment, so many processes at once; in the order given."""
        pairs = [(name, experiment) for name, several in experiments.items() for experiment in several]
        for protocol, seed in dict.fromkeys((experiment.protocol, experiment.seed) for _, experiment in pairs):
            self.dataset(protocol, seed)
        results = in_parallel(lambda pair: self.run(*pair), pairs, jobs)
        made: dict[str, list[dict[str, Any]]] = {name: [] for name in experiments}
        for (name, _), result in zip(pairs, results, strict=True):
            made[name].append(result)
        return made


def _require_same(made: TrainConfig, asked: TrainConfig, folder: Path) -> None:
    """That a run is what is asked for; which metrics it reports changes nothing else of it.

    Raises:
        SystemExit: it is not.
    """
    metrics = {"metrics": asked.evaluation.metrics}
    made = made.model_copy(update={"evaluation": made.evaluation.model_copy(update=metrics)})
    if (
        made.model_copy(update={"dataset": asked.dataset}) != asked
        or Path(made.dataset).resolve() != Path(asked.dataset).resolve()
    ):
        raise SystemExit(f"{folder} was made with other settings, see its config.yaml; remove it to make it anew")


def in_parallel(work: Callable[[One], Made], things: Sequence[One], jobs: int) -> list[Made]:
    """Do something for each of some things, so many at once. What fails first ends it, once what has begun is done."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, thing) for thing in things]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
