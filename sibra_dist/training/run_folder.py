"""A run's folder: what was asked, where it ran, what came out.

<run>/
  config.yaml         the resolved configuration
  environment.json    versions, git commit, hardware, dataset digest
  metrics.jsonl       a line an evaluation
  checkpoints/        the newest few; see `sibra_dist.training.checkpoint`
  best/               the model at its best validation metric
  profile/            traces and phases, if a profile was asked for
  stop                asks the run to stop, and is removed when it has
  evaluation/<split>/ metrics.json, written by `sibra-dist evaluate`
"""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sibra_dist import __version__
from sibra_dist.config import load_config, to_yaml
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.storage import write_atomically
from sibra_dist.errors import CheckpointError
from sibra_dist.models import build_model
from sibra_dist.models.base import Recommender
from sibra_dist.training.checkpoint import load_newest
from sibra_dist.training.checks import require_served
from sibra_dist.training.config import TrainConfig

CONFIG = "config.yaml"
PACKAGES = ("torch", "numpy", "pyarrow", "torchmetrics", "ray", "pyspark")


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        """The run in folder `path`, which may not exist yet."""
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.progress = self.path / "progress.json"
        self.error = self.path / "error.json"
        self.stop = self.path / "stop"
        self.profile = self.path / "profile"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).is_file()

    def create(self, config: TrainConfig, dataset: Dataset) -> None:
        """Start the folder. Its configuration is written last, so that its presence means a run.

        Raises:
            CheckpointError: a run is there already, or the folder cannot be written.
            ConfigError: the model cannot be built for this dataset, or the dataset or the model lacks what the configuration
                asks of it; then no folder is left behind.
        """
        if self.exists:
            raise CheckpointError(
                f"{self.path} holds a run already. Continue it with --resume {self.path}, or choose another --to"
            )
        with torch.device("meta"):  # parameters without memory
            model = build_model(config.model, dataset, config.seed)
        require_served(config, dataset, model)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "environment.json", json.dumps(environment(dataset), indent=2).encode() + b"\n")
            write_atomically(self.path / CONFIG, to_yaml(config).encode())
        except OSError as error:
            raise CheckpointError(f"the run folder {self.path} cannot be written: {error}") from error

    def config(self) -> TrainConfig:
        """The configuration the run was started with.

        Raises:
            CheckpointError: no run is here.
        """
        if not self.exists:
            raise CheckpointError(f"{self.path} is not a run folder: it has no {CONFIG}. Make one with `sibra-dist train`")
        return load_config(TrainConfig, self.path / CONFIG)

    def load_best(self, dataset: Dataset, device: torch.device) -> tuple[Recommender, int]:
        """The model at its best validation metric, ready to evaluate, and the epoch that was.

        Raises:
            CheckpointError: there is none, it is damaged, or it was made from another dataset.
        """
        checkpoint = load_newest(self.best, dataset.manifest.digest)
        if checkpoint is None:
            raise CheckpointError(
                f"{self.path} holds no trained model yet. Continue it with `sibra-dist train --resume {self.path}`"
            )
        config = self.config()
        model = build_model(config.model, dataset, config.seed)
        checkpoint.restore(model)
        return model.to(device).eval(), checkpoint.position.epoch

    def metrics(self) -> list[dict[str, Any]]:
        """The evaluations so far, in order."""
        path = self.path / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}. Remove it: training will go on without its history") from error

    def record(self, metrics: dict[str, Any]) -> None:
        """Add an evaluation; what an interrupted run recorded beyond its last checkpoint is replaced."""
        lines = [line for line in self.metrics() if line["steps"] < metrics["steps"]]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, metrics])
        write_atomically(self.path / "metrics.jsonl", text.encode())

    def evaluation(self, split: str) -> Path:
        """Folder of the evaluation of a split."""
        return self.path / "evaluation" / split


def open_run(path: str | Path, dataset: str | None = None, cache: Path | None = None) -> tuple[RunFolder, TrainConfig, Dataset]:
    """A run, its configuration, and its dataset (or the copy in another folder `dataset`).

    Raises:
        CheckpointError: no run is there, or it was started with a dataset of other content.
    """
    run = RunFolder(path)
    config = run.config()
    opened = open_dataset(dataset or config.dataset, cache)
    try:
        made_from = json.loads((run.path / "environment.json").read_text())["dataset"]["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run.path / 'environment.json'} cannot be read: {error}. Copy the run again") from error
    if made_from != opened.manifest.digest:
        raise CheckpointError(
            f"{path} was made from another dataset ({made_from[:12]}) than {opened.place} ({opened.manifest.digest[:12]}). "
            "Give the dataset it was trained on, or start a new run"
        )
    return run, config, opened


def environment(dataset: Dataset) -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    return {
        "sibra-dist": __version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "dataset": {"name": dataset.manifest.name, "digest": dataset.manifest.digest},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The git commit of a source checkout, marked when files differ from it."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return described.stdout.strip() or None
