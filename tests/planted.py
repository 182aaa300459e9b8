"""Writes small datasets in the format of `sibra_dist.data.manifest` without Spark, with a structure that can be learned.

Users and items belong to one of a few groups, and users like items of their own group. A category, tags and a vector tell
an item's group, so a model that reads them can rank items that it has no interactions of.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sibra_dist.data.manifest import (
    MANIFEST,
    TABLES,
    Counts,
    FeatureSpec,
    InteractionColumn,
    Manifest,
    Protocol,
    Records,
    Shard,
)
from sibra_dist.data.storage import Place

GROUPS = 4
SPLITS = ("train", "validation", "test")


def planted_weight(user: int, item: int) -> float:
    """What an interaction weighs; exact in float32."""
    return 0.5 + (3 * user + 5 * item) % 8 / 4


def planted_time(user: int, item: int) -> int:
    """When an interaction happened, in milliseconds since 1970: more than 32 bits hold."""
    return 1_600_000_000_000 + 86_400_000 * user + item


def write_planted(
    folder: Path,
    *,
    protocol: str = "cold_item",
    users: int = 60,
    items: int = 80,
    per_user: int = 12,
    seed: int = 0,
    shards: int = 2,
    features: bool = True,
    columns: tuple[InteractionColumn, ...] = (),
) -> Path:
    """Write a dataset into `folder`: a tenth of each user's items, of all items or of all users is held out for each split.

    With `columns` the histories tell the weights and times of `planted_weight` and `planted_time`.
    """
    random = np.random.default_rng(seed)
    user_group, item_group = np.arange(users) % GROUPS, np.arange(items) % GROUPS
    liked = [
        np.sort(
            random.choice(
                np.flatnonzero((item_group == user_group[user]) | (random.random(items) < 0.05)), per_user, replace=False
            )
        )
        for user in range(users)
    ]
    cold_items, cold_users = protocol in ("cold_item", "cold_both"), protocol in ("cold_user", "cold_both")
    item_split = _tenths(items, random) if cold_items else ["train"] * items
    user_split = _tenths(users, random) if cold_users else ["train"] * users
    held: dict[str, list[list[int]]]
    if cold_items or cold_users:
        held = {split: [[] for _ in range(users)] for split in SPLITS}
        for user, row in enumerate(liked):
            for item in row.tolist():
                places = {item_split[item]} if cold_items else set()
                places |= {user_split[user]} if cold_users else set()
                if len(places) == 1:
                    held[places.pop()][user].append(item)
    else:
        orders = [random.permutation(row) for row in liked]
        tenth = -(-per_user // 10)
        held = {
            "test": [sorted(order[:tenth].tolist()) for order in orders],
            "validation": [sorted(order[tenth : 2 * tenth].tolist()) for order in orders],
            "train": [sorted(order[2 * tenth :].tolist()) for order in orders],
        }
    user_columns: dict[str, Any] = {}
    item_columns: dict[str, Any] = {}
    user_specs: list[FeatureSpec] = []
    item_specs: list[FeatureSpec] = []
    if features:
        group_names = tuple(f"group {number}" for number in range(GROUPS))
        user_columns["club"] = pa.array([int(g) if u % 7 else None for u, g in enumerate(user_group)], pa.int32())
        user_specs.append(
            FeatureSpec(name="club", kind="category", size=GROUPS, vocabulary=group_names, missing=-(-users // 7))
        )
        tags = [[int(g), GROUPS] if i % 5 else None for i, g in enumerate(item_group)]
        item_columns["tags"] = pa.array(tags, pa.list_(pa.int32()))
        item_specs.append(
            FeatureSpec(name="tags", kind="tags", size=GROUPS + 1, vocabulary=(*group_names, "any"), missing=-(-items // 5))
        )
        vectors = np.eye(GROUPS, 6, dtype=np.float32)[item_group] + random.normal(0, 0.1, (items, 6)).astype(np.float32)
        item_columns["cover"] = pa.array(
            [row if i % 6 else None for i, row in enumerate(vectors.tolist())], pa.list_(pa.float32(), 6)
        )
        item_specs.append(FeatureSpec(name="cover", kind="vector", size=6, missing=-(-items // 6)))
    seen_by = [[user for user in range(users) if item in held["train"][user]] for item in range(items)]

    writer = _Writer(folder, shards)
    writer.entities("users", [f"u{user:04}" for user in range(users)], user_split, user_columns)
    writer.entities("items", [f"i{item:04}" for item in range(items)], item_split, item_columns)
    user_extra: dict[str, pa.Array] = {}
    item_extra: dict[str, pa.Array] = {}
    if "weights" in columns:
        weights = pa.list_(pa.float32())
        by_user = [[planted_weight(user, item) for item in row] for user, row in enumerate(held["train"])]
        by_item = [[planted_weight(user, item) for user in row] for item, row in enumerate(seen_by)]
        user_extra["weights"], item_extra["weights"] = _lists(by_user, weights), _lists(by_item, weights)
    if "times" in columns:
        times = [[planted_time(user, item) for item in row] for user, row in enumerate(held["train"])]
        user_extra["times"] = _lists(times, pa.list_(pa.int64()))
    writer.lists("histories/users", range(users), "items", held["train"], user_extra)
    writer.lists("histories/items", range(items), "users", seen_by, item_extra)
    for split in ("validation", "test"):
        holders = [user for user in range(users) if held[split][user]]
        writer.lists(f"held_out/{split}", holders, "items", [held[split][user] for user in holders])
    writer.write("rejected", pa.table({name: pa.array([], pa.string()) for name in ("table", "file", "reason", "record")}))
    sizes = {split: sum(map(len, held[split])) for split in held}
    Manifest(
        name="planted",
        package_version="0",
        protocol=Protocol(name=protocol, seed=seed, validation=0.1, test=0.1),
        counts=Counts(users=users, items=items, **sizes),
        records=Records(read=sum(sizes.values()), rejected={}, filtered={}, kept=sum(sizes.values())),
        user_features=tuple(user_specs),
        item_features=tuple(item_specs),
        interaction_columns=columns,
        shards={table: tuple(writer.shards[table]) for table in TABLES},
        config={},
        sources=(),
    ).write(folder)
    return folder


def copy_dataset(folder: Path, to: str | Place) -> Place:
    """Copy a dataset, its manifest last."""
    source, target = Place.at(folder), Place.at(to)
    for name in sorted(source.files(), key=lambda name: name == MANIFEST):
        target.write(name, source.read(name))
    return target


def _tenths(count: int, random: np.random.Generator) -> list[str]:
    split = np.full(count, "train", dtype=object)
    shuffled, tenth = random.permutation(count), count // 10
    split[shuffled[:tenth]], split[shuffled[tenth : 2 * tenth]] = "test", "validation"
    return split.tolist()


def _lists(rows: Sequence[Sequence[float]], kind: pa.DataType) -> pa.Array:
    return pa.array([row or None for row in rows], kind)


class _Writer:
    def __init__(self, folder: Path, shards: int) -> None:
        self.place = Place.at(folder)
        self.count = shards
        self.shards: dict[str, list[Shard]] = {}

    def entities(self, side: str, ids: list[str], splits: list[str], columns: dict[str, Any]) -> None:
        index = pa.array(range(len(ids)), pa.int32())
        self.write(side, pa.table({"index": index, "id": ids, "split": splits, **columns}))

    def lists(
        self, table: str, index: Sequence[int], name: str, rows: list[list[int]], extra: dict[str, pa.Array] | None = None
    ) -> None:
        values = _lists(rows, pa.list_(pa.int32()))
        self.write(table, pa.table({"index": pa.array(list(index), pa.int32()), name: values, **(extra or {})}))

    def write(self, table: str, content: pa.Table) -> None:
        rows = max(-(-content.num_rows // self.count), 1)
        for number, start in enumerate(range(0, max(content.num_rows, 1), rows)):
            part = content.slice(start, rows)
            file = pa.BufferOutputStream()
            pq.write_table(part, file)
            written = file.getvalue()
            sha256 = hashlib.sha256(written).hexdigest()
            path = f"{table}/part-{number:05}-{sha256[:8]}.parquet"
            self.place.write(path, written)
            shard = Shard(path=path, rows=part.num_rows, bytes=written.size, sha256=sha256)
            self.shards.setdefault(table, []).append(shard)
