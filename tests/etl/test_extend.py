"""A dataset that extends another keeps its indices and encodings; what is new comes after."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from sibra_dist.data.manifest import Manifest
from sibra_dist.errors import ConfigError, DatasetError
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.pipeline import prepare

pytestmark = pytest.mark.spark

Small = Callable[..., PrepareConfig]
Put = Callable[[Path], Manifest]
ReadTable = Callable[[Path, Manifest, str], pa.Table]
ITEMS = [
    {
        "path": "items.tsv",
        "id": "item_id",
        "features": {
            "kind": {"kind": "category"},
            "year": {"kind": "numeric"},
            "plot": {"kind": "text", "encoder": {"type": "tfidf", "size": 3}},
        },
    }
]


def append_a_day(source: Path) -> None:
    """New users and items that sort before, between and after those that are known; one known user is gone."""
    lines = (source / "interactions.tsv").read_text(encoding="latin-1").splitlines()
    kept = [line for line in lines if not line.startswith("u07\t")]
    new = [f"{user}\t{item}\t5\t9000" for user in ("a01", "u055", "z01") for item in ("a00", "i01", "i055", "zz")]
    (source / "interactions.tsv").write_text("\n".join([*kept, *new]) + "\n", encoding="latin-1")
    with (source / "items.tsv").open("a", encoding="utf-8") as file:
        file.writelines(
            f"{item}\t{kind}\t2030\tnever seen words\n" for item, kind in (("a00", "k0"), ("i055", "k1"), ("zz", "a"))
        )


def test_known_ids_and_encodings_stay_and_new_ones_come_after(
    spark: SparkSession, small: Small, tmp_path: Path, table: ReadTable
) -> None:
    config = small(items=ITEMS, filters={"core": 2})
    source = Path(config.source)
    rows = [f"i{item:02}\tk{item % 3}\t{2000 + item}\ta tale of {item} and of tea" for item in range(1, 11)]
    (source / "items.tsv").write_text("\n".join(["item_id\tkind\tyear\tplot", *rows]) + "\n", encoding="utf-8")
    old = prepare(config, tmp_path / "old")
    append_a_day(source)
    new = prepare(config, tmp_path / "new", extend=tmp_path / "old")

    assert new.extends == old.digest
    for side, further in (("users", ["a01", "u055", "z01"]), ("items", ["a00", "i055", "zz"])):
        before = table(tmp_path / "old", old, side)["id"].to_pylist()
        assert table(tmp_path / "new", new, side)["id"].to_pylist() == [*before, *further]
    gone = table(tmp_path / "new", new, "users")["id"].to_pylist().index("u07")
    assert table(tmp_path / "new", new, "histories/users")["items"][gone].as_py() is None

    kind, year, plot = old.item_features
    kind_now, year_now, plot_now = new.item_features
    assert kind.vocabulary == ("k0", "k1", "k2")
    assert kind_now.vocabulary == ("k0", "k1", "k2", "a")
    assert (year_now.offset, year_now.scale) == (year.offset, year.scale)
    assert (plot_now.size, plot_now.encoder) == (plot.size, plot.encoder)
    assert [s.sha256 for s in new.shards["fitted/items/plot"]] == [s.sha256 for s in old.shards["fitted/items/plot"]]
    for name in ("kind", "year", "plot"):
        before = table(tmp_path / "old", old, "items")[name].to_pylist()
        assert table(tmp_path / "new", new, "items")[name].to_pylist()[: len(before)] == before
    # Of words that nothing was fitted to, there is nothing to be said.
    assert table(tmp_path / "new", new, "items")["plot"].to_pylist()[-3:] == [None] * 3

    # Asked for again it is there; without what it extends it is another dataset.
    assert prepare(config, tmp_path / "new", extend=tmp_path / "old") == new
    with pytest.raises(DatasetError, match="--overwrite"):
        prepare(config, tmp_path / "new")


def test_dataset_that_cannot_be_extended_is_told(small: Small, tmp_path: Path, put_small: Put) -> None:
    put_small(tmp_path / "old")
    with pytest.raises(DatasetError, match="is not a dataset"):
        prepare(small(), tmp_path / "new", extend=tmp_path / "elsewhere")
    users = small().users[0].model_dump()
    users["features"]["city"]["kind"] = "text"
    with pytest.raises(ConfigError, match="users: feature city is not made as it is in"):
        prepare(small(users=[users]), tmp_path / "new", extend=tmp_path / "old")
    (tmp_path / "old" / Manifest.read(tmp_path / "old").shards["users"][0].path).unlink()
    with pytest.raises(DatasetError, match=r"old/users/part-.* cannot be read"):
        prepare(small(), tmp_path / "new", extend=tmp_path / "old")
    assert not (tmp_path / "new").exists()
