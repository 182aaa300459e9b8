"""The training loop. It knows torch.distributed, and neither Ray nor Spark.

Started as one process it trains alone; where torch.distributed is set up, it trains data-parallel. What a step sees is a
function of (seed, epoch, step), so a run that resumes from a checkpoint sees just what it would have seen.
"""

import logging
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from sibra_dist.config import to_plain
from sibra_dist.data.batches import TrainBatch
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.transfer import to_device
from sibra_dist.errors import TrainingError, TrainingStopped
from sibra_dist.models import build_model
from sibra_dist.models.sharing import summed_together
from sibra_dist.phases import phase
from sibra_dist.training.batching import batch_losses, example_told, hardest, make_batches
from sibra_dist.training.checkpoint import divided_tables, load_newest, state_of
from sibra_dist.training.checks import require_served
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.judging import Judge
from sibra_dist.training.optimization import Optimization
from sibra_dist.training.placement import keep_freed_memory, pick_device, place, spare_device, table_layout
from sibra_dist.training.position import Candidate, Position
from sibra_dist.training.profiling import TrainingProfile
from sibra_dist.training.progress import Callbacks, Meter, Progress
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.reading import Part, Reader, Step
from sibra_dist.training.requests import Requests
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.saver import Saver
from sibra_dist.training.stopping import StopRequest
from sibra_dist.training.validation import ProcessValidator, Validator
from sibra_dist.training.watch import Watch
from sibra_dist.training.whereabouts import Whereabouts

logger = logging.getLogger("sibra_dist")

LOOKING_STEPS = {"cpu": 1, "cuda": 50}
"""Steps between two looks at what the device has found: a GPU's work is not waited for in each."""


class Trainer:
    """One run of training, on one rank."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        run: RunFolder,
        callbacks: Callbacks | None = None,
        device: torch.device | None = None,
        *,
        profile: bool = False,
        stop: StopRequest | None = None,
        validator: Validator | None = None,
    ) -> None:
        """Build the model, or continue from the run's newest checkpoint.

        Args:
            config: what is trained, and how.
            dataset: what is trained on.
            run: where everything is kept.
            callbacks: what is told of.
            device: that trains; None: as the configuration says.
            profile: whether some steps and an evaluation are profiled, in the run's folder.
            stop: looked at between steps.
            validator: evaluates if that is done apart from the ranks; None: a process of this machine.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
            TrainingError: the dataset has no training interactions.
            ConfigError: the model cannot be built for this dataset, or the dataset or the model lacks what the configuration
                asks of it.
        """
        self.settings, self.config = config, config.training
        self.run = run
        self.callbacks = callbacks or Callbacks()
        self.stop = StopRequest() if stop is None else stop
        self.ranks = Ranks.current()
        self.whereabouts = Whereabouts(self.ranks, self.config.rank_timeout)
        self.device = device or pick_device(self.config.device)
        keep_freed_memory(self.device)
        self.dataset = place(dataset, self.device, self.config.data_device)
        self.model = build_model(config.model, self.dataset, config.seed, table_layout(self.config, self.ranks)).to(self.device)
        self.profile = TrainingProfile(run.profile, self.device) if profile and self.ranks.leads else None
        require_served(config, self.dataset, self.model)
        self.epochs = self.config.epochs if self.model.trainable else 0
        if self.epochs:
            self.batches = make_batches(config, self.dataset, self.model, self.ranks)
            if not self.batches.num_examples:
                raise TrainingError(f"{dataset.place} has no training interactions: there is nothing to learn from")
            if self.ranks.leads and self.batches.warning is not None:
                logger.warning(self.batches.warning)
            if self.config.compile:
                self.model.compile_layers()
            ahead = self.device.type == "cuda" if self.config.read_ahead is None else self.config.read_ahead
            self.reader = Reader(
                *(self.batches, self.model, self.device, self.config.accumulate),
                together=self.config.sampler.pool is None,
                ahead=ahead and not profile,
            )
            self.optimization = Optimization(self.config, self.model, self.batches.steps_per_epoch, self.ranks)
            self.losses = torch.zeros(self.batches.steps_per_epoch, device=self.device)
            self._new_watch()
        self.apart, self.validator = self.config.evaluate_on == "apart", None
        if self.apart and self.ranks.leads:
            self.validator = validator or ProcessValidator(run, config, spare_device(self.device))
        with self.whereabouts.telling():
            self.position, self.saver = self._resume()
        shared = (self.dataset, self.device, run, self.ranks, self.whereabouts)
        self.judge = Judge(config, *shared, self.saver, self.profile, self.validator)
        self.requests = Requests(self.ranks, self.stop, self.callbacks, self.config.checkpoint_minutes)
        self._meter = Meter(self.config.batch_size)

    def fit(self) -> Position:
        """Train until the epochs are done or early stopping says so.

        Raises:
            TrainingStopped: it was asked to stop, and has written a checkpoint.
            TrainingError: the loss or a gradient is not finite.
            RankTimeoutError: another rank did not take part in time.
        """
        with self.whereabouts.telling(), ExitStack() as stack:
            if self.validator is not None:
                stack.callback(self.validator.close)
                if self.position.candidate is not None:
                    self.validator.start(self.position.candidate.name)
            stack.callback(self.saver.close)
            while not self.position.finished:
                if self.position.epoch < self.epochs:
                    self._train_epoch()
                if not self.position.finished:
                    self._end_epoch()
            self.saver.wait()
        return self.position

    @property
    def steps_done(self) -> int:
        """Since the beginning of the run."""
        return self.position.epoch * self.batches.steps_per_epoch + self.position.step if self.epochs else 0

    def _train_epoch(self) -> None:
        epoch, first = self.position.epoch, self.position.step
        self._meter.start()
        self.model.train()
        self.optimization.clear()
        if 0 < first < self.batches.steps_per_epoch and self._is_due():
            # The checkpoint was written between this step and its evaluation.
            self._between_steps()
            if self.position.finished:
                return
        with closing(self.reader.epoch(epoch, first)) as steps:
            for step in range(first, self.batches.steps_per_epoch):
                is_last = step + 1 == self.batches.steps_per_epoch
                if self.profile is not None:
                    self.profile.before_step()
                self.whereabouts.note("batch", epoch, step)
                self._step(next(steps), step)
                if self.profile is not None:
                    self.profile.after_step(is_last)
                looks = is_last or (step + 1) % LOOKING_STEPS[self.device.type] == 0
                if looks:
                    self._require_finite()
                if self.callbacks.stepped is not None:
                    self.callbacks.stepped(epoch, step, float(self.losses[step]))
                if looks:
                    self._heed()
                if self._meter.step():
                    self._report()
                if not is_last:
                    self._between_steps()
                    if self.position.finished:
                        return

    def _step(self, read: Step, step: int) -> None:
        """One optimisation step.

        Each rank divides by the weight of the *global* batch, so the sum over ranks is the mean over all examples.
        """
        self.whereabouts.note("compute", self.position.epoch, step)
        of_examples, of_parts = [], []
        with summed_together(read.together):
            for part in read.parts:
                losses = self._losses(part)
                loss = (losses * part.batch.weights).sum() / part.batch.total_weight
                with phase("backward"):
                    loss.backward()
                of_examples.append(losses.detach())
                of_parts.append(loss.detach())
        with phase("communicate"):
            self.whereabouts.note("communicate", self.position.epoch, step)
            loss = torch.stack(of_parts).sum()
            values = self.ranks.reduce_step(self.model, torch.cat([loss[None], self.requests.mine(loss)]))
            loss = values[0]
            self.requests.hear(values[1:])
        with phase("optimise"):
            norms = self.optimization.step(self.steps_done)
            self.watch.note(step, torch.cat(of_examples), loss, norms)
            self.optimization.clear()
        self.losses[step] = loss
        self.position = replace(self.position, step=step + 1)

    def _heed(self) -> None:
        """Do what any rank was asked to do, on all of them."""
        stops, saves = self.requests.heed()
        if stops:
            self._stop()
        if saves:
            self._save_checkpoint()

    def _losses(self, part: Part) -> Tensor:
        """The losses of the examples of a part, float32 [B]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            if self.config.sampler.pool is not None and isinstance(part.batch, TrainBatch):
                part = self._with_hardest(part, part.batch)
            with phase("encode"):
                output = self.model.step(part.batch, part.read)
        with phase("score"):
            losses = batch_losses(self.config.loss, part.batch, output.scores.float())
            for auxiliary in output.auxiliary_losses.values():
                losses = losses + auxiliary
        return losses

    def _with_hardest(self, part: Part, batch: TrainBatch) -> Part:
        with phase("negatives"), torch.no_grad():
            kept = hardest(self.model, batch, part.read, self.config.negatives)
            return Part(kept, to_device(self.model.read(to_device(kept, self.dataset.device)), self.device))

    def _between_steps(self) -> None:
        """Evaluate and save where it is time to, within an epoch."""
        if self._is_due():
            self._require_finite()
            self._evaluate_at(self.position.epoch, self.position.step, float(self.losses[: self.position.step].mean()))
            self.model.train()
        elif self.config.checkpoint_every > 0 and self.position.step % self.config.checkpoint_every == 0:
            self._save_checkpoint()

    def _is_due(self) -> bool:
        """Whether an evaluation by steps is, and has not been made or begun."""
        every = self.config.evaluate_every_steps
        return every is not None and self.steps_done % every == 0 and self.position.evaluated != self.steps_done

    def _end_epoch(self) -> None:
        """Evaluate when it is time, and save."""
        loss, epoch = None, self.position.epoch
        if epoch < self.epochs:
            self._require_finite()
            loss = float(self.losses.mean())
            self._new_watch()
            epoch += 1
        due = epoch % self.config.evaluate_every == 0 if self.config.evaluate_every_steps is None else self._is_due()
        if due or epoch == self.epochs:
            self._evaluate_at(epoch, 0, loss)
        else:
            self.position = replace(self.position, epoch=epoch, step=0)
            self._save_checkpoint()
        if self.epochs:
            self._report()

    def _evaluate_at(self, epoch: int, step: int, loss: float | None) -> None:
        """Judge what was found of the candidate, if there is one; let the model be the next; move on to here, and save.

        If the run is asked to stop while it waits, it has not moved on, and does all this when it resumes. With a candidate at
        the end of the last epoch, training is finished when it is judged.
        """
        began, lines, is_best = time.monotonic(), [], False
        if self.position.candidate is not None:
            lines.append(self._judge(self.judge.wait(self.position, self.stop)))
        self.position = replace(self.position, epoch=epoch, step=step)
        if not self.position.finished and self.position.evaluated != self.steps_done:
            name, steps = self.saver.name(self.position), self.steps_done
            candidate = Candidate(name, epoch, steps, loss, round(self._meter.rate))
            self.position = replace(self.position, evaluated=steps, candidate=candidate)
            if not self.apart:
                lines.append(self._judge(self.judge.evaluate(self.model, self.position)))
                is_best = self.position.evaluations_since_best == 0
        is_last = epoch == self.epochs and self.position.candidate is None
        self.position = replace(self.position, finished=self.position.finished or is_last)
        self._meter.pause(began)
        self._save_checkpoint(is_best=is_best)
        for line in lines:
            self.callbacks.evaluated(line)

    def _judge(self, found: dict[str, float] | None) -> dict[str, float]:
        """Judge the candidate by what was found of it, or stop where that is None; returns what is told."""
        if found is None:
            self._stop()
        self.position, line = self.judge.judge(self.position, found)
        return line

    def _resume(self) -> tuple[Position, Saver]:
        """Continue from the newest checkpoint, if there is one."""
        digest = self.dataset.manifest.digest
        tables = divided_tables(self.model)
        checkpoint = load_newest(self.run.checkpoints, digest, self.ranks, tables)
        saver = Saver(
            self.run.checkpoints,
            self.run.best,
            digest,
            to_plain(self.settings),
            keep=self.config.keep_checkpoints,
            best_name=checkpoint.best if checkpoint else None,
            ranks=self.ranks,
            tables=tables,
            timeout=self.config.rank_timeout,
            published=self.validator.start if self.validator is not None else lambda name: None,
        )
        if checkpoint is None:
            return Position(), saver
        checkpoint.restore(self.model, self.optimization.optimizer if self.epochs else None)
        if self.epochs:
            losses = checkpoint.tensors["losses"]
            self.losses[: len(losses)] = losses
        return checkpoint.position, saver

    def _save_checkpoint(self, *, is_best: bool = False, is_last: bool = False) -> None:
        """Begin to write what is needed to continue from here, and the model apart if it is the best."""
        if self.epochs:
            self._require_finite()
        self.requests.saved()
        with phase("checkpoint"):
            self.whereabouts.note("checkpoint", self.position.epoch, self.position.step)
            state = state_of(self.model)
            if self.epochs:
                state = state_of(self.model, self.optimization.optimizer, self.losses[: self.position.step])
            self.saver.save(self.position, state, is_best=is_best, is_last=is_last or self.position.finished)

    def _stop(self) -> NoReturn:
        self._save_checkpoint(is_last=True)
        self.saver.wait()
        if self.ranks.leads:
            with suppress(OSError):  # else it is when the run goes on
                self.run.stop.unlink()
        raise TrainingStopped(
            f"training was asked to stop and has stopped after step {self.position.step} of epoch {self.position.epoch}. "
            f"Continue it with `sibra-dist train --resume {self.run.name}`"
        )

    def _new_watch(self) -> None:
        self.watch = Watch(len(self.optimization.names), self.device)

    def _require_finite(self) -> None:
        """Stop where something is not finite, before it is saved. Ranks find it in the same step, as they share the sums."""
        found = self.watch.found()
        if found is None:
            return
        mine = None
        if found.example >= 0:
            parts = [self.batches.batch(self.position.epoch, found.step, part) for part in range(self.config.accumulate)]
            told = example_told(parts, self.dataset, found.example)
            mine = f"{told} (example {found.example} of rank {self.ranks.rank})"
        where = next(filter(None, self.ranks.gather(mine)), "no single example")
        raise found.error(self.position.epoch, where, self.optimization.names[found.parameter])

    def _report(self) -> None:
        """Report progress."""
        if not self.ranks.leads:
            return
        epoch, step = self.position.epoch, self.position.step
        evaluated, metric = self.judge.latest
        examples_left = self.batches.num_examples * (self.epochs - epoch) - step * self.config.batch_size
        self.callbacks.progress(
            Progress(
                epoch=min(epoch + 1, self.epochs),
                epochs=self.epochs,
                step=step,
                steps=self.batches.steps_per_epoch,
                loss=float(self.losses[: step or None].mean()),
                monitor=f"val/{self.config.monitor}",
                metric=metric,
                evaluated=evaluated / self.batches.steps_per_epoch,
                best=self.position.best,
                examples_per_second=self._meter.rate,
                seconds_left=max(examples_left, 0) / max(self._meter.rate, 1e-9),
            )
        )
