"""Which files a path stands for, and their fingerprints."""

import hashlib
import os
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from sibra_dist.errors import SourceError
from sibra_dist.etl import files as files_module
from sibra_dist.etl.files import fingerprints
from tests.etl.sources import table_of

NAMES = ["a/x-1.tsv", "a/x-2.tsv", "a/_x.tsv", "a/.x.tsv", "a/y[1].tsv", "a/sub/z.tsv", "b/x-1.tsv", "b/_SUCCESS"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "a [1] *"
    for name in NAMES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"user\titem\n{name}\t1\n", encoding="utf-8")
    return source


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("a/x-1.tsv", ["a/x-1.tsv"]),
        ("a/x-*.tsv", ["a/x-1.tsv", "a/x-2.tsv"]),
        ("a/x-[!1].tsv", ["a/x-2.tsv"]),
        ("a/*.tsv", ["a/x-1.tsv", "a/x-2.tsv", "a/y[1].tsv"]),
        ("*/x-1.tsv", ["a/x-1.tsv", "b/x-1.tsv"]),
        ("b/*", ["b/x-1.tsv"]),
        ("?/s*/*", ["a/sub/z.tsv"]),
        ("a/_*", ["a/_x.tsv"]),
        ("a/.x*", ["a/.x.tsv"]),
        ("a/y[1].tsv", ["a/y[1].tsv"]),
        ("a/sub/../../b/./x-1.tsv", ["b/x-1.tsv"]),
        (("b/x-1.tsv", "a/x-2.tsv", "*/x-1.tsv"), ["a/x-1.tsv", "a/x-2.tsv", "b/x-1.tsv"]),
    ],
)
def test_a_path_stands_for_the_files_that_match(folder: Path, path: object, names: list[str]) -> None:
    for source in (folder, f"file://{folder}", os.path.relpath(folder)):
        files = table_of(source, path)
        assert files.names == tuple(names)
        assert files.uris == tuple(str(folder / name) for name in names)
    elsewhere = [f"file://{folder}/{part}" for part in ([path] if isinstance(path, str) else path)]  # type: ignore[attr-defined]
    if not any(letter in elsewhere[0] for letter in "[?*"):
        assert table_of(folder / "b", elsewhere).uris == files.uris


def test_a_file_elsewhere_is_named_in_full(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_text("user\titem\n", encoding="utf-8")
    files = table_of(folder, [str(other), f"file://{other}", "a/x-1.tsv"])
    assert files.names == (str(other), "a/x-1.tsv")
    (folder / "link.tsv").symlink_to(other)
    assert table_of(folder, "link.tsv").names == ("link.tsv",)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"path": "a/x-3.tsv"}, r"there is no file .*a/x-3\.tsv; did you mean x-[12]\.tsv\?"),
        ({"path": ["a/x-1.tsv", "c/*.tsv"]}, r"there is no file .*c/\*\.tsv; nothing is known here"),
        ({"path": "a"}, r"/a is a folder; name the files in it, for example a/\*"),
        ({"path": "a/*"}, r"/a/sub is a folder"),
        ({"path": "ftp://host/x.tsv"}, r"ftp://host/x\.tsv names a file system that is not known here"),
        ({"path": "a/x-1.tsv", "format": "npy"}, r"there is no file .*x-1\.ids beside .*x-1\.tsv"),
        ({"path": ["t", "u"], "format": "table"}, r"format table reads one table, not 2"),
    ],
)
def test_a_path_that_leads_nowhere_is_told(folder: Path, table: dict[str, object], told: str) -> None:
    with pytest.raises(SourceError, match=told):
        table_of(folder, **table)


def test_a_file_that_may_not_be_read_is_told(folder: Path) -> None:
    link = folder / "a" / "round.tsv"
    link.symlink_to(link)
    with pytest.raises(SourceError, match=r"round\.tsv"):
        table_of(folder, "a/round.tsv")


def test_messages_name_a_table_by_its_paths(folder: Path) -> None:
    assert str(table_of(folder, ["a/x-1.tsv", "b/*"])) == "a/x-1.tsv, b/*"
    assert str(table_of(folder, "db.plays", format="table")) == "table db.plays"
    query = str(table_of(folder, "SELECT 1,\n" + "2, " * 1000, format="query"))
    assert query.startswith("query SELECT 1, 2, ")
    assert len(query) < 250


@pytest.mark.spark
def test_fingerprints_are_the_same_wherever_they_are_made(
    spark: SparkSession, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [table_of(folder, "b/*"), table_of(folder, "a/*.tsv"), table_of(folder, "*/x-1.tsv")]
    found = fingerprints(spark, tables)
    assert [source.path for source in found] == ["a/x-1.tsv", "a/x-2.tsv", "a/y[1].tsv", "b/x-1.tsv"]
    for source in found:
        content = (folder / source.path).read_bytes()
        assert (source.bytes, source.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(files_module, "HASHED_BY_DRIVER", 0)
    assert fingerprints(spark, tables) == found
    (folder / "b/x-1.tsv").unlink()
    with pytest.raises(SourceError, match=r"x-1\.tsv is not there where it is read"):
        fingerprints(spark, tables)


@pytest.mark.spark
def test_fingerprints_of_rows_depend_on_all_but_their_order(spark: SparkSession, folder: Path) -> None:
    def digest(rows: list[tuple[object, ...]], schema: str = "a int, b int, m map<string, int>", parts: int = 1) -> str:
        spark.createDataFrame(rows, schema).repartition(parts).createOrReplaceTempView("rows")
        (source,) = fingerprints(spark, [table_of(folder, "rows", format="table")])
        assert (source.path, source.bytes, len(source.sha256)) == ("table rows", 0, 64)
        return source.sha256

    rows: list[tuple[object, ...]] = [(1, None, {"x": 1}), (2, 3, None), (2, 3, None)]
    known = digest(rows)
    assert digest(rows[::-1], parts=3) == known
    others = [
        [(None, 1, {"x": 1}), *rows[1:]],
        [(1, None, {"x": 2}), *rows[1:]],
        rows[:2],
        [rows[0], rows[0], rows[1]],
        [],
    ]
    digests = [digest(other) for other in others] + [digest(rows, "a int, c int, m map<string, int>")]
    assert len({known, *digests}) == 7

    queries = [table_of(folder, f"SELECT {number} AS a, {number} AS a", format="query") for number in (1, 2)]
    found = fingerprints(spark, [*queries, queries[0]])
    assert [source.path for source in found] == ["query", "query"]
    assert len({source.sha256 for source in found}) == 2
