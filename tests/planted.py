"""Writes small datasets in the format of `sibra_dist.data.manifest` without Spark, with a structure that can be learned.

Users and items belong to one of a few groups, and users like items of their own group. A category, tags and a vector tell
an item's group, so a model that reads them can rank items that it has no interactions of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sibra_dist.data.manifest import (
    TABLES,
    Counts,
    FeatureSpec,
    Manifest,
    Protocol,
    Records,
    Shard,
    sha256_of,
)

GROUPS = 4


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
) -> Path:
    """Write a dataset into `folder`: a tenth of each user's items (or of all items) is held out for each of two splits."""
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
    item_split = np.full(items, "train", dtype=object)
    held: dict[str, list[list[int]]]
    if protocol == "cold_item":
        shuffled = random.permutation(items)
        tenth = items // 10
        item_split[shuffled[:tenth]], item_split[shuffled[tenth : 2 * tenth]] = "test", "validation"
        held = {
            split: [[i for i in row.tolist() if item_split[i] == split] for row in liked]
            for split in ("train", "validation", "test")
        }
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
    writer.entities("users", [f"u{user:04}" for user in range(users)], ["train"] * users, user_columns)
    writer.entities("items", [f"i{item:04}" for item in range(items)], item_split.tolist(), item_columns)
    writer.lists("histories/users", range(users), "items", held["train"])
    writer.lists("histories/items", range(items), "users", seen_by)
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
        shards={table: tuple(writer.shards[table]) for table in TABLES},
        config={},
        sources=(),
    ).write(folder)
    return folder


class _Writer:
    def __init__(self, folder: Path, shards: int) -> None:
        self.folder = folder
        self.count = shards
        self.shards: dict[str, list[Shard]] = {}

    def entities(self, side: str, ids: list[str], splits: list[str], columns: dict[str, Any]) -> None:
        index = pa.array(range(len(ids)), pa.int32())
        self.write(side, pa.table({"index": index, "id": ids, "split": splits, **columns}))

    def lists(self, table: str, index: Sequence[int], name: str, rows: list[list[int]]) -> None:
        values = pa.array([row or None for row in rows], pa.list_(pa.int32()))
        self.write(table, pa.table({"index": pa.array(list(index), pa.int32()), name: values}))

    def write(self, table: str, content: pa.Table) -> None:
        (self.folder / table).mkdir(parents=True)
        rows = max(-(-content.num_rows // self.count), 1)
        for number, start in enumerate(range(0, max(content.num_rows, 1), rows)):
            path = f"{table}/part-{number:05}.parquet"
            part = content.slice(start, rows)
            pq.write_table(part, self.folder / path)
            size = (self.folder / path).stat().st_size
            shard = Shard(path=path, rows=part.num_rows, bytes=size, sha256=sha256_of(self.folder / path))
            self.shards.setdefault(table, []).append(shard)
