"""What cannot be read is told with the file, the reason and what to do; never passed over."""

import bz2
import gzip
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import orc
from pyspark.sql import SparkSession

from sibra_dist.errors import SourceError
from sibra_dist.etl.readers import column_names
from tests.etl.sources import pack, rows_of, table_of

pytestmark = pytest.mark.spark

LINES = "\n".join(["user\titem", *[f"u{place}\ti{random.Random(place).random()}" for place in range(20_000)]]).encode()
NAMED = {"header": ["user", "item"]}


def zeroed(content: bytes, place: float, length: int = 40) -> bytes:
    """Some bytes lost in the middle of a file."""
    start = int(place * len(content))
    return content[:start] + bytes(length) + content[start + length :]


def cut(content: bytes) -> bytes:
    return content[: len(content) * 3 // 4]


@pytest.mark.parametrize(
    ("ending", "damage", "reason"),
    [
        ("gz", cut, "Unexpected end"),
        ("gz", lambda content: zeroed(content, 0.4), ""),
        ("gz", lambda content: zeroed(content, 0.0), ""),
        ("gz", lambda content: content[:-6] + b"abcdef", "CRC"),
        ("zst", cut, "Truncated"),
        ("zst", lambda content: zeroed(content, 0.0), ""),
        ("bz2", cut, "Truncated"),
        ("bz2", lambda content: zeroed(content, 0.4), "bz2"),
        ("bz2", lambda content: zeroed(content, 0.0), "bz2"),
        ("lz4", cut, "Truncated"),
        ("lz4", lambda content: zeroed(content, 0.0), "LZ4"),
    ],
)
def test_damaged_text_is_told(
    spark: SparkSession, tmp_path: Path, ending: str, damage: Callable[[bytes], bytes], reason: str
) -> None:
    path = tmp_path / f"a b.tsv.{ending}"
    pack(path, LINES)
    path.write_bytes(damage(path.read_bytes()))
    told = rf"^{tmp_path}/a b\.tsv\.{ending} cannot be read: it is damaged \(.*{reason}.*\)\. Fetch it again$"
    for header in (["user", "item"], True):
        with pytest.raises(SourceError, match=told):
            rows_of(spark, table_of(tmp_path, "a*", header=header))


@pytest.mark.parametrize(("name", "write"), [("x.gz", gzip.compress), ("x.parquet", None)])
def test_damage_is_told_though_the_cluster_is_set_to_ignore_it(
    spark: SparkSession, tmp_path: Path, name: str, write: Callable[[bytes], bytes] | None
) -> None:
    path = tmp_path / name
    if write is None:
        pq.write_table(pa.table({"user": LINES.decode().split()}), path)
    else:
        path.write_bytes(write(LINES))
    path.write_bytes(zeroed(path.read_bytes(), 0.5))
    ignored = [f"spark.sql.files.ignore{files}Files" for files in ("Corrupt", "Missing")]
    for setting in ignored:
        spark.conf.set(setting, "true")
    try:
        with pytest.raises(SourceError, match=rf"{name} cannot be read: it is damaged"):
            rows_of(spark, table_of(tmp_path, name, format="parquet" if write is None else "delimited"), ["user"])
    finally:
        for setting in ignored:
            spark.conf.unset(setting)


def test_a_lost_block_of_bzip2_is_told(spark: SparkSession, tmp_path: Path) -> None:
    content = bytearray(bz2.compress(LINES * 3, 1))
    mark = content.index(bytes.fromhex("314159265359"), 10)
    content[mark] ^= 0xFF
    (tmp_path / "x.tsv.bz2").write_bytes(content)
    with pytest.raises(SourceError, match=r"x\.tsv\.bz2 cannot be read: it is damaged"):
        rows_of(spark, table_of(tmp_path, "x.tsv.bz2", **NAMED))


@pytest.mark.parametrize("name", ["x", "_x"])  # by Spark, and by Arrow
@pytest.mark.parametrize(("kind", "write"), [("Parquet", pq.write_table), ("ORC", orc.write_table)])
def test_damaged_columns_are_told(
    spark: SparkSession, tmp_path: Path, name: str, kind: str, write: Callable[[pa.Table, Path], None]
) -> None:
    path = tmp_path / name
    write(pa.table({"user": [f"{random.Random(place).random()}" for place in range(5000)]}), path)
    whole = path.read_bytes()
    files = table_of(tmp_path, name, format=kind.lower())
    path.write_bytes(zeroed(whole, 0.0, 2000))
    with pytest.raises(SourceError, match=rf"/{name} cannot be read: it is damaged \(\S.*\)\. Fetch it again"):
        rows_of(spark, files, ["user"])
    path.write_bytes(cut(whole))
    with pytest.raises(SourceError, match=rf"/{name} cannot be read as {kind}: \S"):
        rows_of(spark, files, ["user"])


def test_a_file_that_vanishes_is_told(spark: SparkSession, tmp_path: Path) -> None:
    for name in ("x.tsv", "x.tsv.bz2"):
        pack(tmp_path / name, LINES)
        files = table_of(tmp_path, name, **NAMED)
        (tmp_path / name).unlink()
        with pytest.raises(SourceError, match=rf"{name}.*(not there|does not exist)"):
            rows_of(spark, files)


@pytest.mark.parametrize("kind", ["delimited", "atomic", "parquet", "orc"])
def test_a_column_renamed_in_one_part_is_told(spark: SparkSession, tmp_path: Path, kind: str) -> None:
    for part, names in enumerate((["user", "item"], ["user", "item"], ["user", "itme"])):
        path = tmp_path / f"x-{part}"
        if kind in ("parquet", "orc"):
            {"parquet": pq.write_table, "orc": orc.write_table}[kind](pa.table({name: ["1"] for name in names}), path)
        else:
            path.write_text("\t".join(names) + "\n1\t2\n", encoding="utf-8")
    for use in (column_names, rows_of):
        with pytest.raises(SourceError, match=r"/x-2 has no column item, only user, itme; did you mean itme\?"):
            use(spark, table_of(tmp_path, "x-*", format=kind))


def test_columns_that_differ_among_parts_are_told(spark: SparkSession, tmp_path: Path) -> None:
    for name, heading in (("a", "user\titem"), ("b", "user\titem\r"), ("c", "item\tuser"), ("d", "user\titem\tx")):
        (tmp_path / name).write_text(f"{heading}\n1\t2\n", encoding="utf-8")
    assert len(rows_of(spark, table_of(tmp_path, ["a", "b"]))) == 2
    for name in ("c", "d"):
        with pytest.raises(SourceError, match=rf"/{name} has other columns than .*/a, or another order: 'item|user"):
            column_names(spark, table_of(tmp_path, ["a", name]))
    (tmp_path / "e").write_text("user\titem\tuser\n1\t2\t3\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"/e has 2 columns user; rename all but one"):
        rows_of(spark, table_of(tmp_path, "e"))
    for name, user in (("f", [1]), ("g", ["1"])):
        pq.write_table(pa.table({"user": user, "x": user}), tmp_path / name)
    with pytest.raises(SourceError, match=r"/g has column user as string, but .*/f as int64; write both as one type"):
        rows_of(spark, table_of(tmp_path, ["f", "g"], format="parquet"), ["user"])


@pytest.mark.parametrize(
    ("content", "table", "told"),
    [
        (b"", {}, r"/x has an empty first line, which should name its columns"),
        (b"\n1\t2\n", {}, r"/x has an empty first line"),
        (b"us\xff\titem\n", {}, r"/x is not utf-8 text: .*Set encoding to what it is, as latin-1"),
        (b"us\x81\titem\n", {"encoding": "cp1252"}, r"/x is not cp1252 text"),
        (b'"user\titem\n1\t2\n', {"quote": '"'}, r"/x has a first line whose quotes do not match"),
        (b"[\n1\n]\n", {"format": "json"}, r"/x does not begin with a JSON object; write one object a line"),
        (b"", {"format": "json"}, r"/x does not begin with a JSON object"),
        (b"user\titem\n", {"format": "parquet"}, r"/x cannot be read as Parquet"),
        (b"user\titem\n", {"format": "orc"}, r"/x cannot be read as ORC"),
        (b"user\titem\n", {"format": "npz"}, r"/x cannot be read as an npz archive"),
    ],
)
def test_files_that_are_something_else_are_told(
    spark: SparkSession, tmp_path: Path, content: bytes, table: dict[str, object], told: str
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(SourceError, match=told):
        rows_of(spark, table_of(tmp_path, "x", **table))


@pytest.mark.parametrize("name", ["x.zip", "x.tsv.xz"])
def test_text_that_is_packed_in_another_way_is_told(spark: SparkSession, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("x.tsv", LINES)
    for header in (["user", "item"], True):
        with pytest.raises(SourceError, match=rf"{name} is packed in a way that is not read here; unpack it"):
            rows_of(spark, table_of(tmp_path, name, header=header))


@pytest.mark.parametrize(
    ("kind", "path", "told"),
    [
        ("table", "nope", r"^table nope cannot be read: The table or view `nope` cannot be found\.[^\n]*$"),
        ("table", "no such", r"^table no such cannot be read: Syntax error[^\n]*$"),
        ("query", "SELEC 1", r"^query SELEC 1 cannot be read: Syntax error[^\n]*$"),
        ("query", "SELECT a\nFROM (SELECT 1 AS b)", r"^query SELECT a FROM .* cannot be read: .*`a` cannot be resolved[^\n]*$"),
        ("query", "SELECT * FROM parquet.`/nope`", r"cannot be read: Path does not exist[^\n]*$"),
        ("query", "DROP TABLE kept", r"cannot be read: Syntax error"),
        ("query", "SELECT 1); DROP TABLE kept; SELECT (2", r"cannot be read: Syntax error"),
        ("query", "SELECT user FROM kept", r"^query SELECT user FROM kept has no column item, only user$"),
        ("query", "SELECT 1 AS user, 2 AS user, 3 AS item", r"has 2 columns user; rename all but one"),
    ],
)
def test_what_spark_does_not_know_is_told_on_a_line(
    spark: SparkSession, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, path: str, told: str
) -> None:
    spark.createDataFrame([("1",)], "user string").createOrReplaceTempView("kept")
    with pytest.raises(SourceError, match=told):
        rows_of(spark, table_of(tmp_path, path, format=kind))
    assert spark.table("kept").count() == 1
    assert capfd.readouterr().err == ""
