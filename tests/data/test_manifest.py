import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.manifest import MANIFEST, FeatureSpec, Manifest, Shard, read_shard, read_verified_shard, verify_shard
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from tests.planted import write_planted

READERS = [verify_shard, read_shard, read_verified_shard]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_planted(tmp_path / "dataset", protocol="cold_item", shards=3)


def altered(folder: Path, **changes: Any) -> None:
    """Change fields of the manifest in a folder."""
    (folder / MANIFEST).write_text(json.dumps({**json.loads((folder / MANIFEST).read_text()), **changes}))


def fitted_shard(folder: Path, path: str) -> Shard:
    """A shard of something fitted."""
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"word": ["a", "b"], "weight": [1.0, 2.0]}), file)
    content = file.getvalue().to_pybytes()
    Place.at(folder).write(path, content)
    return Shard(path=path, rows=2, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_manifest_reads_back_equal(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert Manifest.read(str(tmp_path)) == Manifest.read(Place.at(tmp_path)) == manifest
    assert Manifest.read(tmp_path).digest == manifest.digest


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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda shards: shards.pop("items"), "it lists no shards of items"),
        (lambda shards: shards.update(ratings=[]), "it lists shards of ratings, which is no table of a dataset"),
        (lambda shards: shards.update({"fitted/items/plot": []}), "it lists shards of fitted/items/plot, which is no table"),
        (lambda shards: shards.update({"fitted/users/tags": []}), "it lists shards of fitted/users/tags, which is no table"),
    ],
)
def test_tables_that_are_missing_or_not_known_are_told(folder: Path, change: Callable[[Any], Any], told: str) -> None:
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    change(shards)
    altered(folder, shards=shards)
    with pytest.raises(DatasetError, match=f"manifest.json is damaged: {told}.*Prepare the dataset again"):
        Manifest.read(folder)


def test_what_was_fitted_belongs_to_the_dataset(folder: Path) -> None:
    without = Manifest.read(folder)
    shard = fitted_shard(folder, "fitted/items/cover/part-00000-00000000.parquet")
    manifest = without.model_copy(update={"shards": {**without.shards, "fitted/items/cover": (shard,)}})
    manifest.write(folder)
    assert Manifest.read(folder) == manifest
    assert [*manifest.all_shards()] == [*without.all_shards(), shard]
    assert manifest.digest != without.digest
    open_dataset(folder)
    (folder / shard.path).write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"fitted/items/cover/part-00000-00000000.parquet is damaged: 7 bytes"):
        open_dataset(folder)


def test_digest_is_of_what_the_dataset_says(folder: Path) -> None:
    manifest = Manifest.read(folder)
    of_the_making = {"name": "other", "package_version": "9", "config": {"a": 1}, "extends": manifest.digest}
    assert manifest.model_copy(update=of_the_making).digest == manifest.digest
    spec = manifest.item_features[1].model_copy(update={"encoder": {"type": "words"}})
    changes: list[dict[str, Any]] = [
        {"interaction_columns": ("weights",)},
        {"item_features": (manifest.item_features[0], spec)},
        {"counts": manifest.counts.model_copy(update={"test": 0})},
        {"shards": {**manifest.shards, "items": manifest.shards["items"][:1]}},
    ]
    digests = {manifest.model_copy(update=change).digest for change in changes}
    assert len(digests | {manifest.digest}) == len(changes) + 1


def test_only_the_first_code_may_be_out_of_the_vocabulary(folder: Path) -> None:
    kept = FeatureSpec(name="a", kind="category", size=2, vocabulary=(None, "x"), missing=0, unknown=3)
    assert FeatureSpec.model_validate_json(kept.model_dump_json()) == kept
    features = json.loads((folder / MANIFEST).read_text())["user_features"]
    features[0]["vocabulary"][1] = None
    altered(folder, user_features=features)
    with pytest.raises(DatasetError, match=r"manifest.json is damaged: user_features.0.vocabulary: only code 0 may stand for"):
        Manifest.read(folder)


def test_columns_of_interactions_are_weights_and_times(folder: Path) -> None:
    altered(folder, interaction_columns=["weights", "moods"])
    with pytest.raises(DatasetError, match=r"manifest.json is damaged: interaction_columns.1: "):
        Manifest.read(folder)


def test_columns_of_a_shard_are_read(folder: Path) -> None:
    shard = Manifest.read(folder).shards["items"][1]
    whole = pq.read_table(folder / shard.path)
    for read in (read_shard, read_verified_shard):
        assert read(folder, shard).equals(whole)
        assert read(str(folder), shard, ["id", "split"]).equals(whole.select(["id", "split"]))


@pytest.mark.parametrize("check", READERS)
def test_shard_that_is_gone_is_told_by_every_reader(folder: Path, check: Callable[[Path, Shard], object]) -> None:
    shard = Manifest.read(folder).shards["items"][1]
    (folder / shard.path).unlink()
    with pytest.raises(DatasetError, match=f"{shard.path} cannot be read: No such file or directory. Copy the dataset again"):
        check(folder, shard)


@pytest.mark.parametrize("check", READERS)
def test_shard_that_is_no_parquet_is_told_by_every_reader(folder: Path, check: Callable[[Path, Shard], object]) -> None:
    shard = Manifest.read(folder).shards["items"][1]
    (folder / shard.path).write_bytes(bytes(shard.bytes))
    with pytest.raises(DatasetError, match=f"{shard.path} is damaged: .*Copy the dataset again or prepare it again"):
        check(folder, shard)


@pytest.mark.parametrize("check", [verify_shard, read_verified_shard])
def test_shard_altered_by_one_byte_is_told_by_those_that_verify(folder: Path, check: Callable[[Path, Shard], object]) -> None:
    shard = Manifest.read(folder).shards["items"][1]
    content = bytearray((folder / shard.path).read_bytes())
    content[4] ^= 1
    (folder / shard.path).write_bytes(content)
    with pytest.raises(DatasetError, match=f"{shard.path} is damaged: its content is not what the manifest's checksum says"):
        check(folder, shard)
