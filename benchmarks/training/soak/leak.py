"""Trains alone in this process, and samples its memory: `python -m ...leak RESULT STEPS FOLDER CONFIG [key=value]...`.

Without Ray and without other ranks, so that whatever grows is the loop's own.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.training.soak.memory import trend
from benchmarks.training.soak.processes import Sample, sample
from sibra_dist.config import load_config
from sibra_dist.data.dataset import open_dataset
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.run_folder import RunFolder

SAMPLES = 500
TIMES = 5
"""Memory after all steps is compared with that after one in so many."""
WINDOW = 0.02
"""Of all samples, those averaged at either time"""


class Enough(Exception):
    """All steps are done."""


def watch(config: TrainConfig, folder: Path, steps: int) -> list[Sample]:
    """Train for so many steps in a new run folder; the process's memory now and then."""
    dataset = open_dataset(config.dataset)
    run = RunFolder(folder)
    run.create(config, dataset)
    found: list[Sample] = []
    began, done, every = time.monotonic(), 0, max(steps // SAMPLES, 1)

    def stepped(epoch: int, step: int, loss: float) -> None:
        nonlocal done
        done += 1
        if done % every == 0 and (now := sample(os.getpid(), "alone", time.monotonic() - began, done)) is not None:
            found.append(now)
        if done >= steps:
            raise Enough

    try:
        Trainer(config, dataset, run, Callbacks(stepped=stepped)).fit()
    except Enough:
        return found
    raise SystemExit(f"training ended after {done} of {steps} steps: set more training.epochs")


def growth(samples: list[Sample]) -> dict[str, Any]:
    """The means around a fifth of the samples and at their end, and the trend between."""
    count = max(int(len(samples) * WINDOW), 1)
    middle = len(samples) // TIMES
    early, late = samples[max(middle - count, 0) : middle], samples[-count:]
    found = trend(samples, enough_steps=0)
    if found is None:
        raise SystemExit("there are too few steps to say anything")
    return {
        "steps": [early[-1].steps, late[-1].steps],
        "rss": [sum(one.rss for one in part) / len(part) for part in (early, late)],
        "private": [sum(one.private for one in part) / len(part) for part in (early, late)],
        "trend": asdict(found),
        "flat": found.is_flat,
    }


def main() -> None:
    """Run as a module."""
    result, steps, folder, name, *settings = sys.argv[1:]
    found = growth(watch(load_config(TrainConfig, name, settings), Path(folder), int(steps)))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
