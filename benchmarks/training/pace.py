"""Times the steps of a training. Of the standard library only: peers in environments of their own use it too."""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

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
        """What the steps took, see `result`."""
        wall, processor = self._wall(), sum(taken for _, taken, _ in self._steps)
        positives = sum(each for _, _, each in self._steps)
        median = statistics.median(taken for taken, _, _ in self._steps)
        return result(positives, wall, processor) | {"steps": len(self._steps), "step_seconds": median}

    def _wall(self) -> float:
        return sum(taken for taken, _, _ in self._steps)


def result(positives: int, wall: float, processor: float) -> dict[str, Any]:
    """What so many positives took: seconds of the clock and of processors, and this process' peak RSS."""
    return {
        "positives_per_second": positives / wall,
        "positives_per_processor_second": positives / processor,
        "processors": processor / wall,
        "peak_rss_mebibytes": peak_rss(),
    }


def peak_rss() -> float:
    """MiB of this process that were in memory at most. `getrusage` would count the process that started it as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def contender(description: str | None) -> argparse.ArgumentParser:
    """The options of every measured program."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, required=True, help="at least so long, after the warm-up")
    parser.add_argument("--result", type=Path, required=True, help="the file that tells what came out")
    return parser


def tell(path: Path, result: dict[str, Any]) -> None:
    """Write what came out, whole or not at all."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(result))
    os.replace(scratch, path)
