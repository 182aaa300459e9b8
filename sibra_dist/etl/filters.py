"""Filters: which interactions are kept at all, in the order of `FilterConfig`."""

from collections.abc import Callable, Mapping
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from sibra_dist.data.manifest import Side
from sibra_dist.errors import ConfigError, SourceError
from sibra_dist.etl.config import EntityFilter, FilterConfig
from sibra_dist.etl.indexing import SIDES, with_keys
from sibra_dist.etl.values import number_in
from sibra_dist.etl.work import Work


def filter_interactions(
    interactions: DataFrame,
    count: int,
    ids: Mapping[Side, DataFrame],
    side_information: Mapping[Side, DataFrame | None],
    config: FilterConfig,
    work: Work,
) -> tuple[DataFrame, dict[str, int]]:
    """Distinct pairs of keys `user`, `item` that pass every filter, and how many each step left out.

    Args:
        interactions: ids `user`, `item`, `draw`, and whichever there are of `rating`, `weight`, `time`, `split`; all but
            `rating` are kept.
        count: how many they are.
        ids: by side what `number_ids` gives.
        side_information: by side what `joined` gives; None where there is none.
        config: the filters. The steps are named after its fields, and come in their order.
        work: where the result of each step is stored.

    Raises:
        ConfigError: a step leaves nothing.
        SourceError: a pair is in several splits of a fixed split.
    """
    left_out: dict[str, int] = {}

    def note(name: str, left: int, remedy: str) -> None:
        nonlocal count
        left_out[name], count = count - left, left
        if left == 0:
            raise ConfigError(f"filters.{name} leaves no interactions; {remedy}")

    if config.min_rating is not None:
        interactions = interactions.where(F.col("rating") >= config.min_rating)
        note("min_rating", interactions.count(), f"no rating is {config.min_rating} or more")
    pairs = work.store(DUPLICATES[config.duplicates](with_keys(interactions, ids)), "pairs")
    note("duplicates", pairs.count(), "there were none before")
    if "split" in pairs.columns:
        pairs = _of_one_split(pairs)
    for side, key in SIDES:
        entity_filter = config.users if side == "users" else config.items
        if entity_filter != EntityFilter():
            pairs = work.store(filter_entities(pairs, key, side_information[side], entity_filter), f"{side}-kept")
            note(side, pairs.count(), f"none of the {side} passes it; widen its bounds")
    if config.core > 1:
        pairs = k_core(pairs, config.core, work)
        note("core", pairs.count(), f"lower filters.core, which is {config.core}")
    return pairs, left_out


def one_of(pairs: DataFrame, *order: str, last: bool = True) -> DataFrame:
    """Of the rows of each pair the last, or first, by those columns of `order` that are there, and then by the rest."""
    others, best = _others(pairs), F.max if last else F.min
    order = tuple(name for name in order if name in pairs.columns)
    if others == list(order[:1]) or not others:
        # Nothing hangs on which row it is. A single number is also much quicker to aggregate than a struct.
        return pairs.groupBy("user", "item").agg(*[best(name).alias(name) for name in others], *_of_all(pairs))
    chosen = best(F.struct(*dict.fromkeys([*order, *others]))).alias("chosen")
    grouped = pairs.groupBy("user", "item").agg(chosen, *_of_all(pairs))
    return grouped.select("user", "item", *[f"chosen.{name}" for name in others], *_names_of_all(pairs))


def summed(pairs: DataFrame) -> DataFrame:
    """Of the rows of each pair the latest, with the sum of all weights: in decimals, which add up exactly in any order."""
    latest = [F.max(name).alias(name) for name in _others(pairs) if name != "weight"]
    exact = F.sum(F.col("weight").cast("decimal(28,9)")).cast("double")
    total = F.when(F.count("*") == 1, F.max("weight")).otherwise(exact).alias("weight")
    return pairs.groupBy("user", "item").agg(*latest, total, *_of_all(pairs))


def _others(pairs: DataFrame) -> list[str]:
    """The columns that are taken from the row that is left. A rating has served once duplicates are settled."""
    return [name for name in pairs.columns if name not in ("user", "item", "rating", "draw", "split")]


def _of_all(pairs: DataFrame) -> list[Column]:
    """What all rows of a pair have in common, or ought to: the draw, and the split. There is always a first."""
    splits = [F.array_sort(F.collect_set("split")).alias("split")] if "split" in pairs.columns else []
    return [F.max("draw").alias("draw"), *splits]


def _names_of_all(pairs: DataFrame) -> list[str]:
    return ["draw", *[name for name in ("split",) if name in pairs.columns]]


DUPLICATES: dict[str, Callable[[DataFrame], DataFrame]] = {
    "latest": lambda pairs: one_of(pairs, "time", "rating", "weight"),
    "earliest": lambda pairs: one_of(pairs, "time", "rating", "weight", last=False),
    "highest": lambda pairs: one_of(pairs, "rating", "weight", "time"),
    "sum": summed,
}


def _of_one_split(pairs: DataFrame) -> DataFrame:
    """Pairs whose rows name one split each: a fixed split that puts a pair in two would leak.

    Raises:
        SourceError: one names two.
    """
    torn = pairs.where(F.size("split") > 1)
    several = torn.groupBy(F.array_join("split", " and ").alias("splits")).count().orderBy("splits").collect()
    if several:
        told = ", ".join(f"{row['count']} in {row['splits']}" for row in several)
        raise SourceError(f"the fixed split has pairs of user and item in more than one part: {told}. Each may be in one only")
    return pairs.withColumn("split", F.element_at("split", 1))


def filter_entities(pairs: DataFrame, key: str, table: DataFrame | None, entity_filter: EntityFilter) -> DataFrame:
    """The pairs whose user, or item, has what the filter asks for. Interactions are counted after features are looked at."""
    if table is not None and (entity_filter.require or entity_filter.columns):
        allowed = table.where(_passes(entity_filter)).select(F.col("key").alias(key))
        pairs = pairs.join(allowed, key, "left_semi")
    if entity_filter.min_count > 1 or entity_filter.max_count is not None:
        counts = pairs.groupBy(key).count()
        fits = F.col("count") >= entity_filter.min_count
        if entity_filter.max_count is not None:
            fits &= F.col("count") <= entity_filter.max_count
        pairs = pairs.join(counts.where(fits).select(key), key, "left_semi")
    return pairs


def k_core(pairs: DataFrame, k: int, work: Work) -> DataFrame:
    """The largest part of distinct pairs in which each user and each item has at least `k`.

    Each round removes users and items with fewer, until a round finds none. It is stored, so that no plan grows with the
    rounds, of which there may be hundreds, and no round is computed twice.
    """
    if k <= 1:
        return pairs
    count, former = pairs.count(), None
    while True:
        for key in ("user", "item"):
            frequent = pairs.groupBy(key).count().where(F.col("count") >= k).select(key)
            pairs = pairs.join(frequent, key, "left_semi")
        pairs, path = work.stored(pairs, "core")
        count, before = pairs.count(), count
        if former is not None:  # the round that this one was made from
            work.delete(former)
        former = path
        if count == before:
            return pairs


def _passes(entity_filter: EntityFilter) -> Column:
    """Whether a row of side information has what the filter asks for."""
    raw = F.col("raw")
    conditions = [F.col("features").getField(name).isNotNull() for name in entity_filter.require]
    for column, (low, high) in entity_filter.within.items():
        conditions.append(F.coalesce(number_in(raw.getField(column)).between(low, high), F.lit(False)))
    for column, values in entity_filter.allowed.items():
        conditions.append(F.coalesce(raw.getField(column).isin(list(values)), F.lit(False)))
    return reduce(Column.__and__, conditions, F.lit(True))
