"""What `describe` should say of a dataset, by plain Python that reads the Parquet files; and datasets made to measure."""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sibra_dist.data.manifest import MANIFEST, FeatureSpec, Manifest, Protocol, Records, Shard
from tests.planted import write_planted

SIDES = {"users": "items", "items": "users"}
INDICES, NUMBERS, TIMES = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.int64())


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    """The rows of all shards of a table, in order."""
    shards = json.loads((folder / MANIFEST).read_text())["shards"][table]
    return [row for shard in shards for row in pq.ParquetFile(folder / shard["path"]).read().to_pylist()]


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def percentile(lengths: list[int], percent: int) -> int:
    """The least length such that so many percent have no more, by trying each."""
    return next(
        length for length in sorted(lengths) if 100 * sum(other <= length for other in lengths) >= percent * len(lengths)
    )


def seen(folder: Path) -> dict[str, Any]:
    """What `describe` should say, by loops over the rows of the shards."""
    manifest = json.loads((folder / MANIFEST).read_text())
    histories = {side: rows(folder, f"histories/{side}") for side in SIDES}
    lengths = {side: [len(row[SIDES[side]] or []) for row in histories[side]] for side in SIDES}
    held_rows = {split: rows(folder, f"held_out/{split}") for split in ("validation", "test")}
    counts = {"users": len(lengths["users"]), "items": len(lengths["items"]), "train": sum(lengths["users"])}
    counts |= {split: sum(len(row["items"]) for row in held) for split, held in held_rows.items()}
    total = counts["train"] + counts["validation"] + counts["test"]
    pairs = counts["users"] * counts["items"]
    entities = {side: rows(folder, side) for side in SIDES}
    ranks_own_items = manifest["protocol"]["name"] in ("cold_item", "cold_both")
    weights = [weight for row in histories["users"] for weight in row.get("weights") or []]
    times = [datetime.fromtimestamp(time / 1000, UTC) for row in histories["users"] for time in row.get("times") or []]
    popular = sorted((length for length in lengths["items"] if length), reverse=True)

    def of_side(side: str) -> dict[str, Any]:
        cold = [row for row, length in zip(entities[side], lengths[side], strict=True) if not length]
        splits = Counter(row["split"] for row in cold)
        specs = manifest["user_features" if side == "users" else "item_features"]
        own = {"kind": "interactions", "size": counts[SIDES[side]], "unknown": None, "unknown_code": None}
        own |= {"present": counts[side] - len(cold), "share": share(counts[side] - len(cold), counts[side])}
        modalities = {"interactions": {**own, "share_of_cold": 0.0 if cold else None}}
        for spec in specs:
            present = sum(row[spec["name"]] is not None for row in entities[side])
            coded = spec["kind"] in ("category", "tags")
            modalities[spec["name"]] = {
                "kind": spec["kind"],
                "size": spec["size"],
                "present": present,
                "share": share(present, counts[side]),
                "share_of_cold": share(sum(row[spec["name"]] is not None for row in cold), len(cold)),
                "unknown": spec["unknown"] if coded else None,
                "unknown_code": spec["vocabulary"][0] is None if coded else None,
            }
        bare = sum(all(row[spec["name"]] is None for spec in specs) for row in cold)
        some = [length for length in lengths[side] if length]
        told = {f"p{percent}": percentile(some, percent) for percent in (1, 10, 25, 50, 75, 90, 99)}
        told |= {"entities": len(some), "min": min(some), "max": max(some)}
        return {
            "cold": {
                "count": len(cold),
                "share": share(len(cold), counts[side]),
                "validation": splits["validation"],
                "test": splits["test"],
                "others": splits["train"],
            },
            "history_lengths": {**told, "mean": sum(some) / len(some)},
            "modalities": modalities,
            "without_modality": {"count": bare, "share": share(bare, counts[side])},
        }

    def of_held_out(split: str) -> dict[str, int]:
        kinds = Counter(
            (lengths["users"][row["index"]] == 0, lengths["items"][item] == 0)
            for row in held_rows[split]
            for item in row["items"]
        )
        return {
            "users": len(held_rows[split]),
            "candidates": sum(row["split"] == split or not ranks_own_items for row in entities["items"]),
            "interactions": kinds.total(),
            "warm": kinds[False, False],
            "cold_item": kinds[False, True],
            "cold_user": kinds[True, False],
            "cold_both": kinds[True, True],
        }

    def head(percent: int) -> dict[str, Any]:
        items = math.ceil(len(popular) * percent / 100)
        return {"items": items, "share": sum(popular[:items]) / sum(popular)}

    tables = {}
    for name in manifest["shards"]:
        sizes = [path.stat().st_size for path in sorted((folder / name).glob("part-*.parquet"))]
        found = {"rows": len(rows(folder, name)), "bytes": sum(sizes), "shards": len(sizes)}
        tables[name] = {**found, "smallest_shard": min(sizes), "largest_shard": max(sizes)}
    return {
        "name": manifest["name"],
        "place": str(folder.resolve()),
        "digest": Manifest.read(folder).digest,
        "format_version": 1,
        "package_version": "0",
        "extends": manifest["extends"],
        "protocol": manifest["protocol"],
        "counts": counts,
        "shares": {split: share(counts[split], total) for split in ("train", "validation", "test")},
        "density": {"train": share(counts["train"], pairs), "all": share(total, pairs)},
        "weights": {"min": min(weights), "mean": sum(weights) / len(weights), "max": max(weights)} if weights else None,
        "times": {"earliest": f"{min(times):%Y-%m-%d}", "latest": f"{max(times):%Y-%m-%d}"} if times else None,
        "users": of_side("users"),
        "items": of_side("items"),
        "held_out": {split: of_held_out(split) for split in held_rows},
        "popularity": {"items": len(popular), "top_1_percent": head(1), "top_20_percent": head(20)},
        "records": manifest["records"],
        "rejected_side_information": manifest["rejected_side_information"],
        "storage": {
            "bytes": sum(path.stat().st_size for path in folder.rglob("*.parquet")),
            "shards": len(list(folder.rglob("*.parquet"))),
            "tables": tables,
        },
    }


def replaced(folder: Path, tables: dict[str, dict[str, pa.Array]], **update: Any) -> Path:
    """The dataset in `folder` with other content in some tables, a shard each, and other fields in its manifest."""
    manifest = Manifest.read(folder)
    shards = dict(manifest.shards)
    for name, columns in tables.items():
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
        path = f"{name}/part-00000-replaced.parquet"
        pq.write_table(pa.table(columns), folder / path)
        content = (folder / path).read_bytes()
        length = len(next(iter(columns.values())))
        shards[name] = (Shard(path=path, rows=length, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()),)
    manifest.model_copy(update={"shards": shards, **update}).write(folder)
    return folder


def lists(column: str, values: Sequence[list[int] | None]) -> dict[str, pa.Array]:
    return {"index": pa.array(range(len(values)), pa.int32()), column: pa.array(values, INDICES)}


def write_tiny(folder: Path) -> Path:
    """Six users and five items: user 4 is cold for no protocol's sake, user 5 and item 4 are new in a later split."""
    write_planted(folder, protocol="temporal_global", users=6, items=5, per_user=1, features=False, shards=1)
    manifest = Manifest.read(folder)
    club = FeatureSpec(name="club", kind="category", size=2, vocabulary=(None, "chess"), missing=2, unknown=3)
    price = FeatureSpec(name="price", kind="numeric", size=1, offset=(0.0,), scale=(1.0,), missing=1)
    users = {
        "index": pa.array(range(6), pa.int32()),
        "id": pa.array(list("abcdef")),
        "split": pa.array(["train"] * 5 + ["test"]),
        "club": pa.array([1, 0, None, 1, None, 0], pa.int32()),
    }
    items = {
        "index": pa.array(range(5), pa.int32()),
        "id": pa.array(list("vwxyz")),
        "split": pa.array(["train"] * 4 + ["validation"]),
        "price": pa.array([[1.0], None, [0.0], [2.0], [3.0]], NUMBERS),
    }
    tables = {
        "users": users,
        "items": items,
        "histories/users": lists("items", [[0, 1, 2], [0, 1], [0], [0, 1, 2, 3], None, None]),
        "histories/items": lists("users", [[0, 1, 2, 3], [0, 1, 3], [0, 3], [3], None]),
        "held_out/validation": {"index": pa.array([0, 4], pa.int32()), "items": pa.array([[4], [3, 4]], INDICES)},
        "held_out/test": {"index": pa.array([1, 5], pa.int32()), "items": pa.array([[2], [0, 4]], INDICES)},
    }
    return replaced(
        folder,
        tables,
        name="tiny",
        protocol=Protocol(name="temporal_global", seed=7, validation=0.15, test=0.2),
        counts=manifest.counts.model_copy(update={"train": 10, "validation": 3, "test": 3}),
        records=Records(read=25, rejected={"no user id": 2, "no item id": 1}, filtered={"min_rating": 6, "core": 0}, kept=16),
        rejected_side_information={"duplicate id": 1},
        user_features=(club,),
        item_features=(price,),
        extends="0123456789abcdef" * 4,
    )
