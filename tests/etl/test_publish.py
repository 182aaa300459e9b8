"""A dataset is there whole, or not at all; and what was there before stays until it is replaced."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from sibra_dist.data.manifest import MANIFEST, Manifest, sha256_of
from sibra_dist.errors import DatasetError
from sibra_dist.etl import pipeline
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.pipeline import prepare

pytestmark = pytest.mark.spark

Small = Callable[..., PrepareConfig]
Put = Callable[[Path], Manifest]


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rerun_does_nothing_another_dataset_needs_overwrite_and_failure_leaves_all_as_it_was(
    small: Small, tmp_path: Path, put_small: Put, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, to = content(Path(small().source)), tmp_path / "place" / "dataset"
    put_small(to)
    before = content(to)
    with caplog.at_level(logging.INFO, logger="sibra_dist"):
        prepare(small(spark={"master": "local[1]"}), to, progress=lambda stage: pytest.fail(f"ran {stage}"))
    assert "nothing to do" in caplog.text

    other = small(split={"seed": 1})
    with pytest.raises(DatasetError, match="--overwrite"):
        prepare(other, to)
    assert content(to) == before

    def leaking(*given: object, **named: object) -> None:
        raise AssertionError("1 pairs of held_out/test are in histories/users")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "check_written", leaking)
        with pytest.raises(AssertionError, match="held_out/test"):
            prepare(other, to, overwrite=True)
    assert content(to) == before
    assert [path.name for path in to.parent.iterdir()] == ["dataset"]

    manifest = prepare(other, to, overwrite=True)
    assert manifest.protocol.seed == 1
    assert content(to) != before
    assert [path.name for path in to.parent.iterdir()] == ["dataset"]
    assert content(Path(small().source)) == source

    (Path(small().source) / "users.dat").write_text("u01::Ulm::20\n", encoding="latin-1")
    with pytest.raises(DatasetError, match="other files"):
        prepare(other, to)


def test_damaged_dataset_is_made_again_and_what_is_not_ours_stays(
    small: Small, tmp_path: Path, put_small: Put, caplog: pytest.LogCaptureFixture
) -> None:
    to = tmp_path / "dataset"
    manifest = put_small(to)
    (to / ".git").mkdir()
    (to / ".git" / "config").write_text("theirs", encoding="utf-8")
    (to / ".work-notes").write_text("theirs", encoding="utf-8")
    (to / "users" / "part-00007-01234567.parquet").write_text("a leftover", encoding="utf-8")
    before = content(to)
    (to / manifest.shards["users"][0].path).unlink()
    with caplog.at_level(logging.WARNING, logger="sibra_dist"):
        assert prepare(small(), to) == manifest
    assert "is damaged" in caplog.text
    assert content(to) == {name: digest for name, digest in before.items() if "01234567" not in name}


def test_folder_that_is_no_dataset_is_left_alone(small: Small, tmp_path: Path) -> None:
    to = tmp_path / "thesis"
    to.mkdir()
    (to / "chapter.txt").write_text("irreplaceable", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match="not a dataset"):
            prepare(small(), to, overwrite=overwrite)
    assert [path.name for path in to.iterdir()] == ["chapter.txt"]
    with pytest.raises(DatasetError, match="is a file"):
        prepare(small(), to / "chapter.txt")


def test_damaged_manifest_is_told_and_may_be_overwritten(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    to = tmp_path / "dataset"
    to.mkdir()
    (to / MANIFEST).write_text("{", encoding="utf-8")
    with pytest.raises(DatasetError, match="damaged"):
        prepare(small(), to)
    assert prepare(small(), to, overwrite=True).counts.users == 12
