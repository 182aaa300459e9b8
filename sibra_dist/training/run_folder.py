"""A run's folder, on any file system: what was asked, where it ran, what came out.

<run>/
  config.yaml         the resolved configuration
  environment.json    versions, git commit, hardware, dataset digest
  metrics.jsonl       a line an evaluation
  checkpoints/        the newest few; see `sibra_dist.training.checkpoint`
  best/               the model at its best validation metric, for each checkpoint that is kept
  profile/            traces and phases, if a profile was asked for
  stop                asks the run to stop, and is removed when it has
  evaluation/<split>/ metrics.json and users.parquet, written by `sibra-dist evaluate`
"""

import json
import logging
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sibra_dist import __version__
from sibra_dist.config import parse_config, to_yaml
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError
from sibra_dist.models import build_model
from sibra_dist.models.base import Recommender
from sibra_dist.training.checkpoint import ALONE, divided_tables, load_best, step_of
from sibra_dist.training.checks import require_served
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.placement import table_layout
from sibra_dist.training.ranks import Ranks

logger = logging.getLogger("sibra_dist")

CONFIG = "config.yaml"
PACKAGES = ("torch", "numpy", "pyarrow", "torchmetrics", "ray", "pyspark")


@dataclass(frozen=True)
class RunFile:
    """A small file of a run, on any file system; its methods, named as those of a `Path`, raise `OSError`."""

    folder: Place
    name: str

    def __str__(self) -> str:
        return str(self.folder / self.name)

    def exists(self) -> bool:
        """Whether it is there."""
        return self.folder.status(self.name) is not None

    def read_text(self) -> str:
        """Its content."""
        return self.folder.read(self.name).decode()

    def write_text(self, text: str) -> None:
        """Replace its content, as a whole."""
        self.folder.write(self.name, text.encode())

    def unlink(self) -> None:
        """Delete it, if it is there."""
        self.folder.delete([self.name])


class RunFolder:
    """Places and small files of one run."""

    def __init__(self, path: str | Path | Place) -> None:
        """The run at a path or URI, which may not exist yet."""
        self.place = Place.at(path)
        self.name = str(self.place) if "://" in str(path) else str(Path(str(path)))
        """As it was given, for messages"""
        self.checkpoints = self.place / "checkpoints"
        self.best = self.place / "best"
        self.profile = self.place / "profile"
        self.progress = RunFile(self.place, "progress.json")
        self.stop = RunFile(self.place, "stop")
        self._config = RunFile(self.place, CONFIG)
        self._environment = RunFile(self.place, "environment.json")
        self._metrics = RunFile(self.place, "metrics.jsonl")
        self._unwritten: list[dict[str, Any]] = []

    @property
    def path(self) -> Path:
        """The folder, where it is one of this machine; `ValueError` where it is not."""
        return self.place.path

    @property
    def exists(self) -> bool:
        """Whether a run was started here.

        Raises:
            CheckpointError: that cannot be found out.
        """
        try:
            return self._config.exists()
        except OSError as error:
            raise CheckpointError(f"the run {self.name} cannot be reached: {error}") from error

    def create(self, config: TrainConfig, dataset: Dataset) -> None:
        """Start the folder. Its configuration is written last, so that its presence means a run.

        Raises:
            CheckpointError: a run is there already, or the folder cannot be written.
            ConfigError: the model cannot be built for this dataset, or the dataset or the model lacks what the configuration
                asks of it; then no folder is left behind.
        """
        if self.exists:
            raise CheckpointError(
                f"{self.name} holds a run already. Continue it with --resume {self.name}, or choose another --to"
            )
        with torch.device("meta"):  # parameters without memory
            model = build_model(config.model, dataset, config.seed)
        require_served(config, dataset, model)
        try:
            self._environment.write_text(json.dumps(environment(dataset), indent=2) + "\n")
            self._config.write_text(to_yaml(config))
        except OSError as error:
            raise CheckpointError(f"the run folder {self.name} cannot be written: {error}") from error

    def config(self) -> TrainConfig:
        """The configuration the run was started with.

        Raises:
            CheckpointError: no run is here.
        """
        if not self.exists:
            raise CheckpointError(f"{self.name} is not a run folder: it has no {CONFIG}. Make one with `sibra-dist train`")
        try:
            return parse_config(TrainConfig, self._config.read_text(), f"{self.name}/{CONFIG}")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.name}/{CONFIG} cannot be read: {error}") from error

    def dataset_digest(self) -> str:
        """Digest of the dataset that the run was started with.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            digest: str = json.loads(self._environment.read_text())["dataset"]["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._environment} cannot be read: {error}. Copy the run again") from error
        return digest

    def load_best(self, dataset: Dataset, device: torch.device, ranks: Ranks = ALONE) -> tuple[Recommender, int]:
        """The model at its best validation metric, ready to evaluate, and the epoch that was; see `load_named_best`."""
        model, name = self.load_named_best(dataset, device, ranks)
        return model, step_of(name)[0]

    def load_named_best(self, dataset: Dataset, device: torch.device, ranks: Ranks = ALONE) -> tuple[Recommender, str]:
        """The model at its best validation metric, ready to evaluate, and its name, which no other training's model has.

        Raises:
            CheckpointError: there is none, it is damaged, or it was made from another dataset.
        """
        config = self.config()
        model = build_model(config.model, dataset, config.seed, table_layout(config.training, ranks))
        checkpoint = load_best(self.checkpoints, self.best, dataset.manifest.digest, ranks, divided_tables(model))
        if checkpoint is None:
            raise CheckpointError(
                f"{self.name} holds no trained model yet. Continue it with `sibra-dist train --resume {self.name}`"
            )
        checkpoint.restore(model)
        return model.to(device).eval(), checkpoint.name

    def metrics(self) -> list[dict[str, Any]]:
        """The evaluations so far, in order.

        Raises:
            CheckpointError: they cannot be read.
        """
        try:
            return self._recorded()
        except OSError as error:
            raise CheckpointError(f"the evaluations of {self.name} cannot be read: {error}") from error

    def record(self, metrics: dict[str, Any]) -> None:
        """Add an evaluation; what an interrupted run recorded beyond its last checkpoint is replaced.

        Where that is not possible, which is told, it is added together with the next one.
        """
        self._unwritten = [line for line in self._unwritten if line["steps"] < metrics["steps"]] + [metrics]
        try:
            lines = [line for line in self._recorded() if line["steps"] < self._unwritten[0]["steps"]]
            self._metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *self._unwritten]))
            self._unwritten = []
        except OSError as error:
            logger.warning("the evaluation could not be recorded: %s; it is tried again with the next one", error)

    def _recorded(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self._metrics.read_text().splitlines()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise CheckpointError(
                f"{self._metrics} is damaged: {error}. Remove it: training will go on without its history"
            ) from error

    def evaluation(self, split: str) -> Place:
        """Folder of the evaluation of a split."""
        return self.place / "evaluation" / split


def open_run(
    path: str | Path | Place, dataset: str | None = None, cache: Path | None = None
) -> tuple[RunFolder, TrainConfig, Dataset]:
    """A run, its configuration, and its dataset (or the copy in another folder `dataset`).

    Raises:
        CheckpointError: no run is there, or it was started with a dataset of other content.
    """
    run = RunFolder(path)
    config = run.config()
    opened = open_dataset(dataset or config.dataset, cache)
    made_from = run.dataset_digest()
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
