"""Recommendations to users, and of items, that the dataset does not have."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.manifest import sha256_of
from sibra_dist.data.storage import Place
from sibra_dist.errors import ConfigError, DatasetError, SourceError
from sibra_dist.loaded import load_run
from sibra_dist.recommending.manifest import Recommended
from sibra_dist.recommending.newcomers import newcomers_of, read_table
from sibra_dist.recommending.recommend import Asked, recommend
from sibra_dist.training.launch import train_here
from sibra_dist.training.run_folder import RunFolder
from tests.newcomers import told_again
from tests.planted import write_planted
from tests.training.conftest import SMALL, make_config

USERS, ITEMS = 60, 80
TABLE = """item_id,tags,cover,interactions,title
a,group 1|any,1|0|0|0|0|0,u0001|u0002|nobody|u0001,A
b,,,,B
,any,,,
i0004,any,,,known
c,any,1|2,,too short
d,any,1|2|3|4|5|x,,no number
a,any,,,again
e,"[""any"", ""never seen""]",,,E
"""
REJECTED = [
    ["no id", ",any,,,"],
    ["id is in the dataset already", "i0004,any,,,known"],
    ["not as many numbers as the feature has", "c,any,1|2,,too short"],
    ["not a finite number", "d,any,1|2|3|4|5|x,,no number"],
    ["duplicate id", "a,any,,,again"],
    ["unknown user id", "a,nobody"],
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A trained run whose users have a category and whose items have tags and vectors, on 60 users and 80 items."""
    folder = tmp_path_factory.mktemp("newcomers")
    config = make_config(write_planted(folder / "dataset"), model=SMALL["model"], training__epochs=1)
    trained = RunFolder(folder / "run")
    dataset = open_dataset(config.dataset)
    trained.create(config, dataset)
    train_here(trained, config, dataset)
    return trained


@pytest.fixture
def dataset(run: RunFolder) -> Dataset:
    return open_dataset(run.config().dataset)


def rows(folder: Path) -> list[dict[str, Any]]:
    shards = json.loads((folder / "recommendations.json").read_text())["shards"]
    return [row for shard in shards for row in pq.read_table(folder / shard["path"]).to_pylist()]


def test_what_a_table_says_and_what_of_it_cannot_be_used(dataset: Dataset, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "items.csv").write_text(TABLE)
    found, refused = newcomers_of(read_table(str(tmp_path / "items.csv")), "items", dataset)
    assert found.ids.to_pylist() == ["a", "b", "e"]
    words = dataset.items.features["tags"].spec.vocabulary
    assert words is not None
    assert found.features["tags"].to_pylist() == [
        sorted([words.index("group 1"), words.index("any")]),
        None,
        [words.index("any")],
    ]
    assert found.features["cover"].to_pylist() == [[1, 0, 0, 0, 0, 0], None, None]
    assert [found.histories.indptr.tolist(), found.histories.indices.tolist()] == [[0, 2, 2, 2], [1, 2]]
    assert [[record.reason, ",".join(record.record)] for record in refused] == REJECTED
    assert "no feature of items is called title; not read" in caplog.text


def test_tables_of_every_format_say_the_same(dataset: Dataset, tmp_path: Path) -> None:
    told = told_again(dataset, "users", range(0, USERS, 7))
    pq.write_table(told, tmp_path / "users.parquet")
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told.to_pylist()))
    plain = told.set_column(2, "interactions", [["|".join(row or []) for row in told["interactions"].to_pylist()]])
    for name, separator in (("users.csv", ","), ("users.tsv", "\t")):
        pa_csv.write_csv(plain, tmp_path / name, pa_csv.WriteOptions(delimiter=separator))
    expected, _ = newcomers_of(read_table(str(tmp_path / "users.parquet")), "users", dataset)
    assert expected.histories.nnz > 0
    for name in ("users.jsonl", "users.csv", "users.tsv"):
        found, refused = newcomers_of(read_table(str(tmp_path / name)), "users", dataset)
        assert refused == []
        assert found.ids.equals(expected.ids)
        assert found.features["club"].equals(expected.features["club"])
        assert found.histories.indices.tolist() == expected.histories.indices.tolist()


BAD_TABLES = {
    "no file": ("items.csv", None, "cannot be read: No such file"),
    "ending": ("items.xls", "x", "no table of a kind that its name says: give a .csv"),
    "no id": ("items.csv", "tags\nany\n", "has no column item_id"),
    "nothing known": (
        "items.csv",
        "item_id,tag\na,any\n",
        "tells nothing of its items: a model reads tags, cover, interactions",
    ),
    "twice": ("items.csv", "item_id,tags,tags\na,any,any\n", "has two columns tags"),
    "no object": ("items.jsonl", '{"item_id": "a", "tags": ["any"]}\n[]\n', "line 2 is no JSON object"),
    "no JSON": ("items.jsonl", '{"item_id": "a", "tags": []}\n{"item_id": }\n', "read: line 2, column 13: Expecting value"),
    "large number": ("items.jsonl", '{"item_id": ' + "9" * 30 + ', "tags": ["any"]}\n', "read: column item_id: .*too large"),
    "deep": ("items.jsonl", '{"item_id": "a", "tags": ' + "[" * 100_000 + "\n", "items.jsonl cannot be read: "),
    "objects": (
        "items.jsonl",
        '{"item_id": "a", "tags": [{"name": "any"}]}\n',
        "tags of .* elements should be texts or numbers",
    ),
    "two types": (
        "items.jsonl",
        '{"item_id": "a", "tags": ["any"]}\n{"item_id": "b", "tags": 7}\n',
        "cannot be read: column tags: ",
    ),
    "type": ("items.jsonl", '{"item_id": 1.5, "tags": ["any"]}\n', "item_id of .* has type double: an id is text or a whole"),
    "no row": ("items.csv", "item_id,tags\n", "none of the 0 rows of .* can be used; check that table"),
    "no good row": ("items.csv", "item_id,tags\ni0001,any\n", "can be used, for example: id is in the dataset already"),
    "no Parquet": ("items.parquet", "PAR1", "cannot be read: "),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_table_that_cannot_be_used_is_one_error(dataset: Dataset, tmp_path: Path, case: str) -> None:
    name, content, expected = BAD_TABLES[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=expected):
        newcomers_of(read_table(str(tmp_path / name)), "items", dataset)


def test_interactions_have_weights_where_the_dataset_has(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", columns=("weights",)))
    lines = ["a,i0002|i0001|i0002,2|1|3", "b,,", "c,i0001,", "d,i0001,1|2", "e,i0001,1e16"]
    lines += ["f,i0001|i0003,nan|1", "g,i0001||i0003,|1|2"]
    (tmp_path / "users.csv").write_text("user_id,interactions,interactions.weights\n" + "\n".join(lines))
    found, refused = newcomers_of(read_table(str(tmp_path / "users.csv")), "users", dataset)
    assert found.ids.to_pylist() == ["a", "b"]
    assert found.weights is not None
    assert (found.histories.indices.tolist(), found.weights.tolist()) == ([1, 2], [1, 2])
    uneven = "weights are not one for each interaction"
    assert [record.reason for record in refused] == [uneven, uneven, "weight is not a number up to 1e15", uneven, uneven]
    (tmp_path / "users.csv").write_text("user_id,interactions\na,i0001\n")
    with pytest.raises(SourceError, match=r"interactions without weights, .* add a column interactions\.weights"):
        newcomers_of(read_table(str(tmp_path / "users.csv")), "users", dataset)


def test_newcomers_are_recommended_beside_what_is_known(run: RunFolder, dataset: Dataset, tmp_path: Path) -> None:
    pq.write_table(told_again(dataset, "users", range(USERS)), tmp_path / "users.parquet")
    pq.write_table(told_again(dataset, "items", range(ITEMS)), tmp_path / "items.parquet")
    tables = {"new_users": str(tmp_path / "users.parquet"), "new_items": str(tmp_path / "items.parquet")}
    recommended = recommend(run, Asked(2 * ITEMS, exclude="none", **tables), Place.at(tmp_path / "all"))
    assert (recommended.users, recommended.rows) == (2 * USERS, 2 * USERS * 2 * ITEMS)
    request = recommended.request
    assert (request.new_users, request.new_items) == tuple(
        sha256_of(tmp_path / name) for name in ("users.parquet", "items.parquet")
    )
    scores = {(row["user_id"], row["item_id"]): row["score"] for row in rows(tmp_path / "all")}
    for (user, item), score in scores.items():
        assert score == pytest.approx(scores[user.removeprefix("new "), item.removeprefix("new ")], abs=1e-5)

    asked = Asked(5, users="new", candidates="new", **tables)
    recommended = recommend(run, asked, Place.at(tmp_path / "new"))
    found = rows(tmp_path / "new")
    assert recommended.users == USERS
    assert {row["user_id"] for row in found} == {f"new u{user:04}" for user in range(USERS)}
    assert all(row["item_id"].startswith("new ") for row in found)
    assert (
        load_run(run.path)
        .with_newcomers(users=tables["new_users"], items=tables["new_items"])
        .recommend([f"new u{user:04}" for user in range(USERS)], 5, candidates="new")
        .to_pylist()
        == found
    )
    with pytest.raises(DatasetError, match=r"not the same users, candidates, new_users, new_items"):
        recommend(run, Asked(5), Place.at(tmp_path / "new"))


def test_what_a_new_user_has_seen_is_not_recommended(run: RunFolder, dataset: Dataset, tmp_path: Path) -> None:
    seen = [f"i{item:04}" for item in range(0, ITEMS, 2)]
    (tmp_path / "users.csv").write_text(f"user_id,interactions\nsomeone,{'|'.join(seen)}\n")
    asked = Asked(ITEMS, users="new", new_users=str(tmp_path / "users.csv"))
    recommend(run, asked, Place.at(tmp_path / "to"))
    assert sorted(row["item_id"] for row in rows(tmp_path / "to")) == [f"i{item:04}" for item in range(1, ITEMS, 2)]


def test_a_new_item_is_not_recommended_to_whom_its_table_names(run: RunFolder, tmp_path: Path) -> None:
    lines = ["a,u0007|u0002", "b,u0007|nobody", "c,"]
    (tmp_path / "items.csv").write_text("item_id,interactions\n" + "\n".join(lines) + "\n")
    (tmp_path / "users.txt").write_text("u0007\nu0002\nu0001\n")
    asked = Asked(3, users=str(tmp_path / "users.txt"), candidates="new", new_items=str(tmp_path / "items.csv"))
    recommend(run, asked, Place.at(tmp_path / "to"))
    found = sorted((row["user_id"], row["item_id"]) for row in rows(tmp_path / "to"))
    assert found == [("u0001", "a"), ("u0001", "b"), ("u0001", "c"), ("u0002", "b"), ("u0002", "c"), ("u0007", "c")]
    assert recommend(run, replace(asked, exclude="none"), Place.at(tmp_path / "all")).rows == 9


def test_what_was_refused_is_kept_and_another_table_is_another_request(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(TABLE)
    asked = Asked(3, candidates="new", exclude="none", new_items=str(tmp_path / "items.csv"))
    recommended = recommend(run, asked, Place.at(tmp_path / "to"))
    assert recommended.rejected == dict.fromkeys(sorted(reason for reason, _ in REJECTED), 1)
    assert (tmp_path / "to" / "rejected.csv").read_text().count("\n") == 1 + len(REJECTED)
    assert Recommended.read(Place.at(tmp_path / "to")) == recommended
    assert recommend(run, asked, Place.at(tmp_path / "to")) == recommended
    (tmp_path / "items.csv").write_text(TABLE + "f,any,,,\n")
    with pytest.raises(DatasetError, match=r"another request \(not the same new_items\)"):
        recommend(run, asked, Place.at(tmp_path / "to"))


@pytest.mark.parametrize(("option", "side"), [("users", "users"), ("candidates", "items")])
def test_only_new_ones_need_a_table(run: RunFolder, tmp_path: Path, option: str, side: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"--{option} new: there are no new {side}; give their table with --new-{side} TABLE"
    ):
        recommend(run, Asked(3, **{option: "new"}), Place.at(tmp_path / "to"))
    assert not (tmp_path / "to").exists()
