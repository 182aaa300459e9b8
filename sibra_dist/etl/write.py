"""Writing: frames to Parquet shards whose bytes are the same however Spark cut the work.

Spark's own writer would leave its mark in the files: how many there are, which row stands where. So each row is sent to
a shard by its position, and one task sorts a shard and writes it with Arrow. Only a line about each shard comes back.
"""

import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, StringType

from sibra_dist.data.manifest import FeatureSpec, Shard

ROWS_PER_GROUP = 65_536
REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("table", "file", "reason", "record")])
SHARD_COLUMNS = "path string, rows long, bytes long, sha256 string"


def entity_schema(specs: Iterable[FeatureSpec]) -> pa.Schema:
    """The columns of `users` or `items`."""
    kinds = {
        "category": lambda size: pa.int32(),
        "tags": lambda size: pa.list_(pa.int32()),
        "numeric": lambda size: pa.list_(pa.float32()),
        "vector": lambda size: pa.list_(pa.float32(), size),
    }
    features = [(spec.name, kinds[spec.kind](spec.size)) for spec in specs]
    return pa.schema([("index", pa.int32()), ("id", pa.string()), ("split", pa.string()), *features])


def list_schema(column: str) -> pa.Schema:
    """The columns of a table of histories or held-out items."""
    return pa.schema([("index", pa.int32()), (column, pa.list_(pa.int32()))])


def write_table(
    frame: DataFrame, position: str, schema: pa.Schema, dataset: Path, table: str, shard_bytes: int
) -> tuple[Shard, ...]:
    """Write `frame` as the shards of one table of the dataset folder, in the order of its distinct column `position`.

    A shard takes the rows of a range of positions, as wide as should make `shard_bytes` uncompressed bytes; a table
    without rows has one shard without rows. Returns the shards in order.
    """
    rows, width, last = _measure(frame, position)
    if rows == 0:
        return (write_shard(schema.empty_table(), dataset, _shard_path(table, 0)),)
    span = max(1, shard_bytes * (last + 1) // width)
    numbered = frame.withColumn("_shard", F.expr(f"{position} div {span}"))

    def write(rows: pa.Table) -> pa.Table:
        return _write_group(rows, position, schema, dataset, table)

    written = numbered.groupBy("_shard").applyInArrow(write, SHARD_COLUMNS).collect()
    return tuple(sorted((Shard(**row.asDict()) for row in written), key=lambda shard: shard.path))


def write_shard(rows: pa.Table, dataset: Path, path: str) -> Shard:
    """Write one shard so that it is on the disk, whole, when this returns."""
    target = dataset / path
    # Spark may run a task twice, even at once: each writes aside, and both come to the same bytes.
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("wb") as file:
            pq.write_table(rows, file, compression="zstd", row_group_size=ROWS_PER_GROUP, store_schema=True)
            file.flush()
            os.fsync(file.fileno())
        with aside.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        size = aside.stat().st_size
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return Shard(path=path, rows=rows.num_rows, bytes=size, sha256=checksum)


def _write_group(rows: pa.Table, position: str, schema: pa.Schema, dataset: Path, table: str) -> pa.Table:
    """Sort and write the rows of one shard; runs in a Spark worker."""
    number = rows.column("_shard")[0].as_py()
    ordered = rows.sort_by(position)
    columns = [_as_type(ordered.column(field.name), field.type) for field in schema]
    shard = write_shard(pa.Table.from_arrays(columns, schema=schema), dataset, _shard_path(table, number))
    return pa.Table.from_pylist([shard.model_dump()])


def _as_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    whole = column.combine_chunks()
    if not pa.types.is_fixed_size_list(kind):
        return whole.cast(kind)
    # Rows that are null take up their place in the values all the same.
    present = whole.is_valid().to_numpy(zero_copy_only=False)
    values = np.zeros((len(whole), kind.list_size), dtype=np.float32)
    values[present] = whole.flatten().to_numpy(zero_copy_only=False).reshape(-1, kind.list_size)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind, mask=pa.array(~present))


def _measure(frame: DataFrame, position: str) -> tuple[int, int, int]:
    """Rows of a frame, about how many bytes they take up, and the last position: whole numbers, so exact in any order."""
    widths = []
    for field in frame.schema:
        if isinstance(field.dataType, StringType):
            widths.append(F.coalesce(F.octet_length(field.name), F.lit(0)))
        elif isinstance(field.dataType, ArrayType):
            widths.append(4 * F.coalesce(F.size(field.name), F.lit(0)))
        else:
            widths.append(F.lit(4))
    total = F.sum(sum(widths, F.lit(0)))
    rows, width, last = frame.agg(F.count("*"), total, F.max(position)).collect()[0]
    return (rows, max(1, width), last) if rows else (0, 1, 0)


def _shard_path(table: str, number: int) -> str:
    return f"{table}/part-{number:05d}.parquet"
