"""Positions: the numbers that ids, and anything else in a total order, are given from 0 on."""

from itertools import accumulate

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

ROW_BITS = 33
"""`monotonically_increasing_id` holds the row within its partition in so many of its lower bits."""


def with_positions(frame: DataFrame, order: list[str], name: str) -> DataFrame:
    """`frame` with a column `name`: the position of each row, from 0 on, in the ascending order of the columns `order`.

    Rows are sorted in parallel: each partition takes a range, and starts where those before it end. The order must tell
    any two rows apart that differ, or else the positions depend on the partitioning. Text is ordered by code point.
    """
    sorted_rows = frame.repartitionByRange(*order).sortWithinPartitions(*order)
    # Which partition a row falls in is settled once, by storing it: the ranges come from a sample.
    stored = sorted_rows.select(
        *sorted_rows.columns, F.spark_partition_id().alias("_part"), F.monotonically_increasing_id().alias("_row")
    ).localCheckpoint()
    sizes = {row["_part"]: row["count"] for row in stored.groupBy("_part").count().collect()}
    counts = [sizes.get(part, 0) for part in range(max(sizes, default=0) + 1)]
    starts = F.array(*[F.lit(start).cast("long") for start in accumulate([0, *counts])])
    position = F.get(starts, F.col("_part")) + F.col("_row").bitwiseAND(F.lit((1 << ROW_BITS) - 1))
    return stored.withColumn(name, position).drop("_part", "_row")


def index_entities(interactions: DataFrame, key: str) -> DataFrame:
    """Columns `id` and `index` (int): the distinct values of column `key`, sorted as text and numbered from 0 on."""
    ids = interactions.select(F.col(key).alias("id")).distinct()
    return with_positions(ids, ["id"], "index").withColumn("index", F.col("index").cast("int"))
