"""The whole evaluation against one written without any of its parts."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from sibra_dist.data.dataset import Dataset, HeldOut, open_dataset
from sibra_dist.errors import ConfigError
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.models import build_model
from sibra_dist.models.base import Recommender
from sibra_dist.models.baselines import PopConfig, RandomConfig
from sibra_dist.models.single_branch import SiBraRConfig
from tests.planted import write_planted


def lists(dataset: Dataset, table: str, column: str) -> dict[int, set[int]]:
    rows = [row for path in sorted((dataset.place.path / table).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["index"]: set(row[column] or ()) for row in rows}


def by_brute_force(model: Recommender, dataset: Dataset, split: HeldOut, k: int) -> tuple[float, float, int]:
    """ndcg@k, recall@k and the number of averaged users, in plain Python from the shards."""
    history, validation = lists(dataset, "histories/users", "items"), lists(dataset, "held_out/validation", "items")
    relevant = lists(dataset, f"held_out/{split}", "items")
    splits = {
        row["index"]: row["split"]
        for path in (dataset.place.path / "items").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    cold = dataset.manifest.protocol.name == "cold_item"
    scores = model.score(
        model.encode_users(torch.arange(dataset.users.count)), model.encode_items(torch.arange(dataset.items.count))
    ).tolist()
    ndcgs, recalls = [], []
    for user, wanted in relevant.items():
        known = history[user] | (validation.get(user, set()) if split == "test" else set())
        candidates = [item for item in splits if (splits[item] == split or not cold) and item not in known]
        ranked = sorted(candidates, key=lambda item: (-scores[user][item], item))[:k]
        gains = [1 / math.log2(rank + 2) for rank, item in enumerate(ranked) if item in wanted]
        ndcgs.append(sum(gains) / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(wanted)))))
        recalls.append(len(gains) / len(wanted))
    return sum(ndcgs) / len(ndcgs), sum(recalls) / len(recalls), len(ndcgs)


@pytest.mark.parametrize("protocol", ["cold_item", "random"])
@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("config", [PopConfig(), RandomConfig(), SiBraRConfig()], ids=lambda config: config.type)
def test_it_agrees_with_brute_force(
    tmp_path: Path, protocol: str, split: HeldOut, config: PopConfig | RandomConfig | SiBraRConfig
) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol=protocol))
    model = build_model(config, dataset, seed=0).eval()
    with torch.inference_mode():
        ndcg, recall, users = by_brute_force(model, dataset, split, 5)
    tiles = EvaluationConfig(metrics=("ndcg", "recall"), cutoffs=(5,), user_tile=7, item_tile=11)
    found = evaluate(model, dataset, split, tiles)
    assert found.metrics == pytest.approx({"ndcg@5": ndcg, "recall@5": recall}, abs=1e-9)
    assert found.counts["users"] == users
    assert found.counts["users_without_relevant"] == dataset.users.count - users
    assert found.counts["candidates"] == (8 if protocol == "cold_item" else 80)


def test_a_modality_that_the_model_does_not_read_cannot_be_hidden(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset"))
    model = build_model(SiBraRConfig(), dataset, seed=0).eval()
    with pytest.raises(ConfigError, match=r"--hide items.coverr: the model reads no such modality; did you mean items.cover"):
        evaluate(model, dataset, "test", EvaluationConfig(), hide=("items.coverr",))
