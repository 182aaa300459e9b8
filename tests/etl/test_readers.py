"""Readers: whatever a table is written as, every record of it arrives, the same from Spark's readers and from Arrow's."""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import orc
from pyspark.sql import SparkSession

from sibra_dist.errors import SourceError
from sibra_dist.etl.files import fingerprints
from sibra_dist.etl.readers import READERS, column_names, read_table, split_fields
from tests.etl.sources import Values, faults_of, pack, rows_of, table_of, values_of

pytestmark = pytest.mark.spark


def write_lines(folder: Path, ending: str, lines: Callable[[Sequence[int]], Sequence[str]]) -> str:
    for part, numbers in enumerate(([1, 2], [3])):
        (folder / f"look-{part}.{ending}").write_text("\n".join(lines(numbers)), encoding="utf-8")
    return f"look-*.{ending}"


def write_columns(folder: Path, ending: str, write: Callable[[pa.Table, str], None]) -> str:
    for part, numbers in enumerate(([1, 2], [3])):
        write(pa.table({"item": numbers, "look": [number / 2 for number in numbers]}), str(folder / f"look-{part}.{ending}"))
    return f"look-*.{ending}"


def write_arrays(folder: Path, ending: str) -> str:
    for part, numbers in enumerate(([1, 2], [3])):
        vectors = np.array([[number / 2] for number in numbers])
        if ending == "npz":
            np.savez(folder / f"look-{part}.npz", ids=np.array(numbers), vectors=vectors)
        else:
            np.save(folder / f"look-{part}.npy", vectors)
            (folder / f"look-{part}.ids").write_text("".join(f"{number}\n" for number in numbers), encoding="utf-8")
    return f"look-*.{ending}"


# What writes the items 1, 2 and 3 with the numbers 0.5, 1 and 1.5, in two files where there are files; gives the path.
WRITERS: dict[str, Callable[[Path], str]] = {
    "delimited": lambda folder: write_lines(folder, "csv", lambda numbers: ["item;look", *[f"{n};{n / 2}" for n in numbers]]),
    "atomic": lambda folder: write_lines(
        folder, "item", lambda numbers: ["item:token\tlook:float", *[f"{n}\t{n / 2}" for n in numbers]]
    ),
    "json": lambda folder: write_lines(folder, "json", lambda numbers: [f'{{"item": {n}, "look": {n / 2}}}' for n in numbers]),
    "parquet": lambda folder: write_columns(folder, "parquet", pq.write_table),
    "orc": lambda folder: write_columns(folder, "orc", orc.write_table),
    "npz": lambda folder: write_arrays(folder, "npz"),
    "npy": lambda folder: write_arrays(folder, "npy"),
    "table": lambda folder: "look",
    "query": lambda folder: "SELECT *, item + 1 AS next FROM look -- all of it\n;",
}
TEXTS: list[Values] = [("1", "0.5"), ("2", "1.0"), ("3", "1.5")]
NUMBERS: list[Values] = [(1, 0.5), (2, 1.0), (3, 1.5)]
EXPECTED: dict[str, list[Values]] = {
    **dict.fromkeys(("delimited", "atomic", "json"), TEXTS),
    **dict.fromkeys(("parquet", "orc", "table", "query"), NUMBERS),
    "npz": [(number, [look]) for number, look in NUMBERS],
    "npy": [(str(number), [look]) for number, look in NUMBERS],
}


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_gives_records_of_one_form(spark: SparkSession, tmp_path: Path, kind: str) -> None:
    # The folder's name is no pattern, but the path of the table may be one.
    folder = tmp_path / "a [b] {c}% +é"
    folder.mkdir()
    spark.createDataFrame(NUMBERS, "item long, look double").createOrReplaceTempView("look")
    files = table_of(folder, WRITERS[kind](folder), format=kind, separator=";")
    first, second = columns = ["ids", "vectors"] if kind in ("npz", "npy") else ["item", "look"]
    frame = read_table(spark, files, columns)
    assert frame.columns == ["file", "record", "fault", "values"]
    rows = frame.collect()
    assert values_of(rows) == EXPECTED[kind]
    assert {row["file"] for row in rows} == set(files.names)
    assert set(columns) <= set(column_names(spark, files))
    assert values_of(rows_of(spark, files, [first])) == [row[:1] for row in EXPECTED[kind]]
    assert values_of(rows_of(spark, files, [second, first])) == [row[::-1] for row in EXPECTED[kind]]
    with pytest.raises(SourceError, match=rf"look.* has no column {second[:-1]}, only {first}.*did you mean {second}"):
        read_table(spark, files, [first, second[:-1]])
    names = {"npy": [f"look-{part}.{ending}" for part in range(2) for ending in ("ids", "npy")]}.get(kind, list(files.names))
    assert [source.path for source in fingerprints(spark, [files, files])] == names


@pytest.mark.parametrize("ending", ["tsv", "tsv.gz", "tsv.bz2", "tsv.zst", "tsv.lz4", "tsv.GZ"])
def test_compressed_text_is_read_whole(spark: SparkSession, tmp_path: Path, ending: str) -> None:
    pairs: list[Values] = [(f"u{place}", f"i{place * 7 % 100}") for place in range(5000)]
    content = ("user\titem\n" + "".join(f"{user}\t{item}\n" for user, item in pairs)).encode()
    if ending == "tsv.GZ":
        (tmp_path / f"x.{ending}").write_bytes(gzip.compress(content))
    else:
        pack(tmp_path / f"x.{ending}", content)
    assert values_of(rows_of(spark, table_of(tmp_path, "x.*"))) == sorted(pairs, key=str)


@pytest.mark.parametrize("name", ["_x.tsv", ".x.tsv", "x:y.tsv", "x._COPYING_"])
def test_files_are_read_that_spark_would_skip(spark: SparkSession, tmp_path: Path, name: str) -> None:
    for path in (name, "y.tsv"):
        (tmp_path / path).write_text(f"user\titem\n{path}\t1\n", encoding="utf-8")
        pq.write_table(pa.table({"user": [path]}), tmp_path / f"{path}.parquet")
    rows = rows_of(spark, table_of(tmp_path, [name, "y.tsv"]))
    assert {row["file"]: row["values"]["user"] for row in rows} == {name: name, "y.tsv": "y.tsv"}
    rows = rows_of(spark, table_of(tmp_path, [f"{name}.parquet", "y.tsv.parquet"], format="parquet"), ["user"])
    assert {row["file"]: row["values"]["user"] for row in rows} == {f"{name}.parquet": name, "y.tsv.parquet": "y.tsv"}


def test_a_local_path_is_local_whatever_the_file_system_of_the_cluster(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("user\titem\n1\t2\n", encoding="utf-8")
    pq.write_table(pa.table({"user": ["1"]}), tmp_path / "x.parquet")
    hadoop = spark._jsc.hadoopConfiguration()
    hadoop.set("fs.defaultFS", "hdfs://nowhere.invalid:1")
    try:
        assert values_of(rows_of(spark, table_of(tmp_path, "x.tsv"))) == [("1", "2")]
        assert values_of(rows_of(spark, table_of(tmp_path, "x.parquet", format="parquet"), ["user"])) == [("1",)]
    finally:
        hadoop.unset("fs.defaultFS")


@pytest.mark.parametrize(
    ("encoding", "text", "bad"),
    [
        ("utf-8", "ü😀", b"\xff\x81"),
        ("latin-1", "ü", None),
        ("cp1252", "ü€", b"\x81"),
        ("shift_jis", "表ソ", b"\x81"),  # the second bytes of these letters are a backslash
        ("gbk", "中文", b"\x81"),
        ("koi8-r", "Привет", None),
        ("ascii", "u", b"\xff"),
    ],
)
def test_text_in_every_encoding(spark: SparkSession, tmp_path: Path, encoding: str, text: str, bad: bytes | None) -> None:
    for name in ("x.tsv", "x.tsv.bz2"):  # by Spark, and by Arrow
        content = f"user\titem\n{text}\t{text}\r\n".encode(encoding)
        pack(tmp_path / name, content + (bad + b"\t2\n" if bad else b""))
        rows = rows_of(spark, table_of(tmp_path, name, encoding=encoding))
        assert values_of(rows) == [(text, text)]
        shown = [("not in the encoding of the table", bad.decode(encoding, "replace") + "\t2")] if bad else []
        assert faults_of(rows) == shown


@pytest.mark.parametrize("separator", [",", "::", ", ", "|", "||", ".*", "\\", "^", "-", "😀", "ab", "\x01", "]", "&&"])
@pytest.mark.parametrize("quote", [None, '"', "'", "|", "^"])
def test_separators_of_any_letters_separate(spark: SparkSession, tmp_path: Path, separator: str, quote: str | None) -> None:
    if quote is not None and quote in separator:
        quote = "%"
    lines = [separator.join(fields) for fields in (["user", "item", "x"], ["ü", "", ""], ["", "2", "3"], ["1", "2"])]
    (tmp_path / "x").write_text("\n".join(lines), encoding="utf-8")
    rows = rows_of(spark, table_of(tmp_path, "x", separator=separator, quote=quote), ["user", "x", "item"])
    assert values_of(rows) == [("", "3", "2"), ("ü", "", "")]
    assert faults_of(rows) == [("wrong number of fields", lines[3])]


def test_quotes_hold_fields_together(spark: SparkSession, tmp_path: Path) -> None:
    long = "x" * 100_000
    good = {
        '"a,b",c': ("a,b", "c"),
        'a,"say ""hi"", b"': ("a", 'say "hi", b'),
        '"",""""': ("", '"'),
        ' a ,""': (" a ", ""),
        f'"{"," * 5000}","{long}"': ("," * 5000, long),
        f'{long},"{"a" + 2 * 5000 * chr(34)}"': (long, "a" + 5000 * '"'),
        "'a,b": ("'a", "b"),
    }
    bad = ['"a"b,c', 'a,"b', 'a"b,c', 'a,"b"c"', '"a,b', '"', '"a" ,b', '"line', 'break",c']
    (tmp_path / "x.csv").write_text("\n".join(['"user","item"', *good, *bad, "one"]), encoding="utf-8")
    rows = rows_of(spark, table_of(tmp_path, "x.csv", separator=",", quote='"'))
    assert values_of(rows) == sorted(good.values(), key=str)
    assert faults_of(rows) == sorted([("quotes do not match", line) for line in bad] + [("wrong number of fields", "one")])


@pytest.mark.parametrize("name", ["x.tsv", "x.tsv.gz", "x.tsv.bz2"])
@pytest.mark.parametrize("named", [False, True])
def test_line_ends_marks_and_gaps_lose_no_record(spark: SparkSession, tmp_path: Path, name: str, named: bool) -> None:
    heading = b"" if named else b"user\titem\r\n"
    lines = b"a\t1\r\n\n\r\nb\x00\t2\n\xef\xbb\xbfc\t\r\nuser\titem\n\t \nd\te\rf\ng\t7"
    pack(tmp_path / name, b"\xef\xbb\xbf" + heading + lines)
    rows = rows_of(spark, table_of(tmp_path, name, header=["user", "item"] if named else True))
    expected = [("a", "1"), ("b\0", "2"), ("\ufeffc", ""), ("", " "), ("d", "e\rf"), ("g", "7")]
    assert values_of(rows) == sorted(expected + ([("user", "item")] if named else []), key=str)
    assert faults_of(rows) == []


@pytest.mark.parametrize("parts", [1, 3, 17])
@pytest.mark.parametrize("kind", ["delimited", "json"])
def test_records_are_the_same_however_a_file_is_divided(spark: SparkSession, tmp_path: Path, parts: int, kind: str) -> None:
    pairs = [(f"ü{place * 3}", "x" * (place % 50)) for place in range(2000)]
    objects = [json.dumps({"user": user, "item": item}, ensure_ascii=False) for user, item in pairs]
    lines = objects if kind == "json" else ["user\titem", *["\t".join(pair) for pair in pairs]]
    content = "\r\n".join(lines).encode()
    (tmp_path / "x").write_bytes(content)
    divided = {"maxPartitionBytes": str(len(content) // parts + 1), "openCostInBytes": "0", "minPartitionNum": "1"}
    for name, value in divided.items():
        spark.conf.set(f"spark.sql.files.{name}", value)
    try:
        frame = read_table(spark, table_of(tmp_path, "x", format=kind), ["user", "item"])
        assert frame.rdd.getNumPartitions() == parts
        assert values_of(frame.collect()) == sorted(pairs, key=str)
    finally:
        for name in divided:
            spark.conf.unset(f"spark.sql.files.{name}")


texts = st.text(max_size=8)


@pytest.mark.parametrize("name", ["x", "x.bz2"])
def test_any_ids_come_back_as_they_were_written(spark: SparkSession, tmp_path: Path, name: str) -> None:
    @settings(max_examples=4)
    @given(st.lists(st.tuples(texts, texts, texts), min_size=50, max_size=100), st.sampled_from([",", "::"]), st.booleans())
    def come_back(records: list[tuple[str, str, str]], separator: str, ascii_only: bool) -> None:
        objects = [json.dumps(dict(zip("abc", record, strict=True)), ensure_ascii=ascii_only) for record in records]
        pack(tmp_path / name, "\n".join(objects).encode())
        rows = rows_of(spark, table_of(tmp_path, name, format="json"), ["a", "b", "c"])
        assert values_of(rows) == sorted(records, key=str)

        # Of text that is delimited, a line feed is no part.
        plain = [tuple(text.replace("\n", " ") for text in record) for record in records]
        lines = [separator.join(f'"{text.replace(chr(34), 2 * chr(34))}"' for text in record) for record in plain]
        assert [tuple(split_fields(line, separator, '"')) for line in lines] == plain
        pack(tmp_path / name, "\n".join(lines).encode())
        rows = rows_of(spark, table_of(tmp_path, name, separator=separator, quote='"', header=["a", "b", "c"]), ["a", "b", "c"])
        assert faults_of(rows) == []
        assert values_of(rows) == sorted(plain, key=str)

    come_back()


def test_faulty_lines_of_json_are_records_and_blank_ones_are_none(spark: SparkSession, tmp_path: Path) -> None:
    good = {'{"a": 1.50, "fault": "x", "0": [1,  2], "d": {"e": null}}': ("1.50", "x", "[1,  2]", None), "{}": (None,) * 4}
    bad = ['{"a": 1} x', "[]", "5", '{"a": "\\ud800"}', "{'a': 1}"]
    content = "\r\n".join(["   ", *good, "", *bad]).encode() + b'\n\t{"a": "\xff"}'
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + content)
    rows = rows_of(spark, table_of(tmp_path, "x.json", format="json"), ["a", "fault", "0", "d.e"])
    assert values_of(rows) == sorted(good.values(), key=str)
    undecodable = ("not in the encoding of the table", '\t{"a": "\ufffd"}')
    assert faults_of(rows) == sorted([("not a JSON object", line) for line in bad] + [undecodable])


def test_a_column_of_json_that_is_rare_is_found(spark: SparkSession, tmp_path: Path) -> None:
    lines = ['{"user": 1, "meta": {"year": 5}}'] * 400 + ['{"user": 2, "fault": "x", "tag": {"a": {"b": null, "c": [1]}}}']
    (tmp_path / "x.json").write_text("\n".join(lines), encoding="utf-8")
    files = table_of(tmp_path, "x.json", format="json")
    assert column_names(spark, files) == ["user", "meta", "meta.year"]
    assert column_names(spark, files, ["fault", "user", "tag.a.b", "usr"]) == ["user", "meta", "meta.year", "fault"]
    rows = rows_of(spark, files, ["user", "fault", "tag.a.c"])
    assert values_of(rows) == [("1", None, None)] * 400 + [("2", "x", "[1]")]
    with pytest.raises(SourceError, match=r"x\.json has no column usr, only user, meta, meta\.year; did you mean user\?"):
        read_table(spark, files, ["usr"])


def test_a_table_or_query_is_read_with_its_types_and_its_odd_names(spark: SparkSession, tmp_path: Path) -> None:
    spark.sql("SELECT 1 AS `a.b`, array(1.5D) AS `c``d`, DATE '2024-05-31' AS e").createOrReplaceTempView("odd")
    for kind, path in (("table", "odd"), ("query", "WITH x AS (SELECT * FROM odd) SELECT * FROM x")):
        files = table_of(tmp_path, path, format=kind)
        (row,) = rows_of(spark, files, ["a.b", "c`d", "e"])
        assert tuple(row["values"])[:2] == (1, [1.5])
        assert read_table(spark, files, ["e"]).schema["values"].dataType.simpleString() == "struct<e:date>"
    pq.write_table(pa.table({"user": [7]}), tmp_path / "x.parquet")
    files = table_of(tmp_path, f"SELECT user FROM parquet.`{tmp_path}/x.parquet`", format="query")
    assert values_of(rows_of(spark, files, ["user"])) == [(7,)]
    assert os.listdir(tmp_path) == ["x.parquet"]
