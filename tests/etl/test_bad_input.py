"""Every kind of bad input is told with the file, the column and what to do."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from sibra_dist.config import validate
from sibra_dist.errors import ConfigError, SibraError, SourceError
from sibra_dist.etl.config import PrepareConfig, SparkConfig
from sibra_dist.etl.pipeline import prepare
from sibra_dist.etl.session import require_java

Small = Callable[..., PrepareConfig]
INTERACTIONS = {"path": "interactions.tsv", "rating": "rating", "time": "time"}


def interactions(**changes: object) -> dict[str, object]:
    return {"interactions": {**INTERACTIONS, **changes}}


def features(**table: object) -> dict[str, object]:
    return {"items": [{"id": "item", "path": "vectors.parquet", "format": "parquet", **table}]}


CASES: dict[str, tuple[dict[str, object], type[SibraError], tuple[str, ...]]] = {
    "missing file": (
        interactions(path="interaction.tsv"),
        SourceError,
        ("no file", "interaction.tsv", "did you mean interactions.tsv"),
    ),
    "missing column": (
        interactions(user="userid"),
        SourceError,
        ("interactions.tsv", "no column userid", "did you mean user_id"),
    ),
    "folder": (interactions(path="."), SourceError, ("is a folder",)),
    "unknown file system": (interactions(path="ftp://host/x"), SourceError, ("ftp://host/x", "s3://", "hdfs://")),
    "not parquet": (interactions(format="parquet"), SourceError, ("interactions.tsv", "cannot be read as Parquet")),
    "not npz": (
        features(format="npz", path="items.item", features={"look": {"kind": "vector"}}),
        SourceError,
        ("items.item", "npz"),
    ),
    "number as tags": (
        features(features={"look": {"kind": "numeric", "column": "vector"}}),
        SourceError,
        ("column vector of vectors.parquet has type array<double>", "numbers"),
    ),
    "vector as category": (
        features(features={"look": {"kind": "category", "column": "vector"}}),
        SourceError,
        ("a category is text",),
    ),
    "pattern in a vector": (
        features(features={"look": {"kind": "vector", "column": "vector", "pattern": "a"}}),
        SourceError,
        ("column vector of vectors.parquet", "`pattern` searches text"),
    ),
    "pattern that Java does not know": (
        features(
            path="items.item", format="atomic", id="item_id", features={"genres": {"kind": "tags", "pattern": "(?P<x>a)"}}
        ),
        ConfigError,
        ("items.item: feature genres", "(?P<x>a)", "no regular expression to Java"),
    ),
    "vector as id": (
        features(id="vector", features={"look": {"kind": "vector", "column": "vector"}}),
        SourceError,
        ("an id is",),
    ),
    "too many rejected": (
        {"max_rejected_share": 0.05},
        SourceError,
        (
            "7 of 81 records",
            "max_rejected_share is 0.05",
            "rating is not a finite number: 2 records, such as 'interactions.tsv: u01",
        ),
    ),
    "table of other ids": (
        features(id="vector_id", path="other.tsv", format="delimited", features={"colour": {"kind": "category"}}),
        SourceError,
        ("none of the 2 ids of other.tsv is in the interactions", "check the column `id`"),
    ),
    "unknown bound": (
        {"filters": {"users": {"within": {"agee": [1, 2]}}}},
        SourceError,
        ("agee", "did you mean age", "users.dat"),
    ),
    "nothing rated so high": (
        {"filters": {"min_rating": 9}},
        ConfigError,
        ("filters.min_rating leaves no interactions", "no rating is 9.0 or more"),
    ),
    "nobody within": ({"filters": {"users": {"within": {"age": [99, 100]}}}}, ConfigError, ("filters.users leaves no",)),
    "core too high": ({"filters": {"core": 50}}, ConfigError, ("filters.core leaves no", "which is 50")),
    "no training": (
        {"split": {"protocol": "cold_item", "validation": 0.45, "test": 0.5}},
        ConfigError,
        ("leaves no train", "change split.validation"),
    ),
}


@pytest.mark.spark
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told(spark: SparkSession, small: Small, tmp_path: Path, name: str) -> None:
    changes, kind, told = CASES[name]
    to = tmp_path / "out" / "dataset"
    with pytest.raises(kind) as raised:
        prepare(small(**changes), to)
    for words in told:
        assert words in str(raised.value)
    assert not to.parent.exists() or not list(to.parent.iterdir())


@pytest.mark.spark
def test_vectors_of_unequal_length_are_told(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    config = small(**features(features={"look": {"kind": "vector", "column": "vector"}}))
    rows = pa.table({"item": ["i01", "i02"], "vector": [[1.0, 2.0], [1.0]]})
    pq.write_table(rows, Path(config.source) / "vectors.parquet")
    with pytest.raises(SourceError, match=re.escape("1 (1 rows, such as id i02), 2 (1 rows, such as id i01)")):
        prepare(config, tmp_path / "dataset")


@pytest.mark.spark
def test_damaged_parquet_is_told(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    config = small(**features(features={"look": {"kind": "vector", "column": "vector"}}))
    path = Path(config.source) / "vectors.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"vectors\.parquet cannot be read: it is damaged"):
        prepare(config, tmp_path / "dataset")


@pytest.mark.spark
def test_archive_with_other_arrays_is_told(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    config = small(**features(format="npz", path="look.npz", features={"look": {"kind": "vector"}}))
    np.savez(Path(config.source) / "look.npz", ids=np.arange(3), vector=np.ones((3, 2)))
    with pytest.raises(SourceError, match=r"look\.npz has no column vectors.*did you mean vector\?"):
        prepare(config, tmp_path / "dataset")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"encoding": "latin-7000"}, "latin-7000"),
        ({"encoding": "utf-16"}, "convert the file to utf-8"),
        ({"header": False}, "give their names"),
        ({"separator": ""}, "separator"),
        ({"encoding": "rot13"}, "utf-8 or latin-1"),
        ({"path": []}, "name at least one file"),
        ({"path": {"train": "a", "validation": "b", "test": []}}, "each of train, validation and test"),
    ],
)
def test_unusable_text_formats_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(PrepareConfig, {"name": "x", "interactions": {"path": "x.tsv", **changes}}, where="x.yaml")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"items": [{"path": "x", "id": "i", "features": {"Key": {"kind": "category"}}}]}, "'Key' cannot name a feature"),
        ({"items": [{"path": "x", "id": "i", "features": {n: {"kind": "tags"} for n in ("a", "A")}}]}, "defined twice"),
        (
            {"items": [{"path": "x", "id": "i", "features": {"a": {"kind": "tags", "column": ["b", "c"]}}}]},
            "read from one column",
        ),
        ({"items": [{"path": "x", "id": "i", "features": {"a": {"kind": "text", "column": []}}}]}, "at least one column"),
        ({"items": [{"path": "x", "id": "i", "features": {"a": {"kind": "tags", "pattern": "(b"}}}]}, "no regular expression"),
        (
            {"items": [{"path": "x", "id": "i", "features": {"a": {"kind": "tags", "pattern": "b{99999999999}"}}}]},
            "'b{99999999999}' is no regular expression",
        ),
        ({"items": [{"path": "x", "id": "i", "features": {"a": {"kind": "tags", "pattern": ""}}}]}, "at least 1 character"),
        ({"filters": {"users": {"within": {"age": [9, 1]}}}}, "begins above its end"),
        ({"filters": {"items": {"min_count": 5, "max_count": 2}}}, "max_count is below min_count"),
        ({"filters": {"duplicates": "sum"}}, "set interactions.weight"),
        ({"split": {"protocol": "temporal_user"}}, "set interactions.time"),
        ({"split": {"protocol": "fixed"}}, "needs to be told the split"),
        ({"split": {"seed": 1 << 70}}, "split.seed"),
        ({"history": {"max_length": 5, "keep": "latest"}}, "set interactions.time"),
    ],
)
def test_contradictions_are_told_before_anything_is_read(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        validate(PrepareConfig, {"name": "x", "interactions": {"path": "x.tsv"}, **changes}, where="x.yaml")


def test_old_or_absent_java_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(SibraError, match=r"no java on the PATH.*Install Java 17"):
        require_java()
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_402\"' >&2\n", encoding="utf-8")
    java.chmod(0o755)
    with pytest.raises(SibraError, match="is version 8"):
        require_java()


def test_settings_of_spark_are_typed() -> None:
    with pytest.raises(ConfigError, match="did you mean driver_memory"):
        validate(SparkConfig, {"driver_memroy": "1g"}, where="x.yaml")
