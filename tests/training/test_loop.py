import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sibra_dist.data.batches import TrainBatch
from sibra_dist.data.dataset import Csr, open_dataset
from sibra_dist.errors import CheckpointError, TrainingError
from sibra_dist.models.base import StepOutput
from sibra_dist.training.batching import hardest
from sibra_dist.training.checkpoint import load_newest
from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run, read_evaluation
from sibra_dist.training.judging import Judge
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks, Progress
from sibra_dist.training.reading import Part, Step
from sibra_dist.training.run_folder import RunFolder
from tests.planted import write_planted
from tests.training.conftest import make_config


def start(folder: Path, dataset: Path, callbacks: Callbacks | None = None, **overrides: Any) -> Trainer:
    config = make_config(dataset, **overrides)
    run, opened = RunFolder(folder), open_dataset(dataset)
    if not run.exists:
        run.create(config, opened)
    return Trainer(config, opened, run, callbacks)


class Interrupted(Exception):
    """Stands for a process that dies."""


def interrupt_at(epoch: int, step: int) -> Callbacks:
    def stepped(at_epoch: int, at_step: int, loss: float) -> None:
        if (at_epoch, at_step) == (epoch, step):
            raise Interrupted

    return Callbacks(stepped=stepped)


def test_it_learns_the_planted_structure(planted: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", planted, training__epochs=15).fit()
    run = RunFolder(tmp_path / "run")
    learned = evaluate_run(run, EvaluationRequest()).metrics
    start(tmp_path / "random", planted, model={"type": "random"}).fit()
    chance = evaluate_run(RunFolder(tmp_path / "random"), EvaluationRequest()).metrics
    # A user's own group holds a quarter of the items: ten of them are about half of those not seen in training.
    assert learned["recall@10"] > 0.5
    assert learned["recall@10"] > 3 * chance["recall@10"]
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] < 0.65 * losses[0]


def test_hiding_every_modality_and_each_behaves(planted: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", planted, training__epochs=10).fit()
    run = RunFolder(tmp_path / "run")

    def recall(*hide: str) -> float:
        return evaluate_run(run, EvaluationRequest(hide=dict.fromkeys(hide, 1.0))).metrics["recall@10"]

    items = ("items.interactions", "items.tags", "items.cover")
    for hidden in [(name,) for name in items] + [tuple(other for other in items if other != name) for name in items]:
        assert recall(*hidden) > 0.3
    request = EvaluationRequest(hide=dict.fromkeys(items, 1.0))
    nothing = evaluate_run(run, request)
    assert nothing.counts["items_without_modality"] == 80
    assert nothing.metrics["recall@10"] < 0.3  # all items tie: the lowest indices are recommended
    assert read_evaluation(run, request)["hidden"] == sorted(items)


SETTINGS: dict[str, dict[str, Any]] = {
    "popularity": {"training__sampler": {"type": "popularity", "log_q": True}, "training__loss": "sampled_softmax"},
    "in_batch": {"training__sampler": {"type": "in_batch", "log_q": True}, "training__loss": "sampled_softmax"},
    "hard negatives": {"training__sampler": {"pool": 8}},
    "soft labels": {
        "training__labels": "weights",
        "training__loss": "bce",
        # Without a negative score no negative could be told from an item of even odds.
        "model__users__output_activation": False,
        "model__items__output_activation": False,
    },
}


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("weighted") / "dataset", protocol="random", columns=("weights",))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_learns_with_other_negatives_and_labels(weighted: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """A user's own group holds a quarter of the items: at random about an eighth of the relevant ones are found."""
    start(tmp_path / "run", weighted, training__epochs=8, **settings).fit()
    assert evaluate_run(RunFolder(tmp_path / "run"), EvaluationRequest()).metrics["recall@10"] > 0.4


def test_the_loss_reads_the_labels(weighted: Path, tmp_path: Path) -> None:
    """At its first step, before the two differ in anything else."""
    soft, hard = (
        start(tmp_path / labels, weighted, training__loss="bce", training__labels=labels) for labels in ("weights", "binary")
    )
    batch = soft.batches.batch(0, 0)
    assert float(batch.labels.min()) < 1
    relabelled = replace(batch, labels=torch.ones_like(batch.labels))
    with torch.no_grad():
        scores = hard.model(batch).scores
    # Each positive moves the loss by (1 - label) times the difference of its two terms, which is its logit.
    expected = ((1 - batch.labels) * scores[:, 0]).sum() / batch.total_weight / scores.shape[1]
    assert expected.abs() > 1e-3
    for trainer, labelled in ((soft, batch), (hard, relabelled)):
        trainer._step(Step([Part(labelled, trainer.model.read(labelled))], {}), 0)
    torch.testing.assert_close(soft.losses[0] - hard.losses[0], expected, atol=1e-5, rtol=1e-3)


class ByNumber(torch.nn.Module):
    """Scores each item by a table, and notes how it was called."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.calls: list[tuple[bool, bool]] = []

    def step(self, batch: TrainBatch, read: None) -> StepOutput:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return StepOutput(self.table[batch.items])


def test_hardest_negatives_are_the_highest_scored_of_the_pool(weighted: Path, tmp_path: Path) -> None:
    trainer = start(tmp_path / "run", weighted, training__sampler={"pool": 12})
    batch = trainer.batches.batch(0, 1)
    # Told apart by column, so that what belongs together can be seen to stay together.
    pool = replace(batch, log_counts=torch.arange(12.0).repeat(64, 1))
    model = ByNumber(torch.randn(80, generator=torch.Generator().manual_seed(0)))
    found = hardest(model, pool, None, 4)  # type: ignore[arg-type]
    assert model.calls == [(False, False)]
    assert model.training
    for row in range(64):
        scores = [float(model.table.detach()[item]) for item in batch.items[row, 1:]]
        best = sorted(range(12), key=lambda column: (-scores[column], column))[:4]
        assert found.log_counts[row].tolist() == best
        columns = [0, *(column + 1 for column in best)]
        assert found.items[row].tolist() == batch.items[row, columns].tolist()
        assert found.item_modalities[row].tolist() == batch.item_modalities[row, columns].tolist()
    assert torch.equal(found.users, batch.users)


def test_a_step_trains_on_the_hardest_of_the_pool(weighted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = start(tmp_path / "run", weighted, training__sampler={"pool": 12})
    seen: list[tuple[bool, torch.Tensor]] = []
    step = trainer.model.step

    def watched(batch: Any, read: Any) -> StepOutput:
        seen.append((trainer.model.training, batch.items))
        return step(batch, read)

    monkeypatch.setattr(trainer.model, "step", watched)
    batch = trainer.batches.batch(0, 0)
    trainer._step(Step([Part(batch, trainer.model.read(batch))], {}), 0)
    assert [(training, items.shape[1]) for training, items in seen] == [(False, 13), (True, 5)]
    assert torch.equal(seen[0][1], batch.items)


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 4), (1, 7), (2, 1)])
def test_an_interrupted_run_ends_as_an_undisturbed_one(planted: Path, tmp_path: Path, epoch: int, step: int) -> None:
    """Bit for bit: parameters, optimizer, early stopping, and the losses that are reported."""
    settings: dict[str, Any] = {"training__checkpoint_every": 3, "training__epochs": 3, "training__schedule": "cosine"}
    if epoch == 1:  # what else a step may depend on
        settings |= {"training__sampler": {"type": "in_batch", "pool": 8}, "training__hide": {"items.tags": 0.5}}
    start(tmp_path / "undisturbed", planted, **settings).fit()
    with pytest.raises(Interrupted):
        start(tmp_path / "interrupted", planted, interrupt_at(epoch, step), **settings).fit()
    trainer = start(tmp_path / "interrupted", planted, **settings)
    # From the last checkpoint, not from the start, which would end alike.
    assert (trainer.position.epoch, trainer.position.step) == (epoch, step // 3 * 3)
    trainer.fit()

    digest = open_dataset(planted).manifest.digest
    for folder in ("checkpoints", "best"):
        expected, found = (load_newest(tmp_path / run / folder, digest) for run in ("undisturbed", "interrupted"))
        assert expected is not None
        assert found is not None
        assert found.position == expected.position
        assert found.tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name], tensor), name
    kept = [
        [
            {key: value for key, value in line.items() if key not in ("examples_per_second", "memory")}
            for line in RunFolder(tmp_path / run).metrics()
        ]
        for run in ("undisturbed", "interrupted")
    ]
    assert kept[0] == kept[1]
    assert [line["epoch"] for line in kept[1]] == [1, 2, 3]


def test_a_finished_run_is_not_trained_again(planted: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", planted).fit()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert start(tmp_path / "run", planted, interrupt_at(0, 0)).fit().finished
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_early_stopping_keeps_the_best(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(Judge, "evaluate", lambda *arguments: {"val/ndcg@10": next(values)})
    position = start(tmp_path / "run", planted, training__patience=2, training__epochs=10).fit()
    assert (position.epoch, position.best_epoch, position.best) == (4, 2, 0.3)
    best = load_newest(tmp_path / "run" / "best", open_dataset(planted).manifest.digest)
    assert best is not None
    assert best.position.epoch == 2


def test_without_patience_all_epochs_are_trained(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "evaluate", lambda self, model, position: {"val/ndcg@10": -float(position.epoch)})
    assert start(tmp_path / "run", planted, training__patience=-1, training__epochs=5).fit().epoch == 5


def test_learning_rate_follows_the_schedule(planted: Path, tmp_path: Path) -> None:
    rates: list[float] = []
    callbacks = Callbacks(stepped=lambda *_: rates.append(trainer.optimization.optimizer.learning_rate))
    settings = {"training__schedule": "cosine", "training__epochs": 2, "training__learning_rate": 0.5}
    trainer = start(tmp_path / "run", planted, callbacks, **settings)
    trainer.fit()
    total = 2 * trainer.batches.steps_per_epoch
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * step / total)) for step in range(total)])


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(planted: Path, tmp_path: Path) -> None:
    """It is told whose example it was, and which gradient was the largest."""
    trainer = start(tmp_path / "run", planted, training__epochs=2, training__checkpoint_every=2)
    original = trainer._losses
    names = dict(trainer.model.named_parameters())
    large = "items.encoders.of_cover.linear.weight"

    def poisoned(part: Part) -> torch.Tensor:
        losses = original(part)
        at = (trainer.position.epoch, trainer.position.step)
        if at == (1, 2):
            losses = losses + 1e6 * names[large].sum()
        factors = torch.ones_like(losses).index_fill(0, torch.tensor(5), math.nan)
        return losses * factors if at == (1, 3) else losses

    trainer._losses = poisoned  # type: ignore[method-assign]
    batch = trainer.batches.batch(1, 3)
    who = f"user u{int(batch.users[5]):04} with item i{int(batch.items[5, 0]):04} .example 5 of rank 0."
    with pytest.raises(TrainingError, match=rf"of epoch 1, step 3 is not finite; first at {who}.*that of {large}, of length"):
        trainer.fit()
    kept = load_newest(tmp_path / "run" / "checkpoints", open_dataset(planted).manifest.digest)
    assert kept is not None
    assert (kept.position.epoch, kept.position.step) == (1, 2)


def test_run_of_another_dataset_is_refused(planted: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", planted).fit()
    other = write_planted(tmp_path / "other", protocol="random", seed=1)
    with pytest.raises(CheckpointError, match="was made from another dataset"):
        start(tmp_path / "run", other)
    with pytest.raises(CheckpointError, match="was made from another dataset"):
        evaluate_run(RunFolder(tmp_path / "run"), EvaluationRequest(dataset=str(other)))


def test_users_without_negatives_are_told(planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path / "run", planted)
    assert "every training item" not in caplog.text
    dataset = open_dataset(planted)
    everything = Csr(torch.arange(61) * 80, torch.arange(80, dtype=torch.int32).repeat(60))
    object.__setattr__(dataset.users, "histories", everything)
    Trainer(make_config(planted), dataset, RunFolder(tmp_path / "other"))
    assert "60 users have interacted with every training item" in caplog.text


def test_progress_is_told(planted: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    start(tmp_path / "run", planted, Callbacks(progress=told.append)).fit()
    assert [progress.evaluated for progress in told if progress.step == 0] == [1, 2, 3]
    last = told[-1]
    assert last.best == max(line["val/ndcg@10"] for line in RunFolder(tmp_path / "run").metrics())
    assert last.seconds_left == 0
    assert last.examples_per_second > 0


def test_run_folder_says_what_it_holds(planted: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", planted).fit()
    run = RunFolder(tmp_path / "run")
    assert run.config() == make_config(planted)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["dataset"]["digest"] == open_dataset(planted).manifest.digest
    assert (
        environment["packages"]["torch"] == torch.__version__.split("+")[0]
        or environment["packages"]["torch"] == torch.__version__
    )
    with pytest.raises(CheckpointError, match=r"holds a run already. Continue it with --resume"):
        run.create(make_config(planted), open_dataset(planted))
    with pytest.raises(CheckpointError, match="is not a run folder"):
        RunFolder(tmp_path).config()


@pytest.mark.parametrize("model", ["pop", "random"])
def test_models_without_training_have_a_run_too(planted: Path, tmp_path: Path, model: str) -> None:
    position = start(tmp_path / "run", planted, model={"type": model}).fit()
    assert position.finished
    assert len(RunFolder(tmp_path / "run").metrics()) == 1
    assert evaluate_run(RunFolder(tmp_path / "run"), EvaluationRequest()).metrics["coverage@10"] > 0
