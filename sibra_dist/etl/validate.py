"""Validation: which records can be used, and for each of the others the reason why not.

Frames of `readers` come in; they go out with a column `reason`, null where the record is good. Of the rest, `record` keeps
what to show. `rejected` and `usable` take the two halves.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, BooleanType, DataType, IntegralType, NumericType, StringType, StructType, TimestampType

from sibra_dist.errors import SourceError
from sibra_dist.etl.config import FeatureConfig, FeatureTableConfig, InteractionsConfig
from sibra_dist.etl.readers import NPZ_COLUMNS, pattern_of

NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
NOT_A_NUMBER = r"^\s*[+-]?[nN][aA][nN]\s*$"
LARGEST = 3.4028234663852886e38
"""The largest float32, in which numbers are stored."""

NO_USER, NO_ITEM, NO_ID = "no user id", "no item id", "no id"
BAD_RATING, BAD_TIME, BAD_NUMBER = "rating is not a finite number", "time is not a number", "not a finite number"
UNKNOWN_ID, DUPLICATE_ID = "unknown id", "duplicate id"


def interaction_columns(table: InteractionsConfig) -> list[str]:
    """The columns that interactions are read from."""
    return list(dict.fromkeys(name for name in (table.user, table.item, table.rating, table.time) if name is not None))


def check_interactions(records: DataFrame, table: InteractionsConfig) -> DataFrame:
    """Columns `user`, `item`, and `rating` and `time` where configured, with `reason`.

    Raises:
        SourceError: a column has a type that is no id or number.
    """
    kinds = _types(records)
    user, item = _id(table.user, kinds, table.path), _id(table.item, kinds, table.path)
    reason = F.when(F.col("fault").isNotNull(), F.col("fault")).when(user.isNull(), NO_USER).when(item.isNull(), NO_ITEM)
    columns = [user.alias("user"), item.alias("item")]
    for name, column, fault in (("rating", table.rating, BAD_RATING), ("time", table.time, BAD_TIME)):
        if column is not None:
            number = _number(column, kinds, table.path)
            reason = reason.when(~_is_finite(number), fault)
            columns.append(number.alias(name))
    return _with_reason(records.select("file", "record", "fault", "values", *columns), reason)


def feature_columns(table: FeatureTableConfig, within: Sequence[str] = ()) -> list[str]:
    """The columns that a feature table is read from: its ids, its features, and columns that a filter looks at."""
    features = [column for name, feature in table.features.items() for column in _columns_of(name, feature, table)]
    return list(dict.fromkeys([id_column(table), *features, *within]))


def id_column(table: FeatureTableConfig) -> str:
    """The column of a feature table's ids."""
    return NPZ_COLUMNS[0] if table.format == "npz" else table.id


def check_features(records: DataFrame, table: FeatureTableConfig, within: Sequence[str], known: DataFrame) -> DataFrame:
    """Columns `id`, `features` (a struct) and `within` (a struct of numbers), with `reason`.

    Features come out as category string, tags array<string> (sorted, distinct), numeric array<double>, vector
    array<float>, and null where a record lacks one: empty text, an empty list, NaN. A numeric or vector feature of
    which one element is absent is absent.

    An id is unknown, and its record rejected, if no usable interaction mentions it (`known`, column `id`), whether or not
    a filter removes those interactions later. Of several records of one id, the smallest by its content stays.

    Raises:
        SourceError: a column has a type that its use does not fit, or vectors differ in length.
    """
    kinds = _types(records)
    identifier = _id(id_column(table), kinds, table.path)
    reason = F.when(F.col("fault").isNotNull(), F.col("fault")).when(identifier.isNull(), NO_ID)
    features = []
    for name, feature in table.features.items():
        value, bad = _feature(name, feature, kinds, table)
        reason = reason.when(bad, BAD_NUMBER)
        features.append(value.alias(name))
    bounds = [_number(column, kinds, table.path).alias(column) for column in within]
    checked = records.select(
        "file",
        "record",
        "values",
        identifier.alias("id"),
        F.struct(*features).alias("features"),
        F.struct(F.lit(True).alias("listed"), *bounds).alias("within"),
        reason.alias("reason"),
    )
    known = known.select("id", F.lit(True).alias("is_known"))
    checked = checked.join(known, "id", "left").withColumn(
        "reason", F.coalesce("reason", F.when(F.col("is_known").isNull(), UNKNOWN_ID))
    )
    # Only good records compete for an id; the order is total but for records that are equal in all that is used.
    rank = F.row_number().over(Window.partitionBy("id", F.col("reason").isNull()).orderBy("record", "values", "file"))
    reason = F.when(F.col("reason").isNull() & (rank > 1), DUPLICATE_ID).otherwise(F.col("reason"))
    return _with_reason(checked.drop("is_known"), reason)


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


def check_share(read: int, counts: Mapping[str, int], examples: Mapping[str, str], largest: float, path: str) -> None:
    """Check that no larger share of the interaction records was rejected than is allowed.

    Raises:
        SourceError: it was, with the commonest reasons and an example of each.
    """
    if read == 0:
        raise SourceError(f"{path} holds no interactions")
    share = sum(counts.values()) / read
    if share > largest:
        told = "; ".join(f"{reason}: {counts[reason]} records, such as {examples[reason]!r}" for reason in list(counts)[:3])
        refused = sum(counts.values())
        raise SourceError(f"{refused} of {read} records of {path} cannot be used; max_rejected_share is {largest}. {told}")


def _with_reason(checked: DataFrame, reason: Column) -> DataFrame:
    """`checked` with its `reason`; `values` gone, and `record` kept only where it will be shown."""
    shown = F.when(F.col("reason").isNotNull(), F.coalesce("record", F.to_json("values")))
    return checked.withColumn("reason", reason).withColumn("record", shown).drop("values", "fault")


def _types(records: DataFrame) -> dict[str, DataType]:
    values = records.schema["values"].dataType
    assert isinstance(values, StructType)
    return {field.name: field.dataType for field in values}


def _columns_of(name: str, feature: FeatureConfig, table: FeatureTableConfig) -> tuple[str, ...]:
    """The columns of one feature: as configured, else its own name, else what an archive has."""
    if feature.column is None:
        return (NPZ_COLUMNS[1],) if table.format == "npz" else (name,)
    return (feature.column,) if isinstance(feature.column, str) else feature.column


def _feature(
    name: str, feature: FeatureConfig, kinds: Mapping[str, DataType], table: FeatureTableConfig
) -> tuple[Column, Column]:
    """A feature's value, null where it is absent, and whether it holds something that should be a number and is not."""
    columns = _columns_of(name, feature, table)
    kind = kinds[columns[0]]
    value = F.col("values").getField(columns[0])
    if feature.kind == "category":
        if not isinstance(kind, StringType | IntegralType | BooleanType):
            raise _misfit(columns[0], kind, table.path, "a category is text, a whole number or true/false")
        return F.nullif(value.cast("string"), F.lit("")), F.lit(False)
    if feature.kind == "tags":
        if not isinstance(kind, StringType | ArrayType):
            raise _misfit(columns[0], kind, table.path, "tags are text or a list")
        tags = value.cast("array<string>") if isinstance(kind, ArrayType) else F.split(value, pattern_of(feature.separator), -1)
        tags = F.array_sort(F.array_distinct(F.filter(tags, lambda tag: tag != "")))
        return F.when(F.size(tags) > 0, tags), F.lit(False)
    if feature.kind == "numeric":
        numbers = [_number(column, kinds, table.path) for column in columns]
        gaps = [_is_absent(column, kinds) for column in columns]
        faults = [~gap & ~_is_finite(number) for gap, number in zip(gaps, numbers, strict=True)]
        return F.when(~reduce(Column.__or__, gaps), F.array(*numbers)), reduce(Column.__or__, faults)
    if not isinstance(kind, ArrayType) or not isinstance(kind.elementType, NumericType):
        raise _misfit(columns[0], kind, table.path, "a vector is a list of numbers")
    absent = value.isNull() | (F.size(value) == 0) | F.exists(value, lambda element: element.isNull() | F.isnan(element))
    bad = ~absent & F.exists(value, lambda element: F.abs(element) > LARGEST)
    return F.when(~absent, value.cast("array<float>")), bad


def _id(column: str, kinds: Mapping[str, DataType], path: str) -> Column:
    """The id in a column, null where there is none."""
    if not isinstance(kinds[column], StringType | IntegralType):
        raise _misfit(column, kinds[column], path, "an id is text or a whole number")
    text = F.col("values").getField(column).cast("string")
    return F.when(F.trim(text) != "", text)


def _number(column: str, kinds: Mapping[str, DataType], path: str) -> Column:
    """The number in a column as a double, null where there is none or it cannot be read."""
    value = F.col("values").getField(column)
    if isinstance(kinds[column], StringType):
        return F.when(value.rlike(NUMBER), F.trim(value).try_cast("double"))
    if not isinstance(kinds[column], NumericType | TimestampType):
        raise _misfit(column, kinds[column], path, "it should hold numbers")
    return value.cast("double")


def _is_absent(column: str, kinds: Mapping[str, DataType]) -> Column:
    """Whether a column of numbers holds nothing, or says so with NaN."""
    value = F.col("values").getField(column)
    if isinstance(kinds[column], StringType):
        return value.isNull() | (F.trim(value) == "") | value.rlike(NOT_A_NUMBER)
    return value.isNull() | F.isnan(value.cast("double"))


def _is_finite(number: Column) -> Column:
    """Whether a number is there and fits into a float32."""
    return F.coalesce(F.abs(number) <= LARGEST, F.lit(False))


def _misfit(column: str, kind: DataType, path: str, expected: str) -> SourceError:
    return SourceError(f"column {column} of {path} has type {kind.simpleString()}: {expected}")
