"""Whether memory grows: a straight line through what was sampled once a process had warmed up.

A process is called flat when the line rises by no more than a hundredth of its mean over all that was sampled, or by no more
than twice the deviation of the samples from it (the copy that a checkpoint is written from comes and goes). A life of fewer
than `ENOUGH` samples or `ENOUGH_STEPS` steps after warm-up is too short for a line: of workers that are killed, the peaks of
their lives are compared, from the first to the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.training.soak.processes import Sample

WARM_UP = 1 / 3
"""Of the samples of a process's life, those left out: imports, the dataset's pages, the optimizer's state, the first copy."""
ENOUGH = 12
ENOUGH_STEPS = 1000
FLAT_SHARE = 0.01
FLAT_DEVIATIONS = 2.0


@dataclass(frozen=True)
class Trend:
    """How the memory of a process went, after warm-up. Sizes are in MiB."""

    role: str
    samples: int
    seconds: float
    steps: int
    """Of the run, from the first sample to the last"""
    mean: float
    mean_private: float
    per_1000_steps: float
    """Slope of the line through the resident sizes"""
    private_per_1000_steps: float
    """Of that through the private sizes"""
    rise: float
    """Of the line through the resident sizes, over all samples"""
    deviation: float
    """Standard deviation of the samples from it"""

    @property
    def is_flat(self) -> bool:
        """By the criterion above; a process that shrinks is flat."""
        return self.rise <= max(FLAT_SHARE * self.mean, FLAT_DEVIATIONS * self.deviation)


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """The trend of each process that lived long enough, in order of appearance."""
    return [found for life in _lives(samples) if (found := trend(life)) is not None]


def peaks(samples: Sequence[Sample], role: str) -> list[float]:
    """The highest resident size, in MiB, of each process of a role that has trained, in order of appearance."""
    lives = (life for life in _lives(samples) if life[0].role == role)
    return [max(one.rss for one in life) for life in lives if any(one.steps is not None for one in life)]


def _lives(samples: Sequence[Sample]) -> list[list[Sample]]:
    lives: dict[int, list[Sample]] = {}
    for one in samples:
        lives.setdefault(one.pid, []).append(one)
    return list(lives.values())


def trend(life: Sequence[Sample], enough_steps: int = ENOUGH_STEPS) -> Trend | None:
    """The trend of a process from its samples in order of time; None where they say nothing."""
    told = [one for one in life if one.steps is not None]
    warm = told[int(len(told) * WARM_UP) :]
    steps = np.array([one.steps for one in warm], float)
    if len(warm) < ENOUGH or steps[-1] - steps[0] < enough_steps:
        return None
    rss, private = (np.array([getattr(one, name) for one in warm]) for name in ("rss", "private"))
    slope, start = np.polyfit(steps, rss, 1)
    return Trend(
        role=warm[0].role,
        samples=len(warm),
        seconds=warm[-1].seconds - warm[0].seconds,
        steps=int(steps[-1] - steps[0]),
        mean=float(rss.mean()),
        mean_private=float(private.mean()),
        per_1000_steps=float(slope * 1000),
        private_per_1000_steps=float(np.polyfit(steps, private, 1)[0] * 1000),
        rise=float(slope * (steps.max() - steps.min())),
        deviation=float((rss - (slope * steps + start)).std()),
    )
