"""Trains with the library's own loop, on one process or on those that `torch.distributed.run` starts, and times its steps.

    python -m benchmarks.training.ours --seconds S --result FILE [--pin] CONFIG [SETTING ...]

Evaluations and checkpoints are left out: nothing is evaluated, and what happens between two epochs is not timed.
"""

import os
import tempfile
from pathlib import Path

import torch

from benchmarks.contender import contender, tell
from benchmarks.training.pace import Pace
from sibra_dist.config import load_config
from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import TrainingStopped
from sibra_dist.models.base import parameter_count
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.launch import process_group
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.stopping import StopRequest

NEVER = 10**9


class Watched:
    """A training whose steps are timed."""

    def __init__(self, config: TrainConfig, seconds: float, run: RunFolder) -> None:
        """Prepare to train with a configuration, in the folder of a run."""
        self.dataset = open_dataset(config.dataset)
        self._stop = StopRequest()
        self.trainer = Trainer(config, self.dataset, run, Callbacks(stepped=self._stepped), stop=self._stop)
        self._batch, self._pairs = config.training.batch_size, self.trainer.batches.num_examples
        self.pace = Pace(seconds)
        self.told: dict[str, object] = {}

    def train(self) -> None:
        """Until enough is timed."""
        try:
            self.trainer.fit()
        except TrainingStopped:
            return
        raise SystemExit("training ended before enough was timed")

    def _stepped(self, epoch: int, step: int, loss: float) -> None:
        if step == 0 and epoch > 0:
            self.pace.rest()
        elif self.pace.step(min(self._batch, self._pairs - step * self._batch)) and not self.told:
            self.told = self.pace.result()
            self._stop.ask()  # which also stops the other ranks, in the same step


def pin() -> None:
    """Give this process one core of those it may use: that of its number among the processes of this machine."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})


def main() -> None:
    """Train until enough is timed."""
    parser = contender(__doc__)
    parser.add_argument("--pin", action="store_true", help="every process to a core of its own")
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    if arguments.pin:
        pin()
    endless = (f"training.epochs={NEVER}", f"training.evaluate_every={NEVER}", "training.schedule=constant")
    config = load_config(TrainConfig, arguments.config, [*arguments.settings, *endless])
    with process_group(config.training) as ranks, tempfile.TemporaryDirectory() as folder:
        watched = Watched(config, arguments.seconds, RunFolder(ranks.agree(Path(folder))))
        watched.train()
        ranks.wait()  # the folder is rank 0's
        trainer = watched.trainer
        if ranks.leads:
            more = {
                "threads": torch.get_num_threads(),
                "ranks": ranks.world,
                "parameters": parameter_count(trainer.model),
                "steps_per_epoch": trainer.batches.steps_per_epoch,
            }
            tell(arguments.result, watched.told | more)


if __name__ == "__main__":
    main()
