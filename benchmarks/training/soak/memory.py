"""Whether memory grows: what a process held at most early and late in its life, and a straight line between.

Steps differ in size and a process keeps the memory that it frees, so its size moves in jumps, up to the most that a step, an
evaluation and a checkpoint need together. What leaks has no such end. So a process is called flat when in the last third of
its samples it never holds a hundredth more than it held in the first third. Lives of fewer than `ENOUGH` samples or
`ENOUGH_STEPS` steps after warm-up say nothing of that: of workers that are killed, the peaks of their lives are told.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.training.soak.processes import Sample

WARM_UP = 1 / 3
"""Of the samples of a process's life, those that the line leaves out: first copies, the optimizer's state."""
ENOUGH = 12
ENOUGH_STEPS = 5000
FLAT_SHARE = 0.01


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
    growth: float
    """The most that was resident in the last third of all samples, less the most in the first third"""

    @property
    def is_flat(self) -> bool:
        """By the criterion above; a process that shrinks is flat."""
        return self.growth <= FLAT_SHARE * self.mean


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
    third = len(told) // 3
    return Trend(
        role=warm[0].role,
        samples=len(warm),
        seconds=warm[-1].seconds - warm[0].seconds,
        steps=int(steps[-1] - steps[0]),
        mean=float(rss.mean()),
        mean_private=float(private.mean()),
        per_1000_steps=float(np.polyfit(steps, rss, 1)[0] * 1000),
        private_per_1000_steps=float(np.polyfit(steps, private, 1)[0] * 1000),
        growth=max(one.rss for one in told[-third:]) - max(one.rss for one in told[:third]),
    )
