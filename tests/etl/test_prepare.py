"""What `prepare` makes of a small source, checked by hand and against plain Python."""

import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from sibra_dist.config import to_yaml
from sibra_dist.data.manifest import Manifest, verify_shard
from sibra_dist.data.storage import Place
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.pipeline import STAGES, prepare
from sibra_dist.etl.tables import list_rows
from sibra_dist.etl.write import Target, write_table

pytestmark = pytest.mark.spark

Small = Callable[..., PrepareConfig]
ReadTable = Callable[[Path, Manifest, str], pa.Table]


def test_small_example_is_as_worked_out_by_hand(spark: SparkSession, small: Small, tmp_path: Path, table: ReadTable) -> None:
    stages: list[str] = []
    to = tmp_path / "dataset"
    manifest = prepare(small(), to, progress=stages.append)
    assert stages == list(STAGES)
    assert manifest == Manifest.read(to)
    for shard in manifest.all_shards():
        verify_shard(to, shard)

    # 72 pairs, one of them twice, one below 3 stars, 7 that cannot be used. A user's 6 give 1 to each held-out split.
    assert manifest.records.read == 81
    assert manifest.records.rejected == {
        "rating is not a finite number": 2,
        "no item id": 1,
        "no user id": 1,
        "not in the encoding of the table": 1,
        "time cannot be read": 1,
        "wrong number of fields": 1,
    }
    assert manifest.records.filtered == {"min_rating": 1, "duplicates": 1, "core": 0}
    assert manifest.records.kept == 72
    assert manifest.counts.model_dump() == {"users": 12, "items": 10, "train": 48, "validation": 12, "test": 12}
    assert manifest.rejected_side_information == {
        "duplicate id": 1,
        "not a finite number": 1,
        "unknown id": 1,
        "wrong number of fields": 1,
    }

    users, items = table(to, manifest, "users"), table(to, manifest, "items")
    assert users["index"].to_pylist() == list(range(12))
    assert users["id"].to_pylist() == [f"u{user:02}" for user in range(1, 13)]
    assert set(users["split"].to_pylist()) == {"train"}
    city, age = manifest.user_features
    # Of two records of u03 the smaller text stays: Bonn, aged 33, not Köln, aged 23.
    assert city.vocabulary == ("Bonn", "Köln", "Linz")
    by_hand = [{0: 1, 1: 2, 2: None}[user % 3] for user in range(1, 12)]
    by_hand[2] = 0
    assert users["city"].to_pylist() == [*by_hand, None]
    assert city.missing == by_hand.count(None) + 1
    ages = [21.0, 22.0, 33.0, 24.0, None, 26.0, 27.0, 28.0, 29.0, 30.0, 31.0, None]
    known = [value for value in ages if value is not None]
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))
    assert age.offset == pytest.approx((mean,), rel=1e-10)
    assert age.scale == pytest.approx((deviation,), rel=1e-10)
    scaled = [None if value is None else pytest.approx([(value - mean) / deviation], rel=1e-6) for value in ages]
    assert users["age"].to_pylist() == scaled
    assert (age.missing, age.unknown) == (2, 0)

    genres, look = manifest.item_features
    assert genres.vocabulary == ("comedy", "drama")
    assert items["genres"].to_pylist() == [{0: [0, 1], 1: [0], 2: None}[item % 3] for item in range(1, 11)]
    assert items.schema.field("look").type == pa.list_(pa.float32(), 2)
    assert items["look"].to_pylist() == [None, *[[float(place), 0.5] for place in range(8)], None]
    assert (look.size, look.missing, genres.missing) == (2, 2, 3)

    rejected = table(to, manifest, "rejected").to_pylist()
    assert rejected == sorted(rejected, key=lambda row: tuple(row.values()))
    assert len(rejected) == 11
    assert {"table": "users", "file": "users.dat", "reason": "unknown id", "record": "u99::Wien::40"} in rejected
    assert {"table": "interactions", "file": "interactions.tsv", "reason": "no item id", "record": "u01\t\t4\t1"} in rejected


@pytest.mark.parametrize("protocol", ["random", "cold_item"])
def test_histories_are_transposes_and_nothing_held_out_is_in_them(
    spark: SparkSession, small: Small, tmp_path: Path, table: ReadTable, protocol: str
) -> None:
    to = tmp_path / "dataset"
    manifest = prepare(small(split={"protocol": protocol, "validation": 0.2, "test": 0.2}), to)
    by_user, by_item = table(to, manifest, "histories/users"), table(to, manifest, "histories/items")
    matrix = np.zeros((12, 10), dtype=int)
    transposed = matrix.T.copy()
    for row in by_user.to_pylist():
        assert row["items"] is None or row["items"] == sorted(set(row["items"]))
        matrix[row["index"], row["items"] or []] = 1
    for row in by_item.to_pylist():
        transposed[row["index"], row["users"] or []] = 1
    assert (matrix == transposed.T).all()
    assert by_user["index"].to_pylist() == list(range(12))
    assert by_item["index"].to_pylist() == list(range(10))
    splits = table(to, manifest, "items")["split"].to_pylist()
    for split in ("validation", "test"):
        held_out = table(to, manifest, f"held_out/{split}").to_pylist()
        assert sum(len(row["items"]) for row in held_out) == getattr(manifest.counts, split)
        for row in held_out:
            assert not matrix[row["index"], row["items"]].any()
            if protocol == "cold_item":
                assert {splits[item] for item in row["items"]} == {split}
    assert matrix.sum() == manifest.counts.train
    assert matrix.sum() + manifest.counts.validation + manifest.counts.test == 72
    if protocol == "cold_item":
        assert splits.count("validation") == splits.count("test") == 2
        cold = [index for index, split in enumerate(splits) if split != "train"]
        assert [by_item["users"][index].as_py() for index in cold] == [None] * 4


@pytest.mark.slow
def test_bytes_do_not_hang_on_files_partitions_row_order_or_cores(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    first = small(split={"protocol": "cold_item", "seed": 3}, history={"max_length": 4})
    digests = {prepare(first, tmp_path / "first").digest}
    heading, *lines = Path(first.source, "interactions.tsv").read_bytes().split(b"\n")
    kept = [line for line in lines if line]
    config = first.model_copy(update={"interactions": first.interactions.model_copy(update={"path": "parts-*.tsv"})})
    was = {name: spark.conf.get(name) for name in ("spark.sql.shuffle.partitions", "spark.sql.adaptive.enabled")}
    for parts in (1, 3, 17):
        random.Random(parts).shuffle(kept)
        for old in Path(config.source).glob("parts-*"):
            old.unlink()
        for part in range(parts):
            Path(config.source, f"parts-{part}.tsv").write_bytes(b"\n".join([heading, *kept[part::parts]]))
        spark.conf.set("spark.sql.shuffle.partitions", str(parts))
        spark.conf.set("spark.sql.adaptive.enabled", "false")
        try:
            digests.add(prepare(config, tmp_path / f"{parts}").digest)
        finally:
            for name, value in was.items():
                spark.conf.set(name, value or "")
    # And on one core, in a process of its own.
    (tmp_path / "prepare.yaml").write_text(to_yaml(config), encoding="utf-8")
    call = [sys.executable, "-m", "sibra_dist.cli", "prepare", str(tmp_path / "prepare.yaml"), "spark.master=local[1]"]
    subprocess.run([*call, "--to", str(tmp_path / "alone")], check=True, capture_output=True)
    digests.add(Manifest.read(tmp_path / "alone").digest)
    assert len(digests) == 1


def test_small_shards_hold_consecutive_ranges(spark: SparkSession, tmp_path: Path) -> None:
    # Three pairs of 4 bytes an entity, none for every tenth, and one entity that has more than a shard should hold: ten
    # entities with pairs fill a shard, those without come along.
    pairs = [(index, other) for index in range(50) for other in range(100 if index == 25 else 3) if index % 10]
    random.Random(1).shuffle(pairs)
    frame = spark.createDataFrame(pairs, "position int, other int")
    target = Target(Place.at(tmp_path), shard_bytes=120)
    written = write_table(frame, "histories/users", target, list_rows("items", (), dense=True), 50, F.lit(4))
    assert [shard.rows for shard in written.shards] == [12, 11, 2, 1, 11, 11, 2]
    read = pa.concat_tables([pq.read_table(tmp_path / shard.path) for shard in written.shards])
    assert read["index"].to_pylist() == list(range(50))
    by_hand = [None if index % 10 == 0 else list(range(100 if index == 25 else 3)) for index in range(50)]
    assert read["items"].to_pylist() == by_hand
    assert written.missing == (0, 5)
    sparse = write_table(frame, "held_out/test", target, list_rows("items", (), dense=False), 50, F.lit(4))
    read = pa.concat_tables([pq.read_table(tmp_path / shard.path) for shard in sparse.shards])
    assert read["index"].to_pylist() == [index for index in range(50) if index % 10]
    empty = write_table(frame.limit(0), "held_out/validation", target, list_rows("items", (), dense=False), 50, F.lit(4))
    assert [shard.rows for shard in empty.shards] == [0]


def test_vocabulary_and_scale_come_from_training_items_only(
    spark: SparkSession, small: Small, tmp_path: Path, table: ReadTable
) -> None:
    items = [
        {
            "path": "own.tsv",
            "id": "item_id",
            "features": {"own": {"kind": "tags"}, "kind": {"kind": "category"}, "year": {"kind": "numeric", "scale": "minmax"}},
        }
    ]
    config = small(items=items, split={"protocol": "cold_item"})
    lines = [f"i{item:02}\town{item:02}|all\tkind{item:02}\t{1990 + item}" for item in range(1, 11)]
    Path(config.source, "own.tsv").write_text("item_id\town\tkind\tyear\n" + "\n".join(lines) + "\n", encoding="utf-8")
    to = tmp_path / "dataset"
    manifest = prepare(config, to)
    rows = table(to, manifest, "items").to_pylist()
    training = [place for place, row in enumerate(rows, start=1) if row["split"] == "train"]
    cold = [row for row in rows if row["split"] != "train"]
    own, kind, year = manifest.item_features
    assert len(training) == 8
    assert own.vocabulary == ("all", *[f"own{item:02}" for item in training])
    assert kind.vocabulary == tuple(f"kind{item:02}" for item in training)
    assert (own.unknown, kind.unknown, own.missing, kind.missing) == (2, 2, 0, 2)
    assert [(row["own"], row["kind"]) for row in cold] == [([0], None)] * 2
    assert year.offset == (1990.0 + min(training),)
    assert year.scale == (float(max(training) - min(training)),)


def test_feature_that_nobody_has_is_absent_for_all(spark: SparkSession, small: Small, tmp_path: Path, table: ReadTable) -> None:
    features = {"year": {"kind": "numeric"}, "kind": {"kind": "category"}, "own": {"kind": "tags"}}
    config = small(items=[{"path": "empty.tsv", "id": "item_id", "features": features}])
    lines = [f"i{item:02}\t\t\t" for item in range(1, 11)]
    Path(config.source, "empty.tsv").write_text("item_id\town\tkind\tyear\n" + "\n".join(lines) + "\n", encoding="utf-8")
    manifest = prepare(config, tmp_path / "dataset")
    assert {spec.name: (spec.size, spec.missing) for spec in manifest.item_features} == dict.fromkeys(features, (0, 10))
    rows = table(tmp_path / "dataset", manifest, "items")
    assert all(rows[name].null_count == 10 for name in features)


def test_weights_and_times_stand_beside_the_histories(
    spark: SparkSession, small: Small, tmp_path: Path, table: ReadTable
) -> None:
    interactions = {"path": "interactions.tsv", "rating": "rating", "weight": "rating", "time": "time"}
    manifest = prepare(small(interactions=interactions), tmp_path / "dataset")
    assert manifest.interaction_columns == ("weights", "times")
    given = {}
    for line in Path(small().source, "interactions.tsv").read_bytes().decode("latin-1").splitlines()[1:]:
        fields = line.split("\t")
        if len(fields) == 4 and fields[3].isdigit() and fields[2].isdigit() and int(fields[2]) >= 3:
            given[fields[0], fields[1]] = max(given.get((fields[0], fields[1]), (0, 0.0)), (int(fields[3]), float(fields[2])))
    users, items = [table(tmp_path / "dataset", manifest, side)["id"].to_pylist() for side in ("users", "items")]
    for row in table(tmp_path / "dataset", manifest, "histories/users").to_pylist():
        for item, weight, time in zip(row["items"], row["weights"], row["times"], strict=True):
            assert (time, weight) == (
                1000 * given[users[row["index"]], items[item]][0],
                given[users[row["index"]], items[item]][1],
            )
    for row in table(tmp_path / "dataset", manifest, "histories/items").to_pylist():
        for user, weight in zip(row["users"], row["weights"], strict=True):
            assert weight == given[users[user], items[row["index"]]][1]


@pytest.mark.parametrize("by", ["files", "column"])
def test_fixed_split_is_taken_as_it_is_given(
    spark: SparkSession, small: Small, tmp_path: Path, table: ReadTable, by: str
) -> None:
    source = Path(small().source)
    pairs = [(f"u{user}", f"i{item}") for user in range(4) for item in range(6)]
    splits = {pair: ("test" if place % 6 == 5 else "val" if place % 6 == 4 else "train") for place, pair in enumerate(pairs)}
    if by == "files":
        # As Elliot writes them: without a heading, item 5 in the test file only.
        for name in ("train", "val", "test"):
            lines = [f"{user}\t{item}\t4.0\t1" for (user, item), split in splits.items() if split == name]
            (source / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths = {"train": "train.tsv", "validation": "val.tsv", "test": "test.tsv"}
        interactions: dict[str, object] = {"path": paths, "header": ["user_id", "item_id", "rating", "time"]}
    else:
        rows = {"user_id": [u for u, _ in splits], "item_id": [i for _, i in splits], "part": list(splits.values())}
        pq.write_table(pa.table(rows), source / "split.parquet")
        interactions = {"path": "split.parquet", "format": "parquet", "split": "part"}
    config = small(interactions=interactions, users=[], items=[], filters={}, split={"protocol": "fixed"})
    manifest = prepare(config, tmp_path / "dataset")
    assert manifest.counts.model_dump() == {"users": 4, "items": 6, "train": 16, "validation": 4, "test": 4}
    items = table(tmp_path / "dataset", manifest, "items").to_pylist()
    assert [row["split"] for row in items] == ["train"] * 4 + ["validation", "test"]
    assert table(tmp_path / "dataset", manifest, "histories/users")["items"].to_pylist() == [[0, 1, 2, 3]] * 4
    assert table(tmp_path / "dataset", manifest, "held_out/validation")["items"].to_pylist() == [[4]] * 4
    assert table(tmp_path / "dataset", manifest, "held_out/test")["items"].to_pylist() == [[5]] * 4


def test_a_pattern_finds_a_value_in_text(spark: SparkSession, small: Small, tmp_path: Path, table: ReadTable) -> None:
    config = small(
        items=[
            {
                "path": "titles.tsv",
                "id": "item_id",
                "features": {
                    "decade": {"kind": "category", "column": "title", "pattern": r"\((\d{3})\d\)$"},
                    "year": {"kind": "numeric", "column": "title", "pattern": r"\d{4}", "scale": "none"},
                    "words": {"kind": "tags", "column": "title", "pattern": "^(.*) ", "separator": " "},
                },
            }
        ]
    )
    titles = ["Heat (1995)", "M (1931)", "1941 (1979)", "Untitled", "Big Night (1996)"]
    rows = [f"i{place:02}\t{title}" for place, title in enumerate(titles, start=1)]
    (Path(config.source) / "titles.tsv").write_text("\n".join(["item_id\ttitle", *rows]) + "\n", encoding="utf-8")
    manifest = prepare(config, tmp_path / "dataset")
    items = table(tmp_path / "dataset", manifest, "items")
    decade, year, words = manifest.item_features
    assert decade.vocabulary == ("193", "197", "199")
    assert items["decade"].to_pylist()[:5] == [2, 0, 1, None, 2]
    # The first that is found: of "1941 (1979)" the year is 1941.
    assert items["year"].to_pylist()[:5] == [[1995], [1931], [1941], None, [1996]]
    assert words.vocabulary is not None
    assert [[words.vocabulary[code] for code in codes] if codes else None for codes in items["words"].to_pylist()[:5]] == [
        ["Heat"],
        ["M"],
        ["1941"],
        None,
        ["Big", "Night"],
    ]
    assert (decade.missing, year.missing, words.missing) == (6, 6, 6)
