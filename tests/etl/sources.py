"""Tables of small files, as tests of the readers write and read them."""

import bz2
import gzip
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyspark.sql import Row, SparkSession

from sibra_dist.etl.config import InteractionsConfig, PrepareConfig, TableConfig
from sibra_dist.etl.files import Files, find_files
from sibra_dist.etl.readers import read_table, unreadable_files

Values = tuple[object, ...]


def table_of(source: object, path: object, **table: object) -> Files:
    """The files of a table under a source folder."""
    config = PrepareConfig(name="x", source=str(source), interactions=InteractionsConfig(path="x"))
    return find_files(config, TableConfig.model_validate({"path": path, **table}))


def rows_of(spark: SparkSession, files: Files, columns: Sequence[str] = ("user", "item")) -> list[Row]:
    """The records of a table."""
    with unreadable_files():
        return read_table(spark, files, columns).collect()


def values_of(rows: Sequence[Row]) -> list[Values]:
    """The values of readable records, sorted."""
    return sorted((tuple(row["values"]) for row in rows if row["fault"] is None), key=str)


def faults_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Fault and text of the other records, sorted."""
    return sorted((row["fault"], row["record"]) for row in rows if row["fault"] is not None)


def pack(path: Path, content: bytes) -> None:
    """Write a file, compressed as its name says: in two parts one after the other, as the formats allow."""
    parts = content[: len(content) // 2], content[len(content) // 2 :]
    if path.suffix in (".gz", ".bz2"):
        compress = gzip.compress if path.suffix == ".gz" else bz2.compress
        path.write_bytes(b"".join(map(compress, parts)))
    elif path.suffix in (".zst", ".lz4"):
        path.write_bytes(b"".join(_framed(part, {".zst": "zstd", ".lz4": "lz4"}[path.suffix]) for part in parts))
    else:
        path.write_bytes(content)


def _framed(content: bytes, compression: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, compression) as stream:
        stream.write(content)
    return bytes(sink.getvalue())
