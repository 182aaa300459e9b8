"""Exported files against what the model computes; the same bytes however they are made; and bad requests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing

from sibra_dist.cli import main
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.manifest import SIDES, Side, sha256_of
from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError, ConfigError, DatasetError, TrainingError
from sibra_dist.exporting import export as module
from sibra_dist.exporting import index as index_module
from sibra_dist.exporting.export import Asked, export
from sibra_dist.exporting.index import recall
from sibra_dist.exporting.manifest import MANIFEST, Exported
from sibra_dist.models.base import SCORES, Recommender
from sibra_dist.models.single_branch import SingleBranch
from sibra_dist.training.run_folder import RunFolder
from tests.models.cases import CASES
from tests.planted import write_planted
from tests.recommending.test_recommend import files, trained
from tests.training.conftest import SMALL

PER_SHARD, TILE = 25, 9
ID = {"users": "user_id", "items": "item_id"}
MODELS: dict[str, dict[str, Any]] = {
    "pop": {"type": "pop"},
    "dot": SMALL["model"],
    "cosine": CASES["CoBraR, cosine"].model,
    "mf": CASES["MF"].model,
    "neumf": CASES["NeuMF"].model,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A run of each model, on a dataset of 60 users and 80 items."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = write_planted(folder / "dataset", protocol="random")
    return {name: trained(folder / name, dataset, model) for name, model in MODELS.items()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_SHARD", PER_SHARD)
    monkeypatch.setattr(module, "TILE", TILE)


def loaded(run: RunFolder) -> tuple[Recommender, Dataset]:
    dataset = open_dataset(run.config().dataset)
    return run.load_best(dataset, torch.device("cpu"))[0], dataset


@torch.no_grad()
def encoded(model: Recommender, dataset: Dataset, side: Side) -> np.ndarray:
    if side == "users":
        return model.encode_users(torch.arange(dataset.users.count)).numpy()
    return model.encode_items(torch.arange(dataset.items.count)).numpy()


@pytest.mark.parametrize("name", ["dot", "mf", "neumf"])
def test_every_file_has_the_models_embeddings_by_index(runs: dict[str, RunFolder], tmp_path: Path, name: str) -> None:
    told: list[tuple[int, int]] = []
    exported = export(runs[name], Asked(), Place.at(tmp_path), lambda done, total: told.append((done, total)))
    model, dataset = loaded(runs[name])
    for side in SIDES:
        about = exported.sides[side]
        expected = encoded(model, dataset, side)
        mapped = np.load(tmp_path / side / "embeddings.npy", mmap_mode="r")
        assert (mapped.dtype, mapped.shape) == (np.dtype("<f4"), (about.count, exported.embedding_size))
        np.testing.assert_allclose(mapped, expected, atol=1e-6)
        ids = [json.loads(line) for line in (tmp_path / side / "ids.jsonl").read_text().splitlines()]
        assert ids == dataset.ids(side).to_pylist()
        table = pq.read_table([tmp_path / shard.path for shard in about.shards])
        assert table[ID[side]].to_pylist() == ids
        np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), mapped)
    assert told == [(25, 140), (50, 140), (60, 140), (85, 140), (110, 140), (135, 140), (140, 140)]


def test_the_manifest_lists_all_there_is_with_checksums(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    exported = export(runs["dot"], Asked(index=True, towers=True), Place.at(tmp_path))
    assert Exported.of(Place.at(tmp_path)) == exported
    assert set(files(tmp_path)) == {MANIFEST, *(file.path for file in exported.files())}
    for file in exported.files():
        path = tmp_path / file.path
        assert (file.bytes, file.sha256) == (path.stat().st_size, sha256_of(path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert export(runs["dot"], Asked(index=True, towers=True), Place.at(tmp_path)) == exported
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    program = torch.export.load(tmp_path / exported.towers["items"].file.path).module()
    count = len(exported.towers["items"].modalities)
    given = {
        one.name: torch.zeros([2 if size == "n" else 0 if size == "entries" else size for size in one.shape]).to(
            getattr(torch, one.dtype)
        )
        for one in exported.towers["items"].inputs
    }
    embedded = program(torch.zeros(2, count, dtype=torch.bool), given)
    assert embedded.shape == (2, exported.embedding_size)
    assert not embedded.requires_grad


@pytest.mark.parametrize("name", ["dot", "cosine", "mf"])
def test_the_index_finds_what_scores_best(
    runs: dict[str, RunFolder], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(index_module, "BEST", 5)
    exported = export(runs[name], Asked(index=True), Place.at(tmp_path))
    about = exported.index
    assert about is not None
    model, dataset = loaded(runs[name])
    users, items = (torch.from_numpy(encoded(model, dataset, side)) for side in SIDES)
    index = faiss.read_index(str(tmp_path / about.file.path))
    found = index.search(users.numpy(), 5)[1]
    scores = model.score(users, items)
    best = scores.topk(5, dim=1).values.double()
    of_found = scores.gather(1, torch.from_numpy(found)).double()
    shared = float(((best - of_found.sort(dim=1, descending=True).values).abs() < 1e-5).double().mean())
    assert shared > 0.9
    assert (about.k, about.sampled_users) == (5, 60)
    assert about.recall == pytest.approx(shared, abs=0.1)


def test_recall_counts_what_was_found_wherever_it_stands() -> None:
    exact = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall(torch.tensor([[4, 3, 9, -1], [5, 6, 7, 8]]), exact) == 6 / 8


@torch.no_grad()
@pytest.mark.parametrize("name", ["dot", "cosine", "mf"])
def test_the_named_score_is_the_models(runs: dict[str, RunFolder], name: str) -> None:
    model, dataset = loaded(runs[name])
    users, items = (torch.from_numpy(encoded(model, dataset, side)) for side in SIDES)
    assert model.score_name is not None
    torch.testing.assert_close(SCORES[model.score_name].all_pairs(users, items), model.score(users, items))


def one_of(rank: int, world: int, folder: str, runs: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    module.ROWS_PER_SHARD, module.TILE = PER_SHARD, TILE
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for number, run in enumerate(runs):
        export(RunFolder(run), Asked(towers=True), Place.at(f"{folder}/two {number}"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_change_no_byte_and_no_more_than_rounding_where_they_divide_the_tables(
    runs: dict[str, RunFolder], tmp_path: Path
) -> None:
    """Two ranks, and three shards of users: in the last turn one has nothing to do."""
    dataset = Path(runs["pop"].config().dataset)
    both = (runs["dot"], trained(tmp_path / "run", dataset, SMALL["model"], training__interaction_table="row_sharded"))
    for number, run in enumerate(both):
        export(run, Asked(towers=True), Place.at(tmp_path / f"alone {number}"))
    arguments = (2, str(tmp_path), tuple(str(run.path) for run in both))
    torch.multiprocessing.start_processes(one_of, args=arguments, nprocs=2, start_method="forkserver")
    assert files(tmp_path / "two 0") == files(tmp_path / "alone 0")
    found, expected = (Exported.of(Place.at(tmp_path / name)) for name in ("two 1", "alone 1"))
    assert found.towers == expected.towers
    for side in SIDES:
        embeddings = [np.load(tmp_path / folder / side / "embeddings.npy") for folder in ("two 1", "alone 1")]
        np.testing.assert_allclose(*embeddings, atol=1e-6)


def test_an_index_has_the_same_bytes_again(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    for to in ("one", "other"):
        export(runs["dot"], Asked(index=True), Place.at(tmp_path / to))
    assert files(tmp_path / "one") == files(tmp_path / "other")


def test_what_was_interrupted_is_made_anew_and_has_no_manifest_before(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(runs["mf"], Asked(), Place.at(tmp_path / "expected"))
    write = Place.write

    def full(self: Place, name: str, content: Any) -> None:
        if name == "items/embeddings.npy":
            raise OSError(28, "No space left on device", name)
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", full)
        with pytest.raises(DatasetError, match=r"cannot be written: No space left on device\. Make room"):
            export(runs["mf"], Asked(), Place.at(tmp_path / "to"))
    assert MANIFEST not in files(tmp_path / "to")
    export(runs["mf"], Asked(), Place.at(tmp_path / "to"))
    assert files(tmp_path / "to") == files(tmp_path / "expected")


def test_towers_are_those_of_the_embeddings_though_training_goes_on(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, names = RunFolder.load_named_best, iter(("first", "second"))

    def of_now(self: RunFolder, *arguments: Any) -> tuple[Recommender, str]:
        return load(self, *arguments)[0], next(names)

    monkeypatch.setattr(RunFolder, "load_named_best", of_now)
    with pytest.raises(CheckpointError, match="its best model is another one by now; export it again"):
        export(runs["mf"], Asked(towers=True), Place.at(tmp_path))
    assert MANIFEST not in files(tmp_path)


def test_a_file_that_was_cut_short_is_made_again(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    export(runs["mf"], Asked(), Place.at(tmp_path))
    expected = files(tmp_path)
    (tmp_path / "users" / "embeddings.npy").write_bytes(b"half")
    export(runs["mf"], Asked(), Place.at(tmp_path))
    assert files(tmp_path) == expected


def test_another_request_needs_to_be_told_to_overwrite(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    export(runs["mf"], Asked(towers=True), Place.at(tmp_path))
    before = files(tmp_path)
    with pytest.raises(DatasetError, match=r"another request \(not the same towers\); add --overwrite"):
        export(runs["mf"], Asked(), Place.at(tmp_path))
    assert files(tmp_path) == before
    export(runs["mf"], Asked(overwrite=True), Place.at(tmp_path))
    assert files(tmp_path).keys() == before.keys() - {"towers/users.pt2", "towers/items.pt2"}


def test_other_files_stay_as_they_are(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(DatasetError, match="not an exported model, and stays as it is"):
        export(runs["mf"], Asked(overwrite=True), Place.at(tmp_path))
    assert set(files(tmp_path)) == {"notes"}


REFUSED: dict[str, tuple[str, Asked, str]] = {
    "a baseline": ("pop", Asked(), "model pop has no embeddings and no towers"),
    "an index of a network's scores": ("neumf", Asked(index=True), "neumf scores by a network"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_has_not_is_refused_before_anything_is_written(
    runs: dict[str, RunFolder], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "require_faiss", lambda: None)
    run, asked, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        export(runs[run], asked, Place.at(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_an_index_without_the_extra_says_what_to_install(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'sibra-dist\[ann\]'"):
        export(runs["dot"], Asked(index=True), Place.at(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def call(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    return exit_.value.code, *capsys.readouterr()


def test_the_command_tells_what_it_wrote_and_what_is_wrong(
    runs: dict[str, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, to = runs["dot"].path, tmp_path / "to"
    code, out, err = call(f"export {run} --to {to} --towers", capsys)
    assert code == 0
    assert out.splitlines() == [
        f"embeddings of 60 users and 80 items, 8 numbers each, are in {to}",
        "tower  towers/users.pt2: users from interactions, club",
        "tower  towers/items.pt2: items from interactions, tags, cover",
    ]
    assert err.splitlines()[-1] == "exporting to: 140 of 140 embeddings"
    code, out, err = call(f"export {run} --to {to}", capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {to} holds an export of another request")
    code, _, err = call(f"export {to} --to {to}", capsys)
    assert code == 2
    assert "is not a run folder" in err


def test_an_embedding_that_is_no_number_is_told_with_its_id(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode: Callable[..., torch.Tensor] = SingleBranch.encode_items

    def broken(self: SingleBranch, items: torch.Tensor) -> torch.Tensor:
        return torch.where(items[:, None] == 33, torch.nan, encode(self, items))

    monkeypatch.setattr(SingleBranch, "encode_items", broken)
    with pytest.raises(TrainingError, match="embedding of item_id 'i0033' is not finite; the model has diverged"):
        export(runs["dot"], Asked(), Place.at(tmp_path))
    assert MANIFEST not in files(tmp_path)
