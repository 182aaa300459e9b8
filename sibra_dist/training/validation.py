"""Evaluation of a training's models apart from the ranks, which train on meanwhile.

When an evaluation falls due, the model is written beside the best models as the candidate; as soon as it can be read there, a
validator evaluates it. What is found counts when the next evaluation falls due, which waits for it if need be, so that no
result depends on who was faster. Checkpoints name the candidate: a run that resumes has it evaluated again.
"""

import logging
import multiprocessing
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch

from sibra_dist.config import to_plain, validate
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.errors import SibraError, TrainingError
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.models import build_model
from sibra_dist.models.base import Recommender
from sibra_dist.training.checkpoint import load_candidate
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.placement import place
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.stopping import StopRequest

logger = logging.getLogger("sibra_dist")

POLL_SECONDS = 1.0

Found = dict[str, float] | SibraError
"""Metrics `val/...`, or why there are none"""


def evaluate_model(config: TrainConfig, model: Recommender, dataset: Dataset, ranks: Ranks) -> dict[str, float]:
    """Metrics `val/...` of the validation split, the monitored one among them; where there are ranks, all call this.

    Args:
        config: the metrics, and what is hidden.
        model: in evaluation mode.
        dataset: what it was built for.
        ranks: which share out the users.
    """
    names = list(dict.fromkeys([*config.evaluation.names, config.training.monitor]))
    shared = (ranks.rank, ranks.world)
    result = evaluate(model, dataset, "validation", config.evaluation, names=names, seed=config.seed, ranks=shared)
    return {f"val/{name}": value for name, value in result.metrics.items()}


class CandidateEvaluator:
    """Evaluates candidates of one run, in whatever process; it keeps the dataset and the memory of the model."""

    def __init__(self, run: str, config: dict[str, Any], device: str) -> None:
        """Prepare for the run in a folder; nothing is read yet."""
        self._run, self._plain, self._device = RunFolder(run), config, torch.device(device)
        self._config: TrainConfig | None = None

    def evaluate(self, name: str) -> Found:
        """The metrics of a candidate, which is whole even where tables were divided over the ranks that trained it.

        An error that the user can put right is returned, so that it gets whole to whoever asks from another process.
        """
        try:
            if self._config is None:
                config = validate(TrainConfig, self._plain, where=self._run.name)
                self._dataset = place(open_dataset(config.dataset), self._device, config.training.data_device)
                self._model = build_model(config.model, self._dataset, config.seed).to(self._device).eval()
                self._config = config
            load_candidate(self._run.best, name, self._dataset.manifest.digest).restore(self._model)
            return evaluate_model(self._config, self._model, self._dataset, Ranks())
        except SibraError as error:
            return error


class Validator(Protocol):
    """Has candidates evaluated elsewhere, one at a time; rank 0 has it."""

    def start(self, name: str) -> None:
        """Begin with a candidate that can be read. May be called from any thread, when the one before is done with."""

    def poll(self, seconds: float) -> Found | None:
        """What was found; None if it is not known within so many seconds."""

    def close(self) -> None:
        """End, whatever is under way; may be called twice."""


class ProcessValidator:
    """A validator in a process of this machine, which ends with the one that started it."""

    def __init__(self, run: RunFolder, config: TrainConfig, device: torch.device) -> None:
        """Prepare; the process starts with the first candidate."""
        # As many threads as here: sums depend on how they are shared out.
        self._task = (str(run.place), to_plain(config), str(device), torch.get_num_threads())
        self._max_failures = config.training.max_failures
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._name, self._failures = "", 0

    def start(self, name: str) -> None:
        """Begin with a candidate; a process that has ended is replaced."""
        self._name, self._failures = name, 0
        self._send()

    def poll(self, seconds: float) -> Found | None:
        """What was found, or an error if the process has ended more often than `training.max_failures`."""
        assert self._process is not None
        assert self._pipe is not None
        try:
            if not self._pipe.poll(seconds):
                return None
            found: Found = self._pipe.recv()
            return found
        except (EOFError, ConnectionError):
            self._process.join()
        self._failures += 1
        ended = f"has ended {self._failures} times, now with code {self._process.exitcode}"
        told = f"the process that evaluates {self._name} {ended}"
        if 0 <= self._max_failures < self._failures:
            return TrainingError(
                f"{told}. Look at what it said, and whether this machine has memory for it. The run can be continued with "
                "`sibra-dist train --resume`; a run with training.evaluate_on ranks needs no such process"
            )
        logger.warning("%s; it is started again", told)
        self._send()
        return None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _send(self) -> None:
        if self._process is None or self._pipe is None or not self._process.is_alive():
            self.close()
            # Not forked: this process has threads, and perhaps a GPU.
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, *self._task), name="validator", daemon=True)
            self._process.start()
            theirs.close()
        with suppress(ConnectionError):  # it has just ended, as `poll` will find
            self._pipe.send(self._name)


def _serve(pipe: Connection, run: str, config: dict[str, Any], device: str, threads: int) -> None:
    """Evaluate what is asked for, in a process of its own, until whoever asks is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal it comes to all, and the one that trains ends this one
    torch.set_num_threads(threads)
    evaluator = CandidateEvaluator(run, config, device)
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send(evaluator.evaluate(pipe.recv()))


def awaited(validator: Validator | None, ranks: Ranks, stop: StopRequest) -> dict[str, float] | None:
    """What the validator of rank 0 finds, on every rank; all call this. None if one was asked to stop meanwhile.

    Raises:
        SibraError: what keeps it from being found, on every rank.
    """
    while True:
        # Ranks meet again and again, so none of them waits longer for the others than it may.
        met = ranks.gather((validator.poll(POLL_SECONDS) if validator is not None else None, bool(stop)))
        found = met[0][0]
        if isinstance(found, SibraError):
            raise found
        if found is not None:
            return found
        if any(asked for _, asked in met):
            return None
