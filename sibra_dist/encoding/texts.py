"""Text to vectors: tf-idf reduced by SVD, feature hashing, or a sentence-transformers model. What is fitted is given.

Words are runs of letters, marks and digits of any alphabet, in compatibility form (NFKC) and lower case; everything else
parts them. A Han character is a word by itself. Other scripts that put no space between words (kana, Thai, Lao, Khmer,
Burmese) are parted only at punctuation, into runs that seldom occur twice: for them take a sentence transformer.
Arrow splits, a column at a time; words are told apart by 64 bits of BLAKE2b, the same everywhere.

By tf-idf and by hashing, the vector of a text is computed from its own words, in the order of their hashes: it has the same
bits whatever texts are beside it. A sentence transformer may differ in the last digits.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from sibra_dist.config import Config
from sibra_dist.data.manifest import FITTED, Manifest, Side, read_verified_shard
from sibra_dist.data.storage import Place
from sibra_dist.encoding.features import lists
from sibra_dist.encoding.words import Floats, count_buckets, count_words, damped, project, weigh
from sibra_dist.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LEAST_LENGTH = 1e-6
"""A shorter vector, of a text whose weights have length 1, is rounding error: nothing of the text is in it."""
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What the libraries below sentence-transformers are told in the environment; it changes no result."""
FITTED_SCHEMA = pa.schema({"bucket": pa.int32(), "idf": pa.float32(), "components": pa.list_(pa.float32())})
"""What is fitted for tf-idf. Files name the elements of lists otherwise, which makes other bytes of the same content."""

ToVectors = Callable[[pa.Array], pa.Array]
"""Texts, none of them null, to their vectors, list<float32>; null where there is nothing to encode."""


class TfidfConfig(Config):
    """Words hashed into buckets, weighted by how rare they are among training entities, reduced by SVD."""

    type: Literal["tfidf"] = "tfidf"
    size: Annotated[int, Field(ge=1)] = 128
    """Length of the vector."""
    buckets: Annotated[int, Field(ge=2, le=1 << 20)] = 1 << 15
    """Words of one bucket count as one word."""
    sample: Annotated[int, Field(ge=1)] = 50_000
    """The SVD is fitted to so many training texts at the most, drawn by hash."""


class HashingConfig(Config):
    """Words hashed into as many signed buckets as the vector is long; nothing is fitted."""

    type: Literal["hashing"] = "hashing"
    size: Annotated[int, Field(ge=1)] = 256


class SentenceTransformerConfig(Config):
    """A sentence-transformers model, which needs the extra `text`."""

    type: Literal["sentence_transformer"] = "sentence_transformer"
    model: str
    """A folder, or a name that sentence-transformers knows. Spark's executors must be able to load it too."""
    batch_size: Annotated[int, Field(ge=1)] = 32


TextEncoder = Annotated[TfidfConfig | HashingConfig | SentenceTransformerConfig, Field(discriminator="type")]


def by_tfidf(config: TfidfConfig, fitted: pa.Table | None) -> ToVectors:
    """Latent semantic analysis: tf-idf weights of words, projected on their main directions, and scaled to length 1.

    A word weighs `(1 + ln tf) * (ln((1 + n) / (1 + df)) + 1)` in a text where it occurs tf times, if df of n training texts
    have it (Salton & Buckley 1988, here with a smoothed idf); the weights of a text are scaled to length 1. The directions
    are the first right singular vectors of the sampled training texts (Deerwester et al. 1990). Where these have fewer than
    `size`, every vector ends in zeros. Words that the sample lacks count for nothing.

    Args:
        config: as it was when `fitted` was fitted.
        fitted: `bucket` int32 (those that the sample has, ascending), `idf` float32, `components` list<float32>.

    Raises:
        ConfigError: `fitted` comes from other settings.
    """
    assert fitted is not None
    known, idf = fitted["bucket"].to_numpy(), fitted["idf"].to_numpy()
    components = fitted["components"].combine_chunks().flatten().to_numpy()
    size, buckets = config.size, config.buckets
    if len(components) != len(known) * size or known[-1] >= buckets:
        raise ConfigError(
            f"texts were encoded to {len(components) // len(known)} numbers before, not to {size} from {buckets} buckets; "
            "a dataset that is extended keeps its encodings: set size and buckets as they were"
        )
    components = components.reshape(-1, size)

    def encode(texts: pa.Array) -> pa.Array:
        rows, found, counts = count_buckets(texts, buckets)
        places = np.minimum(np.searchsorted(known, found), len(known) - 1)
        is_known = known[places] == found
        rows, places, counts = rows[is_known], places[is_known], counts[is_known]
        return _scaled(project(rows, places, weigh(rows, counts, idf[places]), components, len(texts)))

    return encode


def by_hashing(config: HashingConfig, fitted: pa.Table | None) -> ToVectors:
    """Feature hashing: by its hash, each word adds `1 + ln tf` to one place or takes it away (Weinberger et al. 2009).

    Vectors are scaled to length 1. A text whose words cancel out has none. Nothing is fitted.
    """
    size = config.size

    def encode(texts: pa.Array) -> pa.Array:
        rows, hashes, counts = count_words(texts)
        # The sign is the highest bit, which says next to nothing about the place.
        weights = np.where(hashes >> np.uint64(63), -damped(counts), damped(counts))
        places = rows * size + (hashes % np.uint64(size)).astype(np.int64)
        sums = np.bincount(places, weights, len(texts) * size).astype(np.float64)
        return _scaled(sums.reshape(-1, size))

    return encode


def by_sentences(config: SentenceTransformerConfig, fitted: pa.Table | None) -> ToVectors:
    """What a sentence-transformers model makes of each text, on the processor and in one thread. Nothing is fitted."""
    name, batch_size = config.model, config.batch_size

    def encode(texts: pa.Array) -> pa.Array:
        import torch

        model, threads = load_model(name), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            made = model.encode(texts.to_pylist(), batch_size=batch_size, show_progress_bar=False)
        finally:
            torch.set_num_threads(threads)
        return as_lists(np.asarray(made, np.float32))

    return encode


ENCODERS: dict[str, Callable[[Any, pa.Table | None], ToVectors]] = {
    "tfidf": by_tfidf,
    "hashing": by_hashing,
    "sentence_transformer": by_sentences,
}


def text_encoder(encoder: dict[str, Any], fitted: pa.Table | None) -> ToVectors:
    """The encoder of a feature that was made from text, by what the manifest says of it and what was fitted for it."""
    config: TextEncoder = TypeAdapter(TextEncoder).validate_python(encoder)
    return ENCODERS[config.type](config, fitted)


def read_fitted(place: str | Path | Place, manifest: Manifest, side: Side, name: str) -> pa.Table | None:
    """What was fitted to encode a text of a dataset; None if nothing was.

    Raises:
        DatasetError: it cannot be read.
    """
    shards = manifest.shards.get(f"{FITTED}/{side}/{name}", ())
    if not shards:
        return None
    return pa.concat_tables([read_verified_shard(place, shard) for shard in shards]).cast(FITTED_SCHEMA)


@lru_cache(maxsize=1)
def load_model(name: str) -> "SentenceTransformer":
    """A sentence-transformers model that encodes quietly; it sets up the environment of this process for that.

    Raises:
        SourceError: the package is missing, or the model cannot be loaded.
    """
    os.environ.update(QUIET)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise SourceError(
            f"the encoder sentence_transformer lacks a package ({error}); install it here, and wherever Spark's executors "
            "run: pip install 'sibra-dist[text]'"
        ) from error
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
            "executor of Spark, and this machine, can read"
        ) from error


def as_lists(matrix: NDArray[np.float32]) -> pa.Array:
    """The rows of a matrix as list<float32>."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1]).cast(pa.list_(pa.float32()))


def _scaled(vectors: Floats) -> pa.Array:
    """Vectors as list<float32>, scaled to length 1; null where they hold nothing."""
    lengths = np.sqrt(np.add.reduce(vectors * vectors, axis=1))
    kept = lengths > LEAST_LENGTH
    scaled = (vectors[kept] / lengths[kept, None]).astype(np.float32)
    return lists(np.repeat(np.flatnonzero(kept), vectors.shape[1]), scaled.reshape(-1), len(vectors))
