"""Synthetic datasets of any size: `sibra-dist synthesize`, without raw files and without Spark.

A dataset is written shard by shard. What stays in memory are some 50 bytes for each user and item, and the pairs of one
shard; the histories by item come from those by user, by way of buckets on disk, each of which becomes a shard.
"""

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

import sibra_dist
from sibra_dist.config import Config, to_plain
from sibra_dist.data.manifest import TABLES, Counts, FeatureSpec, Manifest, Protocol, Records, Shard, Side
from sibra_dist.data.planted import COLD, Integers, Structure, spread, words
from sibra_dist.data.planted_features import FEATURES, Kind
from sibra_dist.data.publish import WORK, check_place, existing_dataset, hold, quietly, write_shard, writing
from sibra_dist.data.storage import Place

PAIRS_AT_ONCE = 1 << 20
SHARD_PAIRS = 1 << 23
SHARD_BYTES = 1 << 25
"""Of users and items, before compression."""
SPLITS = ("train", "validation", "test")
STAGES = ("users' histories", "items' histories", "users", "items")
REMEDY = "Free some space or make it writable"
Share = Annotated[float, Field(ge=0, lt=0.5)]


class SyntheticConfig(Config):
    """What `sibra-dist synthesize` is asked for."""

    users: Annotated[int, Field(ge=100, lt=2**29)]
    items: Annotated[int, Field(ge=100, lt=2**31)]
    interactions: Annotated[int, Field(ge=1)]
    """In all splits together."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    held_out: Annotated[Share, Field(gt=0)] = 0.1
    """Of each user's interactions, for validation and for test each; not read where items are cold."""
    cold_items: Share = 0.0
    """Of the items, for validation and for test each, with all their interactions; 0: no item is cold."""
    evaluated_users: Annotated[int, Field(ge=1)] | None = None
    """Users that hold something out; null: all. Evaluation costs as much as there are."""
    user_features: tuple[Kind, ...] = ("category", "numeric")
    item_features: tuple[Kind, ...] = ("category", "tags", "numeric", "vector")
    missing: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the entities that lack a feature, drawn for each feature."""
    vector_size: Annotated[int, Field(ge=1)] = 32
    vector_type: Literal["float32", "float16"] = "float32"

    @model_validator(mode="after")
    def _features_are_named_once(self) -> Self:
        for name in ("user_features", "item_features"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names a feature twice")
        return self


def synthesize(
    config: SyntheticConfig, to: str | Path | Place, overwrite: bool = False, progress: Callable[[str], None] | None = None
) -> Manifest:
    """Write the dataset that `config` describes in the folder or at the URI `to`, and return its manifest.

    Its bytes hang on the configuration alone. If it is there already, nothing is done.

    Raises:
        ConfigError: there can be no such dataset.
        DatasetError: `to` holds another dataset and `overwrite` is not given, or something that is no dataset, or cannot be
            written.
    """
    place = Place.at(to)
    structure = Structure(config.users, config.items, config.interactions, config.seed)
    check_place(place)
    recorded = {"synthetic": to_plain(config)}
    with hold(place), writing(place, REMEDY):
        manifest = existing_dataset(place, recorded, (), None, overwrite)
        if manifest is None:
            manifest = _Synthesis(config, structure, place).make(recorded, progress or (lambda stage: None))
            manifest.write(place)
    return manifest


class _Synthesis:
    """One dataset in the making."""

    def __init__(self, config: SyntheticConfig, structure: Structure, place: Place) -> None:
        self._config, self._structure, self._place = config, structure, place
        self._item_split = _cold(config)
        self._counts = dict.fromkeys(SPLITS, 0)
        self._dropped = 0
        self._shards: dict[str, list[Shard]] = {table: [] for table in TABLES}
        self._bucket_items = -(-config.items // max(-(-config.interactions // SHARD_PAIRS), 1))
        """Items whose histories make a shard."""

    def make(self, recorded: Mapping[str, Any], progress: Callable[[str], None]) -> Manifest:
        config = self._config
        with self._work_folder() as work:
            progress(STAGES[0])
            self._write_users_histories(work)
            progress(STAGES[1])
            self._write_items_histories(work)
        progress(STAGES[2])
        user_split = np.zeros(config.users, np.int8)
        specs = {"users": self._write_entities("users", user_split, config.user_features)}
        progress(STAGES[3])
        specs["items"] = self._write_entities("items", self._item_split, config.item_features)
        self._write("rejected", {name: pa.array([], pa.string()) for name in ("table", "file", "reason", "record")})
        share = config.cold_items or config.held_out
        return Manifest(
            name="synthetic",
            package_version=sibra_dist.__version__,
            protocol=Protocol(
                name="cold_item" if config.cold_items else "random", seed=config.seed, validation=share, test=share
            ),
            counts=Counts(users=config.users, items=config.items, **self._counts),
            records=Records(
                read=config.interactions,
                rejected={},
                filtered={"evaluated_users": self._dropped} if self._dropped else {},
                kept=sum(self._counts.values()),
            ),
            user_features=specs["users"],
            item_features=specs["items"],
            shards={table: tuple(shards) for table, shards in self._shards.items()},
            config=dict(recorded),
            sources=(),
        )

    @contextmanager
    def _work_folder(self) -> Iterator[Path]:
        """A folder for buckets, in the dataset's where that is a disk: a later preparation sweeps what a killed one leaves."""
        if not self._place.is_local:
            with tempfile.TemporaryDirectory(prefix="sibra-dist.work-") as folder:
                yield Path(folder)
            return
        work = self._place / f"{WORK}{uuid.uuid4().hex[:12]}"
        work.path.mkdir()
        try:
            yield work.path
        finally:
            quietly(work.delete_all)

    def _write_users_histories(self, work: Path) -> None:
        ends = self._structure.ends
        for first, last in _ranges(ends, SHARD_PAIRS):
            found: dict[str, list[tuple[Integers, Integers]]] = {split: [] for split in SPLITS}
            for start, stop in _ranges(ends[first : last + 1], PAIRS_AT_ONCE):
                users, items, split = self._pairs(first + start, first + stop)
                for number, name in enumerate(SPLITS):
                    there = split == number
                    found[name].append((users[there], items[there]))
                self._fill_buckets(work, *found["train"][-1])
            for name, parts in found.items():
                users, items = (np.concatenate(column) for column in zip(*parts, strict=True))
                self._counts[name] += len(users)
                if name == "train":
                    self._write_lists("histories/users", "items", users, items, np.arange(first, last))
                elif len(users) or (last == self._config.users and not self._shards[f"held_out/{name}"]):
                    self._write_lists(f"held_out/{name}", "items", users, items, np.unique(users))

    def _pairs(self, first: int, last: int) -> tuple[Integers, Integers, Integers]:
        """Interactions of users, by user and then item, and the split of each as a position in `SPLITS`."""
        items, slots = self._structure.chosen(first, last)
        degrees = np.diff(self._structure.ends[first : last + 1])
        users = np.repeat(np.arange(first, last), degrees)
        evaluated = self._evaluated(users)
        if self._config.cold_items:
            split = self._item_split[items].astype(np.int64)
            kept = evaluated | (split == 0)
            self._dropped += len(kept) - int(kept.sum())
            users, items, split = users[kept], items[kept], split[kept]
        else:
            # As many for validation as for test, and at least one for training.
            held = np.minimum(-(-degrees * round(self._config.held_out * 10**6) // 10**6), (degrees - 1) // 2)
            total, both = np.repeat(degrees, degrees), np.repeat(2 * held, degrees)
            split = (spread(slots, both, total) & evaluated) * (1 + slots * both // total % 2)
        order = np.sort(users << 33 | items << 2 | split)
        return order >> 33, order >> 2 & 0x7FFFFFFF, order & 3

    def _evaluated(self, users: Integers) -> npt.NDArray[np.bool_]:
        count = min(self._config.evaluated_users or self._config.users, self._config.users)
        return spread(users, count, self._config.users)

    def _fill_buckets(self, work: Path, users: Integers, items: Integers) -> None:
        keys = np.sort(items << 29 | users)
        buckets = -(-self._config.items // self._bucket_items)
        cuts = np.searchsorted(keys, np.arange(buckets + 1) * self._bucket_items << 29)
        for number, (start, stop) in enumerate(pairwise(cuts)):
            if start < stop:
                with (work / f"{number}").open("ab") as file:
                    file.write(keys[start:stop].data)

    def _write_items_histories(self, work: Path) -> None:
        for number, first in enumerate(range(0, self._config.items, self._bucket_items)):
            bucket = work / f"{number}"
            keys = np.fromfile(bucket, np.int64) if bucket.exists() else np.empty(0, np.int64)
            bucket.unlink(missing_ok=True)
            keys.sort()
            rows = np.arange(first, min(first + self._bucket_items, self._config.items))
            self._write_lists("histories/items", "users", keys >> 29, keys & 0x1FFFFFFF, rows)

    def _write_entities(self, side: Side, split: npt.NDArray[np.int8], kinds: tuple[Kind, ...]) -> tuple[FeatureSpec, ...]:
        config, structure = self._config, self._structure
        features = [
            FEATURES[kind](side, config.seed, structure.groups, config.missing, config.vector_size, config.vector_type)
            for kind in kinds
        ]
        rows = max(SHARD_BYTES // (32 + sum(feature.width for feature in features)), 1)
        for first in range(0, len(split), rows):
            last = min(first + rows, len(split))
            groups = structure.tastes(first, last)[:, 0] if side == "users" else structure.group_of_item[first:last]
            number = pa.array(range(first, last), pa.int64()).cast(pa.string())
            columns = {
                "index": pa.array(np.arange(first, last, dtype=np.int32)),
                "id": pc.binary_join_element_wise(side[0], number, ""),
                "split": pa.DictionaryArray.from_arrays(pa.array(split[first:last]), list(SPLITS)).cast(pa.string()),
            }
            training = split[first:last] == 0
            columns |= {feature.kind: feature.values(first, groups.astype(np.int64), training) for feature in features}
            self._write(side, columns)
        return tuple(feature.spec() for feature in features)

    def _write_lists(self, table: str, column: str, rows: Integers, values: Integers, there: Integers) -> None:
        """A row for each of `there`, ascending, with the values of that row, which is null where there are none."""
        ends = np.searchsorted(rows, there, side="right")
        offsets = np.append(0, ends).astype(np.int32)
        mask = pa.array(np.diff(offsets) == 0)
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)), mask=mask)
        self._write(table, {"index": pa.array(there.astype(np.int32)), column: lists})

    def _write(self, table: str, columns: Mapping[str, pa.Array]) -> None:
        shard, _ = write_shard(pa.table(dict(columns)), self._place, table, len(self._shards[table]))
        self._shards[table].append(shard)


def _cold(config: SyntheticConfig) -> npt.NDArray[np.int8]:
    """The split of each item, as a position in `SPLITS`."""
    split = np.zeros(config.items, np.int8)
    if config.cold_items:
        order = np.argsort(words(config.seed, COLD, 0, config.items), kind="stable")
        count = -(-config.items * round(config.cold_items * 10**6) // 10**6)
        split[order[:count]], split[order[count : 2 * count]] = 2, 1
    return split


def _ranges(ends: Integers, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `most` pairs each, where row r has ends[r + 1] - ends[r]."""
    parts = (ends[1:] - ends[0] - 1) // most
    cuts = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(parts)]
    yield from pairwise(cuts)
