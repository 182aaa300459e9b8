"""Indices: the numbers that ids, and anything else in a total order, are given from 0 on."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from sibra_dist.data.manifest import Side
from sibra_dist.etl.work import Work

ROW_BITS = 33
"""`monotonically_increasing_id` holds the row within its partition in so many of its lower bits."""
SIDES: tuple[tuple[Side, str], ...] = (("users", "user"), ("items", "item"))
"""Each side, and the column that names its entities in a frame of interactions."""


def with_positions(frame: DataFrame, order: list[str], name: str, work: Work) -> DataFrame:
    """`frame` with a column `name`: the position of each row, from 0 on, in the ascending order of the columns `order`.

    Rows are sorted in parallel: each partition takes a range, and starts where those before it end. The order must tell
    any two rows apart that differ, or else the positions depend on the partitioning. Text is ordered by code point.
    """
    sorted_rows = frame.repartitionByRange(*order).sortWithinPartitions(*order)
    # Which partition a row falls in is settled once, by storing it: the ranges come from a sample.
    stored = work.store(
        sorted_rows.select(
            *sorted_rows.columns, F.spark_partition_id().alias("_part"), F.monotonically_increasing_id().alias("_row")
        ),
        f"{name}-by-{order[0]}",
    )
    sizes = {row["_part"]: row["count"] for row in stored.groupBy("_part").count().collect()}
    counts = [sizes.get(part, 0) for part in range(max(sizes, default=0) + 1)]
    starts = F.array(*[F.lit(start).cast("long") for start in accumulate([0, *counts])])
    position = F.get(starts, F.col("_part")) + F.col("_row").bitwiseAND(F.lit((1 << ROW_BITS) - 1))
    return stored.withColumn(name, position).drop("_part", "_row")


def number_ids(interactions: DataFrame, column: str, former: DataFrame | None, work: Work) -> DataFrame:
    """Columns `id` and `key` (int), and `former` where it is given: every id of a column, sorted as text and numbered.

    Keys stand for ids from here on: they are in the same order, and joins and sorts of numbers are cheaper than those of text.

    Args:
        interactions: any interactions, with ids in `column`.
        column: `user` or `item`.
        former: columns `id` and `former` (int), the indices of the dataset that is extended; its ids are numbered too.
        work: where the table is stored.
    """
    ids = interactions.select(F.col(column).alias("id")).distinct()
    if former is not None:
        ids = ids.join(former, "id", "full")
    numbered = with_positions(ids, ["id"], "key", work)
    return numbered.withColumn("key", F.col("key").cast("int"))


def with_keys(interactions: DataFrame, ids: Mapping[Side, DataFrame]) -> DataFrame:
    """Interactions with the keys of their users and items in place of the ids."""
    for side, column in SIDES:
        keys = ids[side].select(F.col("id").alias(column), F.col("key").alias("_key"))
        interactions = interactions.join(keys, column).drop(column).withColumnRenamed("_key", column)
    return interactions


@dataclass(frozen=True)
class Indexed:
    """The entities of one side."""

    table: DataFrame
    """Columns `key`, `index` (int, from 0 to `count` - 1) and `id`."""
    count: int
    is_key: bool
    """Whether every index is the key itself, because no id was left out."""


def index_entities(pairs: DataFrame, column: str, ids: DataFrame, former_count: int, work: Work) -> Indexed:
    """The ids that are left get their indices, in the order of the ids.

    In a dataset that extends another (`former_count` entities), those keep their indices, whether or not any of their
    interactions is left, and new ones follow in the order of the ids.
    """
    kept = pairs.select(F.col(column).alias("key")).distinct()
    total = ids.count()
    if former_count == 0:
        count = kept.count()
        if count == total:
            return Indexed(ids.select("key", F.col("key").alias("index"), "id"), count, is_key=True)
        positions = with_positions(kept, ["key"], "index", work)
        table = ids.join(positions, "key")
        return Indexed(table.select("key", F.col("index").cast("int").alias("index"), "id"), count, is_key=False)
    is_former = F.col("former").isNotNull()
    fresh = with_positions(kept.join(ids.where(~is_former), "key", "left_semi"), ["key"], "_place", work)
    index = F.when(is_former, F.col("former")).otherwise((F.col("_place") + former_count).cast("int"))
    table = ids.join(fresh, "key", "left").where(is_former | F.col("_place").isNotNull())
    return Indexed(table.select("key", index.alias("index"), "id"), former_count + fresh.count(), is_key=False)


def with_indices(pairs: DataFrame, indexed: Mapping[Side, Indexed]) -> DataFrame:
    """Pairs with indices in place of keys."""
    for side, column in SIDES:
        if not indexed[side].is_key:
            indices = indexed[side].table.select(F.col("key").alias(column), F.col("index").alias("_index"))
            pairs = pairs.join(indices, column).drop(column).withColumnRenamed("_index", column)
    return pairs
