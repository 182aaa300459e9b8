"""What an evaluation leaves in a run: its result and every user's values, whole or as they were."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError, SibraError
from sibra_dist.evaluation import per_user
from sibra_dist.evaluation.metrics import CATALOG_METRICS, USER_METRICS, split_metrics
from sibra_dist.models.baselines import Random
from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run
from sibra_dist.training.loop import Trainer
from sibra_dist.training.run_folder import RunFolder
from tests.training.conftest import make_config


@pytest.fixture
def start(planted: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """Starts a run of the random baseline, which needs no training, at a place or else in a folder of the test."""

    def begin(place: str | Path = tmp_path / "run", **settings: Any) -> RunFolder:
        config = make_config(planted, model={"type": "random"}, evaluation__user_tile=7, **settings)
        run = RunFolder(place)
        run.create(config, open_dataset(planted))
        Trainer(config, open_dataset(planted), run).fit()
        return run

    return begin


def files(run: RunFolder) -> dict[str, bytes]:
    folder = run.evaluation("test")
    return {name: folder.read(name) for name in folder.files()}


@pytest.mark.parametrize(
    "metrics", [("ndcg", "mrr", "coverage"), (*USER_METRICS, *CATALOG_METRICS, "ild:tags")], ids=["some", "all"]
)
def test_a_result_and_the_values_of_all_users(start: Callable[..., RunFolder], metrics: tuple[str, ...]) -> None:
    run = start(evaluation__metrics=metrics)
    found = evaluate_run(run, EvaluationRequest())
    written = files(run)
    assert sorted(written) == ["metrics.json", "users.parquet"]
    result = json.loads(written["metrics.json"])
    sha256 = hashlib.sha256(written["users.parquet"]).hexdigest()
    assert result["users"] == {"file": "users.parquet", "rows": found.counts["users"], "sha256": sha256}
    table = pq.read_table(run.path / "evaluation/test/users.parquet")
    averaged, _ = split_metrics(list(found.metrics))
    assert table.column_names == ["user_id", "users.club", "activity", "cold_start", *averaged]
    for name in averaged:
        column = table[name].to_pylist()
        assert sum(column) / len(column) == pytest.approx(found.metrics[name], rel=1e-12, abs=2**-36)
    assert list(result["groups"]) == ["users.club", "activity", "cold_start"]
    warm = result["groups"]["cold_start"]["groups"]["warm"]
    assert warm == {
        "users": found.counts["users"],
        "metrics": {f"test/{name}": found.metrics[name] for name in averaged},
    }
    clubs = {label: group["metrics"]["test/mrr@5"] for label, group in result["groups"]["users.club"]["groups"].items()}
    assert result["groups"]["users.club"]["gap"]["test/mrr@5"] == max(clubs.values()) - min(clubs.values())


def test_items_are_told_by_cold_start_and_popularity(start: Callable[..., RunFolder]) -> None:
    run = start()
    evaluate_run(run, EvaluationRequest())
    groups = json.loads(files(run)["metrics.json"])["item_groups"]
    assert list(groups) == ["cold_start", "popularity"]
    dataset = open_dataset(run.config().dataset)
    for found in groups.values():
        assert sum(group["candidates"] for group in found["groups"].values()) == 80
        assert sum(group["relevant"] for group in found["groups"].values()) == dataset.manifest.counts.test
        assert list(found["gap"]) == ["recall@1", "recall@5", "recall@10", "recall@20"]


def test_what_is_hidden_has_files_of_its_own(start: Callable[..., RunFolder], planted: Path, tmp_path: Path) -> None:
    config = make_config(planted, training__epochs=1)
    run = RunFolder(tmp_path / "trained")
    run.create(config, open_dataset(planted))
    Trainer(config, open_dataset(planted), run).fit()
    evaluate_run(run, EvaluationRequest(hide={"items.cover": 1.0}))
    written = files(run)
    assert sorted(written) == ["metrics-without-items.cover.json", "users-without-items.cover.parquet"]
    users = json.loads(written["metrics-without-items.cover.json"])["users"]
    assert users["file"] == "users-without-items.cover.parquet"


def test_a_feature_of_many_values_makes_no_groups_but_a_column(start: Callable[..., RunFolder]) -> None:
    run = start(evaluation__max_groups=3)  # users.club has four
    evaluate_run(run, EvaluationRequest())
    written = files(run)
    assert list(json.loads(written["metrics.json"])["groups"]) == ["activity", "cold_start"]
    assert "users.club" in pq.read_schema(run.path / "evaluation/test/users.parquet").names


def test_the_size_of_tiles_and_parts_leaves_no_trace(start: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    evaluate_run(run, EvaluationRequest())
    before = files(run)
    monkeypatch.setattr(per_user, "PART_BYTES", 1)
    evaluate_run(run, EvaluationRequest())
    assert files(run) == before


def test_a_store_holds_the_same(start: Callable[..., RunFolder], s3: str) -> None:
    here, there = start(), start(f"{s3}/run")
    for run in (here, there):
        evaluate_run(run, EvaluationRequest())
    assert sorted(files(there)) == ["metrics.json", "users.parquet"]
    assert files(there) == files(here)


@pytest.mark.parametrize("broken", ["scores", "parts", "table"])
def test_an_evaluation_that_fails_leaves_what_was_there(
    start: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    run = start()
    evaluate_run(run, EvaluationRequest())
    before = files(run)
    monkeypatch.setattr(per_user, "PART_BYTES", 1)
    if broken == "scores":
        original, calls = Random.score, []

        def score(self: Random, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return original(self, users, items) * (torch.nan if len(calls) == 3 else 1.0)

        monkeypatch.setattr(Random, "score", score)
    else:
        refused = "00000-00001.arrow" if broken == "parts" else "users.parquet"
        write = Place.write

        def refuse(self: Place, name: str, content: Any) -> None:
            if name.endswith(refused):
                raise OSError(28, "No space left on device", str(self / name))
            write(self, name, content)

        monkeypatch.setattr(Place, "write", refuse)
    error = SibraError if broken == "scores" else CheckpointError
    message = "not a number" if broken == "scores" else "the evaluation of .*run cannot be written: .* No space left on device"
    with pytest.raises(error, match=message):
        evaluate_run(run, EvaluationRequest())
    assert files(run) == before
    assert not (run.path / "evaluation/test/metrics.parts").exists()


def test_what_a_killed_evaluation_left_is_removed(start: Callable[..., RunFolder]) -> None:
    run = start()
    run.evaluation("test").write("metrics.parts/00007-00000.arrow", b"of a former evaluation on more ranks")
    evaluate_run(run, EvaluationRequest())
    assert sorted(files(run)) == ["metrics.json", "users.parquet"]
