"""Where a training runs: in this process, in several that were started to train together, or on workers of Ray.

Processes train together where `python -m torch.distributed.run` started them, or anything else that sets the same variables.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed

from sibra_dist.data.dataset import Dataset
from sibra_dist.errors import ConfigError
from sibra_dist.training.config import TrainConfig, TrainingConfig
from sibra_dist.training.loop import Trainer
from sibra_dist.training.placement import pick_device
from sibra_dist.training.progress import Callbacks, Progress
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.stopping import StopRequest, on_sigterm

LOCAL_SECONDS, REMOTE_SECONDS = 1.0, 10.0
"""Between two looks for a file on a disk, and in an object store."""
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Workers(NamedTuple):
    """How many workers of Ray there are: as many as the cluster has room for, between these bounds. 0: it is not used."""

    least: int
    most: int


def read_workers(text: str) -> Workers:
    """Read `4`, or `1:4`.

    Raises:
        ConfigError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"--workers {text}: give a number, or the least and the most, as in 1:4")
    workers = Workers(int(match[1]), int(match[2] or match[1]))
    if workers.least > workers.most or workers.least == 0 < workers.most:
        raise ConfigError(f"--workers {text}: the first number is at least 1 and at most the second, as in 1:4")
    return workers


def train_here(
    run: RunFolder,
    config: TrainConfig,
    dataset: Dataset,
    progress: Callable[[Progress], None] = lambda progress: None,
    *,
    profile: bool = False,
) -> None:
    """Train, or continue, the run in a folder in this process, as one of those that were started with it.

    SIGTERM to any of them makes all write a checkpoint and end.

    Raises:
        SibraError: see `Trainer`.
    """
    stop = stop_request(run)
    run.stop.unlink()
    with on_sigterm(stop.ask):
        Trainer(config, dataset, run, Callbacks(progress=progress), profile=profile, stop=stop).fit()


def stop_request(run: RunFolder) -> StopRequest:
    """That of this process, which is one of those that train a run: the first looks for the run's file `stop`."""
    if not Ranks.current().leads:
        return StopRequest()
    return StopRequest(run.stop.exists, LOCAL_SECONDS if run.place.is_local else REMOTE_SECONDS)


def launched() -> bool:
    """Whether this process was started as one of several that train together."""
    return all(name in os.environ for name in VARIABLES)


@contextmanager
def process_group(config: TrainingConfig) -> Iterator[Ranks]:
    """This process among those that were started with it, inside; alone where none were.

    Raises:
        ConfigError: the configuration wants a GPU, and there is none.
    """
    if not launched():
        yield Ranks.current()
        return
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Objects travel by way of main memory, with gloo, on any device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=config.rank_timeout))
    try:
        yield Ranks.current()
    finally:
        torch.distributed.destroy_process_group()
