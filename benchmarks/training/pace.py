"""Times the steps of a training. Of the standard library only: peers in environments of their own use it too."""

import statistics
import time
from typing import Any

from benchmarks.contender import rates

WARM_UP = 2
"""Steps before the timed ones."""
LEAST = 3
"""Steps that are timed, even when each takes longer than the time there is."""


class Pace:
    """Times steps until they have taken so many seconds."""

    def __init__(self, seconds: float) -> None:
        """Prepare; the first steps warm up, and are not timed."""
        self._seconds = seconds
        self._steps: list[tuple[float, float, int]] = []
        self._warming = WARM_UP
        self.rest()

    def rest(self) -> None:
        """What has happened since the last step belongs to none."""
        self._last = time.perf_counter(), time.process_time()

    def step(self, positives: int) -> bool:
        """A step on so many positives is done; whether that is enough."""
        wall, processor = self._last
        self.rest()
        if self._warming:
            self._warming -= 1
        else:
            self._steps.append((self._last[0] - wall, self._last[1] - processor, positives))
        return len(self._steps) >= LEAST and self._wall() >= self._seconds

    def result(self) -> dict[str, Any]:
        """What the steps took, see `rates`."""
        wall, processor = self._wall(), sum(taken for _, taken, _ in self._steps)
        positives = sum(each for _, _, each in self._steps)
        median = statistics.median(taken for taken, _, _ in self._steps)
        return rates("positives", positives, wall, processor) | {"steps": len(self._steps), "step_seconds": median}

    def _wall(self) -> float:
        return sum(taken for taken, _, _ in self._steps)
