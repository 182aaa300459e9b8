"""The contract between the two engines: what a dataset folder holds, and how to tell that it is whole.

    <dataset>/
      manifest.json                     written last, whole; a folder without it is not a dataset
      users/part-*.parquet              index int32, id string, split string, then one column a feature
      items/part-*.parquet              the same
      histories/users/part-*.parquet    index int32, items list<int32> [, weights list<float32>] [, times list<int64>]:
                                        training interactions only, null where there are none
      histories/items/part-*.parquet    index int32, users list<int32> [, weights list<float32>]: the same pairs, transposed
      held_out/<split>/part-*           index int32 (user), items list<int32>: users that hold something out
      rejected/part-*                   every input record that was not used: file, reason, record
      fitted/<side>/<feature>/part-*    what was fitted to encode a feature made from text

Rows are sorted by `index`. In `users`, `items` and `histories` every index from 0 to n-1 has one row, so a shard is a
block of CSR rows. Lists are sorted; weights, and times in milliseconds since 1970, stand in the order of the list beside
them. A missing modality is a Parquet null, nothing else.

A shard is named by its number and its content: `part-00000-9f86d081.parquet` ends in the first 8 hexadecimal digits of its
SHA-256. So a new shard never takes the place of another, and a dataset is replaced by replacing its manifest, in one step
that readers see whole: on a disk and in an object store alike, and without renaming a folder.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, field_validator, model_validator

from sibra_dist.config import Config
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

Side = Literal["users", "items"]
FeatureKind = Literal["category", "tags", "numeric", "vector"]
SplitName = Literal["train", "validation", "test"]
InteractionColumn = Literal["weights", "times"]
SIDES: tuple[Side, ...] = ("users", "items")
TABLES = ("users", "items", "histories/users", "histories/items", "held_out/validation", "held_out/test", "rejected")
FITTED = "fitted"
CHUNK_BYTES = 1 << 20
REMEDY = "Copy the dataset again or prepare it again"


class Shard(Config):
    """One Parquet file of a table."""

    path: str
    """Relative to the dataset folder, with forward slashes."""
    rows: int
    bytes: int
    sha256: str


class FeatureSpec(Config):
    """One feature of users or of items, and what was fitted on the training entities to encode it."""

    name: str
    kind: FeatureKind
    size: int
    """category, tags: the number of codes; numeric, vector: the length of the list."""
    vocabulary: tuple[str | None, ...] | None = None
    """category, tags: the value of each code, in code order. Code 0 may be null: it stands for every value that a limit of the
    vocabulary cut off, and for those that the training entities never showed."""
    offset: tuple[float, ...] | None = None
    """numeric: what was subtracted from each element ..."""
    scale: tuple[float, ...] | None = None
    """... and what it was then divided by."""
    missing: int
    """Entities without the feature."""
    unknown: int = 0
    """category, tags: values met that no code of their own stands for."""
    encoder: dict[str, Any] | None = None
    """vector made from text: the configuration of what encoded it."""

    @field_validator("vocabulary")
    @classmethod
    def _null_comes_first(cls, vocabulary: tuple[str | None, ...] | None) -> tuple[str | None, ...] | None:
        if vocabulary and None in vocabulary[1:]:
            raise ValueError("only code 0 may stand for the values that are out of the vocabulary")
        return vocabulary


class Protocol(Config):
    """How the interactions were split."""

    name: str
    seed: int
    validation: float
    test: float

    @property
    def cold_items(self) -> bool:
        """Whether items are split, so that a held-out split ranks its own items only."""
        return self.name in {"cold_item", "cold_both"}

    @property
    def cold_users(self) -> bool:
        """Whether users are split, so that those of a held-out split have no history."""
        return self.name in {"cold_user", "cold_both"}


class Counts(Config):
    """Sizes of the dataset."""

    users: int
    items: int
    train: int
    """Interactions in the training split, and likewise below."""
    validation: int
    test: int


class Records(Config):
    """What became of every interaction record that was read: read = sum(rejected) + sum(filtered) + kept."""

    read: int
    rejected: dict[str, int]
    """By reason; each such record is kept in `rejected/`."""
    filtered: dict[str, int]
    """By the step that left them out, in the order of the steps."""
    kept: int


class Source(Config):
    """Fingerprint of one input file."""

    path: str
    bytes: int
    sha256: str


class Manifest(Config):
    """Everything that a reader needs to know of a dataset before it opens a shard."""

    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    name: str
    package_version: str
    protocol: Protocol
    counts: Counts
    records: Records
    rejected_side_information: dict[str, int] = {}
    """By reason: records of feature tables that were not used; each is kept in `rejected/`."""
    user_features: tuple[FeatureSpec, ...]
    item_features: tuple[FeatureSpec, ...]
    interaction_columns: tuple[InteractionColumn, ...] = ()
    """What the histories say of each interaction: `weights` of users and of items, `times` of users only."""
    shards: dict[str, tuple[Shard, ...]]
    """By table, in index order; every name in `TABLES` is there, and besides them only `fitted/<side>/<feature>`."""
    extends: str | None = None
    """Digest of the dataset whose indices this one continues."""
    config: dict[str, Any]
    sources: tuple[Source, ...]

    @model_validator(mode="after")
    def _tables_are_known(self) -> Self:
        if absent := [table for table in TABLES if table not in self.shards]:
            raise ValueError(f"it lists no shards of {', '.join(absent)}")
        fitted = [f"{FITTED}/{side}/{spec.name}" for side in SIDES for spec in self.features(side)]
        if unknown := [table for table in self.shards if table not in (*TABLES, *fitted)]:
            raise ValueError(f"it lists shards of {', '.join(unknown)}, which is no table of a dataset")
        return self

    @property
    def digest(self) -> str:
        """What the dataset says, as 64 hexadecimal digits: equal for equal bytes, wherever and however they were made."""
        # Without what has its default, so that a field that is new one day alters no digest of today.
        said = {
            "protocol": self.protocol.model_dump(),
            "counts": self.counts.model_dump(),
            "user_features": [spec.model_dump(mode="json", exclude_defaults=True) for spec in self.user_features],
            "item_features": [spec.model_dump(mode="json", exclude_defaults=True) for spec in self.item_features],
            "interaction_columns": self.interaction_columns,
            "shards": {
                table: [shard.sha256 for shard in shards] for table, shards in self.shards.items() if table != "rejected"
            },
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def features(self, side: Side) -> tuple[FeatureSpec, ...]:
        """The features of users or of items."""
        return self.user_features if side == "users" else self.item_features

    def all_shards(self) -> Iterator[Shard]:
        """Every shard of every table."""
        for table in (*TABLES, *sorted(self.shards.keys() - set(TABLES))):
            yield from self.shards[table]

    @classmethod
    def read(cls, place: str | Path | Place) -> Self:
        """The manifest of the dataset in folder `place`.

        Raises:
            DatasetError: there is none, it cannot be understood, or a newer version wrote it.
        """
        dataset = Place.at(place)
        path = dataset / MANIFEST
        try:
            text = dataset.read(MANIFEST).decode()
        except FileNotFoundError as error:
            raise DatasetError(
                f"{dataset} is not a dataset: it has no {MANIFEST}. Make one: sibra-dist prepare CONFIG.yaml --to {dataset}"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
        try:
            values = json.loads(text)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path} is damaged: not a manifest. Prepare the dataset again") from error
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise DatasetError(
                f"{path} has format version {version}, but this sibra-dist reads up to {FORMAT_VERSION}. Install a newer one"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            said = ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"].removeprefix("Value error, ")])
            raise DatasetError(f"{path} is damaged: {said}. Prepare the dataset again") from error

    def write(self, place: str | Path | Place) -> None:
        """Publish the manifest in folder `place`, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        content = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False).encode() + b"\n"
        Place.at(place).write(MANIFEST, content)


def verify_shard(place: str | Path | Place, shard: Shard) -> None:
    """Check that a shard is there, whole and unaltered; it is read once.

    Raises:
        DatasetError: it is not, and how.
    """
    dataset = Place.at(place)
    size, content = 0, hashlib.sha256()
    with _readable(dataset, shard), dataset.stream(shard.path) as file:
        while piece := file.read(CHUNK_BYTES):
            size += len(piece)
            content.update(piece)
    _compare(dataset, shard, size, content.hexdigest())


def read_shard(place: str | Path | Place, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard, or some of its columns: no more is read than they need, so its checksum is not looked at.

    Raises:
        DatasetError: it cannot be read.
    """
    dataset = Place.at(place)
    with _readable(dataset, shard), dataset.open(shard.path) as file:
        return pq.ParquetFile(file).read(columns)


def read_verified_shard(place: str | Path | Place, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard, or some of its columns, out of the very bytes that were found to have its checksum.

    Raises:
        DatasetError: it is not there, or not whole, or altered.
    """
    dataset = Place.at(place)
    with _readable(dataset, shard):
        content = dataset.read(shard.path)
        _compare(dataset, shard, len(content), hashlib.sha256(content).hexdigest())
        return pq.ParquetFile(pa.BufferReader(content)).read(columns)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(dataset: Place, shard: Shard, size: int, sha256: str) -> None:
    path = dataset / shard.path
    if size != shard.bytes:
        raise DatasetError(f"{path} is damaged: {size} bytes where the manifest says {shard.bytes}. {REMEDY}")
    if sha256 != shard.sha256:
        raise DatasetError(f"{path} is damaged: its content is not what the manifest's checksum says. {REMEDY}")


@contextmanager
def _readable(dataset: Place, shard: Shard) -> Iterator[None]:
    path = dataset / shard.path
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}. {REMEDY}") from error
    except pa.ArrowException as error:
        raise DatasetError(f"{path} is damaged: {error}. {REMEDY}") from error
