"""The table of all users' values: what is in it, and that nobody can tell who computed which part."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError
from sibra_dist.evaluation import per_user
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.evaluation.groups import GroupAverages, user_groupings
from sibra_dist.evaluation.per_user import UserParts, UsersFile, publish_users, read_users
from sibra_dist.evaluation.tallies import UserAverages
from sibra_dist.evaluation.user_metrics import Lists
from sibra_dist.models import build_model
from sibra_dist.models.baselines import RandomConfig
from tests.planted import write_planted

METRICS = ("ndcg@5", "recall@10")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Some of its users hold nothing out."""
    return open_dataset(write_planted(tmp_path / "dataset", users=61, shards=4))


def published(dataset: Dataset, folder: Place, world: int, tile: int) -> tuple[UsersFile, dict[str, Any]]:
    """Every rank evaluates, one after the other, and then the table is made."""
    model = build_model(RandomConfig(), dataset, seed=0).eval()
    config = EvaluationConfig(user_tile=tile)
    counts = []
    for rank in range(world):
        parts = UserParts(folder, "parts", rank, METRICS)
        evaluate(model, dataset, "test", config, names=list(METRICS), ranks=(rank, world), each=parts.add)
        parts.flush()
        counts.append(parts.count)
    groupings = user_groupings(dataset)
    groups = GroupAverages(groupings, METRICS)
    return publish_users(folder, "users.parquet", "parts", counts, dataset, groupings, groups), groups.compute()


def brute_force(dataset: Dataset) -> dict[str, tuple[float, float]]:
    """Both metrics of each user that holds something out, by id, from its scores one user at a time."""
    model = build_model(RandomConfig(), dataset, seed=0).eval()
    averages = UserAverages(METRICS)
    found = {}
    ids = dataset.ids("users").to_pylist()
    candidates = dataset.candidates("test").tolist()
    holders, held_out = dataset.held_out["test"]
    for row, user in enumerate(holders.tolist()):
        wanted = set(held_out.gather(torch.tensor([row]))[0].tolist())
        known = {int(item) for _, items in dataset.masked("test", torch.tensor([user])) for item in items}
        with torch.inference_mode():
            scores = model.score(model.encode_users(torch.tensor([user])), model.encode_items(torch.tensor(candidates)))[0]
        best = sorted(
            (place for place, item in enumerate(candidates) if item not in known), key=lambda place: (-scores[place], place)
        )[:10]
        hits = torch.tensor([[place < len(best) and candidates[best[place]] in wanted for place in range(10)]])
        ndcg, recall = averages.per_user(Lists(hits, torch.tensor([len(wanted)])))[0].tolist()
        found[ids[user]] = (ndcg, recall)
    return found


def test_a_row_a_user_with_id_groups_and_values(dataset: Dataset, tmp_path: Path) -> None:
    told, groups = published(dataset, Place.at(tmp_path / "evaluation"), 1, 256)
    table = pq.read_table(tmp_path / "evaluation" / "users.parquet")
    assert table.column_names == ["user_id", "users.club", "activity", "cold_start", *METRICS]
    rows = table.to_pylist()
    expected = brute_force(dataset)
    assert 0 < len(expected) < 61
    assert {row["user_id"]: (row["ndcg@5"], row["recall@10"]) for row in rows} == expected
    assert [row["user_id"] for row in rows] == sorted(expected)
    numbers = [int(row["user_id"][1:]) for row in rows]
    assert [row["users.club"] for row in rows] == [f"group {number % 4}" if number % 7 else None for number in numbers]
    assert (told.file, told.rows) == ("users.parquet", len(rows))
    assert told.sha256 == hashlib.sha256((tmp_path / "evaluation" / "users.parquet").read_bytes()).hexdigest()
    for label, group in groups["users.club"]["groups"].items():
        own = [row["recall@10"] for row in rows if row["users.club"] == label]
        assert group["users"] == len(own)
        assert group["metrics"]["recall@10"] == pytest.approx(sum(own) / len(own), abs=2**-37)
    assert groups["users.club"]["users_in_none"] == sum(row["users.club"] is None for row in rows)


def test_the_same_bytes_for_any_ranks_tiles_and_parts(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_user, "ROWS", 16)
    expected = published(dataset, Place.at(tmp_path / "expected"), 1, 256)
    table = pq.ParquetFile(tmp_path / "expected" / "users.parquet")
    sizes = [table.metadata.row_group(number).num_rows for number in range(table.metadata.num_row_groups)]
    assert sizes[:-1] == [16] * (len(sizes) - 1)
    assert len(sizes) > 1
    for world, tile, part_bytes in ((1, 1, 1), (2, 7, 100), (4, 1, 300), (4, 7, 2**20), (2, 1000, 1)):
        monkeypatch.setattr(per_user, "PART_BYTES", part_bytes)
        folder = tmp_path / f"{world}-{tile}"
        assert published(dataset, Place.at(folder), world, tile) == expected
        assert (folder / "users.parquet").read_bytes() == (tmp_path / "expected" / "users.parquet").read_bytes()
        assert len(list((folder / "parts").iterdir())) >= (2 if part_bytes < 2**20 and tile < 61 else 1)


def test_users_that_are_not_averaged_over_have_no_row(dataset: Dataset, tmp_path: Path) -> None:
    folder = Place.at(tmp_path / "evaluation")
    parts = UserParts(folder, "parts", 0, ["mrr@1"])
    for users, relevant, values in (([0, 1], [0, 0], [math.nan, math.nan]), ([2, 3, 50], [3, 0, 1], [1.0, math.nan, 0.5])):
        parts.add(torch.tensor(users), torch.tensor(relevant), torch.tensor(values, dtype=torch.float64)[:, None])
    parts.flush()
    publish_users(folder, "users.parquet", "parts", [1], dataset, [], GroupAverages([], ["mrr@1"]))
    table = pq.read_table(tmp_path / "evaluation" / "users.parquet")
    assert table.to_pydict() == {"user_id": ["u0002", "u0050"], "mrr@1": [1.0, 0.5]}
    parts.delete()
    assert folder.files() == ["users.parquet"]


def test_with_metrics_of_the_catalogue_alone_there_is_a_row_for_the_same_users(dataset: Dataset, tmp_path: Path) -> None:
    folder = Place.at(tmp_path / "evaluation")
    parts = UserParts(folder, "parts", 0, [])
    parts.add(torch.tensor([3, 4, 5]), torch.tensor([1, 0, 2]), torch.empty(3, 0, dtype=torch.float64))
    parts.flush()
    groups = GroupAverages(user_groupings(dataset), [])
    publish_users(folder, "users.parquet", "parts", [1], dataset, user_groupings(dataset), groups)
    assert pq.read_table(tmp_path / "evaluation" / "users.parquet")["user_id"].to_pylist() == ["u0003", "u0005"]
    assert sum(group["users"] for group in groups.compute()["cold_start"]["groups"].values()) == 2


def test_nobody_to_average_over_makes_an_empty_table(dataset: Dataset, tmp_path: Path) -> None:
    folder = Place.at(tmp_path / "evaluation")
    told = publish_users(folder, "users.parquet", "parts", [0, 0], dataset, [], GroupAverages([], ["mrr@1"]))
    assert told.rows == 0
    assert read_users(folder, told.model_dump(), ["mrr@1"], "evaluate again").num_rows == 0


def test_a_part_that_cannot_be_written_is_kept_in_mind(tmp_path: Path) -> None:
    (tmp_path / "evaluation").write_text("a file, where a folder is wanted")
    parts = UserParts(Place.at(tmp_path / "evaluation"), "parts", 0, ["mrr@1"])
    for _ in range(2):
        parts.add(torch.tensor([0]), torch.tensor([1]), torch.ones(1, 1, dtype=torch.float64))
        parts.flush()
    assert isinstance(parts.error, OSError)
    assert parts.count == 0


def stored(folder: Path, columns: Sequence[str] = ("user_id",), **changes: object) -> list[Any]:
    told = {"file": "users.parquet", "rows": 1, "sha256": "0" * 64, **changes}
    return read_users(Place.at(folder), told, columns, "evaluate again").to_pylist()


def test_a_table_that_cannot_be_used_is_told(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    told = publish_users(Place.at(folder), "users.parquet", "parts", [], dataset, [], GroupAverages([], ["mrr@1"]))
    assert stored(folder, sha256=told.sha256) == []
    with pytest.raises(CheckpointError, match=r"users.parquet is not the file that the result .*: evaluate again"):
        stored(folder)
    with pytest.raises(CheckpointError, match=r"users.parquet has no column mrr@2: evaluate again"):
        stored(folder, ("user_id", "mrr@2"), sha256=told.sha256)
    with pytest.raises(CheckpointError, match=r"gone.parquet cannot be read: No such file or directory: evaluate again"):
        stored(folder, file="gone.parquet")
    with pytest.raises(CheckpointError, match=r"holds no values of single users, as an earlier version wrote it: evaluate"):
        read_users(Place.at(folder), None, ["user_id"], "evaluate again")
