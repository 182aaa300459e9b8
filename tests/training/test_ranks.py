"""Several real processes against one: the same losses, step by step, and the same metrics."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from sibra_dist.config import validate
from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import TrainingError
from sibra_dist.evaluation import embedding, gap
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run, read_evaluation
from sibra_dist.training.loop import Trainer
from sibra_dist.training.modalities import GAP, PLOT, GapRequest, evaluate_modalities, measure_gap
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.reading import Part
from sibra_dist.training.run_folder import RunFolder
from tests.training.conftest import make_config


def train_one(rank: int, world: int, meeting: str, folder: str, plain: dict[str, Any]) -> None:
    """What each process does; rank 0 leaves its step losses in the run folder."""
    torch.set_num_threads(1)
    embedding.ENCODE_TILE = 16  # so that the ranks share out several tiles of items
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    config = validate(TrainConfig, plain, where="test")
    run, dataset = RunFolder(folder), open_dataset(config.dataset)
    losses: list[float] = []
    Trainer(config, dataset, run, Callbacks(stepped=lambda epoch, step, loss: losses.append(loss))).fit()
    Ranks.current().wait()
    evaluate_run(run, EvaluationRequest())
    if rank == 0:
        (run.path / "losses.json").write_text(json.dumps(losses))
    leave()


def leave() -> None:
    """Take the group down when all are done with it: a rank that leaves early would break off the others' connections."""
    Ranks.current().wait()
    torch.distributed.destroy_process_group()


def run_ranks(folder: Path, config: TrainConfig, world: int) -> tuple[list[float], dict[str, Any], list[dict[str, Any]]]:
    run = RunFolder(folder)
    run.create(config, open_dataset(config.dataset))
    meeting = folder.with_suffix(".meeting")
    arguments = (world, str(meeting), str(folder), config.model_dump(mode="json"))
    torch.multiprocessing.start_processes(train_one, args=arguments, nprocs=world, start_method="forkserver")
    losses = json.loads((folder / "losses.json").read_text())
    return losses, read_evaluation(run, EvaluationRequest()), run.metrics()


OTHERS: dict[str, Any] = {
    "training__loss": "sampled_softmax",
    "training__sampler": {"type": "in_batch", "pool": 8},
    "training__hide": {"items.tags": 0.5, "users.club": 1.0},
    "evaluation__hide": {"items.cover": 0.25},
}


@pytest.mark.parametrize(
    ("planted_dropout", "settings"), [(0.0, {}), (0.3, {}), (0.0, OTHERS)], ids=["plain", "dropout", "pool of the batch"]
)
def test_one_two_and_four_ranks_train_alike(
    planted: Path, tmp_path: Path, planted_dropout: float, settings: dict[str, Any]
) -> None:
    """Batch normalisation apart, whose statistics are each rank's own, the number of ranks changes only rounding."""
    config = make_config(
        planted,
        model__users__batch_norm_every=-1,
        model__items__batch_norm_every=-1,
        model__users__input_dropout=planted_dropout,
        model__items__input_dropout=planted_dropout,
        training__batch_size=50,
        training__epochs=2,
        **settings,
    )
    alone, evaluated, history = run_ranks(tmp_path / "run-1", config, 1)
    assert len(alone) == 2 * 10
    worlds = (2,) if planted_dropout or settings else (2, 4)
    for world in worlds:
        losses, metrics, lines = run_ranks(tmp_path / f"run-{world}", config, world)
        assert losses == pytest.approx(alone, rel=1e-4)
        assert metrics["counts"] == evaluated["counts"]
        assert metrics["metrics"] == pytest.approx(evaluated["metrics"], abs=1e-6)
        assert [line["val/ndcg@10"] for line in lines] == pytest.approx([line["val/ndcg@10"] for line in history], abs=1e-6)


def test_the_same_model_has_the_same_metrics_on_any_number_of_ranks(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly: nothing of an evaluation depends on who does which part."""
    config = make_config(planted, training__epochs=1, evaluation__user_tile=7)
    run = RunFolder(tmp_path / "run")
    _, alone, _ = run_ranks(run.path, config, 1)
    users = (run.path / "evaluation/test/users.parquet").read_bytes()
    monkeypatch.setattr(embedding, "ENCODE_TILE", 16)
    judge_modalities(run)
    names = ("test/modalities.json", GAP, PLOT)
    modalities = [(run.path / "evaluation" / name).read_bytes() for name in names]
    for world in (2, 4):
        meeting = tmp_path / f"{world}.meeting"
        torch.multiprocessing.start_processes(
            evaluate_one, args=(world, str(meeting), str(run.path)), nprocs=world, start_method="forkserver"
        )
        assert json.loads((run.path / "evaluation/test/metrics.json").read_text()) == alone
        assert (run.path / "evaluation/test/users.parquet").read_bytes() == users
        written = sorted(path.name for path in (run.path / "evaluation/test").iterdir())
        assert written == ["metrics.json", "modalities.json", "users.parquet"]
        assert [(run.path / "evaluation" / name).read_bytes() for name in names] == modalities


def evaluate_one(rank: int, world: int, meeting: str, folder: str) -> None:
    torch.set_num_threads(1)
    embedding.ENCODE_TILE = 16  # so that the ranks share out several tiles of items
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    evaluate_run(RunFolder(folder), EvaluationRequest())
    gap.TILE = 8
    judge_modalities(RunFolder(folder))
    leave()


def judge_modalities(run: RunFolder) -> None:
    evaluate_modalities(run, EvaluationRequest())
    measure_gap(run, GapRequest())


def train_poisoned(rank: int, world: int, meeting: str, folder: str, plain: dict[str, Any]) -> None:
    """Rank 1 finds a loss that is not finite; each rank leaves what it is told."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    config = validate(TrainConfig, plain, where="test")
    trainer = Trainer(config, open_dataset(config.dataset), RunFolder(folder))
    original = trainer._losses

    def poisoned(part: Part) -> torch.Tensor:
        losses = original(part)
        bad = rank == 1 and trainer.position.step == 3
        return losses * torch.ones_like(losses).index_fill(0, torch.tensor(2), math.inf) if bad else losses

    trainer._losses = poisoned  # type: ignore[method-assign]
    batch = trainer.batches.batch(0, 3)
    told = {"who": f"user u{int(batch.users[2]):04} with item i{int(batch.items[2, 0]):04} (example 2 of rank 1)"}
    try:
        trainer.fit()
    except TrainingError as error:
        told["error"] = str(error)
    Path(f"{folder}.{rank}.json").write_text(json.dumps(told))
    leave()


def test_all_ranks_are_told_whose_example_had_a_loss_that_is_not_finite(planted: Path, tmp_path: Path) -> None:
    config = make_config(planted)
    RunFolder(tmp_path / "run").create(config, open_dataset(planted))
    arguments = (2, str(tmp_path / "meeting"), str(tmp_path / "run"), config.model_dump(mode="json"))
    torch.multiprocessing.start_processes(train_poisoned, args=arguments, nprocs=2, start_method="forkserver")
    told = [json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in range(2)]
    assert told[0]["error"] == told[1]["error"]
    assert f"of epoch 0, step 3 is not finite; first at {told[1]['who']}" in told[0]["error"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
