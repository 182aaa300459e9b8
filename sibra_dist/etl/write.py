"""Writing: rows to Parquet shards whose bytes are the same however Spark cut the work.

Spark's own writer would leave its mark in the files: how many there are, which row stands where. So each row is sent to
a shard by its position, and one task builds a shard from its rows and writes it with Arrow, to any file system that Arrow
knows. Only a line about each shard comes back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from sibra_dist.data.manifest import Shard
from sibra_dist.data.publish import write_shard
from sibra_dist.data.storage import Place

BLOCKS = 4_096
"""Rows are counted in so many blocks of positions, of which shards are put together: heavy rows get shards of their own."""
SHARD_COLUMNS = "path string, rows long, bytes long, sha256 string, missing array<long>"
SHARD_SCHEMA = pa.schema(
    {"path": pa.string(), "rows": pa.int64(), "bytes": pa.int64(), "sha256": pa.string(), "missing": pa.list_(pa.int64())}
)

Build = Callable[[pa.Table, int, int], pa.Table]
"""The rows of a shard, in any order, and the positions where it starts and ends, to the table that is written."""


@dataclass(frozen=True)
class Target:
    """Where shards are written, and how large they are aimed at."""

    place: Place
    shard_bytes: int
    """Before compression."""


@dataclass(frozen=True)
class Written:
    """The shards of one table."""

    shards: tuple[Shard, ...]
    missing: tuple[int, ...]
    """Nulls in each column."""
    starts: tuple[int, ...]
    """The first position that each shard is for, and after the last shard the number of positions."""


def write_table(frame: DataFrame, table: str, target: Target, build: Build, positions: int, width: Column) -> Written:
    """Write a table of the dataset; one without rows gets a shard without rows.

    Args:
        frame: rows with a column `position` (int or long, from 0 to `positions` - 1).
        table: its name, as in `TABLES`.
        target: where to write.
        build: makes the table that is written from the rows of a range of positions; runs in a Spark worker.
        positions: how many positions there are.
        width: about how many bytes a row takes up: a whole number, so that sums are exact in any order.
    """
    positions = max(positions, 1)
    blocks = min(BLOCKS, positions)
    block = F.expr(f"position * {blocks}L div {positions}")
    sizes: dict[int, int] = dict(frame.groupBy(block).agg(F.sum(width.cast("long"))).collect())
    shards = _shards_of_blocks([sizes.get(number, 0) for number in range(blocks)], target.shard_bytes)
    # The first position of a block is the least whole p with p * blocks // positions == block.
    starts = [-(-shards.index(shard) * positions // blocks) for shard in range(shards[-1] + 1)] + [positions]
    numbered = frame.withColumn("_shard", F.get(F.lit(shards), block.cast("int")))
    # A row that stands for the first shard itself: it is written even if it has no other.
    numbered = numbered.unionByName(frame.sparkSession.range(1).select(F.lit(0).alias("_shard")), allowMissingColumns=True)

    def write(rows: pa.Table) -> pa.Table:
        number = rows.column("_shard")[0].as_py()
        there = rows.filter(rows.column("position").is_valid()).drop_columns("_shard")
        shard, missing = write_shard(build(there, starts[number], starts[number + 1]), target.place, table, number)
        return pa.Table.from_pylist([{**shard.model_dump(), "missing": missing}], schema=SHARD_SCHEMA)

    lines = numbered.groupBy("_shard").applyInArrow(write, SHARD_COLUMNS).collect()
    described = sorted((line.asDict() for line in lines), key=lambda line: str(line["path"]))
    missing = [sum(counts) for counts in zip(*[line.pop("missing") for line in described], strict=True)]
    return Written(tuple(Shard(**line) for line in described), tuple(missing), tuple(starts))


def _shards_of_blocks(sizes: Sequence[int], shard_bytes: int) -> list[int]:
    """The number of the shard that each block is in: they are put together until a shard would be larger than it should."""
    shards, number, filled = [], 0, 0
    for size in sizes:
        if size and filled and filled + size > shard_bytes:
            number, filled = number + 1, 0
        filled += size
        shards.append(number)
    return shards
