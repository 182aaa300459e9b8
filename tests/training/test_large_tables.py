"""Training with divided tables and with lazy updates, on real processes, against one process that holds all of everything.

Models are in float64 and without batch normalisation, whose statistics are each rank's own, so what is left is rounding; and
every parameter matters to the loss: Adam makes steps of any size out of a gradient that is rounding alone.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from sibra_dist.config import validate, with_override
from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import TrainingStopped
from sibra_dist.evaluation import embedding
from sibra_dist.models.tables import Table, tables_of
from sibra_dist.training.checkpoint import published, read_description
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run, read_evaluation
from sibra_dist.training.loop import Trainer
from sibra_dist.training.optimization import Optimization
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder, open_run
from sibra_dist.training.stopping import StopRequest
from tests.planted import write_planted
from tests.training.conftest import make_config

USERS, ITEMS, STEPS = 61, 83, 5  # which no number of ranks divides

SIDE = {"input_size": 8, "hidden_sizes": [8], "batch_norm_every": -1}
LINEAR = {**SIDE, "modalities": ["interactions"], "hidden_sizes": [], "normalize_input": False, "output_activation": False}
NETWORK = {"input_size": 8, "hidden_sizes": [8], "input_dropout": 0.1}
TWO = {"draws": 2, "contrast": {"weight": 1e-2}}
SIBRAR = {
    "type": "single_branch",
    "embedding_size": 8,
    "users": {**SIDE, **TWO},
    "items": {**SIDE, **TWO, "modalities": ["id", "interactions", "tags", "cover"]},
}
MF = {
    "type": "mf",
    "embedding_size": 6,
    "initial_deviation": 0.3,
    "regularization": {"users": 0.01, "positives": 0.02, "negatives": 0.03, "bias": 0.01},
}
IDS = {**SIDE, "modalities": ["id"], "hidden_sizes": None, "input_dropout": 0.0}
WHOLE_USERS = {"training.examples": "users", "training.loss": "sampled_softmax", "training.shown_share": 0.5}

CASES: dict[str, dict[str, Any]] = {
    "sibrar": {"model": SIBRAR},
    "sibrar, targets left out": {"model": {**SIBRAR, "exclude_target": True}, "training.clip_norm": 0.05},
    "sibrar, weighted and capped": {
        "model": SIBRAR,
        "model.items.encoders": {"interactions": {"weighting": "raw"}},
        "model.users.encoders": {"interactions": {"weighting": "tf_idf", "max_history": 3}},
    },
    "sibrar, whole users": {"model": SIBRAR, **WHOLE_USERS},
    # The contrast of users sees a part at a time, and ranks have other parts.
    "sibrar, hard negatives in parts": {
        "model": {**SIBRAR, "users": SIDE},
        "training.sampler": {"pool": 8},
        "training.accumulate": 2,
    },
    "mf": {"model": MF, "training.clip_norm": 0.05, "training.read_ahead": True},
    "mf, whole users": {"model": MF, **WHOLE_USERS},
    "dmf": {
        "model": {"type": "single_branch", "embedding_size": 8, "score": "cosine", "users": LINEAR, "items": LINEAR},
        "training.loss": "bce",
        "training.read_ahead": True,
    },
    "neumf": {
        "model": {"type": "neumf", "embedding_size": 8, "gmf_size": 4, "users": IDS, "items": IDS},
        "training.loss": "bce",
    },
    "dropoutnet": {
        "model": {"type": "dropoutnet", "embedding_size": 8, "users": NETWORK, "items": NETWORK},
        "training.loss": "bce",
    },
    "clcrec": {"model": {"type": "clcrec", "embedding_size": 8, "items": {**NETWORK, "contrast": {"weight": 0.01}}}},
}
MODES = [("replicated", "lazy"), ("row_sharded", "dense"), ("row_sharded", "lazy")]


class Found(NamedTuple):
    """What one rank saw of some steps."""

    losses: list[float]
    norms: list[list[float]]
    """Of the gradients, by step."""
    shapes: dict[str, list[tuple[int, ...]]]
    """Of the tensors that a rank keeps of each parameter: the parameter and its moments."""
    whole: dict[str, torch.Tensor]
    """Parameters and their moments, with the rows of all ranks."""
    metrics: dict[str, float]


def configured(dataset: Path, case: str, table: str = "replicated", updates: str = "dense") -> dict[str, Any]:
    values: dict[str, Any] = {
        "dataset": str(dataset),
        "training": {"batch_size": 50, "negatives": 4, "learning_rate": 0.01, "weight_decay": 0.1, "device": "cpu"},
        "evaluation": {"user_tile": 7},
    }
    for path, value in CASES[case].items():
        values = with_override(values, path, value)
    values["training"] |= {"interaction_table": table, "table_updates": updates}
    return values


def start(values: dict[str, Any], folder: Path) -> Trainer:
    config = validate(TrainConfig, values, where="test")
    return Trainer(config, open_dataset(config.dataset), RunFolder(folder))


def steps_of(values: dict[str, Any], folder: Path, after: Callable[[Trainer, int], None] | None = None) -> Found:
    """Take the first steps of a training, and evaluate."""
    trainer = start(values, folder)
    trainer.model.double()
    trainer.optimization = Optimization(trainer.config, trainer.model, trainer.batches.steps_per_epoch, trainer.ranks)
    trainer.model.train()
    norms: list[list[float]] = []
    note = trainer.watch.note

    def noted(step: int, losses: torch.Tensor, loss: torch.Tensor, of_parameters: torch.Tensor) -> None:
        norms.append(of_parameters.tolist())
        note(step, losses, loss, of_parameters)

    trainer.watch.note = noted  # type: ignore[method-assign]
    for step, parts in zip(range(STEPS), trainer.reader.epoch(0, 0), strict=False):
        trainer._step(parts, step)
        if after is not None:
            after(trainer, step)
    metrics = trainer.judge.evaluate(trainer.model, trainer.position)
    shapes, whole, tables = {}, {}, tables_of(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimization.optimizer.state[parameter]
        kept = {"": parameter.detach(), "/exp_avg": state["exp_avg"], "/exp_avg_sq": state["exp_avg_sq"]}
        shapes[name] = [tuple(tensor.shape) for tensor in kept.values()]
        for key, tensor in kept.items():
            divided = name in tables and tables[name].divided
            whole[name + key] = torch.cat(trainer.ranks.gather(tensor)) if divided else tensor
    return Found(trainer.losses[:STEPS].tolist(), norms, shapes, whole, metrics)


def train_all(rank: int, world: int, dataset: str, folder: str) -> None:
    """What each process does: every case in every mode."""
    torch.set_num_threads(1)
    embedding.ENCODE_TILE = 10  # so that there are more tiles of items than ranks
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    found = {
        (case, *mode): steps_of(configured(Path(dataset), case, *mode), Path(folder) / "none")._asdict()
        for case in CASES
        for mode in MODES
    }
    torch.save(found, Path(folder) / f"{world}-{rank}.pt")
    Ranks.current().wait()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "dataset"
    return write_planted(folder, protocol="random", users=USERS, items=ITEMS, columns=("weights",))


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Found]:
    """By case and kind of updates, what one process finds that holds all."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        (case, updates): steps_of(configured(dataset, case, "replicated", updates), folder / "none")
        for case in CASES
        for updates in ("dense", "lazy")
    }


Ranked = dict[tuple[str, str, str], list[Found]]


@pytest.fixture(scope="module", params=[2, 4])
def ranked(request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    """By case and mode, what each of several ranks found."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    arguments = (world, str(dataset), str(folder))
    torch.multiprocessing.start_processes(train_all, args=arguments, nprocs=world, start_method="forkserver")
    ranks = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return {key: [Found(**rank[key]) for rank in ranks] for key in ranks[0]}


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_in_any_mode_trains_and_judges_as_one(
    ranked: Ranked, alone: dict[tuple[str, str], Found], case: str, mode: tuple[str, str]
) -> None:
    one = alone[case, mode[1]]
    for found in ranked[case, *mode]:
        assert found.losses == pytest.approx(one.losses, rel=1e-5)
        assert found.metrics == pytest.approx(one.metrics, abs=1e-9)
        assert found.norms == ranked[case, *mode][0].norms
        for ours, theirs in zip(found.norms, one.norms, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-9)
        assert found.whole.keys() == one.whole.keys()
        for name, tensor in found.whole.items():
            torch.testing.assert_close(
                tensor, one.whole[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_a_rank_holds_its_share_of_rows_and_of_their_moments(ranked: Ranked, mode: tuple[str, str]) -> None:
    tables = {
        "sibrar": {
            "users.encoders.of_interactions.table.weight": ITEMS,
            "items.encoders.of_id.embedding.weight": ITEMS,
            "items.encoders.of_interactions.table.weight": USERS,
        },
        "mf": {"user_embedding.weight": USERS, "item_embedding.weight": ITEMS},
    }
    for case, rows_of in tables.items():
        ranks = ranked[case, *mode]
        for number, found in enumerate(ranks):
            for name, shapes in found.shapes.items():
                rows, width = len(found.whole[name]), shapes[0][1:]
                if mode[0] == "row_sharded" and name in rows_of:
                    rows = len(range(rows_of[name])[number * -(-rows // len(ranks)) :][: -(-rows // len(ranks))])
                assert shapes == [(rows, *width)] * 3
        assert all(len(found.whole[name]) == rows for name, rows in rows_of.items())


def test_alone_row_sharded_is_replicated(dataset: Path, alone: dict[tuple[str, str], Found], tmp_path: Path) -> None:
    for updates in ("dense", "lazy"):
        found = steps_of(configured(dataset, "sibrar", "row_sharded", updates), tmp_path / "none")
        assert found.losses == alone["sibrar", updates].losses
        for name, tensor in found.whole.items():
            assert torch.equal(tensor, alone["sibrar", updates].whole[name])


def test_a_lazy_step_moves_the_rows_it_reads_and_no_others(dataset: Path, tmp_path: Path) -> None:
    seen: dict[str, torch.Tensor] = {}

    def after(trainer: Trainer, step: int) -> None:
        batch = trainer.batches.batch(0, step)
        for table, read in (("user_embedding.weight", batch.users), ("item_embedding.weight", batch.items)):
            now = trainer.model.get_parameter(table).detach().clone()
            if table in seen:
                moved = (now != seen[table]).any(1)
                assert torch.nonzero(moved).flatten().tolist() == read.unique().tolist()
                assert not moved.all()
            seen[table] = now

    steps_of(configured(dataset, "mf", "replicated", "lazy"), tmp_path / "none", after)


def test_lazy_and_dense_differ_where_rows_are_seldom_read(alone: dict[tuple[str, str], Found]) -> None:
    """So that the comparisons above compare two things; the first step's losses are those before any update."""
    for case in CASES:
        lazy, dense = alone[case, "lazy"], alone[case, "dense"]
        assert lazy.losses[0] == dense.losses[0]
        assert any(not torch.allclose(lazy.whole[name], dense.whole[name], rtol=1e-4, atol=1e-5) for name in lazy.whole)


def test_only_tables_are_divided(dataset: Path, tmp_path: Path) -> None:
    model = start(configured(dataset, "sibrar"), tmp_path / "none").model
    assert set(tables_of(model)) == {
        "users.encoders.of_interactions.table.weight",
        "items.encoders.of_id.embedding.weight",
        "items.encoders.of_interactions.table.weight",
    }
    assert all(isinstance(table, Table) and not table.divided for table in tables_of(model).values())


def continue_one(rank: int, world: int, meeting: str, folder: str, steps: int) -> None:
    """Continue a run for so many steps, or to its end; rank 0 adds their losses to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    run, config, dataset = open_run(folder)
    losses: list[float] = []
    stop = StopRequest(lambda: len(losses) + 1 >= steps, poll_seconds=0)  # which a step asks about itself
    callbacks = Callbacks(stepped=lambda epoch, step, loss: losses.append(loss))
    with suppress(TrainingStopped):
        Trainer(config, dataset, run, callbacks, stop=stop).fit()
    if rank == 0:
        with Path(folder, "losses").open("a") as file:
            file.writelines(f"{loss}\n" for loss in losses)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_run_goes_on_with_its_tables_divided_over_other_ranks_or_whole(planted: Path, tmp_path: Path) -> None:
    settings = {"training__epochs": 2, "model__users__batch_norm_every": -1, "model__items__batch_norm_every": -1}
    config = make_config(planted, training__interaction_table="row_sharded", **settings)
    run, dataset = RunFolder(tmp_path / "run"), open_dataset(planted)
    run.create(config, dataset)
    for number, (world, steps) in enumerate([(2, 3), (1, 2), (3, 1000)]):
        arguments = (world, str(tmp_path / f"{number}.meeting"), str(run.path), steps)
        torch.multiprocessing.start_processes(continue_one, args=arguments, nprocs=world, start_method="forkserver")
        saved = read_description(run.checkpoints, published(run.checkpoints)[0])
        assert (saved.world, len(saved.parts)) == (world, world)
    whole = RunFolder(tmp_path / "whole")
    replicated = make_config(planted, **settings)
    whole.create(replicated, dataset)
    wanted: list[float] = []
    Trainer(replicated, dataset, whole, Callbacks(stepped=lambda epoch, step, loss: wanted.append(loss))).fit()
    found = [float(line) for line in (run.path / "losses").read_text().splitlines()]
    assert found == pytest.approx(wanted, rel=1e-4)
    first, second = (evaluate_run(one, EvaluationRequest()).metrics for one in (run, whole))
    assert first == pytest.approx(second, abs=0.02)
    arguments = (2, str(tmp_path / "evaluation.meeting"), str(run.path))
    torch.multiprocessing.start_processes(evaluate_one, args=arguments, nprocs=2, start_method="forkserver")
    divided = read_evaluation(run, EvaluationRequest())["metrics"]
    assert {name.removeprefix("test/"): value for name, value in divided.items()} == pytest.approx(first, abs=1e-6)


def evaluate_one(rank: int, world: int, meeting: str, folder: str) -> None:
    """Evaluate a run on ranks that each have a part of the tables."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    run, config, dataset = open_run(folder)
    model, _ = run.load_best(dataset, torch.device("cpu"), Ranks.current())
    assert config.training.interaction_table == "row_sharded"
    assert all(table.divided for table in tables_of(model).values())
    evaluate_run(run, EvaluationRequest())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
