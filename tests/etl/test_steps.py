"""Filters, positions, splits and features one by one, against plain Python."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sibra_dist.data.manifest import FeatureSpec
from sibra_dist.errors import ConfigError, SourceError
from sibra_dist.etl.config import EntityFilter, FilterConfig, HistoryConfig, SplitConfig
from sibra_dist.etl.feature_config import FeatureConfig
from sibra_dist.etl.features import fit, fit_scales
from sibra_dist.etl.filters import DUPLICATES, filter_entities, filter_interactions, k_core
from sibra_dist.etl.indexing import Indexed, index_entities, number_ids, with_keys, with_positions
from sibra_dist.etl.splits import COLD_SIDES, SPLITS, Input, drawn, first_seen, split_interactions
from sibra_dist.etl.work import Work

pytestmark = pytest.mark.spark

Pair = tuple[str, str]


@pytest.fixture
def work(spark: SparkSession, tmp_path: Path) -> Work:
    return Work(spark, f"file://{tmp_path}/work")


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


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    links=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 6)), min_size=60, max_size=150),
    k=st.integers(2, 4),
)
def test_k_core_is_that_of_plain_python(spark: SparkSession, work: Work, links: set[tuple[int, int, int]], k: int) -> None:
    # Six graphs that have nothing to do with each other, since Spark takes as long over one.
    pairs = {(f"u{graph}{user}", f"i{graph}{item}") for graph, user, item in links}
    assert pairs_of(k_core(frame_of(spark, sorted(pairs)), k, work)) == plain_core(pairs, k)


def test_k_core_comes_to_the_end_of_a_long_chain(spark: SparkSession, work: Work) -> None:
    # Each round takes a link off either end, so that all goes, one round after the other.
    chain = [pair for place in range(12) for pair in ((f"u{place}", f"i{place}"), (f"u{place}", f"i{place + 1}"))]
    assert pairs_of(k_core(frame_of(spark, chain), 2, work)) == set()


@pytest.mark.parametrize(
    ("policy", "time", "weight"), [("latest", 3, 1.5), ("earliest", 1, 2.5), ("highest", 2, 0.25), ("sum", 3, 4.25)]
)
def test_of_several_records_of_a_pair_the_policy_says_which_is_left(
    spark: SparkSession, policy: str, time: int, weight: float
) -> None:
    rows = [("u", "i", 3.0, 2.5, 1), ("u", "i", 5.0, 0.25, 2), ("u", "i", 4.0, 1.5, 3), ("u", "j", 1.0, 7.0, 9)]
    frame = spark.createDataFrame(rows, "user string, item string, rating double, weight double, time long")
    frame = frame.withColumn("draw", drawn(0, "user", "item"))
    left = {row.item: (row.time, row.weight) for row in DUPLICATES[policy](frame).collect()}
    assert left == {"i": (time, weight), "j": (9, 7.0)}


def test_sums_of_weights_do_not_hang_on_the_order(spark: SparkSession) -> None:
    weights = np.random.default_rng(0).lognormal(0, 4, 200).tolist()
    sums = set()
    for order, parts in ((weights, 1), (weights[::-1], 7)):
        frame = spark.createDataFrame([("u", "i", weight) for weight in order], "user string, item string, weight double")
        frame = frame.withColumn("draw", drawn(0, "user", "item"))
        sums.add(DUPLICATES["sum"](frame.repartition(parts)).collect()[0].weight)
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(math.fsum(weights), rel=1e-9)


def test_entity_filters_look_at_features_columns_and_counts(spark: SparkSession) -> None:
    pairs = frame_of(spark, [(f"u{user}", f"i{item}") for user in range(5) for item in range(user + 1)])
    rows = [(f"u{user}", ("x" if user != 4 else None,), (str(20 + user), "ab"[user % 2])) for user in range(5)]
    table = spark.createDataFrame(rows, "key string, features struct<city: string>, raw struct<age: string, sex: string>")

    def users_left(**wanted: object) -> set[str]:
        kept = filter_entities(pairs, "user", table, EntityFilter.model_validate(wanted))
        return {row.user for row in kept.select("user").distinct().collect()}

    assert users_left(require=["city"]) == {"u0", "u1", "u2", "u3"}
    assert users_left(within={"age": [21, 23]}) == {"u1", "u2", "u3"}
    assert users_left(allowed={"sex": ["a"]}) == {"u0", "u2", "u4"}
    assert users_left(min_count=2, max_count=4) == {"u1", "u2", "u3"}
    assert users_left(require=["city"], allowed={"sex": ["b"]}, min_count=3) == {"u3"}


def test_pair_in_two_parts_of_a_fixed_split_is_told(spark: SparkSession, work: Work) -> None:
    rows = [("u", "i", "train"), ("u", "i", "test"), ("u", "j", "train"), ("u", "j", "train"), ("v", "j", "validation")]
    frame = spark.createDataFrame(rows, "user string, item string, split string").withColumn("draw", drawn(0, "user", "item"))
    ids = {"users": number_ids(frame, "user", None, work), "items": number_ids(frame, "item", None, work)}
    information: Mapping[str, None] = {"users": None, "items": None}
    with pytest.raises(SourceError, match="1 in test and train"):
        filter_interactions(frame, 5, ids, information, FilterConfig(), work)  # type: ignore[arg-type]
    kept, left_out = filter_interactions(frame.where("item = 'j'"), 3, ids, information, FilterConfig(), work)  # type: ignore[arg-type]
    assert {(row.user, row.split) for row in kept.collect()} == {(0, "train"), (1, "validation")}
    assert left_out == {"duplicates": 1}


def test_positions_follow_the_order_whatever_the_partitions(spark: SparkSession, work: Work) -> None:
    ids = [f"{place}é" for place in range(100)]
    expected = {identifier: place for place, identifier in enumerate(sorted(ids))}
    for partitions in (1, 5):
        frame = spark.createDataFrame([(identifier,) for identifier in ids], "user string").repartition(partitions)
        assert {row["id"]: row["key"] for row in number_ids(frame, "user", None, work).collect()} == expected
    assert with_positions(frame.limit(0), ["user"], "position", work).count() == 0


def test_ids_that_are_left_are_numbered_anew_and_known_ones_keep_their_number(spark: SparkSession, work: Work) -> None:
    frame = frame_of(spark, [(letter, "i") for letter in "bdfh"])
    left = frame.where("user in ('d', 'h')")

    def indices(former: dict[str, int]) -> dict[str, int]:
        known = spark.createDataFrame(list(former.items()), "id string, former int") if former else None
        ids = number_ids(frame, "user", known, work)
        keys = {"users": ids, "items": number_ids(frame, "item", None, work)}
        indexed = index_entities(with_keys(left, keys), "user", ids, len(former), work)  # type: ignore[arg-type]
        assert indexed.count == indexed.table.count()
        return {row["id"]: row["index"] for row in indexed.table.collect()}

    assert indices({}) == {"d": 0, "h": 1}
    # What is known stays, with interactions (h) or without (b), in the source (b) or not (z); new ids come after.
    assert indices({"z": 0, "h": 1, "b": 2}) == {"z": 0, "h": 1, "b": 2, "d": 3}


def split_input(
    spark: SparkSession, work: Work, pairs: list[tuple[object, ...]], protocol: str, seed: int = 0, parts: int = 3
) -> Input:
    """Pairs (user number, item number, time) with what the splits need besides."""
    ids = {
        side: Indexed(
            spark.createDataFrame([(n, n, f"{side[0]}{n:03}") for n in range(count)], "key int, index int, id string"),
            count,
            True,
        )
        for side, count in (("users", 6), ("items", 40))
    }
    frame = spark.createDataFrame(pairs, "user int, item int, time long").repartition(parts)
    named = frame.withColumns({"u": F.format_string("u%03d", "user"), "i": F.format_string("i%03d", "item")})
    config = SplitConfig.model_validate({"protocol": protocol, "seed": seed})
    return Input(named.withColumn("draw", drawn(seed, "u", "i")).drop("u", "i"), ids, config, work)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", [protocol for protocol in SPLITS if protocol != "fixed"])
def test_splits_have_the_sizes_of_the_protocol_and_follow_the_seed(spark: SparkSession, work: Work, protocol: str) -> None:
    draw = random.Random(7)
    sizes = [3, 4, 7, 10, 20, 30]
    pairs = [(user, item, draw.randrange(50)) for user, size in enumerate(sizes) for item in draw.sample(range(40), size)]
    times = {(user, item): (time, item) for user, item, time in pairs}

    def split(seed: int, parts: int = 3) -> dict[tuple[int, int], str | None]:
        rows = SPLITS[protocol](split_input(spark, work, draw.sample(pairs, len(pairs)), protocol, seed, parts)).collect()
        assert len(rows) == len(pairs)
        return {(row.user, row.item): row.split for row in rows}

    first = split(0)
    assert set(first) == set(times)
    assert first == split(0, parts=1)
    assert (first == split(1)) == (protocol in ("temporal_user", "leave_one_out", "temporal_global"))
    by_user: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for user, item in first:
        by_user[user].append((user, item))
    if protocol in ("random", "temporal_user", "leave_one_out"):
        for mine in by_user.values():
            # In tenths by whole numbers: 30 * 0.1 is a little more than 3 in binary.
            held_out = 1 if protocol == "leave_one_out" else math.ceil(len(mine) / 10)
            counts = Counter(first[pair] for pair in mine)
            assert counts["test"] == counts["validation"] == held_out
            if protocol != "random":
                in_time = [first[pair] for pair in sorted(mine, key=times.__getitem__)]
                assert in_time == ["train"] * counts["train"] + ["validation"] * held_out + ["test"] * held_out
    elif protocol == "temporal_global":
        in_time = [first[pair] for pair in sorted(times, key=lambda pair: (times[pair][0], *pair))]
        assert in_time == ["train"] * 58 + ["validation"] * 8 + ["test"] * 8
    else:
        drawn_entities = {}
        for side in COLD_SIDES[protocol]:
            splits = {
                row["index"]: row["split"] for row in first_seen(*_with_split(spark, work, pairs, protocol), side).collect()
            }
            held_out = math.ceil(len(splits) / 10)
            counts = Counter(splits.values())
            assert counts["test"] == counts["validation"] == held_out
            drawn_entities[side] = splits
        for (user, item), name in first.items():
            names = {splits[user if side == "users" else item] for side, splits in drawn_entities.items()}
            assert name == (names.pop() if len(names) == 1 else None)


def _with_split(spark: SparkSession, work: Work, pairs: list[tuple[int, int, int]], protocol: str) -> tuple[Input, DataFrame]:
    given = split_input(spark, work, pairs, protocol)  # type: ignore[arg-type]
    return given, SPLITS[protocol](given)


def test_entities_new_in_a_later_split_are_not_of_the_training(spark: SparkSession, work: Work) -> None:
    pairs = [(user, user * 2 + step, 10 * user + step) for user in range(6) for step in range(5)]
    given, split = _with_split(spark, work, pairs, "temporal_global")
    names = {(row.user, row.item): row.split for row in split.collect()}
    first = {row["index"]: row["split"] for row in first_seen(given, split, "items").collect()}
    order = ["train", "validation", "test"]
    for item in range(40):
        mine = [names[pair] for pair in names if pair[1] == item]
        assert first[item] == (min(mine, key=order.index) if mine else "train")
    assert set(first.values()) == set(order)


def test_long_histories_are_capped_and_counted(spark: SparkSession, work: Work) -> None:
    pairs = [(user, item, item) for user in range(3) for item in range(10 * user, 10 * user + 10)]
    for keep in ("latest", "sample"):
        given = split_input(spark, work, pairs, "random")  # type: ignore[arg-type]
        history = HistoryConfig.model_validate({"max_length": 5, "keep": keep})
        whole, counts, _ = split_interactions(given, HistoryConfig())
        capped, counts_then, left_out = split_interactions(given, history)
        before, after = [{(row.user, row.item): row.split for row in frame.collect()} for frame in (whole, capped)]
        assert counts == {"train": 24, "validation": 3, "test": 3}
        assert counts_then == {"train": 15, "validation": 3, "test": 3}
        assert left_out == {"history": 9}
        assert all(before[pair] == name for pair, name in after.items())
        training = [
            sorted(item for user, item in before if user == mine and before[user, item] == "train") for mine in range(3)
        ]
        kept = [sorted(item for user, item in after if user == mine and after[user, item] == "train") for mine in range(3)]
        if keep == "latest":
            assert kept == [items[-5:] for items in training]
        else:
            assert kept != [items[-5:] for items in training]


def test_split_that_leaves_nothing_is_told(spark: SparkSession, work: Work) -> None:
    given = split_input(spark, work, [(0, 0, 0), (1, 1, 1)], "leave_one_out")
    with pytest.raises(ConfigError, match="leaves no train interactions"):
        split_interactions(given, HistoryConfig())


def wide_of(spark: SparkSession, rows: list[tuple[str, str | None, list[str] | None]]) -> DataFrame:
    numbered = [(place, f"id{place}", *row) for place, row in enumerate(rows)]
    return spark.createDataFrame(numbered, "index int, id string, split string, colour string, tags array<string>")


def specs_of(
    frame: DataFrame, work: Work, former: Mapping[str, FeatureSpec] | None = None, **limits: int
) -> dict[str, FeatureSpec]:
    configs = {
        "colour": FeatureConfig.model_validate({"kind": "category", **limits}),
        "tags": FeatureConfig.model_validate({"kind": "tags", **limits}),
    }
    return {spec.name: spec for spec in fit(frame, configs, former or {}, "items", work)}


def test_vocabularies_have_a_code_for_the_rest_if_training_has_a_rest(spark: SparkSession, work: Work) -> None:
    train = [("red", ["a", "b"])] * 3 + [("blue", ["a"])] * 2 + [("green", ["c"]), (None, None)]
    frame = wide_of(spark, [("train", *row) for row in train] + [("test", "pink", ["a", "d"]), ("validation", "red", None)])

    every = specs_of(frame, work)
    assert every["colour"].vocabulary == ("blue", "green", "red")
    assert every["tags"].vocabulary == ("a", "b", "c")
    assert (every["colour"].unknown, every["tags"].unknown) == (1, 1)

    often = specs_of(frame, work, min_count=2)
    assert often["colour"].vocabulary == (None, "blue", "red")
    assert often["tags"].vocabulary == (None, "a", "b")
    assert (often["colour"].unknown, often["tags"].unknown) == (2, 2)
    assert (often["colour"].size, often["colour"].kind, often["tags"].kind) == (3, "category", "tags")

    largest = specs_of(frame, work, max_size=1)
    assert largest["colour"].vocabulary == (None, "red")
    assert largest["tags"].vocabulary == (None, "a")


def test_vocabularies_of_an_extended_dataset_grow_at_their_end(spark: SparkSession, work: Work) -> None:
    former = specs_of(wide_of(spark, [("train", "red", ["b"]), ("train", "lost", ["a"])]), work)
    assert former["colour"].vocabulary == ("lost", "red")
    now = specs_of(
        wide_of(spark, [("train", "blue", ["c", "b"]), ("train", "red", None), ("test", "pink", None)]), work, former
    )
    assert now["colour"].vocabulary == ("lost", "red", "blue")
    assert now["tags"].vocabulary == ("a", "b", "c")
    assert (now["colour"].unknown, now["tags"].unknown) == (1, 0)


def test_fitted_scale_is_right_and_the_same_for_any_order(spark: SparkSession) -> None:
    values = np.random.default_rng(0).normal(1e6, 3.0, 400).tolist()
    fitted = {
        tuple(fit_scales(frame.repartition(parts), ["standard", "minmax"]))
        for order, parts in ((values, 1), (values[::-1], 4), (sorted(values), 3))
        for frame in [spark.createDataFrame([(value, value) for value in order], "a double, b double")]
    }
    (((offset, scale), least_and_span),) = fitted
    assert offset == pytest.approx(np.mean(values), rel=1e-12)
    assert scale == pytest.approx(np.std(values), rel=1e-9)
    assert least_and_span == (min(values), max(values) - min(values))
    same = spark.createDataFrame([(2.0,), (2.0,)], "value double")
    assert fit_scales(same, ["standard"]) == [(2.0, 1.0)]
    assert fit_scales(same.limit(0), ["minmax"]) == [(0.0, 1.0)]
