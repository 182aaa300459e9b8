"""Datasets in an object store, which cannot rename: made, replaced and kept as on a disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.manifest import Manifest
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from sibra_dist.etl import pipeline
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.pipeline import prepare
from tests.object_store import ObjectStore

pytestmark = pytest.mark.spark

Small = Callable[..., PrepareConfig]


def upload(source: Path, place: Place) -> None:
    for path in source.iterdir():
        place.write(path.name, path.read_bytes())


def test_dataset_of_an_object_store_is_that_of_the_disk(
    small: Small, small_dataset: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Manifest.read(small_dataset)
    upload(Path(small().source), Place.at(f"{bucket}/raw"))
    config, to = small(source=f"{bucket}/raw"), Place.at(f"{bucket}/datasets/small")
    remote = prepare(config, to)
    assert remote == local
    listed = sorted(shard.path for shard in remote.all_shards())
    assert to.files() == sorted(["manifest.json", *listed])
    assert open_dataset(str(to)).users.histories.nnz == local.counts.train

    prepare(config, to, progress=lambda stage: pytest.fail(f"ran {stage}"))
    other = small(source=f"{bucket}/raw", split={"seed": 1})
    with pytest.raises(DatasetError, match="--overwrite"):
        prepare(other, to)

    def leaking(*given: object, **named: object) -> None:
        # The new shards are there now, beside those of the dataset, which is as it was.
        assert len(to.files()) > len(listed) + 1
        raise AssertionError("pairs of held_out/test are in histories/users")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "check_written", leaking)
        with pytest.raises(AssertionError, match="held_out/test"):
            prepare(other, to, overwrite=True)
    assert Manifest.read(to) == local
    assert to.files() == sorted(["manifest.json", *listed])

    replaced = prepare(other, to, overwrite=True)
    assert Manifest.read(to) == replaced
    assert replaced.digest != local.digest
    assert to.files() == sorted(["manifest.json", *[shard.path for shard in replaced.all_shards()]])


def test_object_that_is_no_dataset_is_left_alone(small: Small, bucket: str) -> None:
    place = Place.at(f"{bucket}/thesis")
    place.write("chapter.txt", b"irreplaceable")
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match="not a dataset"):
            prepare(small(), place, overwrite=overwrite)
    assert place.files() == ["chapter.txt"]


def test_refused_upload_is_told_and_leaves_nothing(
    spark: SparkSession, small: Small, bucket: str, object_store: ObjectStore
) -> None:
    place = Place.at(f"{bucket}/datasets/small")

    def refuse(stage: str) -> None:
        if stage == "write":
            object_store.answer = lambda request: None if request.startswith("GET") else "403 Forbidden"

    with pytest.raises(DatasetError, match="cannot be written"):
        prepare(small(), place, progress=refuse)
    object_store.answer = None
    assert place.files() == []
