"""The tables of a dataset, out of indexed pairs and entities: which rows go into a shard, and how they are laid out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, NumericType, StringType

from sibra_dist.data.manifest import FeatureSpec, InteractionColumn, Side
from sibra_dist.encoding.features import ENCODERS, lists
from sibra_dist.etl.indexing import with_positions
from sibra_dist.etl.work import Work
from sibra_dist.etl.write import Build, Target, Written, write_table

REJECTED = ("table", "file", "reason", "record")
FEATURE_TYPES: dict[str, Callable[[int], pa.DataType]] = {
    "category": lambda size: pa.int32(),
    "tags": lambda size: pa.list_(pa.int32()),
    "numeric": lambda size: pa.list_(pa.float32()),
    "vector": lambda size: pa.list_(pa.float32(), size),
}
OPTIONAL: dict[InteractionColumn, tuple[str, pa.DataType]] = {
    "weights": ("weight", pa.float32()),
    "times": ("time", pa.int64()),
}
"""What a history may hold besides the other side: the column of the pairs that it comes from, and its type."""


@dataclass(frozen=True)
class SideTable:
    """The entities of one side, ready to be written."""

    wide: DataFrame
    """`index`, `id`, `split`, and the value of each feature."""
    count: int
    specs: tuple[FeatureSpec, ...]


@dataclass(frozen=True)
class Pairs:
    """How one table is made of pairs."""

    split: str
    key: Literal["user", "item"]
    """Whose rows they are."""
    optional: tuple[InteractionColumn, ...] = ()
    """What it holds besides, where there is any."""
    dense: bool = False
    """Whether entities without pairs have a row."""


PAIR_TABLES: dict[str, Pairs] = {
    "histories/users": Pairs("train", "user", ("weights", "times"), dense=True),
    "histories/items": Pairs("train", "item", ("weights",), dense=True),
    "held_out/validation": Pairs("validation", "user"),
    "held_out/test": Pairs("test", "user"),
}


def write_entities(entities: SideTable, side: Side, target: Target) -> Written:
    """Write the table of one side."""
    frame = entities.wide.withColumnRenamed("index", "position")
    return write_table(frame, side, target, entity_rows(entities.specs), entities.count, _width(frame))


def with_missing(specs: Sequence[FeatureSpec], written: Written) -> tuple[FeatureSpec, ...]:
    """The features of a side, with how many of its entities lack each."""
    missing = written.missing[-len(specs) :] if specs else ()
    return tuple(spec.model_copy(update={"missing": count}) for spec, count in zip(specs, missing, strict=True))


def entity_rows(specs: Sequence[FeatureSpec]) -> Build:
    """Rows of values to rows of codes and numbers, in the order of the index."""

    def build(rows: pa.Table, start: int, stop: int) -> pa.Table:
        ordered = rows.sort_by("position")
        columns = {
            "index": ordered.column("position").cast(pa.int32()),
            "id": ordered.column("id").cast(pa.string()),
            "split": ordered.column("split").cast(pa.string()),
        }
        for spec in specs:
            encoded = ENCODERS[spec.kind](ordered.column(spec.name).combine_chunks(), spec)
            columns[spec.name] = encoded.cast(FEATURE_TYPES[spec.kind](spec.size))
        return pa.table(columns)

    return build


def write_pairs(table: str, pairs: DataFrame, counts: Mapping[Side, int], target: Target) -> Written:
    """Write histories or held-out items of pairs: indices `user`, `item`, `split`, and `weight` and `time` as there are."""
    made = PAIR_TABLES[table]
    other = "item" if made.key == "user" else "user"
    side: Side = "users" if made.key == "user" else "items"
    there = [name for name in made.optional if name in interaction_columns_of(pairs)]
    columns = [F.col(made.key).alias("position"), F.col(other).alias("other"), *[F.col(OPTIONAL[name][0]) for name in there]]
    width = F.lit(4 + sum(OPTIONAL[name][1].bit_width // 8 for name in there))
    rows = pairs.where(F.col("split") == made.split).select(*columns)
    return write_table(rows, table, target, list_rows(f"{other}s", there, made.dense), counts[side], width)


def interaction_columns_of(pairs: DataFrame) -> tuple[InteractionColumn, ...]:
    """Which optional columns the histories of these pairs have."""
    return tuple(name for name, (column, _) in OPTIONAL.items() if column in pairs.columns)


def list_rows(column: str, further: Sequence[InteractionColumn], dense: bool) -> Build:
    """Pairs to a row for each position with an ascending list, and lists of what belongs to its elements.

    `dense`: there is a row for every position of the shard, null where there are no pairs; else only rows of pairs.
    """

    def build(rows: pa.Table, start: int, stop: int) -> pa.Table:
        position = rows.column("position").to_numpy().astype(np.int64)
        # One number for both: sorting these sorts by position and then by the other side, and pairs are distinct.
        keys = (position - start) << 32 | rows.column("other").to_numpy().astype(np.int64)
        order = None
        if further:
            order = np.argsort(keys)
            keys = keys[order]
        else:
            keys.sort()
        owners, values = keys >> 32, (keys & 0xFFFFFFFF).astype(np.int32)
        there = np.arange(stop - start) if dense else np.unique(owners)
        rank = owners if dense else np.searchsorted(there, owners)
        columns = {"index": pa.array((there + start).astype(np.int32)), column: lists(rank, values, len(there))}
        for name in further:
            source, kind = OPTIONAL[name]
            numbers = rows.column(source).to_numpy()[order].astype(kind.to_pandas_dtype())
            columns[name] = lists(rank, numbers, len(there))
        return pa.table(columns)

    return build


def write_rejected(refused: Sequence[DataFrame], target: Target, work: Work) -> Written:
    """Write the rejected records, in the order of their columns."""
    if not refused:
        empty = work.spark.createDataFrame([], ", ".join(f"{name} string" for name in ("position", *REJECTED)))
        return write_table(empty, "rejected", target, rejected_rows, 0, F.lit(0))
    ordered = with_positions(reduce(DataFrame.unionByName, refused), list(REJECTED), "position", work)
    return write_table(ordered, "rejected", target, rejected_rows, ordered.count(), _width(ordered))


def rejected_rows(rows: pa.Table, start: int, stop: int) -> pa.Table:
    """Rejected records in the order of their position."""
    ordered = rows.sort_by("position")
    return pa.table({name: ordered.column(name).cast(pa.string()) for name in REJECTED})


def _width(frame: DataFrame) -> Column:
    """About how many bytes a row takes up."""
    widths = []
    for field in frame.schema:
        value = F.col(field.name)
        if isinstance(field.dataType, StringType):
            widths.append(F.coalesce(F.octet_length(value), F.lit(0)))
        elif isinstance(field.dataType, ArrayType):
            width = 4 if isinstance(field.dataType.elementType, NumericType) else 16
            widths.append(width * F.coalesce(F.array_size(value), F.lit(0)))
        else:
            widths.append(F.lit(4))
    return reduce(Column.__add__, widths, F.lit(0))
