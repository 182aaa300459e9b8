"""Where training stands, and what early stopping makes of an evaluation."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Candidate:
    """A model that is being evaluated: where training stood, and what is recorded of it beside its metrics."""

    name: str
    """Of its files among the best models, where it is evaluated apart from the ranks"""
    epoch: int
    steps: int
    """Since the beginning of the run"""
    loss: float | None
    """Mean of the epoch so far; None: the model is not trained"""
    examples_per_second: int

    def line(self, found: dict[str, float]) -> dict[str, float]:
        """What is told of it, with the metrics that were found."""
        loss = {} if self.loss is None else {"loss": self.loss}
        return {"epoch": self.epoch, "steps": self.steps, **loss, **found}


@dataclass(frozen=True)
class Position:
    """Where training stands: `step` steps of `epoch` are done, and this is what early stopping remembers."""

    epoch: int = 0
    step: int = 0
    best: float | None = None
    """Best value of the monitored metric so far"""
    best_epoch: int = -1
    evaluations_since_best: int = 0
    evaluated: int | None = None
    """Steps, since the beginning of the run, after which a model was last evaluated, or given to be"""
    candidate: Candidate | None = None
    """That model, until it is judged"""
    finished: bool = False

    @property
    def name(self) -> str:
        """The first part of the name of a checkpoint at this position."""
        return f"epoch-{self.epoch:04d}-step-{self.step:08d}"

    def judged(self, value: float, patience: int) -> "Position":
        """After its candidate was found to have this value of the monitored metric.

        If it is the best so far, no evaluations have been made since the best. The first of equals is. Training is finished
        when there have been `patience` evaluations since, if that is above 0.
        """
        assert self.candidate is not None
        position = replace(self, candidate=None)
        if self.best is None or value > self.best:
            return replace(position, best=value, best_epoch=self.candidate.epoch, evaluations_since_best=0)
        since = self.evaluations_since_best + 1
        return replace(position, evaluations_since_best=since, finished=self.finished or 0 < patience <= since)
