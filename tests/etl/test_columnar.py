"""Parquet and ORC, by Spark's readers and by Arrow's, which must give the same."""

import datetime
import decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import orc
from pyspark.sql import SparkSession

from sibra_dist.errors import SourceError
from sibra_dist.etl import columnar
from sibra_dist.etl.readers import column_names, read_table
from tests.etl.sources import rows_of, table_of, values_of

pytestmark = pytest.mark.spark

NOON = datetime.datetime(2024, 5, 31, 12)
# Of a column, the array, the type that Spark gives it and the value of its first row. The second is null.
BOTH = {
    "flag": (pa.array([True, None]), "boolean", True),
    "number": (pa.array([7, None], pa.int32()), "int", 7),
    "float": (pa.array([0.1, None]), "double", 0.1),
    "text": (pa.array(["é", None]), "string", "é"),
    "large": (pa.array(["é", None], pa.large_string()), "string", "é"),
    "bytes": (pa.array([b"x", None]), "binary", bytearray(b"x")),
    "date": (pa.array([NOON.date(), None]), "date", NOON.date()),
    "price": (pa.array([decimal.Decimal("1.50"), None]), "decimal(3,2)", decimal.Decimal("1.50")),
    "tags": (pa.array([["a", None], None]), "array<string>", ["a", None]),
    "vector": (pa.array([[1.5, 2.0], None], pa.list_(pa.float32(), 2)), "array<float>", [1.5, 2.0]),
    "nested": (pa.array([{"a": [1]}, None]), "struct<a:array<bigint>>", ([1],)),
    "map": (pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())), "map<string,bigint>", {"a": 1}),
}
PARQUET_ONLY = {
    "a.b`c": (pa.array([1, None]), "bigint", 1),
    "small": (pa.array([200, None], pa.uint8()), "smallint", 200),
    "huge": (pa.array([2**63, None], pa.uint64()), "decimal(20,0)", decimal.Decimal(2**63)),
    "coded": (pa.array(["x", None]).dictionary_encode(), "string", "x"),
    "local": (pa.array([NOON, None], pa.timestamp("us")), "timestamp_ntz", NOON),
    "nothing": (pa.nulls(2), "int", None),
}
# Spark cannot read these, and so cannot read a file that has one.
ARROW_ONLY = {
    "half": (pa.array([[np.float16(1.5)], None], pa.list_(pa.float16())), "array<float>", [1.5]),
    "nanoseconds": (pa.array([NOON, None], pa.timestamp("ns")), "timestamp_ntz", NOON),
}


@pytest.mark.parametrize("name", ["x", "_x"])  # by Spark, and by Arrow
@pytest.mark.parametrize("kind", ["parquet", "orc", "parquet that Spark cannot read"])
def test_columns_keep_their_types(
    spark: SparkSession, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"parquet": {**BOTH, **PARQUET_ONLY}, "orc": BOTH}.get(kind, {**BOTH, **PARQUET_ONLY, **ARROW_ONLY})
    content = pa.table({column: array for column, (array, _, _) in columns.items()})
    (orc.write_table if kind == "orc" else pq.write_table)(content, tmp_path / name)
    files = table_of(tmp_path, name, format=kind.split()[0])
    assert column_names(spark, files) == list(columns)
    frame = read_table(spark, files, list(columns))
    told = {field.name: field.dataType.simpleString() for field in frame.select("values.*").schema}
    assert told == {column: kind for column, (_, kind, _) in columns.items()}
    first, second = sorted(frame.collect(), key=lambda row: row["values"]["flag"] is None)
    assert {column: value for column, (_, _, value) in columns.items()} == first["values"].asDict()
    assert set(second["values"]) == {None}


@pytest.mark.parametrize("name", ["x", "_x"])
@pytest.mark.parametrize("kind", ["parquet", "orc"])
def test_times_are_the_same_moment_by_either_way(spark: SparkSession, tmp_path: Path, name: str, kind: str) -> None:
    times = pa.array([NOON], pa.timestamp("us", "UTC"))
    (orc.write_table if kind == "orc" else pq.write_table)(pa.table({"time": times}), tmp_path / name)
    spark.conf.set("spark.sql.session.timeZone", "UTC")
    try:
        frame = read_table(spark, table_of(tmp_path, name, format=kind), ["time"])
        assert frame.selectExpr("unix_seconds(values.time)").first() == (NOON.replace(tzinfo=datetime.UTC).timestamp(),)
    finally:
        spark.conf.unset("spark.sql.session.timeZone")


def test_files_of_many_blocks_are_read_whole(spark: SparkSession, tmp_path: Path) -> None:
    numbers = np.arange(3 * columnar.ROWS + 1)
    pq.write_table(pa.table({"x": numbers}), tmp_path / "_x.parquet", row_group_size=5000)
    orc.write_table(pa.table({"x": numbers}), tmp_path / "_x.orc", stripe_size=1 << 10)
    assert orc.ORCFile(tmp_path / "_x.orc").nstripes > 1
    for kind in ("parquet", "orc"):
        frame = read_table(spark, table_of(tmp_path, f"_x.{kind}", format=kind), ["x"])
        assert sorted(row.x for row in frame.select("values.x").collect()) == numbers.tolist()


def test_parts_may_have_their_columns_in_another_order_and_more_of_them(spark: SparkSession, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [1], "item": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [0.5], "item": ["b"], "user": [2]}), tmp_path / "b.parquet")
    assert values_of(rows_of(spark, table_of(tmp_path, "*.parquet", format="parquet"))) == [(1, "a"), (2, "b")]


def test_names_that_differ_in_capitals_are_two_columns(spark: SparkSession, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [1], "User": [2], "item": [3]}), tmp_path / "x.parquet")
    files = table_of(tmp_path, "x.parquet", format="parquet")
    assert values_of(rows_of(spark, files, ["User", "item"])) == [(2, 3)]
    with pytest.raises(SourceError, match="no column ITEM"):
        read_table(spark, files, ["ITEM"])


def test_a_type_that_is_not_read_is_told(spark: SparkSession, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [1], "when": pa.array([1], pa.time32("ms"))}), tmp_path / "x.parquet")
    files = table_of(tmp_path, "x.parquet", format="parquet")
    assert values_of(rows_of(spark, files, ["user"])) == [(1,)]
    with pytest.raises(
        SourceError, match=r"column when of .*x\.parquet has type time32\[ms\], which is not read here; write it as"
    ):
        rows_of(spark, files, ["when"])
