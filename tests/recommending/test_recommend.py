"""Recommendations against ones found without any part of them; the same files however they are made; and bad requests."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.manifest import sha256_of
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError, SibraError, SourceError
from sibra_dist.evaluation import embedding
from sibra_dist.models.base import Recommender
from sibra_dist.recommending import recommend as module
from sibra_dist.recommending.manifest import MANIFEST, Recommended
from sibra_dist.recommending.recommend import SCHEMA, Asked, recommend
from sibra_dist.training.launch import train_here
from sibra_dist.training.run_folder import RunFolder
from tests.newcomers import told_again
from tests.planted import write_planted
from tests.training.conftest import SMALL, make_config

USERS, ITEMS, PER_SHARD = 60, 80, 17
MODELS: dict[str, Any] = {"pop": {"type": "pop"}, "random": {"type": "random"}, "single_branch": SMALL["model"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A run of each model, on a dataset of 60 users and 80 items."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = write_planted(folder / "dataset", protocol="random")
    return {name: trained(folder / name, dataset, model) for name, model in MODELS.items()}


def trained(folder: Path, dataset: Path, model: dict[str, Any], **settings: Any) -> RunFolder:
    run = RunFolder(folder)
    config = make_config(dataset, model=model, training__epochs=1, **settings)
    opened = open_dataset(dataset)
    run.create(config, opened)
    train_here(run, config, opened)
    return run


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "USERS_PER_SHARD", PER_SHARD)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of all shards that the manifest lists, in order."""
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    tables = [pq.read_table(folder / shard["path"]) for shard in shards]
    assert all(table.schema.equals(SCHEMA) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def interactions(dataset: Dataset, table: str) -> dict[int, set[int]]:
    paths = sorted((dataset.place.path / table).glob("*.parquet"))
    return {row["index"]: set(row["items"] or ()) for path in paths for row in pq.read_table(path).to_pylist()}


def seen_by(dataset: Dataset) -> dict[int, set[int]]:
    """What each user has interacted with in any split, from the shards."""
    tables = [interactions(dataset, table) for table in ("histories/users", "held_out/validation", "held_out/test")]
    return {user: set().union(*(table.get(user, set()) for table in tables)) for user in range(dataset.users.count)}


@torch.inference_mode()
def by_brute_force(model: Recommender, dataset: Dataset, k: int, excluded: dict[int, set[int]]) -> list[dict[str, Any]]:
    users, items = torch.arange(dataset.users.count), torch.arange(dataset.items.count)
    scores = model.score(model.encode_users(users), model.encode_items(items)).tolist()
    found = []
    for user, row in enumerate(scores):
        allowed = [item for item in range(len(row)) if item not in excluded.get(user, set())]
        best = sorted(allowed, key=lambda item: (-row[item], item))[:k]
        found += [
            {"user_id": f"u{user:04}", "item_id": f"i{item:04}", "score": pytest.approx(row[item], abs=1e-5), "rank": rank}
            for rank, item in enumerate(best, 1)
        ]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("k", [1, 7, ITEMS + 5])
@pytest.mark.parametrize("exclude", ["seen", "none"])
def test_it_agrees_with_brute_force(runs: dict[str, RunFolder], tmp_path: Path, name: str, k: int, exclude: str) -> None:
    run = runs[name]
    dataset = open_dataset(run.config().dataset)
    model, _ = run.load_best(dataset, torch.device("cpu"))
    recommended = recommend(run, Asked(k, exclude=exclude), Place.at(tmp_path))
    expected = by_brute_force(model, dataset, k, seen_by(dataset) if exclude == "seen" else {})
    assert rows(tmp_path) == expected
    assert (recommended.users, recommended.rows, len(recommended.shards)) == (USERS, len(expected), 4)


def test_what_is_complete_says_so_and_has_the_checksums(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    recommended = recommend(runs["pop"], Asked(5), Place.at(tmp_path), lambda done, total: told.append((done, total)))
    assert Recommended.read(Place.at(tmp_path)) == recommended
    assert recommended.complete
    assert recommended.request.dataset == open_dataset(runs["pop"].config().dataset).manifest.digest
    for shard in recommended.shards:
        path = tmp_path / shard.path
        assert (shard.bytes, shard.sha256) == (path.stat().st_size, sha256_of(path))
        assert shard.rows == pq.read_metadata(path).num_rows
    assert set(files(tmp_path)) == {MANIFEST, *(shard.path for shard in recommended.shards)}
    assert told == [(0, 60), (17, 60), (34, 60), (51, 60), (60, 60)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert recommend(runs["pop"], Asked(5), Place.at(tmp_path)) == recommended
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["pop", "random"])
@pytest.mark.parametrize(("user_tile", "item_tile", "encode_tile"), [(1, 1, 1), (7, 11, 5), (16, 1000, 1000)])
def test_tiles_change_no_byte(
    runs: dict[str, RunFolder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    user_tile: int,
    item_tile: int,
    encode_tile: int,
) -> None:
    recommend(runs[name], Asked(9), Place.at(tmp_path / "expected"))
    monkeypatch.setattr(module, "USER_TILE", user_tile)
    monkeypatch.setattr(module, "ITEM_TILE", item_tile)
    monkeypatch.setattr(embedding, "ENCODE_TILE", encode_tile)
    recommend(runs[name], Asked(9), Place.at(tmp_path / "tiled"))
    assert files(tmp_path / "tiled") == files(tmp_path / "expected")


def with_newcomers(run: RunFolder, folder: Path) -> Asked:
    """A request with tables of new users and items; the items are several tiles for ranks to share out."""
    dataset = open_dataset(run.config().dataset)
    pq.write_table(told_again(dataset, "users", range(0, USERS, 7)), folder / "users.parquet")
    pq.write_table(told_again(dataset, "items", range(0, ITEMS, 3)), folder / "items.parquet")
    return Asked(9, new_users=str(folder / "users.parquet"), new_items=str(folder / "items.parquet"))


def one_of(rank: int, world: int, meeting: str, run: str, asked: Asked, to: str) -> None:
    torch.set_num_threads(1)
    module.USERS_PER_SHARD, embedding.ENCODE_TILE = PER_SHARD, 16
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    recommend(RunFolder(run), asked, Place.at(to))
    torch.distributed.destroy_process_group()


def on_ranks(world: int, run: RunFolder, asked: Asked, to: Path) -> None:
    arguments = (world, str(to.with_suffix(f".{world}.meeting")), str(run.path), asked, str(to))
    torch.multiprocessing.start_processes(one_of, args=arguments, nprocs=world, start_method="forkserver")


@pytest.mark.slow
def test_ranks_change_no_byte(runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those that go on with what another number of them has begun, five shards being a multiple of neither."""
    monkeypatch.setattr(embedding, "ENCODE_TILE", 16)
    asked = with_newcomers(runs["single_branch"], tmp_path)
    recommend(runs["single_branch"], asked, Place.at(tmp_path / "expected"))
    on_ranks(2, runs["single_branch"], asked, tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "expected")
    shards = sorted((tmp_path / "two" / "recommendations").iterdir())
    shards[1].unlink()
    on_ranks(4, runs["single_branch"], asked, tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "expected")


@pytest.mark.slow
def test_ranks_that_divide_the_tables_recommend_alike(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    dataset = Path(runs["pop"].config().dataset)
    run = trained(tmp_path / "run", dataset, SMALL["model"], training__interaction_table="row_sharded")
    asked = with_newcomers(run, tmp_path)
    recommend(run, asked, Place.at(tmp_path / "expected"))
    on_ranks(3, run, asked, tmp_path / "three")
    expected, found = rows(tmp_path / "expected"), rows(tmp_path / "three")
    assert found == [{**row, "score": pytest.approx(row["score"], abs=1e-5)} for row in expected]


def shard_writes(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Let something happen when a shard is about to be written, which is told its number."""
    write = Place.write

    def instead(self: Place, name: str, content: Any) -> None:
        if name.startswith("recommendations/part-"):
            act(int(name.split("-")[1]))
        write(self, name, content)

    monkeypatch.setattr(Place, "write", instead)


def killed_at_the_third(rank: int, run: str, to: str) -> None:
    module.USERS_PER_SHARD = PER_SHARD
    torch.set_num_threads(1)

    def act(number: int) -> None:
        if number == 2:
            (Path(to) / "recommendations" / f".part-00002-x.parquet.{'0' * 32}.partial").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    shard_writes(pytest.MonkeyPatch(), act)
    recommend(RunFolder(run), Asked(9), Place.at(to))


@pytest.mark.slow
def test_what_was_killed_goes_on_to_the_same_files(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, to = runs["single_branch"], tmp_path / "killed"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.start_processes(killed_at_the_third, args=(str(run.path), str(to)), start_method="forkserver")
    plan = Recommended.read(Place.at(to))
    assert plan is not None
    assert (plan.complete, plan.shards) == (False, ())
    whole = [path.name[:10] for path in (to / "recommendations").iterdir() if path.suffix == ".parquet"]
    assert sorted(whole) == ["part-00000", "part-00001"]
    written: list[int] = []
    with monkeypatch.context() as patch:
        shard_writes(patch, written.append)
        recommend(run, Asked(9), Place.at(to))
    assert written == [2, 3]
    recommend(run, Asked(9), Place.at(tmp_path / "expected"))
    assert files(to) == files(tmp_path / "expected")


def test_a_full_disk_is_told_and_what_is_there_is_kept(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        if number == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    with monkeypatch.context() as patch:
        shard_writes(patch, full)
        with pytest.raises(DatasetError, match=r"cannot be written: No space left on device\. Make room, .* it goes on"):
            recommend(runs["pop"], Asked(3), Place.at(tmp_path))
    kept = files(tmp_path)
    assert len(kept) == 2
    recommended = recommend(runs["pop"], Asked(3), Place.at(tmp_path))
    assert len(recommended.shards) == 4
    assert files(tmp_path).items() >= {name: content for name, content in kept.items() if name != MANIFEST}.items()


def test_a_damaged_shard_is_made_again(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    recommended = recommend(runs["pop"], Asked(3), Place.at(tmp_path))
    expected = files(tmp_path)
    (tmp_path / recommended.shards[2].path).write_bytes(b"PAR1 and nothing else")
    assert recommend(runs["pop"], Asked(3), Place.at(tmp_path)) == recommended
    assert files(tmp_path) == expected


def test_only_the_listed_users_in_their_order_and_the_others_are_told(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    listed = ["u0041", "nobody", "u0003", "u0041", 'say "hi", you']
    everyone = recommend(runs["random"], Asked(4), Place.at(tmp_path / "all"))
    assert everyone.rejected == {}
    by_user = {row["user_id"]: [] for row in rows(tmp_path / "all")}
    for row in rows(tmp_path / "all"):
        by_user[row["user_id"]].append(row)
    (tmp_path / "users.txt").write_text("\ufeff" + "\r\n".join(listed) + "\r\n\n")
    pq.write_table(pa.table({"age": [1] * 5, "user_id": listed}), tmp_path / "users.parquet")
    quoted = [json.dumps(user).replace('\\"', '""') for user in listed]
    (tmp_path / "users.csv").write_text("age,user_id\n" + "".join(f"1,{user}\n" for user in quoted))
    (tmp_path / "users.tsv").write_text("user_id\tage\n" + "".join(f"{user}\t1\n" for user in quoted))
    for name in ("users.txt", "users.parquet", "users.csv", "users.tsv"):
        to = tmp_path / f"to {name}"
        recommended = recommend(runs["random"], Asked(4, users=str(tmp_path / name)), Place.at(to))
        assert rows(to) == [*by_user["u0041"], *by_user["u0003"]]
        assert recommended.users == 2
        assert recommended.rejected == {"duplicate id": 1, "unknown id": 2}
        told = [line.removeprefix(f"{tmp_path / name},") for line in (to / "rejected.csv").read_text().splitlines()]
        assert told == [
            *("file,reason,record", "unknown id,nobody", "duplicate id,u0041"),
            'unknown id,"say ""hi"", you"',
        ]


def test_listed_pairs_are_excluded_and_unknown_ones_told(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    dataset = open_dataset(runs["random"].config().dataset)
    model, _ = runs["random"].load_best(dataset, torch.device("cpu"))
    every = {3: set(range(ITEMS)), 0: {1, 79}, 59: {5}}
    pairs = [(f"u{user:04}", f"i{item:04}") for user, items in every.items() for item in sorted(items)]
    pairs = [*pairs, ("u0000", "i0001"), ("u0000", "new"), ("nobody", "i0001"), ("nobody", "new")]
    (tmp_path / "pairs.csv").write_text("item_id,user_id\n" + "".join(f"{item},{user}\n" for user, item in pairs))
    asked = Asked(6, exclude=str(tmp_path / "pairs.csv"))
    recommended = recommend(runs["random"], asked, Place.at(tmp_path / "to"))
    found = rows(tmp_path / "to")
    assert found == by_brute_force(model, dataset, 6, every)
    assert not any(row["user_id"] == "u0003" for row in found)
    assert recommended.users == USERS
    assert recommended.rejected == {"unknown item id": 1, "unknown user id": 2}
    assert (tmp_path / "to" / "rejected.csv").read_text().splitlines()[1:] == [
        f'{asked.exclude},unknown item id,"u0000,new"',
        f'{asked.exclude},unknown user id,"nobody,i0001"',
        f'{asked.exclude},unknown user id,"nobody,new"',
    ]


def test_nobody_is_left_with_anything(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("user_id\titem_id\n" + "".join(f"u0007\ti{item:04}\n" for item in range(ITEMS)))
    (tmp_path / "users").write_text("u0007")
    asked = Asked(6, users=str(tmp_path / "users"), exclude=str(tmp_path / "pairs.tsv"))
    recommended = recommend(runs["pop"], asked, Place.at(tmp_path / "to"))
    assert (recommended.users, recommended.rows, len(recommended.shards)) == (1, 0, 1)
    assert rows(tmp_path / "to") == []


CHANGES: dict[str, Callable[[Path], Asked]] = {
    "k": lambda folder: Asked(4),
    "exclude": lambda folder: Asked(3, exclude="none"),
    "users": lambda folder: Asked(3, users=str(folder / "users")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_request_is_refused_and_replaces_when_told_to(runs: dict[str, RunFolder], tmp_path: Path, what: str) -> None:
    (tmp_path / "users").write_text("u0001\nu0002\nu0001\n")
    to, other = Place.at(tmp_path / "to"), CHANGES[what](tmp_path)
    recommend(runs["pop"], Asked(3), to)
    before = files(to.path)
    with pytest.raises(DatasetError, match=rf"of another request \(not the same {what}\); add --overwrite"):
        recommend(runs["pop"], other, to)
    assert files(to.path) == before
    recommend(runs["pop"], Asked(other.k, other.users, other.exclude, overwrite=True), to)
    recommend(runs["pop"], other, Place.at(tmp_path / "fresh"))
    assert files(to.path) == files(tmp_path / "fresh")
    recommend(runs["pop"], Asked(3, overwrite=True), to)
    assert files(to.path) == before


def test_another_model_is_another_request(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    recommend(runs["pop"], Asked(3), Place.at(tmp_path))
    with pytest.raises(DatasetError, match="not the same checkpoint"):
        recommend(runs["random"], Asked(3), Place.at(tmp_path))


def test_shards_without_a_manifest_or_with_a_damaged_one_are_not_trusted(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    recommended = recommend(runs["pop"], Asked(3), Place.at(tmp_path))
    before = files(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(DatasetError, match=r"without recommendations\.json; add --overwrite"):
        recommend(runs["pop"], Asked(3), Place.at(tmp_path))
    for damaged in ("{", "[]", json.dumps({**recommended.model_dump(), "format_version": 2})):
        (tmp_path / MANIFEST).write_text(damaged)
        with pytest.raises(DatasetError, match=r"recommendations\.json cannot be read: .* add --overwrite"):
            recommend(runs["pop"], Asked(3), Place.at(tmp_path))
    recommend(runs["pop"], Asked(3, overwrite=True), Place.at(tmp_path))
    assert files(tmp_path) == before


def test_other_files_are_never_touched(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for to in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DatasetError, match=r"holds something that is not recommendations|is a file; name a folder"):
            recommend(runs["pop"], Asked(3, overwrite=True), Place.at(to))
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_a_score_that_is_no_number_is_told(tmp_path: Path, runs: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    from sibra_dist.models.baselines import Pop

    monkeypatch.setattr(Pop, "score", lambda self, users, items: (users @ items.T) / 0 * 0)
    with pytest.raises(SibraError, match=r"the score of Pop for user '\w+' and item '\w+' is not a number \(NaN\)"):
        recommend(runs["pop"], Asked(3), Place.at(tmp_path / "to"))


BAD_FILES = {
    "missing": ("nowhere.csv", None, "cannot be read: No such file or directory"),
    "folder": ("", None, "cannot be read: "),
    "no column": ("users.csv", b"user,age\nu1,3\n", r"has no column user_id; did you mean user\?"),
    "no header": ("users.tsv", b"", "has no column user_id; nothing is known here"),
    "not Parquet": ("users.parquet", b"user_id\nu1\n", "cannot be read: .*Check that it is of the kind that its name says"),
    "not text": ("users.txt", b"\xff\xfeu\x00", "cannot be read: .*Check that it is of the kind that its name says"),
    "ragged": ("users.csv", b"user_id,age\nu1,3\nu2\n", "cannot be read: .*Expected 2 columns"),
    "of strangers": ("users.txt", b"x\ny\n", "none of the 2 ids of .* is a user of the dataset, for example 'x'"),
    "empty": ("users.txt", b"", "none of the 0 ids of .* is a user of the dataset; check that file"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_cannot_be_used_is_told(runs: dict[str, RunFolder], tmp_path: Path, what: str) -> None:
    name, content, told = BAD_FILES[what]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=told):
        recommend(runs["pop"], Asked(3, users=str(tmp_path / name)), Place.at(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_pairs_must_be_a_table(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("u1 i1\n")
    with pytest.raises(SourceError, match=r"no table with the columns user_id and item_id: give a \.csv"):
        recommend(runs["pop"], Asked(3, exclude=str(tmp_path / "pairs.txt")), Place.at(tmp_path / "to"))
