"""Splits: which interactions are for training, validation and test. A split is one function and one line of `SPLITS`.

Each takes distinct interactions (indices `user`, `item`, and `draw`, `time`, `split` as there are) and gives them back with
a column `split`; null leaves a pair out. A draw is a hash of the seed and the external ids, so that it is the same for any
partitioning and order of the input, and whichever index an id has. Of n things ceil(n * share) are for test, and as many for
validation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from sibra_dist.data.manifest import Side
from sibra_dist.errors import ConfigError
from sibra_dist.etl.config import HistoryConfig, SplitConfig
from sibra_dist.etl.indexing import Indexed, with_positions
from sibra_dist.etl.work import Work

COLD_SIDES: dict[str, tuple[Side, ...]] = {"cold_item": ("items",), "cold_user": ("users",), "cold_both": ("users", "items")}
"""The protocols that split entities, and whose."""
IN_TIME = ("temporal_global", "fixed")
"""The protocols in which an entity may be new in a later split."""
CAPPED = "capped"


@dataclass(frozen=True)
class Input:
    """What a split is made from."""

    pairs: DataFrame
    entities: Mapping[Side, Indexed]
    config: SplitConfig
    work: Work
    _splits: dict[Side, DataFrame] = field(default_factory=dict)

    def split_of(self, side: Side) -> DataFrame:
        """Columns `index` and `split` of each user, or item, of a side that is split; drawn once."""
        if side not in self._splits:
            entities = self.entities[side]
            order = entities.table.select("index", "id", drawn(self.config.seed, "id").alias("draw"))
            positions = with_positions(order, ["draw", "id"], "position", self.work)
            name = _split_at(F.col("position"), F.lit(entities.count), self.config)
            self._splits[side] = positions.select("index", name.alias("split"))
        return self._splits[side]


def drawn(seed: int, *ids: str) -> Column:
    """A whole number for each row that hangs on the seed and the columns `ids` alone."""
    return F.xxhash64(F.lit(seed).cast("long"), *ids)


def random_split(given: Input) -> DataFrame:
    """Each user's interactions in a drawn order."""
    return _by_user(given, "draw", "item")


def temporal_user_split(given: Input) -> DataFrame:
    """Each user's interactions by time, the latest for test; of simultaneous ones the higher item id is the later."""
    return _by_user(given, F.desc("time"), F.desc("item"))


def leave_one_out_split(given: Input) -> DataFrame:
    """Each user's latest interaction for test, the one before for validation."""
    latest = Window.partitionBy("user").orderBy(F.desc("time"), F.desc("item"))
    place = F.row_number().over(latest)
    return given.pairs.withColumn("split", F.when(place == 1, "test").when(place == 2, "validation").otherwise("train"))


def temporal_global_split(given: Input) -> DataFrame:
    """All interactions by time, the latest for test; simultaneous ones by user id and then item id."""
    ordered = with_positions(given.pairs, ["time", "user", "item"], "position", given.work)
    count = F.lit(given.pairs.count())
    return ordered.withColumn("split", _split_at(count - 1 - F.col("position"), count, given.config)).drop("position")


def cold_split(given: Input) -> DataFrame:
    """Users, items or both in a drawn order, and all interactions along with them.

    An interaction whose user and item fall into different splits is left out.
    """
    pairs = given.pairs
    for side in COLD_SIDES[given.config.protocol]:
        column = side.removesuffix("s")
        splits = given.split_of(side).select(F.col("index").alias(column), F.col("split").alias(f"{column}_split"))
        pairs = pairs.join(splits, column)
    names = [f"{side.removesuffix('s')}_split" for side in COLD_SIDES[given.config.protocol]]
    agreed = F.when(F.col(names[0]) == F.col(names[-1]), F.col(names[0]))
    return pairs.withColumn("split", agreed).drop(*names)


def fixed_split(given: Input) -> DataFrame:
    """As the source says."""
    return given.pairs


Split = Callable[[Input], DataFrame]
SPLITS: dict[str, Split] = {
    "random": random_split,
    "temporal_user": temporal_user_split,
    "leave_one_out": leave_one_out_split,
    "temporal_global": temporal_global_split,
    "cold_item": cold_split,
    "cold_user": cold_split,
    "cold_both": cold_split,
    "fixed": fixed_split,
}


def split_interactions(given: Input, history: HistoryConfig) -> tuple[DataFrame, dict[str, int], dict[str, int]]:
    """The interactions with their `split`; how many there are in each; and how many were left out, by reason.

    Raises:
        ConfigError: nothing is left to train on, or nothing falls into a split that was asked for.
    """
    protocol = given.config.protocol
    split = SPLITS[protocol](given)
    if history.max_length is not None:
        split = capped(split, history)
    stored = given.work.store(split, "split")
    found: dict[str | None, int] = dict(stored.groupBy("split").count().collect())
    counts = {name: found.get(name, 0) for name in ("train", "validation", "test")}
    wanted = [name for name in counts if name != "test" or given.config.test > 0 or protocol in ("leave_one_out", "fixed")]
    for name in wanted:
        if counts[name] == 0:
            told = ", ".join(f"{count} {split_name}" for split_name, count in counts.items())
            raise ConfigError(
                f"split.protocol {protocol} leaves no {name} interactions ({told}); "
                "change split.validation or split.test, raise filters.core, or bring more data"
            )
    left_out = {"split": found[None]} if None in found else {}
    if history.max_length is not None:
        left_out["history"] = found.get(CAPPED, 0)
    return stored.where(F.col("split").isin(*counts)), counts, left_out


def capped(split: DataFrame, history: HistoryConfig) -> DataFrame:
    """Of each user's training interactions beyond the length that is kept, the split is `CAPPED`."""
    order = [F.desc("time"), F.desc("item")] if history.keep == "latest" else [F.xxhash64(F.lit(1), "draw"), F.col("item")]
    # Users are told apart by split too, so that only training interactions are counted.
    place = F.row_number().over(Window.partitionBy("user", "split").orderBy(*order))
    is_over = (F.col("split") == "train") & (place > F.lit(history.max_length))
    return split.withColumn("split", F.when(is_over, CAPPED).otherwise(F.col("split")))


def first_seen(given: Input, split: DataFrame, side: Side) -> DataFrame:
    """Columns `index`, `id`, `split` of each entity of a side: the split in which it first appears.

    That is `train` for all, but for entities that were split, and for those that are new in a later split where time or the
    source decides: nothing is to be fitted on them.
    """
    protocol, entities = given.config.protocol, given.entities[side].table.select("index", "id")
    if side in COLD_SIDES.get(protocol, ()):
        return entities.join(given.split_of(side), "index")
    if protocol in IN_TIME:
        order = {"train": 0, "validation": 1, "test": 2}
        rank = F.create_map(*[F.lit(value) for pair in order.items() for value in pair])[F.col("split")]
        first = split.groupBy(F.col(side.removesuffix("s")).alias("index")).agg(F.min_by("split", rank).alias("split"))
        # Entities that only the extended dataset knew have no interaction; they were trained on before.
        return entities.join(first, "index", "left").withColumn("split", F.coalesce("split", F.lit("train")))
    return entities.withColumn("split", F.lit("train"))


def _by_user(given: Input, *order: str | Column) -> DataFrame:
    position = F.row_number().over(Window.partitionBy("user").orderBy(*order)) - 1
    count = F.count("*").over(Window.partitionBy("user"))
    return given.pairs.withColumn("split", _split_at(position, count, given.config))


def _split_at(position: Column, count: Column, config: SplitConfig) -> Column:
    test = _ceil_share(count, config.test)
    validation = _ceil_share(count, config.validation)
    return F.when(position < test, "test").when(position < test + validation, "validation").otherwise("train")


def _ceil_share(count: Column, ratio: float) -> Column:
    # In decimals: as binary fractions 30 * 0.1 is a little more than 3, and its ceiling 4.
    return F.ceil(count.cast("decimal(19,0)") * F.lit(Decimal(str(ratio))))
