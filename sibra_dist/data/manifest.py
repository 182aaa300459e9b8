"""The contract between the two engines: what a dataset folder holds, and how to tell that it is whole.

    <dataset>/
      manifest.json                     written last, atomically; a folder without it is not a dataset
      users/part-00000.parquet          index int32, id string, split string, then one column a feature
      items/part-00000.parquet          the same
      histories/users/part-*.parquet    index int32, items list<int32>: training interactions only, null where there are none
      histories/items/part-*.parquet    index int32, users list<int32>: the same pairs, transposed
      held_out/validation/part-*        index int32 (user), items list<int32>: users that hold something out
      held_out/test/part-*
      rejected/part-*                   every input record that was not used: file, reason, record

Rows are sorted by `index`. In `users`, `items` and `histories` every index from 0 to n-1 has one row, so a shard is a
block of CSR rows. Lists are sorted. A missing modality is a Parquet null, nothing else.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from sibra_dist.config import Config
from sibra_dist.errors import DatasetError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

Side = Literal["users", "items"]
FeatureKind = Literal["category", "tags", "numeric", "vector"]
SplitName = Literal["train", "validation", "test"]
TABLES = ("users", "items", "histories/users", "histories/items", "held_out/validation", "held_out/test", "rejected")


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
    vocabulary: tuple[str, ...] | None = None
    """category, tags: the value of each code, in code order."""
    offset: tuple[float, ...] | None = None
    """numeric: what was subtracted from each element ..."""
    scale: tuple[float, ...] | None = None
    """... and what it was then divided by."""
    missing: int
    """Entities without the feature."""
    unknown: int = 0
    """category, tags: values met that the training entities never showed, so that no code stands for them."""


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
    shards: dict[str, tuple[Shard, ...]]
    """By table, in index order; every name in `TABLES` is there."""
    config: dict[str, Any]
    sources: tuple[Source, ...]

    @property
    def digest(self) -> str:
        """What the dataset says, as 64 hexadecimal digits: equal for equal bytes, wherever and however they were made."""
        said = {
            "protocol": self.protocol.model_dump(),
            "counts": self.counts.model_dump(),
            "user_features": [spec.model_dump(mode="json") for spec in self.user_features],
            "item_features": [spec.model_dump(mode="json") for spec in self.item_features],
            "shards": {table: [shard.sha256 for shard in self.shards[table]] for table in TABLES if table != "rejected"},
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def features(self, side: Side) -> tuple[FeatureSpec, ...]:
        """The features of users or of items."""
        return self.user_features if side == "users" else self.item_features

    def all_shards(self) -> Iterator[Shard]:
        """Every shard of every table."""
        for table in TABLES:
            yield from self.shards[table]

    @classmethod
    def read(cls, dataset: Path) -> Self:
        """The manifest of the dataset in folder `dataset`.

        Raises:
            DatasetError: there is none, it cannot be understood, or a newer version wrote it.
        """
        path = dataset / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DatasetError(
                f"{dataset} is not a dataset: it has no {MANIFEST}. Make one: sibra-dist prepare CONFIG.yaml --to {dataset}"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path} cannot be read: {error}") from error
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
            manifest = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise DatasetError(
                f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}. Prepare the dataset again"
            ) from error
        absent = [table for table in TABLES if table not in manifest.shards]
        if absent:
            raise DatasetError(f"{path} is damaged: it lists no shards of {', '.join(absent)}. Prepare the dataset again")
        return manifest

    def write(self, dataset: Path) -> None:
        """Publish the manifest in folder `dataset`, whole or not at all."""
        write_atomically(
            dataset / MANIFEST, json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False).encode() + b"\n"
        )


def verify_shard(dataset: Path, shard: Shard) -> None:
    """Check that a shard is there, whole and unaltered.

    Raises:
        DatasetError: it is not, and how.
    """
    path = dataset / shard.path
    remedy = "Copy the dataset again or prepare it again"
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise DatasetError(f"{path} is damaged: {size} bytes where the manifest says {shard.bytes}. {remedy}")
        if sha256_of(path) != shard.sha256:
            raise DatasetError(f"{path} is damaged: its content is not what the manifest's checksum says. {remedy}")
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}. {remedy}") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, even after a power cut."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
