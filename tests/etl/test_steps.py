"""Readers, filters, positions and splits one by one, against plain Python."""

import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession

from sibra_dist.etl.config import FeatureTableConfig, InteractionsConfig, PrepareConfig, SplitConfig
from sibra_dist.etl.features import fit_scale
from sibra_dist.etl.filters import k_core, without_duplicates
from sibra_dist.etl.indexing import index_entities, with_positions
from sibra_dist.etl.readers import READERS, find_files, fingerprints, read_table
from sibra_dist.etl.splits import SPLITS

pytestmark = pytest.mark.spark

Pair = tuple[str, str]


def frame_of(spark: SparkSession, pairs: list[Pair]) -> DataFrame:
    return spark.createDataFrame(pairs, "user string, item string")


def pairs_of(frame: DataFrame) -> set[Pair]:
    return {(row.user, row.item) for row in frame.collect()}


def plain_core(pairs: set[Pair], k: int) -> set[Pair]:
    while True:
        users, items = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        kept = {(user, item) for user, item in pairs if users[user] >= k and items[item] >= k}
        if kept == pairs:
            return kept
        pairs = kept


@pytest.mark.parametrize(("seed", "k"), [(0, 2), (1, 3), (2, 3)])
def test_k_core_is_that_of_plain_python(spark: SparkSession, seed: int, k: int) -> None:
    draw = random.Random(seed)
    pairs = sorted({(f"u{int(draw.random() ** 2 * 20)}", f"i{int(draw.random() ** 2 * 20)}") for _ in range(110)})
    expected = plain_core(set(pairs), k)
    assert 0 < len(expected) < len(pairs)
    assert pairs_of(k_core(frame_of(spark, pairs), k)) == expected


def test_k_core_comes_to_the_end_of_a_long_chain(spark: SparkSession) -> None:
    # Each round takes a link off either end, so that all goes, one round after the other.
    chain = [pair for place in range(12) for pair in ((f"u{place}", f"i{place}"), (f"u{place}", f"i{place + 1}"))]
    assert pairs_of(k_core(frame_of(spark, chain), 2)) == set()


def test_latest_of_several_interactions_stays(spark: SparkSession) -> None:
    rows = [("u", "i", 1.0), ("u", "i", 3.0), ("u", "i", 2.0), ("u", "j", 0.0)]
    kept = without_duplicates(spark.createDataFrame(rows, "user string, item string, time double"))
    assert {tuple(row) for row in kept.collect()} == {("u", "i", 3.0), ("u", "j", 0.0)}


def test_positions_follow_the_order_whatever_the_partitions(spark: SparkSession) -> None:
    ids = [f"{place}é" for place in range(100)]
    expected = {identifier: place for place, identifier in enumerate(sorted(ids))}
    for partitions in (1, 5):
        frame = spark.createDataFrame([(identifier,) for identifier in ids], "user string").repartition(partitions)
        assert {row["id"]: row["index"] for row in index_entities(frame, "user").collect()} == expected
    assert with_positions(frame.limit(0), ["user"], "position").count() == 0


@pytest.mark.parametrize("protocol", SPLITS)
def test_splits_have_the_sizes_of_the_protocol_and_follow_the_seed(spark: SparkSession, protocol: str) -> None:
    draw = random.Random(7)
    sizes = [3, 4, 7, 10, 20, 30]
    pairs = [(f"u{user}", f"i{item}") for user, size in enumerate(sizes) for item in draw.sample(range(40), size)]

    def split(seed: int, partitions: int = 3) -> dict[Pair, str]:
        frame = frame_of(spark, draw.sample(pairs, len(pairs))).repartition(partitions)
        rows = SPLITS[protocol](frame, SplitConfig.model_validate({"protocol": protocol, "seed": seed})).collect()
        assert len(rows) == len(pairs)
        return {(row.user, row.item): row.split for row in rows}

    first = split(0)
    assert set(first) == set(pairs)
    assert first == split(0, partitions=1)
    assert first != split(1)
    place = {"random": 0, "cold_item": 1}[protocol]
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for pair, name in first.items():
        groups[pair[place]][name] += 1
    if protocol == "random":
        # In tenths by whole numbers: 30 * 0.1 is a little more than 3 in binary.
        for counts in groups.values():
            held_out = math.ceil(counts.total() / 10)
            assert counts["test"] == counts["validation"] == held_out
    else:
        whole = Counter(next(iter(counts)) for counts in groups.values())
        assert all(len(counts) == 1 for counts in groups.values())
        assert whole["test"] == whole["validation"] == math.ceil(len(groups) / 10)


def test_every_reader_gives_records_of_one_form(spark: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / "a [b] {c}% é"
    folder.mkdir()
    spark.createDataFrame([(1, 2.5)], "item long, look double").coalesce(1).write.parquet(str(folder / "parquet"))
    np.savez(folder / "look.npz", ids=np.array([1]), vectors=np.array([[2.5]]))
    (folder / "look.csv").write_bytes("\ufeffitem, look\r\n1, 2.5\r\n".encode())
    (folder / "look.itememb").write_text("item:token\tlook:float\n1\t2.5\n", encoding="utf-8")
    tables: dict[str, tuple[str, str, list[str]]] = {
        "delimited": ("look.csv", "item", ["1", "2.5"]),
        "atomic": ("look.itememb", "item", ["1", "2.5"]),
        "parquet": ("parquet/part-*.parquet", "item", [1, 2.5]),
        "npz": ("look.npz", "ids", [1, [2.5]]),
    }
    assert set(tables) == set(READERS)
    for kind, (path, key, values) in tables.items():
        table = FeatureTableConfig.model_validate(
            {"path": path, "format": kind, "separator": ", ", "id": key, "features": {"look": {"kind": "numeric"}}}
        )
        # The folder's name is no pattern, but the path of the table may be one.
        config = PrepareConfig(name="x", source=str(folder), interactions=InteractionsConfig(path="x"))
        files = find_files(config, table)
        frame = read_table(spark, files, [key, "vectors" if kind == "npz" else "look"])
        assert frame.columns == ["file", "record", "fault", "values"]
        (row,) = frame.collect()
        assert list(row["values"]) == values, kind
        assert (row["file"], row["fault"]) == (files.names[0], None)
        assert [source.path for source in fingerprints([files])] == list(files.names)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252"])
def test_lines_that_cannot_be_decoded_are_faulty_records(spark: SparkSession, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.tsv").write_bytes("user_id\titem_id\nü\t1\n".encode(encoding) + b"\x81\t2\n")
    config = PrepareConfig(name="x", source=str(tmp_path), interactions=InteractionsConfig(path="x.tsv", encoding=encoding))
    rows = read_table(spark, find_files(config, config.interactions), ["user_id", "item_id"]).collect()
    assert next(row["values"]["user_id"] for row in rows if row["fault"] is None) == "ü"
    faults = [(row["fault"], row["record"]) for row in rows if row["fault"] is not None]
    assert faults == ([] if encoding == "latin-1" else [("not in the encoding of the table", "\ufffd\t2")])


def test_fitted_scale_is_right_and_the_same_for_any_order(spark: SparkSession) -> None:
    values = np.random.default_rng(0).normal(1e6, 3.0, 400).tolist()
    fitted = {
        fit_scale(spark.createDataFrame([(value,) for value in order], "value double").repartition(parts), "standard")
        for order, parts in ((values, 1), (values[::-1], 4), (sorted(values), 3))
    }
    ((offset, scale),) = fitted
    assert offset == pytest.approx(np.mean(values), rel=1e-12)
    assert scale == pytest.approx(np.std(values), rel=1e-9)
    same = spark.createDataFrame([(2.0,), (2.0,)], "value double")
    assert fit_scale(same, "standard") == (2.0, 1.0)
    assert fit_scale(same.limit(0), "minmax") == (0.0, 1.0)
