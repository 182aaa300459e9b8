import json
import multiprocessing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from sibra_dist.data.cache import cache_folder, default_cache
from sibra_dist.data.dataset import Csr, open_dataset
from sibra_dist.data.manifest import MANIFEST, Manifest
from sibra_dist.errors import DatasetError
from tests.planted import write_planted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_planted(tmp_path / "dataset", protocol="cold_item", shards=3)


def test_arrays_equal_the_shards(folder: Path) -> None:
    dataset = open_dataset(folder)
    for side, entities, other in (("users", dataset.users, "items"), ("items", dataset.items, "users")):
        rows = [
            row
            for number in range(3)
            for row in pq.read_table(folder / f"histories/{side}/part-{number:05}.parquet")[other].to_pylist()
        ]
        assert [
            entities.histories.indices[slice(*entities.histories.indptr[i : i + 2])].tolist() for i in range(entities.count)
        ] == [row or [] for row in rows]
    items = [row for number in range(3) for row in pq.read_table(folder / f"items/part-{number:05}.parquet").to_pylist()]
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
    splits = [row["split"] for n in range(3) for row in pq.read_table(folder / f"items/part-{n:05}.parquet").to_pylist()]
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
    context = multiprocessing.get_context("spawn")
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
    shard = folder / "histories/users/part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match=r"histories/users/part-00001.parquet is damaged: its content"):
        open_dataset(folder)


@pytest.mark.parametrize("opened_before", [False, True])
def test_shard_cut_short_is_told(folder: Path, opened_before: bool) -> None:
    if opened_before:
        open_dataset(folder)
    shard = folder / "items/part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(DatasetError, match=r"items/part-00000.parquet is damaged: \d+ bytes where the manifest says \d+"):
        open_dataset(folder)


def test_shard_that_is_gone_is_told(folder: Path) -> None:
    (folder / "items/part-00000.parquet").unlink()
    with pytest.raises(DatasetError, match=r"items/part-00000.parquet cannot be read: No such file"):
        open_dataset(folder)


def test_newer_format_is_refused(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**values, "format_version": 2, "something": "new"}))
    with pytest.raises(DatasetError, match=r"format version 2, but this sibra-dist reads up to 1. Install a newer"):
        open_dataset(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 1}'])
def test_damaged_manifest_is_told(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DatasetError, match=r"manifest.json is damaged"):
        open_dataset(folder)


def test_manifest_reads_back_equal(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert Manifest.read(tmp_path).digest == manifest.digest


def test_cache_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match=r"the cache .* cannot be used.*SIBRA_CACHE"):
        open_dataset(folder, tmp_path / "file" / "cache")
