import multiprocessing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from sibra_dist.data.cache import cache_folder, default_cache
from sibra_dist.data.dataset import SPLITS, Csr, HeldOut, open_dataset
from sibra_dist.data.manifest import Manifest
from sibra_dist.errors import DatasetError
from tests.planted import planted_time, planted_weight, write_planted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_planted(tmp_path / "dataset", protocol="cold_item", shards=3)


def shard_file(folder: Path, table: str, number: int) -> Path:
    """The file of a shard, whatever its content made it be called."""
    (path,) = (folder / table).glob(f"part-{number:05}-????????.parquet")
    return path


def rows_of(folder: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a table of three shards."""
    return [row for number in range(3) for row in pq.read_table(shard_file(folder, table, number)).to_pylist()]


def test_arrays_equal_the_shards(folder: Path) -> None:
    dataset = open_dataset(folder)
    for side, entities, other in (("users", dataset.users, "items"), ("items", dataset.items, "users")):
        rows = [row[other] for row in rows_of(folder, f"histories/{side}")]
        assert [
            entities.histories.indices[slice(*entities.histories.indptr[i : i + 2])].tolist() for i in range(entities.count)
        ] == [row or [] for row in rows]
    items = rows_of(folder, "items")
    tags, cover = dataset.items.features["tags"], dataset.items.features["cover"]
    for row in items:
        index = row["index"]
        assert bool(tags.present[index]) == (row["tags"] is not None)
        assert isinstance(tags.values, Csr)
        assert tags.values.gather(torch.tensor([index]))[0].tolist() == (row["tags"] or [])
        assert bool(cover.present[index]) == (row["cover"] is not None)
        assert isinstance(cover.values, torch.Tensor)
        assert cover.values[index].tolist() == (row["cover"] or [0.0] * 6)
    assert dataset.ids("items").to_pylist() == [row["id"] for row in items]


def test_candidates_are_the_splits_own_items_in_item_cold_start(folder: Path) -> None:
    dataset = open_dataset(folder)
    splits = [row["split"] for row in rows_of(folder, "items")]
    assert dataset.candidates("test").tolist() == [i for i, split in enumerate(splits) if split == "test"]
    assert dataset.training_items.tolist() == [i for i, split in enumerate(splits) if split == "train"]


def test_all_items_are_candidates_otherwise_and_the_past_is_masked(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol="random"))
    assert dataset.candidates("test").tolist() == list(range(80))
    holders, held = dataset.held_out["validation"]
    users = torch.tensor([3, 17])
    masked = {
        (row, item)
        for rows, items in dataset.masked("test", users)
        for row, item in zip(rows.tolist(), items.tolist(), strict=True)
    }
    expected = set()
    for row, user in enumerate(users.tolist()):
        expected |= {(row, item) for item in dataset.users.histories.gather(torch.tensor([user]))[0].tolist()}
        expected |= {(row, item) for item in held.gather(torch.nonzero(holders == user).flatten())[0].tolist()}
    assert masked == expected
    assert len(masked) == 2 * (12 - 2)  # all of a user's items but the two that are tested


@pytest.mark.parametrize("split", ["validation", "test"])
def test_all_items_are_candidates_in_user_cold_start_and_nothing_is_masked(tmp_path: Path, split: HeldOut) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol="cold_user"))
    assert (dataset.manifest.protocol.cold_users, dataset.manifest.protocol.cold_items) == (True, False)
    assert dataset.candidates(split).tolist() == list(range(80))
    assert dataset.training_items.tolist() == list(range(80))
    holders, held = dataset.held_out[split]
    assert holders.tolist() == torch.nonzero(dataset.users.split == SPLITS.index(split)).flatten().tolist()
    assert len(holders) == 6
    assert held.lengths().tolist() == [12] * 6
    assert [rows.numel() for rows, _ in dataset.masked(split, holders.long())] == [0] * (1 if split == "validation" else 2)
    warm = torch.nonzero(dataset.users.split == 0).flatten()
    assert dataset.users.histories.lengths(warm).tolist() == [12] * 48


@pytest.mark.parametrize("split", ["validation", "test"])
def test_cold_users_are_ranked_cold_items_when_both_are_split(tmp_path: Path, split: HeldOut) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol="cold_both", users=200))
    assert (dataset.manifest.protocol.cold_users, dataset.manifest.protocol.cold_items) == (True, True)
    number = SPLITS.index(split)
    own = torch.nonzero(dataset.items.split == number).flatten().tolist()
    assert len(own) == 8
    assert dataset.candidates(split).tolist() == own
    assert dataset.training_items.tolist() == torch.nonzero(dataset.items.split == 0).flatten().tolist()
    holders, held = dataset.held_out[split]
    assert len(holders) > 5
    assert set(dataset.users.split[holders.long()].tolist()) == {number}
    assert set(held.indices.tolist()) <= set(own)
    assert sum(rows.numel() for rows, _ in dataset.masked(split, holders.long())) == 0


def test_weights_and_times_stand_beside_the_histories(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", columns=("weights", "times"), shards=3))
    users, items = dataset.users.histories, dataset.items.histories
    pairs = list(zip(torch.repeat_interleave(users.lengths()).tolist(), users.indices.tolist(), strict=True))
    transposed = list(zip(items.indices.tolist(), torch.repeat_interleave(items.lengths()).tolist(), strict=True))
    assert sorted(pairs) == sorted(transposed)
    assert (items.lengths() == 0).any()  # such a row is null in the shards
    assert dataset.users.weights is not None
    assert dataset.items.weights is not None
    assert dataset.users.times is not None
    assert dataset.users.weights.dtype == dataset.items.weights.dtype == torch.float32
    assert dataset.users.times.dtype == torch.int64
    assert dataset.users.weights.tolist() == [planted_weight(*pair) for pair in pairs]
    assert dataset.items.weights.tolist() == [planted_weight(*pair) for pair in transposed]
    assert dataset.users.times.tolist() == [planted_time(*pair) for pair in pairs]
    assert dataset.items.times is None


@pytest.mark.parametrize("columns", [(), ("weights",), ("times",)])
def test_a_dataset_may_have_weights_or_times_or_neither(tmp_path: Path, columns: tuple[Any, ...]) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", columns=columns))
    assert dataset.manifest.interaction_columns == columns
    assert (dataset.users.weights is not None) == (dataset.items.weights is not None) == ("weights" in columns)
    assert (dataset.users.times is not None) == ("times" in columns)


def test_gather_takes_any_rows_in_any_order() -> None:
    matrix = Csr(torch.tensor([0, 2, 2, 5]), torch.tensor([4, 7, 1, 2, 3], dtype=torch.int32))
    columns, starts = matrix.gather(torch.tensor([2, 1, 0, 2]))
    assert columns.tolist() == [1, 2, 3, 4, 7, 1, 2, 3]
    assert starts.tolist() == [0, 3, 3, 5]
    empty, starts = matrix.gather(torch.tensor([], dtype=torch.int64))
    assert empty.tolist() == starts.tolist() == []


def test_second_opening_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_dataset(folder)
    monkeypatch.setattr("sibra_dist.data.dataset._decode", None)
    assert open_dataset(folder).users.count == 60


def test_damaged_cache_is_made_again(folder: Path) -> None:
    before = open_dataset(folder).users.histories.indices.clone()
    cached = cache_folder(Manifest.read(folder), default_cache()) / "histories.users.indices.bin"
    content = bytearray(cached.read_bytes())
    content[5] ^= 1
    cached.write_bytes(content)
    assert torch.equal(open_dataset(folder).users.histories.indices, before)


def test_writing_to_an_array_reaches_no_file(folder: Path) -> None:
    open_dataset(folder).users.histories.indices.zero_()
    assert open_dataset(folder).users.histories.indices.any()


def _open_and_sum(folder: Path, cache: Path, queue: "multiprocessing.Queue[int]") -> None:
    queue.put(int(open_dataset(folder, cache).users.histories.indices.sum()))


def test_processes_that_open_at_once_agree(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    queue: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=_open_and_sum, args=(folder, tmp_path / "fresh", queue)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(timeout=120)
    assert sums == {int(open_dataset(folder).users.histories.indices.sum())}


def test_folder_without_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is not a dataset: it has no manifest.json.*sibra-dist prepare"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("opened_before", [False, True])
def test_shard_altered_by_one_byte_is_told(folder: Path, opened_before: bool) -> None:
    if opened_before:
        open_dataset(folder)
    shard = shard_file(folder, "histories/users", 1)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match=r"histories/users/part-00001-\w{8}.parquet is damaged: its content"):
        open_dataset(folder)


@pytest.mark.parametrize("opened_before", [False, True])
def test_shard_cut_short_is_told(folder: Path, opened_before: bool) -> None:
    if opened_before:
        open_dataset(folder)
    shard = shard_file(folder, "items", 0)
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(DatasetError, match=r"items/part-00000-\w{8}.parquet is damaged: \d+ bytes where the manifest says \d+"):
        open_dataset(folder)


def test_shard_that_is_gone_is_told(folder: Path) -> None:
    shard_file(folder, "items", 0).unlink()
    with pytest.raises(DatasetError, match=r"items/part-00000-\w{8}.parquet cannot be read: No such file"):
        open_dataset(folder)


@pytest.mark.parametrize("table", ["rejected", "users"])
def test_a_shard_that_is_not_decoded_or_was_before_is_checked_too(folder: Path, table: str) -> None:
    open_dataset(folder)
    shard = shard_file(folder, table, 0)
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(DatasetError, match=rf"{table}/part-00000-\w{{8}}.parquet is damaged: its content"):
        open_dataset(folder)


def test_cache_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match=r"the cache .* cannot be used.*SIBRA_CACHE"):
        open_dataset(folder, tmp_path / "file" / "cache")
