"""Has the models of a training evaluated, on its ranks or apart from them, and says what comes of it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from sibra_dist.data.dataset import Dataset
from sibra_dist.errors import TrainingError
from sibra_dist.models.base import Recommender
from sibra_dist.phases import phase
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.memory import highest, peak_memory
from sibra_dist.training.position import Position
from sibra_dist.training.profiling import TrainingProfile
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.saver import Saver
from sibra_dist.training.stopping import StopRequest
from sibra_dist.training.validation import Validator, awaited, evaluate_model
from sibra_dist.training.whereabouts import Whereabouts


class Judge:
    """Judges the candidates of one training; every rank has one, and all make the same calls."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        device: torch.device,
        run: RunFolder,
        ranks: Ranks,
        whereabouts: Whereabouts,
        saver: Saver,
        profile: TrainingProfile | None = None,
        validator: Validator | None = None,
    ) -> None:
        """Prepare to judge.

        Args:
            config: which metrics are found, and how long early stopping has patience.
            dataset: that is trained on.
            device: that trains.
            run: where evaluations are recorded.
            ranks: that train.
            whereabouts: are told.
            saver: names the best model.
            profile: takes an evaluation, or the wait for it.
            validator: of rank 0, where models are evaluated apart from the ranks.
        """
        self._config, self._dataset, self._device, self._run = config, dataset, device, run
        self._ranks, self._whereabouts, self._profile = ranks, whereabouts, profile
        self._saver, self._validator = saver, validator
        self.latest: tuple[int, float | None] = 0, None
        """Of the latest evaluation: steps that were done, and the monitored metric of the model after these"""

    def evaluate(self, model: Recommender, position: Position) -> dict[str, float]:
        """What the ranks find of a model, which is left in evaluation mode."""
        model.eval()
        with self._evaluating(position):
            return evaluate_model(self._config, model, self._dataset, self._ranks)

    def wait(self, position: Position, stop: StopRequest) -> dict[str, float] | None:
        """What the validator has found of the candidate, once it has; None if the run is asked to stop before."""
        self._saver.wait()
        with self._evaluating(position):
            return awaited(self._validator, self._ranks, stop)

    def judge(self, position: Position, found: dict[str, float]) -> tuple[Position, dict[str, float]]:
        """Where training stands once its candidate is judged by what was found of it, and the line that is recorded.

        Raises:
            TrainingError: the dataset has nothing to judge by.
        """
        candidate, value = position.candidate, found[f"val/{self._config.training.monitor}"]
        assert candidate is not None
        if math.isnan(value):
            raise TrainingError(
                f"no user of {self._dataset.place} holds anything out for validation: prepare it with such a split"
            )
        self.latest = candidate.steps, value
        line = candidate.line(found)
        peak = highest(self._ranks.gather(peak_memory(self._device)))
        recorded = {**line, "examples_per_second": candidate.examples_per_second, "memory": peak}
        self._ranks.alone(lambda: self._run.record(recorded))
        judged = position.judged(value, self._config.training.patience)
        if judged.evaluations_since_best == 0:
            self._saver.best = candidate.name
        return judged, line

    @contextmanager
    def _evaluating(self, position: Position) -> Iterator[None]:
        self._whereabouts.note("evaluate", position.epoch, position.step)
        with self._profile.evaluation() if self._profile is not None else nullcontext(), phase("evaluate"):
            yield
