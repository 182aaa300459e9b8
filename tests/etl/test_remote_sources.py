"""Sources in an object store, which Spark without connectors does not reach."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import orc
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from sibra_dist.data.storage import Place
from sibra_dist.errors import SourceError
from sibra_dist.etl import files as files_module
from sibra_dist.etl.config import TableConfig
from sibra_dist.etl.files import Files, fingerprints
from sibra_dist.etl.frames import file_column, spark_paths
from sibra_dist.etl.lines import read_lines
from tests.etl.sources import faults_of, rows_of, table_of, values_of
from tests.object_store import ObjectStore

pytestmark = pytest.mark.spark


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def columns(numbers: list[int]) -> pa.Table:
    return pa.table({"ids": numbers, "vectors": [[number / 2] for number in numbers]})


# What the files of a format hold, by the ends of their names.
CONTENTS: dict[str, Callable[[list[int]], dict[str, bytes]]] = {
    "delimited": lambda ns: {"tsv": "\n".join(["ids\tvectors", *[f"{n}\t{n / 2}" for n in ns]]).encode()},
    "atomic": lambda ns: {"item.gz": gzip.compress("\n".join(["ids:x\tvectors:y", *[f"{n}\t{n / 2}" for n in ns]]).encode())},
    "json": lambda ns: {"json": "\n".join(json.dumps({"ids": n, "vectors": n / 2}) for n in ns).encode()},
    "parquet": lambda ns: {"parquet": saved(lambda stream: pq.write_table(columns(ns), stream))},
    "orc": lambda ns: {"orc": saved(lambda stream: orc.write_table(columns(ns), stream))},
    "npz": lambda ns: {"npz": saved(lambda stream: np.savez(stream, ids=ns, vectors=np.array(ns)[:, None] / 2))},
    "npy": lambda ns: {
        "npy": saved(lambda stream: np.save(stream, np.array(ns)[:, None] / 2)),
        "ids": "\n".join(map(str, ns)).encode(),
    },
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_every_format_is_read_from_an_object_store(
    spark: SparkSession, bucket: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place.at(f"{bucket}/raw data")
    for part, numbers in (("a é/x", [1, 2]), ("b/x", [3]), ("b/_x", [4])):
        for ending, content in CONTENTS[kind](numbers).items():
            place.write(f"{part}.{ending}", content)
    ending = next(iter(CONTENTS[kind]([0])))
    files = table_of(place, f"*/*.{ending}", format=kind)
    assert files.names == (f"a é/x.{ending}", f"b/x.{ending}")
    assert files.uris == tuple(f"{place}/{name}" for name in files.names)
    rows = rows_of(spark, files, ["ids", "vectors"])
    text, vectors = kind in ("delimited", "atomic", "json"), kind in ("parquet", "orc", "npz", "npy")
    assert values_of(rows) == [(str(n) if text or kind == "npy" else n, [n / 2] if vectors else f"{n / 2}") for n in (1, 2, 3)]
    assert {row["file"] for row in rows} == set(files.names)
    found = fingerprints(spark, [files])
    assert [source.path for source in found] == sorted(name for _, name in files.inputs())
    monkeypatch.setattr(files_module, "HASHED_BY_DRIVER", 0)
    assert fingerprints(spark, [files]) == found


def test_text_of_an_object_store_has_the_same_records_and_faults(spark: SparkSession, bucket: str, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfuser\titem\r\na\t1\r\n\n\xff\t2\nb\t3\t4\nuser\titem\nc\t"
    Place.at(bucket).write("x.tsv", content)
    (tmp_path / "x.tsv").write_bytes(content)
    remote, local = [rows_of(spark, table_of(source, "x.tsv")) for source in (bucket, tmp_path)]
    assert sorted(map(str, remote)) == sorted(map(str, local))
    assert len(faults_of(remote)) == 2


def test_files_here_and_there_are_one_table(spark: SparkSession, bucket: str, tmp_path: Path) -> None:
    Place.at(bucket).write("x.tsv", b"user\titem\n1\t2\n")
    (tmp_path / "x.tsv").write_bytes(b"user\titem\n3\t4\n")
    rows = rows_of(spark, table_of(tmp_path, [f"{bucket}/x.tsv", "x.tsv"]))
    assert {row["file"]: tuple(row["values"]) for row in rows} == {f"{bucket}/x.tsv": ("1", "2"), "x.tsv": ("3", "4")}


def test_long_objects_are_read_in_parts(spark: SparkSession, bucket: str, object_store: ObjectStore) -> None:
    line = "x" * 1000 + "\t1\n"
    Place.at(bucket).write("x.tsv", ("user\titem\n" + line * 12_000).encode())
    files = table_of(bucket, "x.tsv")
    object_store.requests.clear()
    assert read_lines(spark, files).agg(F.count("*"), F.sum(F.length("text"))).first() == (12_001, 12_000 * 1002 + 9)
    read = [request for request in object_store.requests if request.startswith("GET") and request.endswith("x.tsv?")]
    assert len(read) > 2


def test_trouble_with_an_object_store_is_told(spark: SparkSession, bucket: str, object_store: ObjectStore) -> None:
    place = Place.at(bucket)
    place.write("x.tsv", b"user\titem\n1\t2\n")
    place.write("x.tsv.gz", gzip.compress(b"user\titem\n" + b"1\t2\n" * 1000)[:-20])
    with pytest.raises(SourceError, match=rf"there is no file {bucket}/y\.tsv; did you mean x\.tsv\?"):
        table_of(bucket, "y.tsv")
    with pytest.raises(
        SourceError, match=rf"{bucket}/x\.tsv\.gz cannot be read: it is damaged \(Truncated.*\)\. Fetch it again"
    ):
        rows_of(spark, table_of(bucket, "x.tsv.gz"))
    files = table_of(bucket, "x.tsv", header=["user", "item"])
    object_store.answer = lambda request: "403 Forbidden" if "x.tsv" in request else None
    with pytest.raises(SourceError, match=rf"{bucket}/x\.tsv cannot be read: .*(ACCESS_DENIED|AccessDenied|403)") as raised:
        rows_of(spark, files)
    assert "damaged" not in str(raised.value)
    with pytest.raises(SourceError, match=rf"{bucket}/x\.tsv cannot be read: \S"):
        table_of(bucket, "x.tsv")


def test_spark_reads_by_itself_what_hadoop_has_a_file_system_for(spark: SparkSession) -> None:
    def files(*uris: str) -> Files:
        return Files(TableConfig(path="x"), uris, uris)

    assert spark_paths(spark, files("s3://b/raw/x.tsv")) is None
    assert spark_paths(spark, files("hdfs://n:1/x[1].tsv", "/y")) == [r"hdfs://n:1/x\[1\].tsv", "file:///y"]
    hadoop = spark._jsc.hadoopConfiguration()
    hadoop.set("fs.s3a.impl", "org.apache.hadoop.fs.LocalFileSystem")
    try:
        assert spark_paths(spark, files("s3://b/raw/x.tsv", "s3a://b/y")) == ["s3a://b/raw/x.tsv", "s3a://b/y"]
        assert spark_paths(spark, files("s3://b/raw/_x.tsv")) is None
    finally:
        hadoop.unset("fs.s3a.impl")


@pytest.mark.parametrize(
    "named",
    [
        # Spark's own name of a file, where it lies, and what we call it.
        {
            "s3a://b/raw/a%20b/x+y.tsv": ("s3://b/raw/a b/x+y.tsv", "a b/x+y.tsv"),
            "s3a://b/other.tsv": ("s3://b/other.tsv", "s3://b/other.tsv"),
            "file:/c/d%25.tsv": ("/c/d%.tsv", "/c/d%.tsv"),
        },
        {"s3a://b/raw/x.tsv": ("s3://b/raw/x.tsv", "x.tsv"), "s3a://b/x.tsv": ("s3://b/x.tsv", "s3://b/x.tsv")},
        {"s3a://b/raw/x.tsv": ("s3a://b/raw/x.tsv", "x.tsv"), "file:///b/x.tsv": ("/b/x.tsv", "/b/x.tsv")},
        {"file:/raw/x.tsv": ("/raw/x.tsv", "x.tsv"), "file:///raw/raw/y": ("/raw/raw/y", "raw/y")},
        {"hdfs://n:8020/raw/x.tsv": ("hdfs:///raw/x.tsv", "x.tsv"), "hdfs://n:8020/y": ("hdfs:///y", "hdfs:///y")},
        {"hdfs://n:8020/raw/x.tsv": ("hdfs://n:8020/raw/x.tsv", "x.tsv"), "hdfs://m/y": ("hdfs://m/y", "hdfs://m/y")},
    ],
)
def test_files_that_spark_reads_have_our_names(spark: SparkSession, named: dict[str, tuple[str, str]]) -> None:
    uris, names = zip(*named.values(), strict=True)
    frame = spark.createDataFrame([((path,),) for path in named], "_metadata struct<file_path: string>")
    found = frame.select(file_column(Files(TableConfig(path="x"), uris, names))).collect()
    assert tuple(row.file for row in found) == names
