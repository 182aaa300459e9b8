"""The preparation of a dataset on one page: read, validate, filter, index, split, features, write."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import unquote

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import sibra_dist
from sibra_dist.data.manifest import Counts, Manifest, Protocol, Records, Side, Source, verify_shard
from sibra_dist.errors import SourceError, nearest
from sibra_dist.etl.config import EntityFilter, FeatureTableConfig, PrepareConfig
from sibra_dist.etl.features import encode_features, joined
from sibra_dist.etl.filters import filter_interactions
from sibra_dist.etl.indexing import index_entities
from sibra_dist.etl.publish import existing_dataset, recorded, staged
from sibra_dist.etl.readers import Files, column_names, find_files, fingerprints, read_table
from sibra_dist.etl.session import spark_session
from sibra_dist.etl.splits import first_seen, split_interactions
from sibra_dist.etl.tables import check_for_leakage, write_tables
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

logger = logging.getLogger("sibra_dist")

STAGES = ("read", "validate", "filter", "index", "split", "features", "write")
SIDES: tuple[tuple[Side, str], ...] = (("users", "user"), ("items", "item"))
"""Each side, and the column that names its entities in a frame of interactions."""


def prepare(
    config: PrepareConfig, to: Path, overwrite: bool = False, progress: Callable[[str], None] | None = None
) -> Manifest:
    """Make the dataset that `config` describes, in folder `to`, and return its manifest.

    The dataset appears in one move when it is whole. If `to` already holds the dataset of the same configuration and files,
    nothing is done. The bytes of the dataset hang on the configuration and the records alone: not on their order, nor on how
    Spark divides the work.

    Args:
        config: what to make the dataset from, and how.
        to: the folder of the dataset; a relative `config.source` is relative to the working directory.
        overwrite: replace the dataset that is in `to`.
        progress: called with the name of each stage of `STAGES` as it begins.

    Raises:
        SourceError: input that cannot be read or used.
        ConfigError: a filter or a split that leaves nothing.
        DatasetError: `to` holds another dataset and `overwrite` is not given, or something that is no dataset.
    """
    inputs = Inputs.find(config)
    sources = fingerprints(inputs.all())
    manifest = existing_dataset(to, config, sources, overwrite)
    if manifest is not None:
        logger.info("%s already holds this dataset; nothing to do", to)
        return manifest
    with staged(to) as folder:
        with spark_session(config.spark) as spark, ExitStack() as stored, _unreadable_files():
            manifest = _make(spark, config, inputs, sources, folder, stored, progress or (lambda stage: None))
        for shard in manifest.all_shards():
            verify_shard(folder, shard)
        manifest.write(folder)
    return manifest


def _make(
    spark: SparkSession,
    config: PrepareConfig,
    inputs: "Inputs",
    sources: tuple[Source, ...],
    folder: Path,
    stored: ExitStack,
    progress: Callable[[str], None],
) -> Manifest:
    """Write every shard into `folder`, and say what they are."""
    progress("read")
    records = read_table(spark, inputs.interactions, interaction_columns(config.interactions))
    progress("validate")
    checked = _stored(check_interactions(records, config.interactions), stored)
    read, reasons, examples = count_by_reason(checked)
    check_share(read, reasons, examples, config.max_rejected_share, config.interactions.path)
    refused = [rejected(checked, "interactions")] if reasons else []
    interactions = usable(checked)
    side_information: dict[Side, DataFrame | None] = {}
    side_reasons: Counter[str] = Counter()
    for side, key in SIDES:
        known = interactions.select(F.col(key).alias("id")).distinct()
        tables = []
        for files, within in _with_bounds(inputs.side(side), _filter_of(config, side).within):
            table = cast(FeatureTableConfig, files.table)
            checked = check_features(read_table(spark, files, feature_columns(table, within)), table, within, known)
            checked = _stored(checked, stored)
            _, found, _ = count_by_reason(checked)
            side_reasons.update(found)
            refused += [rejected(checked, side)] if found else []
            tables.append(usable(checked))
        side_information[side] = joined(tables)

    progress("filter")
    kept, left_out = filter_interactions(interactions, side_information["users"], side_information["items"], config.filters)

    progress("index")
    indices = {side: index_entities(kept, key) for side, key in SIDES}

    progress("split")
    split, counts = split_interactions(kept, config.split)
    pairs = split.select("user", "item", "split")
    for side, key in SIDES:
        index = indices[side].select(F.col("id").alias(key), F.col("index").alias(f"{key}_index"))
        pairs = pairs.join(index, key).drop(key).withColumnRenamed(f"{key}_index", key)
    pairs = pairs.localCheckpoint()

    progress("features")
    entities, specs = {}, {}
    for side, key in SIDES:
        rows = indices[side].join(first_seen(split, config.split, key), "id")
        tables_of_side = config.users if side == "users" else config.items
        features = {name: feature for table in tables_of_side for name, feature in table.features.items()}
        entities[side], specs[side] = encode_features(rows, side_information[side], features, side)

    progress("write")
    shards = write_tables(entities, specs, pairs, refused, folder, config.shard_mebibytes << 20)
    check_for_leakage(spark, folder)
    return Manifest(
        name=config.name,
        package_version=sibra_dist.__version__,
        protocol=Protocol(
            name=config.split.protocol, seed=config.split.seed, validation=config.split.validation, test=config.split.test
        ),
        counts=Counts(users=entities["users"].count(), items=entities["items"].count(), **counts),
        records=Records(read=read, rejected=reasons, filtered=left_out, kept=sum(counts.values())),
        rejected_side_information=dict(sorted(side_reasons.items())),
        user_features=specs["users"],
        item_features=specs["items"],
        shards=shards,
        config=recorded(config),
        sources=sources,
    )


@dataclass(frozen=True)
class Inputs:
    """The files of every table."""

    interactions: Files
    users: tuple[Files, ...]
    items: tuple[Files, ...]

    @classmethod
    def find(cls, config: PrepareConfig) -> "Inputs":
        """The files that a configuration names; a `SourceError` tells of one that is not there."""
        users, items = [tuple(find_files(config, table) for table in tables) for tables in (config.users, config.items)]
        return cls(find_files(config, config.interactions), users, items)

    def side(self, side: Side) -> tuple[Files, ...]:
        """The tables of side information of users or of items."""
        return self.users if side == "users" else self.items

    def all(self) -> tuple[Files, ...]:
        """Every table."""
        return (self.interactions, *self.users, *self.items)


def _filter_of(config: PrepareConfig, side: Side) -> EntityFilter:
    return config.filters.users if side == "users" else config.filters.items


def _with_bounds(tables: Sequence[Files], bounds: Iterable[str]) -> list[tuple[Files, list[str]]]:
    """Each table with those columns that a filter bounds; a column belongs to the first table that has it."""
    names = [column_names(files) for files in tables]
    owners = {}
    for column in bounds:
        having = [place for place, there in enumerate(names) if column in there]
        if not having:
            told = ", ".join(files.table.path for files in tables) or "any table of side information"
            hint = nearest(column, {name for there in names for name in there})
            raise SourceError(f"filters bound the column {column}, which is not in {told}; {hint}")
        owners[column] = having[0]
    return [(files, [column for column, owner in owners.items() if owner == place]) for place, files in enumerate(tables)]


def _stored(frame: DataFrame, stored: ExitStack) -> DataFrame:
    """The frame, to be kept once computed, until `stored` closes."""
    kept = frame.persist()
    stored.callback(kept.unpersist)
    return kept


@contextmanager
def _unreadable_files() -> Iterator[None]:
    """Turn Spark's word that it cannot read a file into ours."""
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        told = re.search(r"\[FAILED_READ_FILE\S* .*? file:/*(/.*?)\.\s", str(error))
        if told is None:
            raise
        raise SourceError(f"{unquote(told[1])} cannot be read: it is damaged. Fetch it again") from error
