"""The checks before publication find what they are there for, in files as they were written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from sibra_dist.data.manifest import Counts, FeatureSpec, Manifest, Protocol, Records
from sibra_dist.data.publish import write_shard
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from sibra_dist.etl.checks import check_written
from sibra_dist.etl.reading import unreadable_files

pytestmark = pytest.mark.spark

LISTS = pa.list_(pa.int32())
# Users 0 to 3, items 0 to 4, of which 4 is held out for test; two shards each.
SOUND: dict[str, list[dict[str, list[Any]]]] = {
    "users": [
        {"index": [0, 1], "split": ["train"] * 2, "age": [[-1.0], [1.0]]},
        {"index": [2, 3], "split": ["train"] * 2, "age": [[1.0], [-1.0]]},
    ],
    "items": [
        {"index": [0, 1, 2], "split": ["train"] * 3, "kind": [0, 1, None]},
        {"index": [3, 4], "split": ["train", "test"], "kind": [2, 0]},
    ],
    "histories/users": [{"index": [0, 1], "items": [[0, 1], [2]]}, {"index": [2, 3], "items": [[3], None]}],
    "histories/items": [{"index": [0], "users": [[0]]}, {"index": [1, 2, 3, 4], "users": [[0], [1], [2], None]}],
    "held_out/validation": [{"index": [0, 1], "items": [[2], [0]]}, {"index": [2], "items": [[0, 1]]}],
    "held_out/test": [{"index": [1, 2], "items": [[4], [4]]}],
    "rejected": [{"reason": []}],
}
STARTS = {
    "users": (0, 2, 4),
    "items": (0, 3, 5),
    "histories/users": (0, 2, 4),
    "histories/items": (0, 1, 5),
    "held_out/validation": (0, 2, 4),
    "held_out/test": (0, 4),
    "rejected": (0, 1),
}
TYPES = {"index": pa.int32(), "items": LISTS, "users": LISTS, "kind": pa.int32(), "age": pa.list_(pa.float32())}

Change = Callable[[dict[str, list[dict[str, list[Any]]]]], None]


def written(place: Place, change: Change) -> Manifest:
    tables = {table: [{name: list(values) for name, values in shard.items()} for shard in SOUND[table]] for table in SOUND}
    change(tables)
    shards = {}
    for table, parts in tables.items():
        arrays = [{name: pa.array(values, TYPES.get(name, pa.string())) for name, values in part.items()} for part in parts]
        shards[table] = tuple(write_shard(pa.table(part), place, table, number)[0] for number, part in enumerate(arrays))
    return Manifest(
        name="x",
        package_version="0",
        protocol=Protocol(name="cold_item", seed=0, validation=0.1, test=0.1),
        counts=Counts(users=4, items=5, train=4, validation=4, test=2),
        records=Records(read=10, rejected={}, filtered={}, kept=10),
        user_features=(FeatureSpec(name="age", kind="numeric", size=1, offset=(30.0,), scale=(5.0,), missing=0),),
        item_features=(FeatureSpec(name="kind", kind="category", size=3, vocabulary=("a", "b", "c"), missing=1),),
        shards=shards,
        config={},
        sources=(),
    )


def put(table: str, shard: int, column: str, row: int, value: Any) -> Change:
    def change(tables: dict[str, list[dict[str, list[Any]]]]) -> None:
        tables[table][shard][column][row] = value

    return change


DEFECTS: dict[str, tuple[Change, str]] = {
    "test pair in a history": (put("histories/users", 1, "items", 0, [3, 4]), "1 pairs of held_out/test"),
    "validation pair in a history": (put("histories/users", 0, "items", 1, [0, 2]), "1 pairs of held_out/validation"),
    "pair in both held-out splits": (put("held_out/validation", 1, "items", 0, [0, 1, 4]), "are in held_out/validation"),
    "cold item with a history": (put("histories/items", 1, "users", 3, [1]), "1 entities that are new in a later split"),
    "code of a cold item only": (put("items", 1, "kind", 0, 0), "1 codes of kind are of no training entity"),
    "scale of other entities": (put("users", 1, "age", 0, [3.0]), "the scale of age"),
    "index out of order": (put("users", 0, "index", 0, 1), "does not hold the indices"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(spark: SparkSession, tmp_path: Path, name: str) -> None:
    change, told = DEFECTS[name]
    place = Place.at(tmp_path)
    manifest = written(place, change)
    with pytest.raises(AssertionError, match=told):
        check_written(spark, place, manifest, STARTS, fitted_here=True)


def test_sound_dataset_passes_and_a_damaged_shard_is_told(spark: SparkSession, tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    manifest = written(place, lambda tables: None)
    check_written(spark, place, manifest, STARTS, fitted_here=True)
    path = tmp_path / manifest.shards["held_out/test"][0].path
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"held_out/test/part.* is damaged"), unreadable_files():
        check_written(spark, place, manifest, STARTS, fitted_here=True)


def test_scales_and_codes_of_an_extended_dataset_may_be_of_entities_that_are_gone(spark: SparkSession, tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    manifest = written(place, put("users", 1, "age", 0, [3.0]))
    check_written(spark, place, manifest, STARTS, fitted_here=False)
