"""Text to vectors: tf-idf reduced by SVD, feature hashing, or a sentence-transformers model.

Words are runs of letters, marks and digits of any alphabet, in compatibility form (NFKC) and lower case; everything else
parts them. A Han character is a word by itself. Other scripts that put no space between words (kana, Thai, Lao, Khmer,
Burmese) are parted only at punctuation, into runs that seldom occur twice: for them take a sentence transformer.
Arrow splits, a column at a time; words are told apart by 64 bits of BLAKE2b, the same everywhere.

The vector of a text has the same bits however Spark divides and orders the work. Each is computed from its own words, in the
order of their hashes, and what is fitted comes from whole numbers and from a sample in the order of `index`. Three things may
differ in the last digits on another machine: the SVD when it is fitted, and a sentence transformer (processor, version
of torch); and what is a letter (version of Arrow). Once fitted, tf-idf encodes to the same bits everywhere.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from sibra_dist.errors import ConfigError, SourceError
from sibra_dist.etl.feature_config import HashingConfig, SentenceTransformerConfig, TextEncoder, TfidfConfig
from sibra_dist.etl.words import Floats, count_buckets, count_words, damped, main_directions, project, smooth_idf, weigh

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

HAS_WORD = r"[\p{L}\p{N}]"
ROWS_AT_ONCE = 1024
"""Texts that are looked at together, which bounds a worker's memory; no result hangs on it."""
ROWS_PER_CALL = 512
"""A sentence transformer is given together the texts whose indices lie in one range of this width."""
LEAST_LENGTH = 1e-6
"""A shorter vector, of a text whose weights have length 1, is rounding error: nothing of the text is in it."""
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What the libraries below sentence-transformers are told in the environment; it changes no result."""

VECTORS = "index int, vector array<float>"
FITTED_SCHEMA = pa.schema({"bucket": pa.int32(), "idf": pa.float32(), "components": pa.list_(pa.float32())})
"""What is fitted for tf-idf. Files name the elements of lists otherwise, which makes other bytes of the same content."""
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
    """Latent semantic analysis: tf-idf weights of words, projected on their main directions, and scaled to length 1.

    A word weighs `(1 + ln tf) * (ln((1 + n) / (1 + df)) + 1)` in a text where it occurs tf times, if df of n training texts
    have it (Salton & Buckley 1988, here with a smoothed idf); the weights of a text are scaled to length 1. The directions
    are the first right singular vectors of the sampled training texts (Deerwester et al. 1990). Where these have fewer than
    `size`, every vector ends in zeros. Words that the sample lacks count for nothing.

    What is fitted: `bucket` int32 (those that the sample has, ascending), `idf` float32, `components` list<float32>.
    """
    if fitted is None:
        fitted = fit_tfidf(texts.where(F.col("split") == "train").select("index", "text"), config)
    known, idf = fitted["bucket"].to_numpy(), fitted["idf"].to_numpy()
    components = fitted["components"].combine_chunks().flatten().to_numpy()
    size, buckets = config.size, config.buckets
    if len(components) != len(known) * size or known[-1] >= buckets:
        raise ConfigError(
            f"texts were encoded to {len(components) // len(known)} numbers before, not to {size} from {buckets} buckets; "
            "a dataset that is extended keeps its encodings: set size and buckets as they were"
        )
    components = components.reshape(-1, size)

    def encode(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in _slices(batches):
            rows, found, counts = count_buckets(batch["text"], buckets)
            places = np.minimum(np.searchsorted(known, found), len(known) - 1)
            is_known = known[places] == found
            rows, places, counts = rows[is_known], places[is_known], counts[is_known]
            yield _vectors(batch, project(rows, places, weigh(rows, counts, idf[places]), components, batch.num_rows))

    return texts.select("index", "text").mapInArrow(encode, VECTORS), fitted, size


def encode_hashing(texts: DataFrame, config: HashingConfig, fitted: pa.Table | None) -> Encoded:
    """Feature hashing: by its hash, each word adds `1 + ln tf` to one place or takes it away (Weinberger et al. 2009).

    Vectors are scaled to length 1. A text whose words cancel out has no row.
    """
    size = config.size

    def encode(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in _slices(batches):
            rows, hashes, counts = count_words(batch["text"])
            # The sign is the highest bit, which says next to nothing about the place.
            weights = np.where(hashes >> np.uint64(63), -damped(counts), damped(counts))
            places = rows * size + (hashes % np.uint64(size)).astype(np.int64)
            sums = np.bincount(places, weights, batch.num_rows * size).astype(np.float64)
            yield _vectors(batch, sums.reshape(-1, size))

    return texts.select("index", "text").mapInArrow(encode, VECTORS), None, size


def encode_sentences(texts: DataFrame, config: SentenceTransformerConfig, fitted: pa.Table | None) -> Encoded:
    """What a sentence-transformers model makes of each text, on the processor, with one thread in each of Spark's workers.

    A worker loads the model once and keeps it. What a model makes of a text depends, in the last digits, on the texts beside
    it; so it is always given the same ones together, those of a range of indices. Vectors are as long as the model
    makes them.
    """
    spark, name, batch_size = texts.sparkSession, config.model, config.batch_size

    def try_model(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        # A fault is told, not raised: Spark would have the task try again.
        for _ in batches:
            size, fault = 0, None
            try:
                size = len(load_model(name).encode(["text"], show_progress_bar=False)[0])
            except SourceError as error:
                fault = str(error)
            yield pa.RecordBatch.from_pydict({"size": pa.array([size], pa.int32()), "fault": pa.array([fault], pa.string())})

    def encode(block: pa.Table) -> pa.Table:
        ordered = block.sort_by("index")
        made = load_model(name).encode(ordered["text"].to_pylist(), batch_size=batch_size, show_progress_bar=False)
        return pa.table({"index": ordered["index"], "vector": _lists(made.astype(np.float32))})

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
    components = _lists(main_directions(rows, places, values, config.size))
    return pa.table({"bucket": known, "idf": idf, "components": components}).cast(FITTED_SCHEMA)


@lru_cache(maxsize=1)
def load_model(name: str) -> "SentenceTransformer":
    """A sentence-transformers model that encodes quietly and in one thread; for Spark's workers, whose process it sets up.

    Raises:
        SourceError: the package is missing, or the model cannot be loaded.
    """
    os.environ.update(QUIET)
    try:
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise SourceError(
            f"the encoder sentence_transformer lacks a package ({error}); install it wherever Spark's executors run: "
            "pip install 'sibra-dist[text]'"
        ) from error
    # Spark's workers share the machine's cores already.
    torch.set_num_threads(1)
    try:
        try:
            # A model that is here needs no network, and asking for news of it would take a minute where there is none.
            return SentenceTransformer(name, device="cpu", local_files_only=True)
        except OSError:
            return SentenceTransformer(name, device="cpu")
    except Exception as error:  # a damaged or missing file shows in a dozen ways
        reason = (str(error) or repr(error)).splitlines()[0]
        raise SourceError(
            f"the sentence-transformers model {name} cannot be loaded ({reason}); name the folder of a model that every "
            "executor of Spark can read"
        ) from error


def _slices(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield batch.slice(start, ROWS_AT_ONCE)


def _vectors(batch: pa.RecordBatch, vectors: Floats) -> pa.RecordBatch:
    """The rows of `VECTORS`: the vectors that hold anything, scaled to length 1."""
    lengths = np.sqrt(np.add.reduce(vectors * vectors, axis=1))
    kept = lengths > LEAST_LENGTH
    scaled = (vectors[kept] / lengths[kept, None]).astype(np.float32)
    return pa.RecordBatch.from_pydict({"index": batch["index"].filter(pa.array(kept)), "vector": _lists(scaled)})


def _lists(matrix: NDArray[np.float32]) -> pa.Array:
    """The rows of a matrix as list<float32>."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1]).cast(pa.list_(pa.float32()))
