"""Trains with the library's own loop, and notes when validation ndcg@10 first reaches each of some thresholds.

    python -m benchmarks.training.quality --seconds S --result FILE --thresholds T ... --seeds N ... -- CONFIG [SETTING ...]

The clock starts with the first step: imports and the opening of the dataset are left out, evaluations are not. Training ends
with its epochs, or once nothing is left to reach; `--seconds` is not read. It is done once with each seed, and what is told of
a threshold is the median of the seeds.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from benchmarks.contender import contender, peak_rss, tell
from sibra_dist.config import load_config
from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import TrainingStopped
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.stopping import StopRequest


class Curve:
    """What evaluations found, and when."""

    def __init__(self, monitor: str, enough: float = math.inf, stop: Callable[[], None] = lambda: None) -> None:
        """Follow a metric of validation; the clock starts with `start`. `stop` is called once the metric is `enough`."""
        self._enough, self._stop = enough, stop
        self._metric = f"val/{monitor}"
        self.points: list[tuple[float, int, float]] = []
        self.evaluating = 0.0

    def start(self) -> None:
        """Training begins."""
        self._started = self._stepped = time.perf_counter()

    def stepped(self, epoch: int, step: int, loss: float) -> None:
        """A step is done; an evaluation may follow."""
        self._stepped = time.perf_counter()

    def evaluated(self, metrics: dict[str, float]) -> None:
        """An evaluation is done."""
        now = time.perf_counter()
        self.evaluating += now - self._stepped
        self.points.append((now - self._started, int(metrics["steps"]), metrics[self._metric]))
        if metrics[self._metric] >= self._enough:
            self._stop()

    def reached(self, threshold: float) -> dict[str, float] | None:
        """`seconds` and `steps` until the metric was as high for the first time; None if it never was."""
        first = next((point for point in self.points if point[2] >= threshold), None)
        return None if first is None else {"seconds": first[0], "steps": first[1]}


def middle(found: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """The median, by time; None if that is one that was never there. Of an even number the later one."""
    return sorted(found, key=lambda one: math.inf if one is None else one["seconds"])[len(found) // 2]


def train(config: TrainConfig, enough: float) -> Curve:
    """Train once."""
    stop = StopRequest()
    curve = Curve(config.training.monitor, enough, stop.ask)
    callbacks = Callbacks(stepped=curve.stepped, evaluated=curve.evaluated)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, open_dataset(config.dataset), RunFolder(folder), callbacks, stop=stop)
        curve.start()
        with suppress(TrainingStopped):
            trainer.fit()
    return curve


def main() -> None:
    """Train with each seed."""
    parser = contender(__doc__)
    parser.add_argument("--thresholds", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    configs = [load_config(TrainConfig, arguments.config, [*arguments.settings, f"seed={seed}"]) for seed in arguments.seeds]
    curves = [train(config, max(arguments.thresholds)) for config in configs]
    told = {
        "best": [max(value for _, _, value in curve.points) for curve in curves],
        "reached": {f"{each:g}": middle([curve.reached(each) for curve in curves]) for each in arguments.thresholds},
        "evaluations": [len(curve.points) for curve in curves],
        "evaluating": statistics.median(curve.evaluating for curve in curves),
        "threads": torch.get_num_threads(),
        "peak_rss_mebibytes": peak_rss(),
    }
    tell(arguments.result, told)


if __name__ == "__main__":
    main()
