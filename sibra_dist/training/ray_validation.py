"""Evaluates candidates on a Ray cluster, apart from the workers that train.

The driver has an actor for it, which gets its processor or GPU before the workers get theirs, and outlives them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch

from sibra_dist.config import to_plain
from sibra_dist.errors import TrainingError
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.validation import CandidateEvaluator, Found


@contextmanager
def evaluator(run: RunFolder, config: TrainConfig, device: torch.device) -> Iterator[Any]:
    """An actor that is a `CandidateEvaluator`, inside.

    When it dies it is started again and asked again, up to `training.max_failures` times a candidate.

    Args:
        run: whose candidates it evaluates.
        config: of the run.
        device: that it asks the cluster for.
    """
    gpus = int(device.type == "cuda")
    options = {"num_gpus": gpus, "num_cpus": 1 - gpus, "max_restarts": -1, "max_task_retries": config.training.max_failures}
    remote: Any = ray.remote(CandidateEvaluator)
    actor = remote.options(**options).remote(str(run.place), to_plain(config), device.type)
    try:
        ray.get(actor.__ray_ready__.remote())
        yield actor
    finally:
        ray.kill(actor)


class ActorValidator:
    """A validator that asks an actor."""

    def __init__(self, actor: Any) -> None:
        """Prepare to ask an actor that `evaluator` has made."""
        self._actor = actor
        self._asked: Any = None

    def start(self, name: str) -> None:
        """Ask for a candidate."""
        self._asked = self._actor.evaluate.remote(name)

    def poll(self, seconds: float) -> Found | None:
        """What was found, or an error if the actor has died too often, or has found what it does not know."""
        try:
            found: Found = ray.get(self._asked, timeout=seconds)
            return found
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[-300:]
            return TrainingError(
                f"the worker that evaluates apart has failed: {reason}. Continue the run with `sibra-dist train --resume`"
            )

    def close(self) -> None:
        """Forget what was asked; the actor ends with the training."""
        self._asked = None
