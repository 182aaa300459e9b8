"""Features: what the training entities show of side information, in a few aggregates for all features together.

How values then become codes and numbers is in `sibra_dist.encoding.features`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import sqrt

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from sibra_dist.config import to_plain
from sibra_dist.data.manifest import FeatureSpec, Side
from sibra_dist.errors import ConfigError, SourceError
from sibra_dist.etl.extend import Former
from sibra_dist.etl.feature_config import FeatureConfig
from sibra_dist.etl.text import encode_text
from sibra_dist.etl.validate import LISTED
from sibra_dist.etl.work import Work

GRID_BITS = 40
"""Numbers are rounded to a grid of so many bits between the least and the largest before they are summed."""


def joined(tables: Sequence[DataFrame]) -> DataFrame | None:
    """Side information of several tables in one: columns `key`, `features` and `raw`, a row for each key in any of them."""
    if not tables:
        return None
    if len(tables) == 1:
        return tables[0]
    renamed = [
        table.select("key", F.col("features").alias(f"features_{place}"), F.col("raw").alias(f"raw_{place}"))
        for place, table in enumerate(tables)
    ]
    together = reduce(lambda left, right: left.join(right, "key", "full"), renamed)

    def merged(name: str) -> Column:
        parts = [(place, table.select(f"{name}.*").columns) for place, table in enumerate(tables)]
        fields = [
            F.col(f"{name}_{place}").getField(field).alias(field)
            for place, names in parts
            for field in names
            if field != LISTED
        ]
        return F.struct(F.lit(True).alias(LISTED), *fields).alias(name)

    return together.select("key", merged("features"), merged("raw"))


def with_features(entities: DataFrame, side_information: DataFrame | None, configs: Mapping[str, FeatureConfig]) -> DataFrame:
    """Entities (`index`, `key`, `id`, `split`) with a column for each feature; `key` has served then."""
    if side_information is None:
        return entities.drop("key")
    return entities.join(side_information.select("key", "features.*"), "key", "left").select("index", "id", "split", *configs)


def encode_texts(
    wide: DataFrame, configs: Mapping[str, FeatureConfig], side: Side, former: Former, work: Work
) -> tuple[DataFrame, dict[str, pa.Table]]:
    """The same rows, stored, with a vector in place of each text; and by feature what was fitted, where anything was."""
    wide = work.store(wide, side)
    learned = {}
    for name, config in configs.items():
        if config.kind == "text":
            texts = wide.select("index", "split", F.col(name).alias("text"))
            vectors, fitted, _ = encode_text(texts, config.encoder, former.fitted(side, name))
            wide = wide.drop(name).join(vectors.withColumnRenamed("vector", name), "index", "left")
            # The encoder is not to run once for every look at its vectors.
            wide = work.store(wide, name)
            if fitted is not None:
                learned[name] = fitted
    return wide, learned


def fit(
    wide: DataFrame, configs: Mapping[str, FeatureConfig], former: Mapping[str, FeatureSpec], side: str, work: Work
) -> tuple[FeatureSpec, ...]:
    """What the training entities of a side show of each feature. `missing` is not counted yet.

    Args:
        wide: `split`, and a column for each feature: category string, tags array<string>, numeric array<double>, vector
            array<float>. It is read several times, so it should be stored.
        configs: the features, by name; a text must have become a vector.
        former: what was fitted for the dataset that is extended. Its codes and scales stay, and new values get new codes.
        side: `users` or `items`, for messages.
        work: where counts of values are stored.

    Raises:
        SourceError: vectors of one feature differ in length, or there are none.
    """
    coded = [name for name, config in configs.items() if config.kind in ("category", "tags")]
    vocabularies = _fit_vocabularies(wide, {name: configs[name] for name in coded}, former, work) if coded else {}
    numbers = _fit_numbers(wide, {name: config for name, config in configs.items() if name not in coded}, former, side)
    return tuple(vocabularies[name] if name in vocabularies else numbers[name] for name in configs)


@dataclass(frozen=True)
class _Seen:
    """What is known of the values of one coded feature before its vocabulary is chosen."""

    in_training: int = 0
    """Values that a training entity has."""
    eligible: int = 0
    """Those that enough of them have."""


def _fit_vocabularies(
    wide: DataFrame, configs: Mapping[str, FeatureConfig], former: Mapping[str, FeatureSpec], work: Work
) -> dict[str, FeatureSpec]:
    """A vocabulary for each feature. At most `max_size` values of each come to the driver, whatever the data."""
    places = {name: place for place, name in enumerate(configs)}
    values = []
    for name, config in configs.items():
        held = F.coalesce(F.col(name) if config.kind == "tags" else F.array(name), F.array().cast("array<string>"))
        values.append(F.transform(held, _of_feature(places[name])))
    shown = wide.select("split", F.explode(F.concat(*values)).alias("_")).select("split", "_.feature", "_.value")
    training = F.sum((F.col("split") == "train").cast("long")).alias("training")
    counts = work.store(shown.where(F.col("value").isNotNull()).groupBy("feature", "value").agg(training), "values")
    least = F.array(*[F.lit(config.min_count) for config in configs.values()])[F.col("feature")]
    is_eligible = F.col("training") >= least
    tallies = counts.groupBy("feature").agg(F.count_if(F.col("training") > 0), F.count_if(is_eligible)).collect()
    seen = {row[0]: _Seen(*row[1:]) for row in tallies}
    eligible = counts.where(is_eligible)
    small = [place for name, place in places.items() if seen.get(place, _Seen()).eligible <= configs[name].max_size]
    chosen: dict[int, list[str]] = {place: [] for place in places.values()}
    for row in sorted(eligible.where(F.col("feature").isin(small)).collect(), key=lambda row: (-row["training"], row["value"])):
        chosen[row["feature"]].append(row["value"])
    for name, place in places.items():
        if place not in small:
            order = eligible.where(F.col("feature") == place).orderBy(F.desc("training"), "value")
            chosen[place] = [row["value"] for row in order.limit(configs[name].max_size).select("value").collect()]
    vocabularies = {
        name: _vocabulary(chosen[place], seen.get(place, _Seen()), former.get(name), configs[name].max_size)
        for name, place in places.items()
    }
    rows = [(places[name], value) for name, words in vocabularies.items() for value in words if value is not None]
    coded = work.spark.createDataFrame(rows, "feature int, value string")
    strangers: dict[int, int] = dict(
        counts.join(F.broadcast(coded), ["feature", "value"], "left_anti").groupBy("feature").count().collect()
    )
    return {
        name: FeatureSpec(
            name=name,
            kind="category" if configs[name].kind == "category" else "tags",
            size=len(words),
            vocabulary=words,
            missing=0,
            unknown=strangers.get(places[name], 0),
        )
        for name, words in vocabularies.items()
    }


def _of_feature(place: int) -> Callable[[Column], Column]:
    return lambda value: F.struct(F.lit(place).alias("feature"), value.alias("value"))


def _vocabulary(values: Sequence[str], seen: _Seen, former: FeatureSpec | None, largest: int) -> tuple[str | None, ...]:
    """The value of each code: those of the dataset that is extended and then new ones, or all in the order of the text.

    `values` come by how common they are.
    """
    if former is not None and former.vocabulary is not None:
        known = {value for value in former.vocabulary if value is not None}
        room = max(largest - len(known), 0)
        return (*former.vocabulary, *sorted([value for value in values if value not in known][:room]))
    # A code for the rest is there if training shows any rest: else no model could learn what it means.
    return ((None,) if seen.in_training > len(values) else ()) + tuple(sorted(values))


def _fit_numbers(
    wide: DataFrame, configs: Mapping[str, FeatureConfig], former: Mapping[str, FeatureSpec], side: str
) -> dict[str, FeatureSpec]:
    """Lengths of vectors and lists of numbers, and the scales of the latter."""
    if not configs:
        return {}
    bounds = wide.agg(*[part for name in configs for part in (F.min(F.array_size(name)), F.max(F.array_size(name)))]).collect()[
        0
    ]
    specs: dict[str, FeatureSpec] = {}
    for place, (name, config) in enumerate(configs.items()):
        low, high = bounds[2 * place], bounds[2 * place + 1]
        if low != high:
            raise _unequal(wide, name)
        if not high and config.kind != "numeric":
            raise SourceError(f"none of the {side} that are kept has the vector {name}; check the ids of its table")
        specs[name] = FeatureSpec(
            name=name,
            kind="numeric" if config.kind == "numeric" else "vector",
            size=high or 0,
            encoder=to_plain(config.encoder) if config.kind == "text" else None,
            missing=0,
        )
    for name, spec in specs.items():
        if name in former and former[name].size and spec.size not in (0, former[name].size):
            raise ConfigError(
                f"{side}: feature {name} has {spec.size} elements, and {former[name].size} in the dataset that is extended; "
                "keep its columns, or give it another name"
            )
        if name in former:
            specs[name] = spec.model_copy(update={"offset": former[name].offset, "scale": former[name].scale})
    scaled = [name for name, config in configs.items() if config.kind == "numeric" and config.scale != "none"]
    anew = [(name, place) for name in scaled if name not in former for place in range(specs[name].size)]
    training = wide.where(F.col("split") == "train")
    columns = [training[name][place].alias(f"{name}_{place}") for name, place in anew]
    fitted = fit_scales(training.select(*columns), [configs[name].scale for name, _ in anew]) if anew else []
    for name in {name for name, _ in anew}:
        pairs = [pair for (other, _), pair in zip(anew, fitted, strict=True) if other == name]
        offset, scale = zip(*pairs, strict=True)
        specs[name] = specs[name].model_copy(update={"offset": offset, "scale": scale})
    return specs


def fit_scales(values: DataFrame, scales: Sequence[str]) -> list[tuple[float, float]]:
    """What to subtract from the numbers in each column, and what to divide by; 0 and 1 where there is none.

    `standard`: the mean and the standard deviation (of the population); `minmax`: the least, and the span. A divisor of 0
    becomes 1. The numbers are the same in whatever order and grouping Spark adds up: floating-point sums would not
    be, so values are first brought to whole numbers on a grid from the least to the largest, 2**40 steps wide, and whole
    numbers are added exactly.
    """
    names = values.columns
    ends = values.agg(*[part for name in names for part in (F.count(name), F.min(name), F.max(name))]).collect()[0]
    counts, lows, highs = ends[0::3], ends[1::3], ends[2::3]
    steps = 1 << GRID_BITS
    sums: list[Column] = []
    for name, low, high in zip(names, lows, highs, strict=True):
        span = F.lit((high - low) or 1.0 if high is not None else 1.0)
        step = F.round((F.col(name) - F.lit(low or 0.0)) / span * steps).cast("decimal(13,0)")
        sums += [F.sum(step), F.sum((step * step).cast("decimal(27,0)"))]
    added = values.agg(*sums).collect()[0]
    fitted = []
    for place, (count, low, high, scale) in enumerate(zip(counts, lows, highs, scales, strict=True)):
        if count == 0:
            fitted.append((0.0, 1.0))
        elif scale == "minmax" or high == low:
            fitted.append((low, (high - low) or 1.0))
        else:
            total, squares = int(added[2 * place]), int(added[2 * place + 1])
            variance = (count * squares - total**2) / (count * steps) ** 2
            fitted.append((low + (high - low) * (total / count / steps), (high - low) * sqrt(variance) or 1.0))
    return fitted


def _unequal(wide: DataFrame, name: str) -> SourceError:
    rows = wide.where(F.col(name).isNotNull()).groupBy(F.size(name)).agg(F.count("*"), F.min("id")).collect()
    told = ", ".join(f"{size} ({count} rows, such as id {least})" for size, count, least in sorted(rows))
    return SourceError(f"{name}: its lists differ in length: {told}")
