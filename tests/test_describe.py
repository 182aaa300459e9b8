"""What is found out about a dataset: every figure against plain Python that reads the Parquet files."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sibra_dist.data.manifest import TABLES, Manifest
from sibra_dist.describe import describe
from sibra_dist.errors import DatasetError
from tests.described import INDICES, NUMBERS, TIMES, lists, percentile, replaced, rows, seen, write_tiny
from tests.planted import copy_dataset, write_planted


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("protocol", ["random", "cold_item", "cold_user", "cold_both"])
def test_every_figure_is_that_of_the_files(tmp_path: Path, protocol: str, features: bool) -> None:
    folder = write_planted(tmp_path / "dataset", protocol=protocol, features=features, shards=3)
    assert describe(folder).model_dump(mode="json") == seen(folder)


def test_the_order_of_the_tables_is_always_the_same(tmp_path: Path) -> None:
    folder = write_planted(tmp_path / "dataset")
    manifest = Manifest.read(folder)
    cover = manifest.shards["rejected"]  # any shard will do
    backwards = {"fitted/items/cover": cover, **dict(reversed(manifest.shards.items()))}
    manifest.model_copy(update={"shards": backwards}).write(folder)
    found = describe(folder).storage
    assert list(found.tables) == [*TABLES, "fitted/items/cover"]
    assert found.shards == len(list(folder.rglob("*.parquet"))) + len(cover)


def test_the_size_of_the_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_planted(tmp_path / "dataset", protocol="cold_item")
    monkeypatch.setattr("sibra_dist.describe.BLOCK", 7)
    assert describe(folder).model_dump(mode="json") == seen(folder)


def test_weights_and_times_are_those_of_the_training_interactions(tmp_path: Path) -> None:
    folder = write_planted(tmp_path / "dataset", columns=("weights", "times"))
    found = describe(folder).model_dump(mode="json")
    assert found == seen(folder)
    assert (found["weights"]["min"], found["weights"]["max"]) == (0.5, 2.25)
    assert found["times"] == {"earliest": "2020-09-13", "latest": "2020-11-11"}  # a day a user


def test_a_dataset_small_enough_to_count_by_hand(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "dataset")
    found = describe(folder).model_dump(mode="json")
    assert found == seen(folder)
    assert found["shares"] == {"train": 0.625, "validation": 0.1875, "test": 0.1875}
    assert found["density"] == {"train": 10 / 30, "all": 16 / 30}
    assert found["users"]["cold"] == {"count": 2, "share": 2 / 6, "validation": 0, "test": 1, "others": 1}
    assert found["items"]["cold"] == {"count": 1, "share": 0.2, "validation": 1, "test": 0, "others": 0}
    lengths = {
        "entities": 4,
        "min": 1,
        "p1": 1,
        "p10": 1,
        "p25": 1,
        "p50": 2,
        "p75": 3,
        "p90": 4,
        "p99": 4,
        "max": 4,
        "mean": 2.5,
    }
    assert found["users"]["history_lengths"] == found["items"]["history_lengths"] == lengths
    club = {
        "kind": "category",
        "size": 2,
        "present": 4,
        "share": 4 / 6,
        "share_of_cold": 0.5,
        "unknown": 3,
        "unknown_code": True,
    }
    price = {"kind": "numeric", "size": 1, "present": 4, "share": 0.8, "share_of_cold": 1.0}
    assert found["users"]["modalities"]["club"] == club
    assert found["items"]["modalities"]["price"] == {**price, "unknown": None, "unknown_code": None}
    assert found["users"]["without_modality"] == {"count": 1, "share": 1 / 6}  # user 4
    assert found["items"]["without_modality"] == {"count": 0, "share": 0.0}
    kinds = {"users": 2, "candidates": 5, "interactions": 3}
    assert found["held_out"] == {
        "validation": {**kinds, "warm": 0, "cold_item": 1, "cold_user": 1, "cold_both": 1},
        "test": {**kinds, "warm": 1, "cold_item": 0, "cold_user": 1, "cold_both": 1},
    }
    assert found["popularity"] == {
        "items": 4,
        "top_1_percent": {"items": 1, "share": 0.4},
        "top_20_percent": {"items": 1, "share": 0.4},
    }


def test_percentiles_are_lengths_that_occur_for_any_number_of_entities(tmp_path: Path) -> None:
    for users in (99, 100, 101):
        lengths = [1 + 7 * user % users for user in range(users)]
        histories = [list(range(length)) for length in lengths]
        folder = write_planted(tmp_path / str(users), protocol="random", users=users, items=users, features=False, shards=1)
        replaced(folder, {"histories/users": lists("items", histories)})  # of the one side only, for its lengths
        found = describe(folder).users.history_lengths
        assert found is not None
        told = [found.p1, found.p10, found.p25, found.p50, found.p75, found.p90, found.p99]
        assert told == [percentile(lengths, percent) for percent in (1, 10, 25, 50, 75, 90, 99)]


def test_an_empty_split_has_no_users_and_no_interactions(tmp_path: Path) -> None:
    folder = write_planted(tmp_path / "dataset", protocol="random")
    counts = Manifest.read(folder).counts.model_copy(update={"test": 0})
    nothing = {"index": pa.array([], pa.int32()), "items": pa.array([], INDICES)}
    replaced(folder, {"held_out/test": nothing}, counts=counts)
    found = describe(folder).model_dump(mode="json")
    assert found == seen(folder)
    assert found["shares"]["test"] == 0.0
    parts = ("users", "interactions", "warm", "cold_item", "cold_user", "cold_both")
    assert found["held_out"]["test"] == {"candidates": 80, **dict.fromkeys(parts, 0)}


def test_a_dataset_that_trains_on_nothing_has_no_lengths_and_no_popularity(tmp_path: Path) -> None:
    """None comes from `prepare`, but another program may write one."""
    folder = write_planted(tmp_path / "dataset", protocol="random", columns=("weights", "times"))
    counts = Manifest.read(folder).counts.model_copy(update={"train": 0, "validation": 0, "test": 0})
    users, items = lists("items", [None] * 60), lists("users", [None] * 80)
    weights = pa.array([None] * 60, NUMBERS)
    nothing = {"index": pa.array([], pa.int32()), "items": pa.array([], INDICES)}
    tables = {
        "histories/users": {**users, "weights": weights, "times": pa.array([None] * 60, TIMES)},
        "histories/items": {**items, "weights": pa.array([None] * 80, NUMBERS)},
        "held_out/validation": nothing,
        "held_out/test": nothing,
    }
    found = describe(replaced(folder, tables, counts=counts))
    parts = (found.popularity, found.weights, found.times, found.users.history_lengths, found.items.history_lengths)
    assert parts == (None,) * 5
    assert found.shares.model_dump() == {"train": None, "validation": None, "test": None}
    assert (found.users.cold.count, found.users.cold.others, found.users.without_modality.count) == (60, 60, 9)


def test_times_of_any_century_are_told(tmp_path: Path) -> None:
    folder = write_planted(tmp_path / "dataset", protocol="random", columns=("times",))
    histories = rows(folder, "histories/users")
    histories[0]["times"][0], histories[1]["times"][0] = -1, 253_402_300_800_000
    times = pa.array([row["times"] for row in histories], TIMES)
    replaced(folder, {"histories/users": {**lists("items", [row["items"] for row in histories]), "times": times}})
    found = describe(folder).times
    assert found is not None
    assert (found.earliest, found.latest) == ("1969-12-31", "10000-01-01")


@pytest.mark.parametrize("weight", [math.inf, math.nan])
def test_a_weight_that_is_no_number_is_told(tmp_path: Path, weight: float) -> None:
    folder = write_planted(tmp_path / "dataset", protocol="random", columns=("weights",))
    histories = rows(folder, "histories/users")
    histories[5]["weights"][2] = weight
    weights = pa.array([row["weights"] for row in histories], NUMBERS)
    replaced(folder, {"histories/users": {**lists("items", [row["items"] for row in histories]), "weights": weights}})
    with pytest.raises(DatasetError, match=r"dataset is damaged: not every weight is a finite number. Prepare"):
        describe(folder)


def test_a_dataset_in_an_object_store_is_described_the_same(tmp_path: Path, s3: str) -> None:
    folder = write_planted(tmp_path / "dataset")
    place = copy_dataset(folder, f"{s3}/some/dataset")
    assert describe(f"{s3}/some/dataset/").model_dump() == {**describe(folder).model_dump(), "place": str(place)}


def test_every_key_is_documented(tmp_path: Path) -> None:
    def keys(value: Any, free: bool = False) -> Iterator[str]:
        """The keys at any depth, but for those that are names of features, tables, reasons or steps."""
        if isinstance(value, dict):
            for key, inner in value.items():
                if not free:
                    yield key
                named = ("modalities", "tables", "rejected", "filtered", "rejected_side_information")
                yield from keys(inner, free=key in named)

    found = set(keys(describe(write_tiny(tmp_path / "dataset")).model_dump(mode="json")))
    documented = set(re.findall(r"\w+", describe.__doc__ or ""))
    assert len(found) > 50
    assert found - documented == set()
