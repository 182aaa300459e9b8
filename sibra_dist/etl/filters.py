"""Filters: which interactions are kept at all, in the order of `FilterConfig`."""

from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from sibra_dist.errors import ConfigError
from sibra_dist.etl.config import EntityFilter, FilterConfig


def filter_interactions(
    interactions: DataFrame, users: DataFrame | None, items: DataFrame | None, config: FilterConfig
) -> tuple[DataFrame, dict[str, int]]:
    """Distinct pairs `user`, `item` (with `time`, if there is one) that pass every filter, and how many each step left out.

    `users` and `items` hold the side information as `joined` gives it; None where there is none. The steps are named after
    the fields of `FilterConfig`, and come in their order, with `duplicates` after the ratings.

    Raises:
        ConfigError: a step leaves nothing.
    """
    left_out: dict[str, int] = {}
    remaining = interactions.count()

    def step(name: str, frame: DataFrame, remedy: str) -> DataFrame:
        nonlocal remaining
        # Later steps start from what is stored here, so that none of them reads the input again. Deterministic steps
        # make a lost block recomputable up to the checkpoint before it; beyond that the job has to be run again.
        stored = frame.localCheckpoint()
        count = stored.count()
        left_out[name], remaining = remaining - count, count
        if count == 0:
            raise ConfigError(f"filters.{name} leaves no interactions; {remedy}")
        return stored

    if config.min_rating is not None:
        interactions = interactions.where(F.col("rating") >= config.min_rating)
    interactions = step("min_rating", interactions, f"the largest rating is below {config.min_rating}")
    interactions = step("duplicates", without_duplicates(interactions), "this cannot be")
    for side, key, table, entity_filter in (("users", "user", users, config.users), ("items", "item", items, config.items)):
        if entity_filter != EntityFilter() and table is not None:
            allowed = table.where(_passes(entity_filter)).select(F.col("id").alias(key))
            interactions = interactions.join(allowed, key, "left_semi")
        interactions = step(side, interactions, f"none of the {side} has every required feature and lies within the bounds")
    interactions = step("core", k_core(interactions, config.core), f"lower filters.core, which is {config.core}")
    return interactions, left_out


def without_duplicates(interactions: DataFrame) -> DataFrame:
    """One row for each pair of user and item: the latest, where times are known. Ratings have served by now."""
    latest = [F.max("time").alias("time")] if "time" in interactions.columns else []
    pairs = interactions.groupBy("user", "item")
    return pairs.agg(*latest) if latest else interactions.select("user", "item").distinct()


def k_core(interactions: DataFrame, k: int) -> DataFrame:
    """The largest part of distinct interactions in which each user and each item has at least `k`."""
    if k <= 1:
        return interactions
    count = interactions.count()
    while True:
        for key in ("user", "item"):
            frequent = interactions.groupBy(key).count().where(F.col("count") >= k).select(key)
            interactions = interactions.join(frequent, key, "left_semi")
        # Without the checkpoint the plan would double each round: the core may be hundreds of rounds away.
        interactions = interactions.localCheckpoint()
        count, before = interactions.count(), count
        if count == before:
            return interactions


def _passes(entity_filter: EntityFilter) -> Column:
    """Whether a row of side information has what the filter asks for."""
    conditions = [F.col("features").getField(name).isNotNull() for name in entity_filter.require]
    for column, (low, high) in entity_filter.within.items():
        conditions.append(F.coalesce(F.col("within").getField(column).between(low, high), F.lit(False)))
    return reduce(Column.__and__, conditions)
