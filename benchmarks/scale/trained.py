"""Trains in this process, and measures what it takes: `python -m benchmarks.scale.trained RESULT CONFIG [key=value]...`.

Private memory is looked at every few milliseconds, for the system keeps no peak of it. What was there once everything is
imported and the dataset is opened is taken away.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sibra_dist.config import load_config
from sibra_dist.data.dataset import open_dataset
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.loop import Trainer
from sibra_dist.training.memory import Memory, memory
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


def train(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train as the configuration says, in a folder, and say what it took."""
    dataset = open_dataset(config.dataset)
    run = RunFolder(folder)
    run.create(config, dataset)
    watched = Watched()
    began = time.perf_counter()
    steps: list[float] = []
    with watched.watching():
        trainer = Trainer(config, dataset, run)
        built = time.perf_counter()
        trainer.callbacks = trainer.callbacks.__class__(stepped=lambda *step: steps.append(time.perf_counter()))
        trainer.fit()
    return {
        "before": watched.first.private,
        "private": watched.private - watched.first.private,
        "mapped": watched.mapped - watched.first.mapped,
        "peak_rss": memory().peak,
        "build_seconds": built - began,
        "step_seconds": [later - earlier for earlier, later in zip([built, *steps], steps, strict=False)],
        "seconds": time.perf_counter() - began,
    }


def main(result: str, config: str, *overrides: str) -> None:
    """Write what was measured to the file `result`, as JSON."""
    settings = load_config(TrainConfig, config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        measured = train(settings, Path(folder) / "run")
    Path(result).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
