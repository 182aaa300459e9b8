"""Matrices of NumPy and the ids of their rows."""

from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from sibra_dist.errors import SourceError
from sibra_dist.etl import arrays
from sibra_dist.etl.readers import column_names
from tests.etl.sources import faults_of, rows_of, table_of, values_of

pytestmark = pytest.mark.spark

COLUMNS = ["ids", "vectors"]
VECTORS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f8", "i2", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["npz", "npz compressed", "npy"])
def test_vectors_of_any_numbers_in_any_order(spark: SparkSession, tmp_path: Path, dtype: str, order: str, kind: str) -> None:
    vectors = np.asarray(VECTORS.astype(dtype), order=order)  # type: ignore[call-overload]
    if kind == "npy":
        np.save(tmp_path / "x.npy", vectors)
        (tmp_path / "x.ids").write_text("\n".join(f"é{place}" for place in range(40)), encoding="latin-1")
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(tmp_path / "x.npz", ids=np.arange(40).astype(str), vectors=vectors)
    files = table_of(tmp_path, f"x.{kind[:3]}", format=kind[:3], encoding="latin-1")
    rows = {row["values"]["ids"]: row["values"]["vectors"] for row in rows_of(spark, files, COLUMNS)}
    expected = vectors.astype(np.float32)
    assert rows == {f"é{place}" if kind == "npy" else str(place): expected[place].tolist() for place in range(40)}


@pytest.mark.parametrize("width", [0, 1, 300_000])
def test_matrices_of_many_blocks(spark: SparkSession, tmp_path: Path, width: int) -> None:
    rows = 3 if width > 1 else arrays.ROWS * 2 + 1
    vectors = np.broadcast_to(np.arange(rows, dtype=np.float32)[:, None], (rows, width))
    np.savez(tmp_path / "x.npz", ids=np.arange(rows), vectors=vectors)
    np.save(tmp_path / "x.npy", vectors)
    (tmp_path / "x.ids").write_text("".join(f"{place}\r\n" for place in range(rows)) + "\n", encoding="utf-8")
    for kind in ("npz", "npy"):
        for row in rows_of(spark, table_of(tmp_path, f"x.{kind}", format=kind), COLUMNS):
            identifier, vector = row["values"]
            assert len(vector) == width
            assert set(vector) <= {float(identifier)}


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.array([-1, 2], np.int8), [-1, 2]),
        (np.array([1, 2**63], np.uint64), ["1", str(2**63)]),
        (np.array(["a", "é"]), ["a", "é"]),
        (np.array([b"a", "é".encode()]), ["a", "é"]),
    ],
)
def test_ids_are_whole_numbers_or_text(spark: SparkSession, tmp_path: Path, ids: np.ndarray, expected: list[object]) -> None:
    np.savez(tmp_path / "x.npz", ids=ids, vectors=np.ones((2, 1)))
    assert values_of(rows_of(spark, table_of(tmp_path, "x.npz", format="npz"), ["ids"])) == [(value,) for value in expected]


def test_ids_that_are_numbers_in_one_part_are_text_in_all(spark: SparkSession, tmp_path: Path) -> None:
    for name, ids in (("a", np.array([1, 2])), ("b", np.array(["x", "y"]))):
        np.savez(tmp_path / f"{name}.npz", ids=ids, vectors=np.ones((2, 1)))
    rows = rows_of(spark, table_of(tmp_path, "*.npz", format="npz"), ["ids"])
    assert values_of(rows) == [("1",), ("2",), ("x",), ("y",)]


def test_ids_that_cannot_be_decoded_are_faulty_records(spark: SparkSession, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ids=np.array([b"a", b"\xff"]), vectors=np.ones((2, 1)))
    np.save(tmp_path / "x.npy", np.ones((3, 1)))
    (tmp_path / "x.ids").write_bytes(b"\xef\xbb\xbfa\n\xff\n\n")
    for kind, ids in (("npz", ["a"]), ("npy", ["", "a"])):
        rows = rows_of(spark, table_of(tmp_path, f"x.{kind}", format=kind), COLUMNS)
        assert faults_of(rows) == [("not in the encoding of the table", "\ufffd")]
        assert values_of(rows) == [(identifier, [1.0]) for identifier in ids]


def test_what_is_too_large_for_a_float_is_infinite(spark: SparkSession, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ids=np.arange(1), vectors=np.array([[1e300]]))
    assert values_of(rows_of(spark, table_of(tmp_path, "x.npz", format="npz"), ["vectors"])) == [([float("inf")],)]


@pytest.mark.parametrize(
    ("arrays_of", "told"),
    [
        (
            {"ids": np.arange(3), "vector": np.ones((3, 2))},
            r"x\.npz has no column vectors, only ids, vector; did you mean vector\?",
        ),
        (
            {"ids": np.arange(3), "vectors": np.ones((2, 2))},
            r"ids must be n values and vectors n rows, not \(3,\) and \(2, 2\)",
        ),
        ({"ids": np.arange(3), "vectors": np.ones(3)}, r"ids must be n values and vectors n rows"),
        ({"ids": np.ones(3), "vectors": np.ones((3, 2))}, r"ids must be whole numbers or text, not float64; save ids\.astype"),
        (
            {"ids": np.array(["a", None], dtype=object), "vectors": np.ones((2, 2))},
            r"ids must be whole numbers or text, not object",
        ),
        ({"ids": np.arange(3), "vectors": np.ones((3, 2)).astype(str)}, r"vectors must be numbers, not <U32"),
    ],
)
def test_archives_of_anything_else_are_told(
    spark: SparkSession, tmp_path: Path, arrays_of: dict[str, np.ndarray], told: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays_of)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=told):
        column_names(spark, table_of(tmp_path, "x.npz", format="npz"))


@pytest.mark.parametrize(
    ("matrix", "ids", "told"),
    [
        (np.ones(3), "1\n2\n3\n", r"x\.npy must be a matrix with a row for each id, not an array of shape \(3,\)"),
        (np.ones((3, 2)).astype(complex), "1\n2\n3\n", r"x\.npy: vectors must be numbers, not complex128"),
        (np.ones((3, 2)), "1\n2\n", r"x\.ids has fewer ids than .*x\.npy has rows"),
        (np.ones((3, 2)), "1\n2\n3\n4", r"x\.ids has more ids than .*x\.npy has rows"),
    ],
)
def test_matrices_that_do_not_fit_their_ids_are_told(
    spark: SparkSession, tmp_path: Path, matrix: np.ndarray, ids: str, told: str
) -> None:
    np.save(tmp_path / "x.npy", matrix)
    (tmp_path / "x.ids").write_text(ids, encoding="utf-8")
    with pytest.raises(SourceError, match=told):
        rows_of(spark, table_of(tmp_path, "x.npy", format="npy"), COLUMNS)


def test_damaged_arrays_are_told(spark: SparkSession, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ids=np.arange(4000), vectors=np.tile(VECTORS, (100, 1)))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    np.save(tmp_path / "x.npy", VECTORS)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    (tmp_path / "x.ids").write_text("1\n" * 40, encoding="utf-8")
    for kind, reason in (("npz", "Bad CRC-32"), ("npy", "it ends before its last row")):
        with pytest.raises(SourceError, match=rf"x\.{kind} cannot be read: it is damaged \({reason}.*\)\. Fetch it again"):
            rows_of(spark, table_of(tmp_path, f"x.{kind}", format=kind), COLUMNS)
    (tmp_path / "x.npy").write_bytes(b"junk")
    with pytest.raises(SourceError, match=r"x\.npy cannot be read as an npy file"):
        rows_of(spark, table_of(tmp_path, "x.npy", format="npy"), COLUMNS)
