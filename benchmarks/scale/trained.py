"""Trains in this process, and measures what it takes: `python -m benchmarks.scale.trained RESULT CONFIG [key=value]...`.

Of processes that `torch.distributed.run` has started to train together, what the first takes, which has the most to hold.

Private memory is looked at every few milliseconds, for the system keeps no peak of it. What the process itself needs, with
everything that is imported on the way, is taken away: it is what there is after a training of a tiny dataset.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from sibra_dist.config import load_config
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.synthetic import SyntheticConfig, synthesize
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.launch import process_group
from sibra_dist.training.loop import Trainer
from sibra_dist.training.memory import Memory, memory
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder

SECONDS = 0.005


class Watched:
    """The most private and mapped memory that was seen."""

    def __init__(self) -> None:
        """Begin with what there is."""
        self.first = self.now = memory()
        self.private, self.mapped = self.now.private, self.now.mapped
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look now and then while the block runs."""
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _look(self) -> None:
        while not self._ended.wait(SECONDS):
            now: Memory = memory()
            self.private, self.mapped = max(self.private, now.private), max(self.mapped, now.mapped)


def warm_up(config: TrainConfig, folder: Path, ranks: Ranks) -> None:
    """Train on hardly anything, so that what is loaded when it is first needed is there."""

    def make() -> None:
        synthesize(SyntheticConfig(users=100, items=100, interactions=500, missing=0), folder / "dataset")

    ranks.alone(make)
    dataset = open_dataset(folder / "dataset", folder / "cache")
    tiny = config.training.model_copy(update={"epochs": 1, "batch_size": 512, "evaluate_every_steps": None})
    config = config.model_copy(update={"dataset": str(folder / "dataset"), "training": tiny})
    run = RunFolder(folder / "run")
    ranks.alone(lambda: run.create(config, dataset))
    Trainer(config, dataset, run).fit()


class Enough(Exception):
    """What was to be measured has been."""


def train(config: TrainConfig, folder: Path, ranks: Ranks, *, once: bool = False) -> dict[str, Any]:
    """Train as the configuration says, in a folder, and say what it took.

    With `once` it is enough when the model has been evaluated for the first time. Seconds are of processor time.
    """
    dataset = open_dataset(config.dataset)
    run = RunFolder(folder / "run")
    ranks.alone(lambda: run.create(config, dataset))
    warm_up(config, folder / "tiny", ranks)
    watched, steps = Watched(), [time.thread_time()]

    def stepped(epoch: int, step: int, loss: float) -> None:
        steps.append(time.thread_time())

    def evaluated(metrics: dict[str, float]) -> None:
        if once:
            raise Enough

    with watched.watching(), suppress(Enough):
        trainer = Trainer(config, dataset, run, Callbacks(stepped=stepped, evaluated=evaluated))
        steps[0] = time.thread_time()
        trainer.fit()
    return {
        "before": watched.first.private,
        "private": watched.private - watched.first.private,
        "mapped": watched.mapped - watched.first.mapped,
        "peak_rss": memory().peak,
        "step_seconds": [later - earlier for earlier, later in pairwise(steps)],
    }


def main(result: str, config: str, *overrides: str) -> None:
    """Write what was measured to the file `result`, as JSON; the setting `once=true` is that of `train`."""
    once = "once=true" in overrides
    settings = load_config(TrainConfig, config, [override for override in overrides if override != "once=true"])
    with process_group(settings.training) as ranks, tempfile.TemporaryDirectory() as folder:
        measured = train(settings, Path(ranks.agree(folder)), ranks, once=once)
        if ranks.leads:
            Path(result).write_text(json.dumps(measured))
        ranks.wait()  # the folder is rank 0's


if __name__ == "__main__":
    main(*sys.argv[1:])
