"""Synthetic datasets are what they say, are like those of the preparation, and hold a structure that can be learned."""

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sibra_dist.config import validate
from sibra_dist.data import synthetic
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.manifest import Manifest
from sibra_dist.data.storage import Place
from sibra_dist.data.synthetic import SyntheticConfig, synthesize
from sibra_dist.errors import ConfigError, DatasetError
from sibra_dist.etl.checks import Files, _unlearned, check_shard

SMALL = {"users": 1_000, "items": 500, "interactions": 30_000}


def small(**options: Any) -> SyntheticConfig:
    return validate(SyntheticConfig, {**SMALL, **options}, "synthesize")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table has several shards, made of several blocks."""
    monkeypatch.setattr(synthetic, "PAIRS_AT_ONCE", 3_000)
    monkeypatch.setattr(synthetic, "SHARD_PAIRS", 8_000)
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 20_000)


def pairs(dataset: Dataset, matrix: Any, rows: torch.Tensor) -> set[tuple[int, int]]:
    owners = torch.repeat_interleave(rows, matrix.lengths())
    return set(zip(owners.tolist(), matrix.indices.tolist(), strict=True))


def split_pairs(dataset: Dataset) -> dict[str, set[tuple[int, int]]]:
    found = {"train": pairs(dataset, dataset.users.histories, torch.arange(dataset.users.count))}
    return found | {split: pairs(dataset, held, holders) for split, (holders, held) in dataset.held_out.items()}


@pytest.mark.parametrize(
    "options", [{}, {"cold_items": 0.1}, {"evaluated_users": 40}, {"cold_items": 0.2, "evaluated_users": 7}]
)
def test_every_interaction_is_there_once_and_counted(tmp_path: Path, options: dict[str, Any]) -> None:
    manifest = synthesize(small(**options), tmp_path / "dataset")
    dataset = open_dataset(tmp_path / "dataset")
    found = split_pairs(dataset)
    counts = manifest.counts
    assert {split: len(there) for split, there in found.items()} == {
        "train": counts.train,
        "validation": counts.validation,
        "test": counts.test,
    }
    assert dataset.users.histories.nnz == counts.train  # no pair twice
    assert len(set.union(*found.values())) == sum(map(len, found.values())) == manifest.records.kept
    assert manifest.records.kept + sum(manifest.records.filtered.values()) == SMALL["interactions"]
    by_item = pairs(dataset, dataset.items.histories, torch.arange(dataset.items.count))
    assert {(user, item) for item, user in by_item} == found["train"]
    if (evaluated := options.get("evaluated_users")) is not None:
        assert len({user for split in ("validation", "test") for user, _ in found[split]}) <= evaluated
    else:
        assert not manifest.records.filtered


def test_warm_splits_take_the_same_share_of_each_user(tmp_path: Path) -> None:
    synthesize(small(held_out=0.2), tmp_path / "dataset")
    dataset = open_dataset(tmp_path / "dataset")
    held = {split: torch.zeros(1_000, dtype=torch.long) for split in ("validation", "test")}
    for split, (holders, rows) in dataset.held_out.items():
        held[split][holders.long()] = rows.lengths()
    total = dataset.users.histories.lengths() + held["validation"] + held["test"]
    assert torch.equal(held["validation"], held["test"])
    expected = torch.minimum(torch.ceil(total * 0.2 - 1e-9).long(), (total - 1) // 2)
    assert torch.equal(held["test"], expected)
    # None has the popular ones.
    popularity = dataset.items.histories.lengths().double()
    means = [float(popularity[rows.indices.long()].mean()) for _, rows in dataset.held_out.values()]
    assert means[0] == pytest.approx(means[1], rel=0.05)


def test_cold_items_have_no_history(tmp_path: Path) -> None:
    synthesize(small(cold_items=0.1), tmp_path / "dataset")
    items = open_dataset(tmp_path / "dataset").items
    assert torch.bincount(items.split).tolist() == [400, 50, 50]
    assert not items.histories.lengths()[items.split > 0].any()


@pytest.mark.parametrize("options", [{}, {"cold_items": 0.1, "missing": 0.4}, {"user_features": ["vector", "tags"]}])
def test_it_passes_the_checks_of_the_preparation(tmp_path: Path, options: dict[str, Any]) -> None:
    manifest = synthesize(small(**options), tmp_path / "dataset")
    assert all(len(manifest.shards[table]) > 1 for table in ("users", "items", "histories/users", "histories/items"))
    specs = {"users": manifest.user_features, "items": manifest.item_features}
    starts = {}
    for table, shards in manifest.shards.items():
        starts[table] = tuple(accumulate((shard.rows for shard in shards), initial=0))
        if table.startswith("held_out/"):
            firsts = [pq.read_table(tmp_path / "dataset" / shard.path)["index"][0].as_py() for shard in shards]
            starts[table] = (0, *firsts[1:], manifest.counts.users)
    files = Files(Place.at(tmp_path / "dataset"), manifest.shards, starts, specs)
    shown: dict[str, list[dict[str, Any]]] = {"users": [], "items": []}
    for table, shards in manifest.shards.items():
        for number in range(len(shards)):
            faults, summary = check_shard(files, table, number)
            assert not faults
            if table in shown:
                shown[table].append(summary)
    for side, features in specs.items():
        assert not [fault for spec in features for fault in _unlearned(spec, shown[side])]


def test_features_are_missing_as_the_manifest_says(tmp_path: Path) -> None:
    manifest = synthesize(small(vector_size=7, vector_type="float16"), tmp_path / "dataset")
    dataset = open_dataset(tmp_path / "dataset")
    assert [spec.name for spec in manifest.item_features] == ["category", "tags", "numeric", "vector"]
    assert [spec.name for spec in manifest.user_features] == ["category", "numeric"]
    absent = []
    for entities in (dataset.users, dataset.items):
        for feature in entities.features.values():
            missing = int((~feature.present).sum())
            assert missing == feature.spec.missing
            assert 0.1 < missing / entities.count < 0.3
            absent.append(feature.present[:500])
    assert not any(torch.equal(one, other) for one, other in pairwise(absent))
    numbers = dataset.items.features["numeric"]
    assert isinstance(numbers.values, torch.Tensor)
    assert numbers.values[numbers.present].std(0).tolist() == pytest.approx([1, 1], abs=0.15)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = synthesize(small(), tmp_path / "one")
    # Blocks are a matter of memory alone.
    monkeypatch.setattr(synthetic, "PAIRS_AT_ONCE", 1_111)
    assert synthesize(small(), tmp_path / "two").digest == one.digest
    assert synthesize(small(seed=1), tmp_path / "three").digest != one.digest


def test_popularity_and_activity_are_uneven(tmp_path: Path) -> None:
    synthesize(small(users=4_000, items=2_000, interactions=100_000), tmp_path / "dataset")
    dataset = open_dataset(tmp_path / "dataset")
    for entities, low, high in ((dataset.users, 0.4, 0.75), (dataset.items, 0.4, 0.75)):
        lengths = entities.histories.lengths().sort(descending=True).values
        assert low < float(lengths[: len(lengths) // 5].sum() / lengths.sum()) < high


def test_what_is_there_is_not_made_again_and_not_overwritten_unasked(tmp_path: Path) -> None:
    first = synthesize(small(), tmp_path / "dataset")
    written = (tmp_path / "dataset" / "manifest.json").stat().st_mtime_ns
    assert synthesize(small(), tmp_path / "dataset") == first
    assert (tmp_path / "dataset" / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(DatasetError, match="add --overwrite"):
        synthesize(small(seed=1), tmp_path / "dataset")
    synthesize(small(seed=1), tmp_path / "dataset", overwrite=True)
    manifest = Manifest.read(tmp_path / "dataset")
    assert manifest.protocol.seed == 1
    there = {str(path.relative_to(tmp_path / "dataset")) for path in (tmp_path / "dataset").rglob("*") if path.is_file()}
    assert there == {"manifest.json", *(shard.path for shard in manifest.all_shards())}


def test_nothing_is_left_of_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic._Synthesis, "_write_items_histories", full)
    with pytest.raises(DatasetError, match=r"No space left on device\. Free some space"):
        synthesize(small(), tmp_path / "dataset")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"users": 10}, "users: input should be greater"),
        ({"interactions": 100}, "can have from 3000 to"),
        ({"interactions": 400_000}, "can have from 3000 to"),
        ({"item_features": ["colour"]}, "item_features"),
        ({"item_features": ["tags", "tags"]}, "names a feature twice"),
        ({"missing": 0.999}, "no training entity of the users shows the category"),
        ({"cold_items": 0.5}, "cold_items"),
    ],
)
def test_what_cannot_be_is_one_error(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        synthesize(small(**options), tmp_path / "dataset")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("users", "items", "interactions"), [(100, 100, 300), (100, 100, 5_000), (300, 30_000, 20_000)])
def test_extreme_shapes(tmp_path: Path, users: int, items: int, interactions: int) -> None:
    config = small(users=users, items=items, interactions=interactions, missing=0, user_features=[], item_features=["vector"])
    manifest = synthesize(config, tmp_path / "dataset")
    dataset = open_dataset(tmp_path / "dataset")
    assert sum(map(len, split_pairs(dataset).values())) == interactions == manifest.records.kept


def test_the_structure_can_be_learned(tmp_path: Path) -> None:
    """What users of a group take is of few groups, and the vectors of a group are alike."""
    synthesize(small(missing=0), tmp_path / "dataset")
    dataset = open_dataset(tmp_path / "dataset")
    group_of_user = dataset.users.features["category"].values
    group_of_item = dataset.items.features["category"].values
    owners = torch.repeat_interleave(dataset.users.histories.lengths())
    own = group_of_user[owners] == group_of_item[dataset.users.histories.indices.long()]
    assert 0.55 < float(own.float().mean()) < 0.7
    vectors = dataset.items.features["vector"].values.numpy()
    centres = np.stack([vectors[group_of_item.numpy() == group].mean(0) for group in range(int(group_of_item.max()) + 1)])
    nearest = np.argmin(((vectors[:, None] - centres) ** 2).sum(-1), axis=1)
    assert (nearest == group_of_item.numpy()).mean() > 0.9
