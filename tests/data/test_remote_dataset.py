"""A dataset in an object store is the same dataset as on a disk, and is downloaded once."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from sibra_dist.data.batches import Batches, ModalitySampling
from sibra_dist.data.cache import cache_folder, default_cache
from sibra_dist.data.dataset import Csr, Dataset, Entities, open_dataset
from sibra_dist.data.manifest import MANIFEST, Manifest
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from tests.object_store import ObjectStore
from tests.planted import copy_dataset, write_planted


@pytest.fixture
def local(tmp_path: Path) -> Path:
    # A seed for each test: the cache goes by content, and would know a dataset that another test has opened.
    seed = sum(map(ord, tmp_path.name))
    return write_planted(tmp_path / "dataset", columns=("weights", "times"), shards=3, seed=seed)


@pytest.fixture
def remote(local: Path, s3: str) -> Place:
    return copy_dataset(local, f"{s3}/some/dataset")


def downloads(store: ObjectStore) -> list[str]:
    """The keys that were read, one for each time."""
    return [found[1] for request in store.requests if (found := re.fullmatch(r"GET /[^/]+/some/dataset/(.+)\?", request))]


def tensors(dataset: Dataset) -> dict[str, torch.Tensor]:
    """Every tensor of a dataset, by where it stands."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, value: torch.Tensor | Csr | None) -> None:
        if isinstance(value, Csr):
            found[f"{name}.indptr"], found[f"{name}.indices"] = value.indptr, value.indices
        elif value is not None:
            found[name] = value

    def add_all(side: str, entities: Entities) -> None:
        for name in ("split", "histories", "weights", "times"):
            add(f"{side}.{name}", getattr(entities, name))
        for name, feature in entities.features.items():
            add(f"{side}.{name}.present", feature.present)
            add(f"{side}.{name}.values", feature.values)

    add_all("users", dataset.users)
    add_all("items", dataset.items)
    for split, (holders, held) in dataset.held_out.items():
        add(f"{split}.holders", holders)
        add(split, held)
    return found


def first_batch(dataset: Dataset) -> dict[str, object]:
    users = ModalitySampling(torch.ones(dataset.users.count, 2, dtype=torch.bool), 1)
    items = ModalitySampling(torch.ones(dataset.items.count, 3, dtype=torch.bool), 2)
    return dataclasses.asdict(Batches(dataset, users, items, seed=3, batch_size=50, negatives=4).batch(0, 0))


def test_dataset_in_an_object_store_is_the_one_on_the_disk(local: Path, remote: Place, tmp_path: Path) -> None:
    # A cache of its own, so that nothing comes from the arrays of the other.
    here, there = open_dataset(local), open_dataset(str(remote), tmp_path / "cache")
    assert str(there.place) == str(remote)
    assert there.manifest == here.manifest
    expected, found = tensors(here), tensors(there)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert there.ids("items").to_pylist() == here.ids("items").to_pylist()
    for mine, theirs in zip(first_batch(here).values(), first_batch(there).values(), strict=True):
        if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
            assert torch.equal(mine, theirs)
        else:
            assert mine == theirs


def test_every_shard_is_downloaded_once(remote: Place, object_store: ObjectStore) -> None:
    object_store.requests.clear()
    manifest = open_dataset(remote).manifest
    assert sorted(downloads(object_store)) == sorted([MANIFEST, *(shard.path for shard in manifest.all_shards())])


def test_a_warm_cache_downloads_no_shard(remote: Place, object_store: ObjectStore) -> None:
    before = tensors(open_dataset(remote))
    object_store.requests.clear()
    after = tensors(open_dataset(remote))
    assert downloads(object_store) == [MANIFEST]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_that_was_not_checked_yet_is_checked(local: Path, remote: Place, object_store: ObjectStore) -> None:
    open_dataset(local)
    object_store.requests.clear()
    manifest = open_dataset(remote).manifest
    assert sorted(downloads(object_store)) == sorted([MANIFEST, *(shard.path for shard in manifest.all_shards())])


def test_damaged_cache_is_made_again_from_the_object_store(remote: Place) -> None:
    before = open_dataset(remote).users.histories.indices.clone()
    cached = cache_folder(Manifest.read(remote), default_cache()) / "histories.users.indices.bin"
    cached.write_bytes(cached.read_bytes()[:-4])
    assert torch.equal(open_dataset(remote).users.histories.indices, before)


@pytest.mark.parametrize("table", ["histories/users", "rejected"])
def test_damaged_remote_shard_is_told(remote: Place, table: str) -> None:
    path = Manifest.read(remote).shards[table][0].path
    content = bytearray(remote.read(path))
    content[len(content) // 2] ^= 1
    remote.write(path, bytes(content))
    with pytest.raises(DatasetError, match=f"{remote}/{path} is damaged: its content is not what"):
        open_dataset(remote)


@pytest.mark.parametrize("opened_before", [False, True])
def test_remote_shard_cut_short_is_told(remote: Place, opened_before: bool) -> None:
    if opened_before:
        open_dataset(remote)
    path = Manifest.read(remote).shards["items"][0].path
    remote.write(path, remote.read(path)[:-1])
    with pytest.raises(DatasetError, match=rf"{remote}/{path} is damaged: \d+ bytes where the manifest says"):
        open_dataset(remote)


@pytest.mark.parametrize("opened_before", [False, True])
def test_missing_remote_shard_is_told(remote: Place, opened_before: bool) -> None:
    if opened_before:
        open_dataset(remote)
    path = Manifest.read(remote).shards["items"][0].path
    remote.delete([path])
    with pytest.raises(DatasetError, match=f"{remote}/{path} cannot be read: No such file or directory. Copy the dataset"):
        open_dataset(remote)


def test_shards_that_may_not_be_read_are_told(remote: Place, object_store: ObjectStore) -> None:
    object_store.answer = lambda request: "403 Forbidden" if "parquet" in request else None
    with pytest.raises(DatasetError, match=f"{remote}/users/part-00000-.* cannot be read: .*ACCESS_DENIED"):
        open_dataset(remote)


def test_remote_folder_without_manifest_is_no_dataset(s3: str) -> None:
    with pytest.raises(DatasetError, match=f"{s3}/nothing is not a dataset: it has no manifest.json"):
        open_dataset(f"{s3}/nothing")
