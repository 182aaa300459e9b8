"""Texts of Spark's frames to vectors, by the encoders of `sibra_dist.encoding.texts`; and what these are fitted to.

The vector of a text has the same bits however Spark divides and orders the work: what is fitted comes from whole numbers and
from a sample in the order of `index`. Three things may differ in the last digits on another machine: the SVD when it is
fitted, and a sentence transformer (processor, version of torch); and what is a letter (version of Arrow). Once fitted,
tf-idf encodes to the same bits everywhere.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from sibra_dist.encoding.texts import (
    FITTED_SCHEMA,
    HashingConfig,
    SentenceTransformerConfig,
    TextEncoder,
    TfidfConfig,
    ToVectors,
    as_lists,
    by_hashing,
    by_sentences,
    by_tfidf,
    load_model,
)
from sibra_dist.encoding.words import count_buckets, main_directions, smooth_idf, weigh
from sibra_dist.errors import SourceError

HAS_WORD = r"[\p{L}\p{N}]"
ROWS_AT_ONCE = 1024
"""Texts that are looked at together, which bounds a worker's memory; no result hangs on it."""
ROWS_PER_CALL = 512
"""A sentence transformer is given together the texts whose indices lie in one range of this width."""

VECTORS = "index int, vector array<float>"
Encoded = tuple[DataFrame, pa.Table | None, int]
"""The frame of vectors, what was fitted, and the length of a vector."""


def encode_text(texts: DataFrame, config: TextEncoder, fitted: pa.Table | None) -> Encoded:
    """The vectors of texts, what was fitted to encode them, and the length of a vector.

    The vectors are a frame `index` int, `vector` array<float>, which is not computed yet, with a row for each text that
    there is something to encode of: a text without a word, or of words only that the encoder does not know, has no row,
    as if it were absent. What was fitted is None where nothing is.

    Args:
        texts: `index` int (each once), `split` and `text` strings; a null text is absent. It is read several times.
        config: which encoder, and its settings.
        fitted: what an earlier call returned, to encode as it did. None: fit anew, to rows of the split `train` only.

    Raises:
        SourceError: there is no text to fit to, or the model cannot be loaded.
        ConfigError: `fitted` comes from other settings.
    """
    present = texts.where(F.col("text").isNotNull())
    # A Parquet file may call bytes text that are none; Arrow would refuse them.
    present = present.select("index", "split", F.make_valid_utf8("text").alias("text"))
    return ENCODERS[config.type](present, config, fitted)


def encode_tfidf(texts: DataFrame, config: TfidfConfig, fitted: pa.Table | None) -> Encoded:
    """By `by_tfidf`, fitted to the training texts if it is not fitted already."""
    if fitted is None:
        fitted = fit_tfidf(texts.where(F.col("split") == "train").select("index", "text"), config)
    return _each_text(texts, by_tfidf(config, fitted)), fitted, config.size


def encode_hashing(texts: DataFrame, config: HashingConfig, fitted: pa.Table | None) -> Encoded:
    """By `by_hashing`; a text whose words cancel out has no row."""
    return _each_text(texts, by_hashing(config, None)), None, config.size


def encode_sentences(texts: DataFrame, config: SentenceTransformerConfig, fitted: pa.Table | None) -> Encoded:
    """What a sentence-transformers model makes of each text, on the processor, with one thread in each of Spark's workers.

    A worker loads the model once and keeps it. What a model makes of a text depends, in the last digits, on the texts beside
    it; so it is always given the same ones together, those of a range of indices. Vectors are as long as the model
    makes them.
    """
    spark, encode_all = texts.sparkSession, by_sentences(config, None)

    def try_model(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        # A fault is told, not raised: Spark would have the task try again.
        for _ in batches:
            size, fault = 0, None
            try:
                size = len(load_model(config.model).encode(["text"], show_progress_bar=False)[0])
            except SourceError as error:
                fault = str(error)
            yield pa.RecordBatch.from_pydict({"size": pa.array([size], pa.int32()), "fault": pa.array([fault], pa.string())})

    def encode(block: pa.Table) -> pa.Table:
        ordered = block.sort_by("index")
        return pa.table({"index": ordered["index"], "vector": encode_all(ordered["text"].combine_chunks())})

    # One task a core, so that a machine that cannot load the model shows now and not after hours.
    tasks = spark.sparkContext.defaultParallelism
    trial = spark.range(0, tasks, numPartitions=tasks).mapInArrow(try_model, "size int, fault string")
    size, fault = trial.agg(F.max("size"), F.min("fault")).collect()[0]
    if fault is not None:
        raise SourceError(fault)
    # The number of partitions is given, or Spark would make one of what is little data and much work.
    partitions = int(spark.conf.get("spark.sql.shuffle.partitions") or tasks)
    blocks = texts.select("index", "text", F.expr(f"index div {ROWS_PER_CALL}").alias("block")).repartition(partitions, "block")
    return blocks.groupBy("block").applyInArrow(encode, VECTORS), None, size


ENCODERS: dict[str, Callable[..., Encoded]] = {
    "tfidf": encode_tfidf,
    "hashing": encode_hashing,
    "sentence_transformer": encode_sentences,
}


def fit_tfidf(training: DataFrame, config: TfidfConfig) -> pa.Table:
    """The idf over all `training` texts, and the main directions of a sample of them, as `encode_tfidf` describes.

    What comes to the driver is bounded by the configuration: a count for each bucket, and those of each sampled text.

    Raises:
        SourceError: no text has a word.
    """
    buckets = config.buckets

    def count_texts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        # The place after the last bucket counts the texts that have any word.
        totals = np.zeros(buckets + 1, np.int64)
        for batch in _slices(batches):
            rows, found, _ = count_buckets(batch["text"], buckets)
            totals += np.bincount(found, minlength=buckets + 1)
            totals[buckets] += len(np.unique(rows))
        seen = np.flatnonzero(totals)
        yield pa.RecordBatch.from_pydict({"bucket": seen.astype(np.int32), "texts": totals[seen]})

    def count_in_each(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in _slices(batches):
            rows, found, counts = count_buckets(batch["text"], buckets)
            columns = {"index": batch["index"].to_numpy()[rows], "bucket": found, "count": counts}
            yield pa.RecordBatch.from_pydict({name: column.astype(np.int32) for name, column in columns.items()})

    counted = training.mapInArrow(count_texts, "bucket int, texts long").groupBy("bucket").agg(F.sum("texts").alias("texts"))
    totals = np.zeros(buckets + 1, np.int64)
    table = counted.toArrow()
    totals[table["bucket"].to_numpy()] = table["texts"].to_numpy()
    # Indices are drawn without their texts, which thus stay where they are.
    drawn = training.where(F.col("text").rlike(HAS_WORD)).select("index")
    drawn = drawn.orderBy(F.xxhash64("index"), "index").limit(config.sample)
    sample = training.join(F.broadcast(drawn), "index", "left_semi")
    entries = sample.mapInArrow(count_in_each, "index int, bucket int, count int").toArrow()
    if entries.num_rows == 0:
        raise SourceError(
            "tf-idf is fitted to the texts of training entities, and none of them has a word; take the encoder hashing, "
            "which is not fitted"
        )
    entries = entries.sort_by([("index", "ascending"), ("bucket", "ascending")])
    _, rows = np.unique(entries["index"].to_numpy(), return_inverse=True)
    known, places = np.unique(entries["bucket"].to_numpy(), return_inverse=True)
    idf = smooth_idf(int(totals[buckets]), totals[known])
    values = weigh(rows, entries["count"].to_numpy().astype(np.int64), idf[places])
    components = as_lists(main_directions(rows, places, values, config.size))
    return pa.table({"bucket": known, "idf": idf, "components": components}).cast(FITTED_SCHEMA)


def _slices(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield batch.slice(start, ROWS_AT_ONCE)


def _each_text(texts: DataFrame, encode: ToVectors) -> DataFrame:
    """The rows of `VECTORS`: those of texts that there is something to encode of."""

    def vectors(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in _slices(batches):
            found = encode(batch["text"])
            kept = found.is_valid()
            yield pa.RecordBatch.from_pydict({"index": batch["index"].filter(kept), "vector": found.filter(kept)})

    return texts.select("index", "text").mapInArrow(vectors, VECTORS)
