"""Validation: which records can be used, and for each of the others the reason why not.

Frames of `readers` come in; they go out with a column `reason`, null where the record is good. Of the rest, `record` keeps
what to show. `rejected` and `usable` take the two halves.
"""

import re
from collections.abc import Mapping, Sequence
from functools import reduce

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BooleanType,
    DataType,
    DateType,
    IntegralType,
    NumericType,
    StringType,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from sibra_dist.errors import ConfigError, SourceError
from sibra_dist.etl.config import FeatureConfig, FeatureTableConfig, InteractionsConfig
from sibra_dist.etl.readers import NPZ_COLUMNS, pattern_of

NOT_A_NUMBER = r"^\s*[+-]?[nN][aA][nN]\s*$"
ISO_TIME = r"^\s*\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?([zZ]|[+-]\d{2}:?\d{2})?)?\s*$"
HAS_ZONE = r"([zZ]|:\d{2}(\.\d+)?[+-]\d{2}:?\d{2})\s*$"
LARGEST = 3.4028234663852886e38
"""The largest float32, in which numbers are stored."""
LATEST = 1 << 53
"""Milliseconds further from 1970 than this are no time: a float64 cannot count them."""

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
    user, item = _id(table.user, kinds, name), _id(table.item, kinds, name)
    reason = F.when(F.col("fault").isNotNull(), F.col("fault")).when(user.isNull(), NO_USER).when(item.isNull(), NO_ITEM)
    columns = [user.alias("user"), item.alias("item")]
    for field, column, fault, largest in (
        ("rating", table.rating, BAD_RATING, LARGEST),
        ("weight", table.weight, BAD_WEIGHT, LARGEST_WEIGHT),
    ):
        if column is not None:
            number = _number(F.col("values").getField(column), column, kinds, name)
            reason = reason.when(~_is_finite(number, largest), fault)
            columns.append(number.alias(field))
    if table.time is not None:
        time = _milliseconds(table.time, kinds, name, table.time_format)
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
    features = [column for name, feature in table.features.items() for column in _columns_of(name, feature, table)]
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
    identifier = _id(id_column(table), kinds, name)
    reason = F.when(F.col("fault").isNotNull(), F.col("fault")).when(identifier.isNull(), NO_ID)
    features = []
    for feature_name, feature in table.features.items():
        if feature.pattern is not None:
            _require_pattern(records.sparkSession, feature.pattern, f"{name}: feature {feature_name}")
        value, bad = _feature(feature_name, feature, kinds, table, name)
        reason = reason.when(bad, BAD_NUMBER)
        features.append(value.alias(feature_name))
    seen = [_as_text(F.col("values").getField(column), column, kinds, name).alias(column) for column in raw]
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


def _columns_of(name: str, feature: FeatureConfig, table: FeatureTableConfig) -> tuple[str, ...]:
    """The columns of one feature: as configured, else its own name, else what an archive has."""
    if feature.column is None:
        return (NPZ_COLUMNS[1],) if table.format in ("npz", "npy") else (name,)
    return (feature.column,) if isinstance(feature.column, str) else feature.column


def _feature(
    name: str, feature: FeatureConfig, kinds: Mapping[str, DataType], table: FeatureTableConfig, told: str
) -> tuple[Column, Column]:
    """A feature's value, null where it is absent, and whether it holds something that should be a number and is not."""
    columns = _columns_of(name, feature, table)
    cells = [_cell(column, kinds, feature.pattern, told) for column in columns]
    kind, value = kinds[columns[0]], cells[0]
    is_json = table.format == "json"
    if feature.kind == "category":
        if not isinstance(kind, StringType | IntegralType | BooleanType):
            raise _misfit(columns[0], kind, told, "a category is text, a whole number or true/false")
        return F.nullif(value.cast("string"), F.lit("")), F.lit(False)
    if feature.kind == "text":
        texts = [_as_text(cell, column, kinds, told) for cell, column in zip(cells, columns, strict=True)]
        return F.nullif(F.trim(F.concat_ws(" ", *texts)), F.lit("")), F.lit(False)
    if feature.kind == "tags":
        if not isinstance(kind, StringType | ArrayType):
            raise _misfit(columns[0], kind, told, "tags are text or a list")
        tags = value.cast("array<string>") if isinstance(kind, ArrayType) else _split(value, feature.separator, is_json)
        tags = F.array_sort(F.array_distinct(F.filter(tags, lambda tag: F.coalesce(tag, F.lit("")) != "")))
        return F.when(F.size(tags) > 0, tags), F.lit(False)
    if feature.kind == "numeric" or len(columns) > 1:
        numbers = [_number(cell, column, kinds, told) for cell, column in zip(cells, columns, strict=True)]
        gaps = [_is_absent(cell, kinds[column]) for cell, column in zip(cells, columns, strict=True)]
        faults = [~gap & ~_is_finite(number) for gap, number in zip(gaps, numbers, strict=True)]
        element = "double" if feature.kind == "numeric" else "float"
        list_of = F.array(*[number.cast(element) for number in numbers])
        return F.when(~reduce(Column.__or__, gaps), list_of), reduce(Column.__or__, faults)
    return _vector(value, kind, columns[0], feature, told, is_json)


def _vector(
    value: Column, kind: DataType, column: str, feature: FeatureConfig, told: str, is_json: bool
) -> tuple[Column, Column]:
    if isinstance(kind, StringType):
        parts = F.transform(_split(value, feature.separator, is_json), lambda part: F.trim(part))
        parts = F.when(F.trim(value) != "", parts)
        gap = F.exists(parts, lambda part: F.coalesce(part, F.lit("")).rlike(rf"(^$)|({NOT_A_NUMBER})"))
        numbers = F.transform(parts, number_in)
    elif isinstance(kind, ArrayType) and isinstance(kind.elementType, NumericType):
        numbers = value.cast("array<double>")
        gap = F.exists(numbers, lambda element: element.isNull() | F.isnan(element))
    else:
        raise _misfit(column, kind, told, "a vector is a list of numbers")
    absent = numbers.isNull() | (F.size(numbers) == 0) | F.coalesce(gap, F.lit(False))
    bad = ~absent & F.exists(numbers, lambda element: element.isNull() | (F.abs(element) > LARGEST))
    # A list that cannot be stored would stop the job where its record is rejected anyway.
    whole = F.when(~absent & ~bad, numbers)
    return whole.cast("array<float>"), bad


def _split(text: Column, separator: str, is_json: bool) -> Column:
    """The elements of a list in a column of text: a JSON list in tables of that format, else what separators part."""
    parts = F.split(text, pattern_of(separator), -1)
    if not is_json:
        return parts
    return F.coalesce(F.when(F.trim(text).startswith("["), F.from_json(text, "array<string>")), parts)


def _id(column: str, kinds: Mapping[str, DataType], told: str) -> Column:
    """The id in a column, null where there is none."""
    if not isinstance(kinds[column], StringType | IntegralType):
        raise _misfit(column, kinds[column], told, "an id is text or a whole number")
    text = F.col("values").getField(column).cast("string")
    return F.when(F.trim(text) != "", text)


def _number(value: Column, column: str, kinds: Mapping[str, DataType], told: str) -> Column:
    """The number in the value of a column as a double, null where there is none or it cannot be read."""
    if isinstance(kinds[column], StringType):
        return number_in(value)
    if not isinstance(kinds[column], NumericType | TimestampType):
        raise _misfit(column, kinds[column], told, "it should hold numbers")
    return _unsigned_zero(value.cast("double"))


def _unsigned_zero(number: Column) -> Column:
    """The number, with -0.0 as 0.0: Spark takes them for equal, so that which of them is the least would hang on the order."""
    return number + F.lit(0.0)


def number_in(text: Column) -> Column:
    """The number in decimals that a text is, as a double; null where it is none. NaN and Infinity are none."""
    digits = F.trim(text)
    # Java takes 1d, 2f and 0x1p3 for numbers too. A regular expression would say so, but takes longer than all else together.
    is_decimal = F.substring(digits, -1, 1).isin(*"0123456789.") & ~F.contains(F.lower(digits), F.lit("x"))
    return _unsigned_zero(F.when(is_decimal, digits.try_cast("double")))


def _milliseconds(column: str, kinds: Mapping[str, DataType], told: str, written: str) -> Column:
    """The time in a column as whole milliseconds since 1970, null where there is none or it cannot be read."""
    kind, value = kinds[column], F.col("values").getField(column)
    if isinstance(kind, DateType):
        seconds = F.unix_date(value).cast("double") * 86_400
    elif isinstance(kind, TimestampType):
        return F.unix_millis(value)
    elif isinstance(kind, TimestampNTZType):
        seconds = _iso_seconds(value.cast("string"))
    elif written == "iso":
        if not isinstance(kind, StringType):
            raise _misfit(column, kind, told, "an ISO time is text, a date or a timestamp")
        seconds = _iso_seconds(value)
    else:
        seconds = _number(value, column, kinds, told) / (1000 if written == "milliseconds" else 1)
    return F.when(F.abs(seconds) * 1000 < LATEST, F.round(seconds * 1000).cast("long"))


def _iso_seconds(text: Column) -> Column:
    """Seconds since 1970 of an ISO 8601 date or time, in UTC unless it names a zone: never that of the session."""
    trimmed = F.trim(text)
    zoned = F.when(F.length(trimmed) == 10, F.concat(trimmed, F.lit("T00:00:00Z"))).otherwise(
        F.when(trimmed.rlike(HAS_ZONE), trimmed).otherwise(F.concat(trimmed, F.lit("Z")))
    )
    return F.when(text.rlike(ISO_TIME), zoned.try_cast("timestamp").cast("double"))


def _cell(column: str, kinds: Mapping[str, DataType], pattern: str | None, told: str) -> Column:
    """The value of a column; with a pattern, what that finds first in the text, null where it finds nothing."""
    value = F.col("values").getField(column)
    if pattern is None:
        return value
    if not isinstance(kinds[column], StringType):
        raise _misfit(column, kinds[column], told, "`pattern` searches text; leave it out")
    return F.nullif(F.regexp_extract(value, pattern, min(re.compile(pattern).groups, 1)), F.lit(""))


def _require_pattern(spark: SparkSession, pattern: str, where: str) -> None:
    """Python has read the expression with the configuration; that Java, which is to search, reads it too is seen here."""
    try:
        spark.range(1).select(F.regexp_extract(F.lit(""), pattern, 0)).collect()
    except PySparkException as error:
        raise ConfigError(
            f"{where}: its pattern {pattern!r} is no regular expression to Java, which searches with it; "
            "write it so that Python and Java read it, without names of groups"
        ) from error


def _as_text(value: Column, column: str, kinds: Mapping[str, DataType], told: str) -> Column:
    """The value of a column, as text."""
    if isinstance(kinds[column], ArrayType | StructType):
        raise _misfit(column, kinds[column], told, "it should hold single values")
    return value.cast("string")


def _is_absent(value: Column, kind: DataType) -> Column:
    """Whether a value where a number belongs is none, or says so with NaN."""
    if isinstance(kind, StringType):
        return value.isNull() | (F.trim(value) == "") | value.rlike(NOT_A_NUMBER)
    return value.isNull() | F.isnan(value.cast("double"))


def _is_finite(number: Column, largest: float = LARGEST) -> Column:
    """Whether a number is there and no larger than can be stored."""
    return F.coalesce(F.abs(number) <= largest, F.lit(False))


def _misfit(column: str, kind: DataType, told: str, expected: str) -> SourceError:
    return SourceError(f"column {column} of {told} has type {kind.simpleString()}: {expected}")
