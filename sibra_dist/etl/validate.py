"""Validation: which records can be used, and for each of the others the reason why not.

Frames of `readers` come in; they go out with a column `reason`, null where the record is good. Of the rest, `record` keeps
what to show. `rejected` and `usable` take the two halves.
"""

from collections.abc import Mapping, Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructType

from sibra_dist.errors import SourceError
from sibra_dist.etl.config import FeatureTableConfig, InteractionsConfig
from sibra_dist.etl.readers import NPZ_COLUMNS
from sibra_dist.etl.values import (
    LARGEST,
    as_text,
    columns_of,
    feature_value,
    id_in,
    is_finite,
    milliseconds,
    number_of,
    require_pattern,
)

NO_USER, NO_ITEM, NO_ID = "no user id", "no item id", "no id"
BAD_RATING, BAD_WEIGHT, BAD_NUMBER = "rating is not a finite number", "weight is not a number up to 1e15", "not a finite number"
LARGEST_WEIGHT = 1e15
"""Larger ones could not be summed exactly."""
LISTED = "_listed"
"""A field that a struct has in any case: one without fields cannot be stored."""
BAD_TIME, BAD_SPLIT = "time cannot be read", "split is not train, validation or test"
UNKNOWN_ID, DUPLICATE_ID = "unknown id", "duplicate id"
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
} | {"test": "test"}


def interaction_columns(table: InteractionsConfig) -> list[str]:
    """The columns that interactions are read from."""
    names = (table.user, table.item, table.rating, table.weight, table.time, table.split)
    return list(dict.fromkeys(name for name in names if name is not None))


def check_interactions(records: DataFrame, table: InteractionsConfig, name: str) -> DataFrame:
    """Columns `user`, `item`, and where configured `rating`, `weight` (double), `time` (long, milliseconds), `split`; `reason`.

    Raises:
        SourceError: a column has a type that is no id, number or time. `name` says which table it is of.
    """
    kinds = _types(records)
    user, item = id_in(table.user, kinds, name), id_in(table.item, kinds, name)
    reason = F.when(F.col("fault").isNotNull(), F.col("fault")).when(user.isNull(), NO_USER).when(item.isNull(), NO_ITEM)
    columns = [user.alias("user"), item.alias("item")]
    for field, column, fault, largest in (
        ("rating", table.rating, BAD_RATING, LARGEST),
        ("weight", table.weight, BAD_WEIGHT, LARGEST_WEIGHT),
    ):
        if column is not None:
            number = number_of(F.col("values").getField(column), column, kinds, name)
            reason = reason.when(~is_finite(number, largest), fault)
            columns.append(number.alias(field))
    if table.time is not None:
        time = milliseconds(table.time, kinds, name, table.time_format)
        reason = reason.when(time.isNull(), BAD_TIME)
        columns.append(time.alias("time"))
    if table.split is not None:
        names = F.create_map(*[F.lit(text) for pair in SPLIT_NAMES.items() for text in pair])
        split = names[F.lower(F.trim(F.col("values").getField(table.split).cast("string")))]
        reason = reason.when(split.isNull(), BAD_SPLIT)
        columns.append(split.alias("split"))
    return _with_reason(records.select("file", "record", "fault", "values", *columns), reason)


def feature_columns(table: FeatureTableConfig, raw: Sequence[str] = ()) -> list[str]:
    """The columns that a feature table is read from: its ids, its features, and columns that a filter looks at."""
    features = [column for name, feature in table.features.items() for column in columns_of(name, feature, table)]
    return list(dict.fromkeys([id_column(table), *features, *raw]))


def id_column(table: FeatureTableConfig) -> str:
    """The column of a feature table's ids."""
    return NPZ_COLUMNS[0] if table.format in ("npz", "npy") else table.id


def check_features(records: DataFrame, table: FeatureTableConfig, raw: Sequence[str], ids: DataFrame, name: str) -> DataFrame:
    """Columns `key`, `features` (a struct) and `raw` (a struct of text: the columns that filters look at), with `reason`.

    Features come out as category string, tags array<string> (sorted, distinct), numeric array<double>, vector
    array<float>, text string, and null where a record lacks one: empty text, an empty list, NaN. A numeric or vector feature
    of which one element is absent is absent.

    An id is unknown, and its record rejected, if `ids` (columns `id`, `key`) lacks it, so if no usable interaction mentions
    it, whether or not a filter removes those interactions later. Of several records of one id, the smallest by its content
    stays.

    Raises:
        SourceError: a column has a type that its use does not fit. `name` says which table it is of.
        ConfigError: a pattern is no regular expression to Java.
    """
    kinds = _types(records)
    identifier = id_in(id_column(table), kinds, name)
    reason = F.when(F.col("fault").isNotNull(), F.col("fault")).when(identifier.isNull(), NO_ID)
    features = []
    for feature_name, feature in table.features.items():
        if feature.pattern is not None:
            require_pattern(records.sparkSession, feature.pattern, f"{name}: feature {feature_name}")
        value, bad = feature_value(feature_name, feature, kinds, table, name)
        reason = reason.when(bad, BAD_NUMBER)
        features.append(value.alias(feature_name))
    seen = [as_text(F.col("values").getField(column), column, kinds, name).alias(column) for column in raw]
    checked = records.select(
        "file",
        "record",
        "values",
        identifier.alias("id"),
        F.struct(F.lit(True).alias(LISTED), *features).alias("features"),
        F.struct(F.lit(True).alias(LISTED), *seen).alias("raw"),
        reason.alias("reason"),
    )
    checked = checked.join(ids.select("id", "key"), "id", "left").withColumn(
        "reason", F.coalesce("reason", F.when(F.col("key").isNull(), UNKNOWN_ID))
    )
    # Only good records compete for an id; the order is total but for records that are equal in all that is used.
    rank = F.row_number().over(Window.partitionBy("id", F.col("reason").isNull()).orderBy("record", "values", "file"))
    reason = F.when(F.col("reason").isNull() & (rank > 1), DUPLICATE_ID).otherwise(F.col("reason"))
    return _with_reason(checked, reason).drop("id")


def rejected(checked: DataFrame, table: str) -> DataFrame:
    """The records that cannot be used, as rows of the table `rejected`."""
    return checked.where(F.col("reason").isNotNull()).select(F.lit(table).alias("table"), "file", "reason", "record")


def usable(checked: DataFrame) -> DataFrame:
    """The good records, without what is known of where they came from."""
    return checked.where(F.col("reason").isNull()).drop("file", "reason", "record")


def count_by_reason(checked: DataFrame) -> tuple[int, dict[str, int], dict[str, str]]:
    """How many records there are; of the rejected, how many by reason, and an example of each."""
    rows = checked.groupBy("reason").agg(F.count("*"), F.min(F.concat_ws(": ", "file", "record"))).collect()
    counts = {str(reason): int(count) for reason, count, _ in rows if reason is not None}
    order = sorted(counts, key=lambda reason: (-counts[reason], reason))
    examples = {str(reason): str(text) for reason, _, text in rows if reason is not None}
    return sum(row[1] for row in rows), {reason: counts[reason] for reason in order}, examples


def check_share(read: int, counts: Mapping[str, int], examples: Mapping[str, str], largest: float, name: str) -> None:
    """Check that no larger share of a table's records was rejected than is allowed.

    Side information of unknown ids is no fault: catalogues list more than anyone has touched. But a table of which no id
    at all is known is the wrong table, or the wrong column.

    Raises:
        SourceError: it was, with the commonest reasons and an example of each.
    """
    if read == 0:
        raise SourceError(f"{name} holds no records")
    if counts.get(UNKNOWN_ID) == read:
        raise SourceError(
            f"none of the {read} ids of {name} is in the interactions, for example {examples[UNKNOWN_ID]!r}; "
            "check the column `id` of that table, and the columns of the interactions"
        )
    faults = [reason for reason in counts if reason != UNKNOWN_ID]
    refused = sum(counts[reason] for reason in faults)
    if refused / read > largest:
        told = "; ".join(f"{reason}: {counts[reason]} records, such as {examples[reason]!r}" for reason in faults[:3])
        raise SourceError(f"{refused} of {read} records of {name} cannot be used; max_rejected_share is {largest}. {told}")


def _with_reason(checked: DataFrame, reason: Column) -> DataFrame:
    """`checked` with its `reason`; `values` gone, and `file` and `record` kept only where they will be shown."""
    file = F.when(F.col("reason").isNotNull(), F.col("file"))
    record = F.when(F.col("reason").isNotNull(), F.coalesce("record", F.to_json("values")))
    shown = checked.withColumn("reason", reason).withColumn("record", record).withColumn("file", file)
    return shown.drop("values", "fault")


def _types(records: DataFrame) -> dict[str, DataType]:
    values = records.schema["values"].dataType
    assert isinstance(values, StructType)
    return {field.name: field.dataType for field in values}
