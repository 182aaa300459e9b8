"""The tables a dataset is made from: found, read and checked."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import cast

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sibra_dist.data.manifest import Side
from sibra_dist.errors import SourceError, nearest
from sibra_dist.etl.config import EntityFilter, FeatureTableConfig, InteractionsConfig, PrepareConfig
from sibra_dist.etl.files import Files, find_files
from sibra_dist.etl.indexing import SIDES
from sibra_dist.etl.readers import column_names, read_table
from sibra_dist.etl.validate import (
    check_features,
    check_interactions,
    check_share,
    count_by_reason,
    feature_columns,
    interaction_columns,
    rejected,
    usable,
)
from sibra_dist.etl.work import Work, together


@dataclass(frozen=True)
class Inputs:
    """The files of every table."""

    interactions: tuple[tuple[str | None, Files], ...]
    """With the split they hold, if the files say how the interactions are split."""
    users: tuple[Files, ...]
    items: tuple[Files, ...]

    @classmethod
    def find(cls, config: PrepareConfig) -> "Inputs":
        """The files that a configuration names; a `SourceError` tells of one that is not there."""
        interactions = tuple((split, find_files(config, table)) for split, table in config.interaction_tables())
        users, items = [tuple(find_files(config, table) for table in tables) for tables in (config.users, config.items)]
        return cls(interactions, users, items)

    def side(self, side: Side) -> tuple[Files, ...]:
        """The tables of side information of users or of items."""
        return self.users if side == "users" else self.items

    def all(self) -> tuple[Files, ...]:
        """Every table."""
        return (*[files for _, files in self.interactions], *self.users, *self.items)


@dataclass(frozen=True)
class Usable:
    """What of some tables can be used, and what became of the rest."""

    tables: tuple[DataFrame, ...]
    read: int
    reasons: Mapping[str, int]
    """How many records were rejected, by reason."""
    refused: tuple[DataFrame, ...]
    """Those records, as rows of the table `rejected`."""

    @property
    def table(self) -> DataFrame:
        """The only table, where there is one."""
        (table,) = self.tables
        return table


def read_interactions(inputs: Inputs, work: Work) -> DataFrame:
    """The records of all tables of interactions, checked and stored; see `check_interactions`."""
    frames = []
    for split, files in inputs.interactions:
        table = cast(InteractionsConfig, files.table)
        checked = check_interactions(read_table(work.spark, files, interaction_columns(table)), table, str(files))
        frames.append(checked if split is None else checked.withColumn("split", F.lit(split)))
    return work.store(reduce(DataFrame.unionByName, frames), "interactions")


def usable_interactions(checked: DataFrame, inputs: Inputs, config: PrepareConfig) -> Usable:
    """The usable records of what `read_interactions` gave."""
    read, reasons, examples = count_by_reason(checked)
    told = ", ".join(str(files) for _, files in inputs.interactions)
    check_share(read, reasons, examples, config.max_rejected_share, told)
    return Usable((usable(checked),), read, reasons, (rejected(checked, "interactions"),) if reasons else ())


def read_side_information(
    inputs: Inputs, config: PrepareConfig, ids: Mapping[Side, DataFrame], work: Work
) -> dict[Side, Usable]:
    """The usable records of each side's tables."""
    return together({side: partial(_read_side, side, inputs, config, ids[side], work) for side, _ in SIDES})


def _read_side(side: Side, inputs: Inputs, config: PrepareConfig, ids: DataFrame, work: Work) -> Usable:
    entity_filter = config.filters.users if side == "users" else config.filters.items
    tables, refused, all_reasons, total = [], [], Counter[str](), 0
    for files, raw in _with_raw_columns(work.spark, inputs.side(side), entity_filter):
        table = cast(FeatureTableConfig, files.table)
        records = read_table(work.spark, files, feature_columns(table, raw))
        checked = work.store(check_features(records, table, raw, ids, str(files)), f"{side}-information")
        read, reasons, examples = count_by_reason(checked)
        check_share(read, reasons, examples, config.max_rejected_share, str(files))
        tables.append(usable(checked))
        refused += [rejected(checked, side)] if reasons else []
        all_reasons.update(reasons)
        total += read
    return Usable(tuple(tables), total, all_reasons, tuple(refused))


def _with_raw_columns(
    spark: SparkSession, tables: Sequence[Files], entity_filter: EntityFilter
) -> list[tuple[Files, list[str]]]:
    """Each table with those columns that a filter looks at; a column belongs to the first table that has it."""
    if not entity_filter.columns:
        return [(files, []) for files in tables]
    names = [column_names(spark, files, entity_filter.columns) for files in tables]
    owners = {}
    for column in entity_filter.columns:
        having = [place for place, there in enumerate(names) if column in there]
        if not having:
            told = ", ".join(map(str, tables)) or "any table of side information"
            hint = nearest(column, {name for there in names for name in there})
            raise SourceError(f"filters look at the column {column}, which is not in {told}; {hint}")
        owners[column] = having[0]
    return [(files, [column for column, owner in owners.items() if owner == place]) for place, files in enumerate(tables)]
