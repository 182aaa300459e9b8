"""The preparation of a dataset on one page: read, validate, filter, index, split, features, write, verify."""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pyarrow as pa

import sibra_dist
from sibra_dist.data.manifest import FITTED, Counts, Manifest, Protocol, Records, Side, Source
from sibra_dist.data.publish import check_place, existing_dataset, hold, quietly, write_shard
from sibra_dist.data.storage import Place
from sibra_dist.etl.checks import check_written
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.extend import Former
from sibra_dist.etl.features import encode_texts, fit, joined, with_features
from sibra_dist.etl.files import fingerprints
from sibra_dist.etl.filters import filter_interactions
from sibra_dist.etl.indexing import SIDES, index_entities, number_ids, with_indices
from sibra_dist.etl.inputs import Inputs, read_interactions, read_side_information, usable_interactions
from sibra_dist.etl.publish import recorded, writing
from sibra_dist.etl.reading import unreadable_files
from sibra_dist.etl.session import settled, spark_session, work_folder
from sibra_dist.etl.splits import Input, drawn, first_seen, split_interactions
from sibra_dist.etl.tables import (
    PAIR_TABLES,
    SideTable,
    interaction_columns_of,
    with_missing,
    write_entities,
    write_pairs,
    write_rejected,
)
from sibra_dist.etl.work import Work, together
from sibra_dist.etl.write import Target

logger = logging.getLogger("sibra_dist")

STAGES = ("read", "validate", "filter", "index", "split", "features", "write", "verify")


def prepare(
    config: PrepareConfig,
    to: str | Path | Place,
    overwrite: bool = False,
    extend: str | Path | Place | None = None,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Make the dataset that `config` describes, in the folder or at the URI `to`, and return its manifest.

    The dataset appears in one step when it is whole and checked. If `to` already holds the dataset of the same
    configuration and files, nothing is done. The bytes of the dataset hang on the configuration and the records alone: not on
    their order, nor on how Spark divides the work.

    Args:
        config: what to make the dataset from, and how.
        to: where to make it; a relative `config.source` is relative to the working directory.
        overwrite: replace the dataset that is there.
        extend: a dataset whose indices, codes, scales and text encodings are kept; what is new is numbered after them.
        progress: called with the name of each stage of `STAGES` as it begins.

    Raises:
        SourceError: input that cannot be read or used.
        ConfigError: a filter or a split that leaves nothing.
        DatasetError: `to` holds another dataset and `overwrite` is not given, or something that is no dataset.
    """
    place = Place.at(to)
    inputs = Inputs.find(config)
    former = Former.read(extend, config)
    check_place(place)
    with spark_session(config.spark) as spark, unreadable_files():
        sources = fingerprints(spark, inputs.all())
        with hold(place), writing(place), settled(spark, config.spark, sources), ExitStack() as cleanup:
            manifest = existing_dataset(place, recorded(config), sources, former.digest, overwrite)
            if manifest is not None:
                logger.info("nothing to do: %s already holds this dataset", to)
                return manifest
            uri, delete = work_folder(spark, config.spark, place)
            cleanup.callback(quietly, delete)
            work = Work(spark, uri)
            work.check_shared()
            manifest = _make(config, inputs, sources, former, place, work, progress or (lambda stage: None))
            manifest.write(place)
    return manifest


def _make(
    config: PrepareConfig,
    inputs: Inputs,
    sources: tuple[Source, ...],
    former: Former,
    place: Place,
    work: Work,
    progress: Callable[[str], None],
) -> Manifest:
    """Write every shard, check them all, and say what they are."""
    target = Target(place, config.shard_mebibytes << 20)
    progress("read")
    checked = read_interactions(inputs, work)

    progress("validate")
    interactions = usable_interactions(checked, inputs, config)
    records = interactions.table.withColumn("draw", drawn(config.split.seed, "user", "item"))
    ids = together(
        {side: partial(number_ids, records, column, former.indices(work.spark, side), work) for side, column in SIDES}
    )
    information = read_side_information(inputs, config, ids, work)

    progress("filter")
    count = interactions.read - sum(interactions.reasons.values())
    tables = {side: joined(read.tables) for side, read in information.items()}
    pairs, left_out = filter_interactions(records, count, ids, tables, config.filters, work)

    progress("index")
    indexed = together(
        {side: partial(index_entities, pairs, column, ids[side], former.count(side), work) for side, column in SIDES}
    )

    progress("split")
    given = Input(with_indices(pairs, indexed), indexed, config.split, work)
    split, counts, unsplit = split_interactions(given, config.history)

    progress("features")

    def encoded(side: Side) -> tuple[SideTable, dict[str, pa.Table]]:
        features = config.features(side)
        rows = first_seen(given, split, side).join(indexed[side].table.select("index", "key"), "index")
        wide, fitted = encode_texts(with_features(rows, tables[side], features), features, side, former, work)
        return SideTable(wide, indexed[side].count, fit(wide, features, former.specs(side), side, work)), fitted

    entities = together({side: partial(encoded, side) for side, _ in SIDES})

    progress("write")
    refused = [frame for read in (interactions, *information.values()) for frame in read.refused]
    counted = {side: table.count for side, (table, _) in entities.items()}
    written = together(
        {
            **{table: partial(write_pairs, table, split, counted, target) for table in PAIR_TABLES},
            **{side: partial(write_entities, entities[side][0], side, target) for side, _ in SIDES},
            "rejected": partial(write_rejected, refused, target, work),
        }
    )
    shards = {table: shown.shards for table, shown in written.items()}
    for side, (_, fitted) in entities.items():
        for name, learned in fitted.items():
            table = f"{FITTED}/{side}/{name}"
            shards[table] = (write_shard(learned, target.place, table, 0)[0],)
    specs = {side: with_missing(table.specs, written[side]) for side, (table, _) in entities.items()}
    side_reasons = sum((Counter(read.reasons) for read in information.values()), Counter())
    manifest = Manifest(
        name=config.name,
        package_version=sibra_dist.__version__,
        protocol=Protocol(
            name=config.split.protocol, seed=config.split.seed, validation=config.split.validation, test=config.split.test
        ),
        counts=Counts(users=counted["users"], items=counted["items"], **counts),
        records=Records(
            read=interactions.read,
            rejected=dict(interactions.reasons),
            filtered=left_out | unsplit,
            kept=sum(counts.values()),
        ),
        rejected_side_information=dict(sorted(side_reasons.items())),
        user_features=specs["users"],
        item_features=specs["items"],
        interaction_columns=interaction_columns_of(split),
        shards=shards,
        extends=former.digest,
        config=recorded(config),
        sources=sources,
    )

    progress("verify")
    starts = {table: shown.starts for table, shown in written.items()}
    check_written(work.spark, place, manifest, starts, fitted_here=former.digest is None)
    return manifest
