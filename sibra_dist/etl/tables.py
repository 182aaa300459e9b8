"""The tables of a dataset, out of indexed pairs: their rows, and the check that nothing held out shows in training."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sibra_dist.data.manifest import FeatureSpec, Shard, Side
from sibra_dist.etl.indexing import with_positions
from sibra_dist.etl.write import REJECTED_SCHEMA, entity_schema, list_schema, write_shard, write_table


def write_tables(
    entities: Mapping[Side, DataFrame],
    specs: Mapping[Side, Sequence[FeatureSpec]],
    pairs: DataFrame,
    refused: Sequence[DataFrame],
    folder: Path,
    shard_bytes: int,
) -> dict[str, tuple[Shard, ...]]:
    """Write every table of the dataset into `folder`, and return their shards by table.

    `entities` and `specs` are what `encode_features` gave; `pairs` has indices `user` and `item`, and `split`; `refused`
    holds frames of rejected records.
    """
    lists = {
        "histories/users": (histories(pairs, entities["users"], "user", "item"), "items"),
        "histories/items": (histories(pairs, entities["items"], "item", "user"), "users"),
        "held_out/validation": (lists_of(pairs.where(F.col("split") == "validation"), "user", "item"), "items"),
        "held_out/test": (lists_of(pairs.where(F.col("split") == "test"), "user", "item"), "items"),
    }
    shards: dict[str, tuple[Shard, ...]] = {}
    for side, frame in entities.items():
        shards[side] = write_table(frame, "index", entity_schema(specs[side]), folder, side, shard_bytes)
    for table, (frame, column) in lists.items():
        shards[table] = write_table(frame, "index", list_schema(column), folder, table, shard_bytes)
    if refused:
        ordered = with_positions(reduce(DataFrame.unionByName, refused), REJECTED_SCHEMA.names, "position")
        shards["rejected"] = write_table(ordered, "position", REJECTED_SCHEMA, folder, "rejected", shard_bytes)
    else:
        shards["rejected"] = (write_shard(REJECTED_SCHEMA.empty_table(), folder, "rejected/part-00000.parquet"),)
    return shards


def lists_of(pairs: DataFrame, key: str, other: str) -> DataFrame:
    """Columns `index` and `<other>s`: for each `key` that has a pair, the sorted indices it is paired with."""
    return pairs.groupBy(F.col(key).alias("index")).agg(F.sort_array(F.collect_list(other)).alias(f"{other}s"))


def histories(pairs: DataFrame, entities: DataFrame, key: str, other: str) -> DataFrame:
    """The lists of the training pairs, with a row for every entity: null where it has no pair."""
    return entities.select("index").join(lists_of(pairs.where(F.col("split") == "train"), key, other), "index", "left")


def check_for_leakage(spark: SparkSession, folder: Path) -> None:
    """Check in the files as written that no held-out pair is in a history, and that cold items have none.

    Raises:
        AssertionError: a defect of this package; the dataset must not be published.
    """
    tables = {name: spark.read.parquet(str(folder / name)) for name in ("items", "histories/users", "histories/items")}
    seen = tables["histories/users"].withColumnRenamed("items", "seen")
    for split in ("validation", "test"):
        held_out = spark.read.parquet(str(folder / "held_out" / split)).join(seen, "index")
        leaking = held_out.where(F.arrays_overlap("items", "seen")).count()
        assert leaking == 0, f"{leaking} users have {split} items in their training histories"
    cold = tables["items"].where(F.col("split") != "train").join(tables["histories/items"], "index")
    leaking = cold.where(F.col("users").isNotNull()).count()
    assert leaking == 0, f"{leaking} cold-start items have training histories"
