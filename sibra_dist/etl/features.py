"""Features: side information to codes and numbers. All that is fitted is fitted on the training entities alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import sqrt

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from sibra_dist.data.manifest import FeatureKind, FeatureSpec, Side
from sibra_dist.errors import SourceError
from sibra_dist.etl.config import FeatureConfig

GRID_BITS = 40
"""Numbers are rounded to a grid of so many bits between the least and the largest before they are summed."""


def joined(tables: Sequence[DataFrame]) -> DataFrame | None:
    """Side information of several tables in one: columns `id`, `features` and `within`, a row for each id in any of them."""
    if not tables:
        return None
    if len(tables) == 1:
        return tables[0]
    renamed = [
        table.select("id", F.col("features").alias(f"features_{place}"), F.col("within").alias(f"within_{place}"))
        for place, table in enumerate(tables)
    ]
    together = reduce(lambda left, right: left.join(right, "id", "full"), renamed)

    def merged(name: str) -> Column:
        parts = [(place, table.select(f"{name}.*").columns) for place, table in enumerate(tables)]
        fields = [F.col(f"{name}_{place}").getField(field).alias(field) for place, names in parts for field in names]
        return F.struct(*fields).alias(name)

    return together.select("id", merged("features"), merged("within"))


def encode_features(
    entities: DataFrame, side_information: DataFrame | None, configs: Mapping[str, FeatureConfig], side: Side
) -> tuple[DataFrame, tuple[FeatureSpec, ...]]:
    """The table of one side, columns `index`, `id`, `split` and one for each feature, and what was fitted.

    `entities` holds `index`, `id` and `split`. Category becomes an int code, tags a sorted array of distinct codes, numeric
    and vector an array<float>; null is an absent feature. A value that no training entity has stands for nothing: it is
    left out, and counted as unknown.

    Raises:
        SourceError: vectors of one feature differ in length, or there are none.
    """
    table = entities.select("index", "id", "split")
    if side_information is None:
        return table, ()
    wide = table.join(side_information.select("id", "features.*"), "id", "left").localCheckpoint()
    fitted = []
    for name, config in configs.items():
        wide, spec = ENCODERS[config.kind](wide, name, config)
        fitted.append(spec)
    wide = wide.localCheckpoint()
    present = wide.agg(F.count("*").alias("index"), *[F.count(name).alias(name) for name in configs]).collect()[0]
    specs = tuple(spec.model_copy(update={"missing": present["index"] - present[spec.name]}) for spec in fitted)
    for spec in specs:
        if spec.kind == "vector" and spec.size == 0:
            raise SourceError(f"none of the {side} that are kept has the vector {spec.name}; check the ids of its table")
    return wide.select("index", "id", "split", *configs), specs


def encode_category(wide: DataFrame, name: str, config: FeatureConfig) -> tuple[DataFrame, FeatureSpec]:
    """A value to its place among the sorted values of training entities."""
    vocabulary, unknown = _vocabulary(wide.select("split", F.col(name).alias("value")))
    codes = _codes(wide, vocabulary).select(F.col("value").alias(name), F.col("code").alias("_code"))
    coded = wide.join(codes, name, "left").drop(name).withColumnRenamed("_code", name)
    return coded, _coded_spec(name, "category", vocabulary, unknown)


def encode_tags(wide: DataFrame, name: str, config: FeatureConfig) -> tuple[DataFrame, FeatureSpec]:
    """Each tag to its place among the sorted tags of training entities."""
    exploded = wide.select("index", "split", F.explode(name).alias("value"))
    vocabulary, unknown = _vocabulary(exploded)
    coded = exploded.join(_codes(wide, vocabulary), "value").groupBy("index")
    lists = coded.agg(F.sort_array(F.collect_list("code")).alias(name))
    return wide.drop(name).join(lists, "index", "left"), _coded_spec(name, "tags", vocabulary, unknown)


def encode_numeric(wide: DataFrame, name: str, config: FeatureConfig) -> tuple[DataFrame, FeatureSpec]:
    """Numbers shifted and scaled as they are spread among training entities."""
    size = wide.agg(F.max(F.size(name))).collect()[0][0] or 0
    spec = FeatureSpec(name=name, kind="numeric", size=size, missing=0)
    values = [F.col(name)[place] for place in range(size)]
    if config.scale != "none":
        training = wide.where((F.col("split") == "train") & F.col(name).isNotNull())
        fitted = [fit_scale(training.select(value.alias("value")), config.scale) for value in values]
        spec = spec.model_copy(update={"offset": tuple(pair[0] for pair in fitted), "scale": tuple(pair[1] for pair in fitted)})
        values = [(value - offset) / scale for value, (offset, scale) in zip(values, fitted, strict=True)]
    scaled = F.when(F.col(name).isNotNull(), F.array(*[value.cast("float") for value in values]))
    return wide.withColumn(name, scaled), spec


def encode_vector(wide: DataFrame, name: str, config: FeatureConfig) -> tuple[DataFrame, FeatureSpec]:
    """Vectors as they are; all must have one length."""
    rows = wide.where(F.col(name).isNotNull()).groupBy(F.size(name).alias("size")).agg(F.count("*"), F.min("id")).collect()
    if len(rows) > 1:
        told = ", ".join(f"{size} ({count} rows, such as id {identifier})" for size, count, identifier in sorted(rows))
        raise SourceError(f"vectors of feature {name} must all have one length, but theirs are {told}")
    return wide, FeatureSpec(name=name, kind="vector", size=rows[0][0] if rows else 0, missing=0)


Encoder = Callable[[DataFrame, str, FeatureConfig], tuple[DataFrame, FeatureSpec]]
ENCODERS: dict[str, Encoder] = {
    "category": encode_category,
    "tags": encode_tags,
    "numeric": encode_numeric,
    "vector": encode_vector,
}


def fit_scale(values: DataFrame, scale: str) -> tuple[float, float]:
    """What to subtract from the numbers in column `value`, and what to divide by; 0 and 1 where there is none.

    `standard`: the mean and the standard deviation (of the population); `minmax`: the least, and the span. A divisor of 0
    becomes 1. The numbers are the same in whatever order and grouping Spark adds up: floating-point sums would not
    be, so values are first brought to whole numbers on a grid from the least to the largest, 2**40 steps wide, and whole
    numbers are added exactly.
    """
    count, low, high = values.agg(F.count("*"), F.min("value"), F.max("value")).collect()[0]
    if count == 0:
        return 0.0, 1.0
    span = high - low
    if scale == "minmax" or span == 0:
        return low, span or 1.0
    steps = 1 << GRID_BITS
    place = F.round((F.col("value") - low) / span * steps).cast("decimal(13,0)")
    total, squares = values.agg(F.sum(place), F.sum((place * place).cast("decimal(27,0)"))).collect()[0]
    mean = int(total) / count / steps
    variance = (count * int(squares) - int(total) ** 2) / (count * steps) ** 2
    return low + span * mean, span * sqrt(variance) or 1.0


def _vocabulary(values: DataFrame) -> tuple[tuple[str, ...], int]:
    """The sorted values of column `value` that training entities have, and how many others there are."""
    seen = values.where(F.col("value").isNotNull()).groupBy("value").agg(F.max(F.col("split") == "train").alias("in_training"))
    vocabulary = tuple(sorted(row.value for row in seen.where("in_training").select("value").collect()))
    return vocabulary, seen.count() - len(vocabulary)


def _coded_spec(name: str, kind: FeatureKind, vocabulary: tuple[str, ...], unknown: int) -> FeatureSpec:
    return FeatureSpec(name=name, kind=kind, size=len(vocabulary), vocabulary=vocabulary, missing=0, unknown=unknown)


def _codes(frame: DataFrame, vocabulary: Sequence[str]) -> DataFrame:
    """Columns `value` and `code` (int) of a vocabulary."""
    rows = [(value, code) for code, value in enumerate(vocabulary)]
    return F.broadcast(frame.sparkSession.createDataFrame(rows, "value string, code int"))
