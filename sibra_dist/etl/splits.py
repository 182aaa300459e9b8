"""Splits: which interactions are for training, validation and test. A split is one function and one line of `SPLITS`.

Each takes distinct interactions (`user`, `item` and further columns) and gives them back with a column `split`. The draw
hangs on the seed and the external ids alone, so that it is the same for any partitioning, order and index.
"""

from collections.abc import Callable
from decimal import Decimal

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from sibra_dist.errors import ConfigError
from sibra_dist.etl.config import SplitConfig
from sibra_dist.etl.indexing import with_positions


def random_split(interactions: DataFrame, config: SplitConfig) -> DataFrame:
    """Split each user's n interactions: in a drawn order ceil(n * test) test, the next ceil(n * validation) validate."""
    drawn = Window.partitionBy("user").orderBy(F.xxhash64(F.lit(config.seed).cast("long"), "user", "item"), "item")
    position = F.row_number().over(drawn) - 1
    count = F.count("*").over(Window.partitionBy("user"))
    return interactions.withColumn("split", _split_at(position, count, config))


def cold_item_split(interactions: DataFrame, config: SplitConfig) -> DataFrame:
    """Split n items and all that is theirs: in a drawn order ceil(n * test) test, the next ceil(n * validation) validate."""
    items = interactions.select("item").distinct()
    count = F.lit(items.count())
    drawn = items.withColumn("draw", F.xxhash64(F.lit(config.seed).cast("long"), "item"))
    positions = with_positions(drawn, ["draw", "item"], "position")
    splits = positions.select("item", _split_at(F.col("position"), count, config).alias("split"))
    return interactions.join(splits, "item")


Split = Callable[[DataFrame, SplitConfig], DataFrame]
SPLITS: dict[str, Split] = {
    "random": random_split,
    "cold_item": cold_item_split,
}


def split_interactions(interactions: DataFrame, config: SplitConfig) -> tuple[DataFrame, dict[str, int]]:
    """The interactions with their `split`, and how many there are in each.

    Raises:
        ConfigError: nothing is left to train on, or nothing falls into a split that was asked for.
    """
    split = SPLITS[config.protocol](interactions, config).localCheckpoint()
    counts = {"train": 0, "validation": 0, "test": 0} | dict(split.groupBy("split").count().collect())
    for name, share in (("train", 1.0), ("validation", config.validation), ("test", config.test)):
        if share > 0 and counts[name] == 0:
            told = ", ".join(f"{count} {split_name}" for split_name, count in counts.items())
            raise ConfigError(
                f"split.protocol {config.protocol} leaves no {name} interactions ({told}); "
                "change split.validation or split.test, raise filters.core, or bring more data"
            )
    return split, counts


def first_seen(split: DataFrame, config: SplitConfig, key: str) -> DataFrame:
    """Columns `id` and `split`: the split in which each user (`key` "user") or item first appears.

    That is `train` for all, but for the items of an item cold start that were held out.
    """
    ids = split.select(F.col(key).alias("id"), "split")
    if (config.protocol, key) == ("cold_item", "item"):
        return ids.distinct()
    return ids.select("id").distinct().withColumn("split", F.lit("train"))


def _split_at(position: Column, count: Column, config: SplitConfig) -> Column:
    test = _ceil_share(count, config.test)
    validation = _ceil_share(count, config.validation)
    return F.when(position < test, "test").when(position < test + validation, "validation").otherwise("train")


def _ceil_share(count: Column, ratio: float) -> Column:
    # In decimals: as binary fractions 30 * 0.1 is a little more than 3, and its ceiling 4.
    return F.ceil(count.cast("decimal(19,0)") * F.lit(Decimal(str(ratio))))
