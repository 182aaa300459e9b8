"""A newcomer's side information is encoded to the very bits that `prepare` makes of the same record."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.manifest import Manifest
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.pipeline import prepare
from sibra_dist.recommending.newcomers import newcomers_of, read_table
from tests.newcomers import column

pytestmark = pytest.mark.spark

FEATURES = {
    "kind": {"kind": "category"},
    "shelf": {"kind": "category", "min_count": 4},
    "tags": {"kind": "tags"},
    "year": {"kind": "numeric"},
    "price": {"kind": "numeric", "scale": "minmax"},
    "cover": {"kind": "vector"},
    "plot": {"kind": "text", "encoder": {"type": "tfidf", "size": 4, "buckets": 64}},
    "notes": {"kind": "text", "encoder": {"type": "hashing", "size": 5}},
}


def record(item: int) -> dict[str, str]:
    """The raw values of an item; each is missing here and there."""
    values = {
        "kind": f"k{item % 3}",
        "shelf": f"s{min(item % 5, 2)}",
        "tags": "|".join(f"t{place}" for place in range(item % 4, 4)[::-1]),
        "year": f"{2000 + item}",
        "price": f" {item / 7:.6f} ",
        "cover": f"{item / 3}|-0|{-item / 11:e}",
        "plot": f"A tale of {item}, of tea and of w{item % 4}. ",
        "notes": f"note w{item % 3} \u00e9t\u00e9 {item * item}",
    }
    return {name: "" if (item + place) % 6 == 0 else value for place, (name, value) in enumerate(values.items())}


def test_newcomers_are_encoded_as_the_items_of_a_dataset(
    spark: SparkSession, small: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    items = [{"path": "raw.csv", "separator": ",", "quote": '"', "id": "item_id", "features": FEATURES}]
    config = small(items=items, filters={"core": 2})

    def write(path: Path, ids: dict[str, int]) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["item_id", *FEATURES], lineterminator="\n")
            writer.writeheader()
            writer.writerows({"item_id": name, **record(item)} for name, item in ids.items())

    write(Path(config.source) / "raw.csv", {f"i{item:02}": item for item in range(1, 11)})
    prepare(config, tmp_path / "dataset")
    dataset = open_dataset(tmp_path / "dataset")
    known = dataset.ids("items").to_pylist()
    write(tmp_path / "new.csv", {f"new {name}": int(name[1:]) for name in known})
    found, refused = newcomers_of(read_table(str(tmp_path / "new.csv")), "items", dataset)
    assert refused == []
    assert found.ids.to_pylist() == [f"new {name}" for name in known]
    specs = Manifest.read(tmp_path / "dataset").item_features
    assert [spec.name for spec in specs] == list(FEATURES)
    for name, encoded in found.features.items():
        stored = column(dataset, "items", name)
        assert None in stored
        assert [stored != [None] * len(stored), encoded.to_pylist()] == [True, stored], name
