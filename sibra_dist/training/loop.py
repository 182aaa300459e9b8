"""The training loop. It knows torch.distributed, and neither Ray nor Spark.

Started as one process it trains alone; where torch.distributed is set up, it trains data-parallel. What a step sees is a
function of (seed, epoch, step), so a run that resumes from a checkpoint sees just what it would have seen.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from sibra_dist.data.batches import TrainBatch
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.user_batches import AnyBatch
from sibra_dist.errors import TrainingError
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.models import build_model
from sibra_dist.models.base import Recommender
from sibra_dist.training.batching import batch_losses, make_batches
from sibra_dist.training.checkpoint import Position, load_newest, save_checkpoint
from sibra_dist.training.checks import require_served
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.ranks import Ranks, pick_device
from sibra_dist.training.run_folder import RunFolder

logger = logging.getLogger("sibra_dist")

PROGRESS_SECONDS = 0.5
FINITE_CHECK_STEPS = 100


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    monitor: str
    metric: float | None
    """Its latest value ..."""
    evaluated: int
    """... after so many epochs"""
    best: float | None
    examples_per_second: float
    seconds_left: float
    """Until the last epoch is done, were training not to stop early."""


@dataclass(frozen=True)
class Callbacks:
    """What the loop tells its surroundings. Progress goes to rank 0 only; the others are called on every rank."""

    progress: Callable[[Progress], None] = lambda progress: None
    evaluated: Callable[[dict[str, float]], None] = lambda metrics: None
    stepped: Callable[[int, int, float], None] | None = None
    """(epoch, step, loss of the global batch); reading the loss waits for the device."""


class Trainer:
    """One run of training, on one rank."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        run: RunFolder,
        callbacks: Callbacks | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Build the model, or continue from the run's newest checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
            TrainingError: the dataset has no training interactions.
            ConfigError: the model cannot be built for this dataset, or the dataset or the model lacks what the configuration
                asks of it.
        """
        self.config = config.training
        self.evaluation = config.evaluation
        self.seed = config.seed
        self.dataset = dataset
        self.run = run
        self.callbacks = callbacks or Callbacks()
        self.ranks = Ranks.current()
        self.device = device or pick_device(self.config.device)
        self.model = build_model(config.model, dataset, config.seed).to(self.device)
        require_served(config, dataset, self.model)
        self.epochs = self.config.epochs if self.model.trainable else 0
        if self.epochs:
            self.batches = make_batches(config, dataset, self.model, self.ranks, self.device)
            if not self.batches.num_examples:
                raise TrainingError(f"{dataset.place} has no training interactions: there is nothing to learn from")
            if self.ranks.leads and self.batches.warning is not None:
                logger.warning(self.batches.warning)
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
            )
            self.losses = torch.zeros(self.batches.steps_per_epoch, device=self.device)
        self.position = self._resume()
        self._told = time.monotonic()
        self._metric: float | None = None
        self._evaluated = 0
        self._rate = 0.0

    def fit(self) -> Position:
        """Train until the epochs are done or early stopping says so."""
        while not self.position.finished:
            if self.epochs:
                self._train_epoch()
            self._end_epoch()
        return self.position

    def _train_epoch(self) -> None:
        epoch, first = self.position.epoch, self.position.step
        started = time.monotonic()
        self.model.train()
        for step in range(first, self.batches.steps_per_epoch):
            self.losses[step] = self._step(self.batches.batch(epoch, step))
            self.position = replace(self.position, step=step + 1)
            if self.callbacks.stepped is not None:
                self.callbacks.stepped(epoch, step, float(self.losses[step]))
            if (step + 1) % FINITE_CHECK_STEPS == 0:
                self._require_finite()
            if self.config.checkpoint_every > 0 and (step + 1) % self.config.checkpoint_every == 0:
                self._save_checkpoint()
            self._tell(first, step + 1, started)

    def _step(self, batch: AnyBatch) -> torch.Tensor:
        """One optimisation step; returns the loss of the global batch.

        Each rank divides by the weight of the *global* batch, so the sum over ranks is the mean over all examples.
        """
        if self.config.sampler.pool is not None and isinstance(batch, TrainBatch):
            batch = hardest(self.model, batch, self.config.negatives)
        output = self.model(batch)
        losses = batch_losses(self.config.loss, batch, output.scores)
        for auxiliary in output.auxiliary_losses.values():
            losses = losses + auxiliary
        loss = (losses * batch.weights).sum() / batch.total_weight
        self.optimizer.zero_grad()
        loss.backward()
        loss = self.ranks.reduce_step(self.model, loss)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        return loss

    def _learning_rate(self) -> float:
        """Of the step that `position` names: a function of it alone, so that a resumed run needs no state for it."""
        if self.config.schedule == "constant":
            return self.config.learning_rate
        done = self.position.epoch * self.batches.steps_per_epoch + self.position.step
        return self.config.learning_rate * (1 + math.cos(math.pi * done / (self.epochs * self.batches.steps_per_epoch))) / 2

    def _end_epoch(self) -> None:
        """Evaluate when it is time, let early stopping decide, and save."""
        metrics: dict[str, float] = {}
        epoch = self.position.epoch
        if self.epochs:
            self._require_finite()
            metrics["loss"] = float(self.losses.mean())
            epoch += 1
        position = replace(self.position, epoch=epoch, step=0, finished=epoch >= self.epochs)
        if position.finished or epoch % self.config.evaluate_every == 0:
            metrics |= self._evaluate()
            value = self._metric = metrics[f"val/{self.config.monitor}"]
            self._evaluated = epoch
            if math.isnan(value):
                raise TrainingError(
                    f"no user of {self.dataset.place} holds anything out for validation: prepare it with such a split"
                )
            if position.best is None or value > position.best:
                position = replace(position, best=value, best_epoch=epoch, evaluations_since_best=0)
                if self.ranks.leads:
                    save_checkpoint(self.run.best, position, self.dataset.manifest.digest, self.model)
            else:
                position = replace(position, evaluations_since_best=position.evaluations_since_best + 1)
            out_of_patience = 0 < self.config.patience <= position.evaluations_since_best
            position = replace(position, finished=position.finished or out_of_patience)
            if self.ranks.leads:
                self.run.record({"epoch": epoch, **metrics, "examples_per_second": round(self._rate)})
        self.position = position
        if self.epochs:
            self._save_checkpoint()
            self._report(epoch, 0)
        if f"val/{self.config.monitor}" in metrics:
            self.callbacks.evaluated({"epoch": epoch, **metrics})

    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        names = list(dict.fromkeys([*self.evaluation.names, self.config.monitor]))
        ranks = (self.ranks.rank, self.ranks.world)
        result = evaluate(self.model, self.dataset, "validation", self.evaluation, names=names, seed=self.seed, ranks=ranks)
        return {f"val/{name}": value for name, value in result.metrics.items()}

    def _resume(self) -> Position:
        checkpoint = load_newest(self.run.checkpoints, self.dataset.manifest.digest)
        # All ranks must continue from one place, even if a file appeared while they were looking.
        found = checkpoint.position if checkpoint else Position()
        position = self.ranks.agree(found)
        if found != position:
            raise TrainingError(
                f"ranks see different checkpoints in {self.run.checkpoints}: it must lie on a disk that they share"
            )
        if checkpoint is not None:
            checkpoint.restore(self.model, self.optimizer)
            saved = checkpoint.tensors["losses"]
            if position.step and len(saved) == len(self.losses):
                self.losses.copy_(saved)
        return position

    def _save_checkpoint(self) -> None:
        self._require_finite()
        if self.ranks.leads:
            save_checkpoint(
                self.run.checkpoints,
                self.position,
                self.dataset.manifest.digest,
                self.model,
                self.optimizer,
                self.losses,
                self.config.keep_checkpoints,
            )

    def _require_finite(self) -> None:
        """Stop on a loss that is not finite, before anything is saved. All ranks hold the same losses."""
        wrong = torch.nonzero(~self.losses[: self.position.step].isfinite())
        if len(wrong):
            raise TrainingError(
                f"the loss of epoch {self.position.epoch}, step {int(wrong[0])} is not finite. "
                "Lower training.learning_rate, or look for extreme values in numeric features; the last checkpoint is kept"
            )

    def _tell(self, first: int, done: int, started: float) -> None:
        """Measure the speed and, at most twice a second, report progress."""
        now = time.monotonic()
        self._rate = (done - first) * self.config.batch_size / max(now - started, 1e-9)
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self._report(self.position.epoch, done)

    def _report(self, epoch: int, done: int) -> None:
        """Report progress: `done` steps of an epoch."""
        if not self.ranks.leads or not self.epochs:
            return
        examples_left = self.batches.num_examples * (self.epochs - epoch) - done * self.config.batch_size
        self.callbacks.progress(
            Progress(
                epoch=min(epoch + 1, self.epochs),
                epochs=self.epochs,
                step=done,
                steps=self.batches.steps_per_epoch,
                loss=float(self.losses[: done or None].mean()),
                monitor=f"val/{self.config.monitor}",
                metric=self._metric,
                evaluated=self._evaluated,
                best=self.position.best,
                examples_per_second=self._rate,
                seconds_left=max(examples_left, 0) / max(self._rate, 1e-9),
            )
        )


def hardest(model: Recommender, batch: TrainBatch, count: int) -> TrainBatch:
    """The batch with the `count` of its negatives that the model scores highest, as it is in evaluation mode.

    The batch's own key decides on dropout, so what is scored is what the step then trains, but for batch statistics.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        scores = model(batch).scores[:, 1:]
    model.train(was_training)
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    columns = F.pad(kept + 1, (1, 0))  # and the positive, which is column 0
    draws = batch.item_modalities.shape[-1]
    return replace(
        batch,
        items=batch.items.gather(1, columns),
        item_modalities=batch.item_modalities.gather(1, columns[..., None].expand(-1, -1, draws)),
        log_counts=batch.log_counts.gather(1, kept),
    )
