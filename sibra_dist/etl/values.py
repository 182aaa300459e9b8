"""Values: what the columns of a record hold, as expressions of Spark: ids, numbers, times, features."""

import re
from collections.abc import Mapping
from functools import reduce

from pyspark.errors import PySparkException
from pyspark.sql import Column, SparkSession
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
from sibra_dist.etl.config import FeatureTableConfig
from sibra_dist.etl.feature_config import FeatureConfig
from sibra_dist.etl.readers import NPZ_COLUMNS, pattern_of

NOT_A_NUMBER = r"^\s*[+-]?[nN][aA][nN]\s*$"
ISO_TIME = r"^\s*\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?([zZ]|[+-]\d{2}:?\d{2})?)?\s*$"
HAS_ZONE = r"([zZ]|:\d{2}(\.\d+)?[+-]\d{2}:?\d{2})\s*$"
LARGEST = 3.4028234663852886e38
"""The largest float32, in which numbers are stored."""
LATEST = 1 << 53
"""Milliseconds further from 1970 than this are no time: a float64 cannot count them."""


def columns_of(name: str, feature: FeatureConfig, table: FeatureTableConfig) -> tuple[str, ...]:
    """The columns of one feature: as configured, else its own name, else what an archive has."""
    if feature.column is None:
        return (NPZ_COLUMNS[1],) if table.format in ("npz", "npy") else (name,)
    return (feature.column,) if isinstance(feature.column, str) else feature.column


def feature_value(
    name: str, feature: FeatureConfig, kinds: Mapping[str, DataType], table: FeatureTableConfig, told: str
) -> tuple[Column, Column]:
    """A feature's value, null where it is absent, and whether it holds something that should be a number and is not."""
    columns = columns_of(name, feature, table)
    cells = [_cell(column, kinds, feature.pattern, told) for column in columns]
    kind, value = kinds[columns[0]], cells[0]
    is_json = table.format == "json"
    if feature.kind == "category":
        if not isinstance(kind, StringType | IntegralType | BooleanType):
            raise _misfit(columns[0], kind, told, "a category is text, a whole number or true/false")
        return F.nullif(value.cast("string"), F.lit("")), F.lit(False)
    if feature.kind == "text":
        texts = [as_text(cell, column, kinds, told) for cell, column in zip(cells, columns, strict=True)]
        return F.nullif(F.trim(F.concat_ws(" ", *texts)), F.lit("")), F.lit(False)
    if feature.kind == "tags":
        if not isinstance(kind, StringType | ArrayType):
            raise _misfit(columns[0], kind, told, "tags are text or a list")
        tags = value.cast("array<string>") if isinstance(kind, ArrayType) else _split(value, feature.separator, is_json)
        tags = F.array_sort(F.array_distinct(F.filter(tags, lambda tag: F.coalesce(tag, F.lit("")) != "")))
        return F.when(F.size(tags) > 0, tags), F.lit(False)
    if feature.kind == "numeric" or len(columns) > 1:
        numbers = [number_of(cell, column, kinds, told) for cell, column in zip(cells, columns, strict=True)]
        gaps = [_is_absent(cell, kinds[column]) for cell, column in zip(cells, columns, strict=True)]
        faults = [~gap & ~is_finite(number) for gap, number in zip(gaps, numbers, strict=True)]
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


def id_in(column: str, kinds: Mapping[str, DataType], told: str) -> Column:
    """The id in a column, null where there is none."""
    if not isinstance(kinds[column], StringType | IntegralType):
        raise _misfit(column, kinds[column], told, "an id is text or a whole number")
    text = F.col("values").getField(column).cast("string")
    return F.when(F.trim(text) != "", text)


def number_of(value: Column, column: str, kinds: Mapping[str, DataType], told: str) -> Column:
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


def milliseconds(column: str, kinds: Mapping[str, DataType], told: str, written: str) -> Column:
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
        seconds = number_of(value, column, kinds, told) / (1000 if written == "milliseconds" else 1)
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


def require_pattern(spark: SparkSession, pattern: str, where: str) -> None:
    """Python has read the expression with the configuration; that Java, which is to search, reads it too is seen here."""
    try:
        spark.range(1).select(F.regexp_extract(F.lit(""), pattern, 0)).collect()
    except PySparkException as error:
        raise ConfigError(
            f"{where}: its pattern {pattern!r} is no regular expression to Java, which searches with it; "
            "write it so that Python and Java read it, without names of groups"
        ) from error


def as_text(value: Column, column: str, kinds: Mapping[str, DataType], told: str) -> Column:
    """The value of a column, as text."""
    if isinstance(kinds[column], ArrayType | StructType):
        raise _misfit(column, kinds[column], told, "it should hold single values")
    return value.cast("string")


def _is_absent(value: Column, kind: DataType) -> Column:
    """Whether a value where a number belongs is none, or says so with NaN."""
    if isinstance(kind, StringType):
        return value.isNull() | (F.trim(value) == "") | value.rlike(NOT_A_NUMBER)
    return value.isNull() | F.isnan(value.cast("double"))


def is_finite(number: Column, largest: float = LARGEST) -> Column:
    """Whether a number is there and no larger than can be stored."""
    return F.coalesce(F.abs(number) <= largest, F.lit(False))


def _misfit(column: str, kind: DataType, told: str, expected: str) -> SourceError:
    return SourceError(f"column {column} of {told} has type {kind.simpleString()}: {expected}")
