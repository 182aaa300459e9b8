"""The whole evaluation against one written without any of its parts."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from sibra_dist.config import validate
from sibra_dist.data.dataset import Dataset, HeldOut, open_dataset
from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.errors import ConfigError
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.models import build_model
from sibra_dist.models.base import Recommender
from sibra_dist.models.baselines import PopConfig, RandomConfig
from sibra_dist.models.single_branch import SingleBranchConfig
from tests.planted import write_planted


def lists(dataset: Dataset, table: str, column: str) -> dict[int, set[int]]:
    rows = [row for path in sorted((dataset.place.path / table).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["index"]: set(row[column] or ()) for row in rows}


def by_brute_force(
    model: Recommender, dataset: Dataset, split: HeldOut, k: int, hidden: tuple[Hidden, Hidden] = (NOTHING_HIDDEN,) * 2
) -> tuple[float, float, int]:
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
        model.encode_users(torch.arange(dataset.users.count), hidden[0]),
        model.encode_items(torch.arange(dataset.items.count), hidden[1]),
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
@pytest.mark.parametrize("config", [PopConfig(), RandomConfig(), SingleBranchConfig()], ids=lambda config: config.type)
def test_it_agrees_with_brute_force(
    tmp_path: Path, protocol: str, split: HeldOut, config: PopConfig | RandomConfig | SingleBranchConfig
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


def test_tiles_are_seen_one_by_one_and_every_user_once(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol="random"))
    model = build_model(RandomConfig(), dataset, seed=0).eval()
    tiles = EvaluationConfig(metrics=("recall",), cutoffs=(5,), user_tile=7)
    users, recalls = [], []
    for rank in (0, 1):

        def note(tile: Tensor, hits: Tensor, relevant: Tensor) -> None:
            assert len(tile) <= 7
            users.extend(tile.tolist())
            recalls.extend((hits[:, :5].sum(1) / relevant).tolist())

        evaluate(model, dataset, "test", tiles, ranks=(rank, 2), each=note)
    assert sorted(users) == dataset.held_out["test"][0].tolist()
    whole = evaluate(model, dataset, "test", tiles).metrics["recall@5"]
    assert sum(recalls) / len(recalls) == pytest.approx(whole)


HIDE = {"items.tags": 0.5, "items.cover": 0.25, "items.interactions": 1.0, "users.club": 0.5}


def test_a_hidden_share_is_that_of_the_seed(tmp_path: Path) -> None:
    """Beside brute force that hides the same ones; and an item that loses all it has is counted."""
    dataset = open_dataset(write_planted(tmp_path / "dataset"))
    model = build_model(SingleBranchConfig(), dataset, seed=0).eval()
    tiles = EvaluationConfig(metrics=("ndcg", "recall"), cutoffs=(5,), user_tile=7, item_tile=11, hide=HIDE)
    found = {seed: evaluate(model, dataset, "validation", tiles, seed=seed) for seed in (0, 5)}
    for seed, evaluation in found.items():
        users = Hidden("users", {"club": 0.5}, seed)
        items = Hidden("items", {"tags": 0.5, "cover": 0.25, "interactions": 1.0}, seed)
        with torch.inference_mode():
            ndcg, recall, _ = by_brute_force(model, dataset, "validation", 5, (users, items))
        assert evaluation.metrics == pytest.approx({"ndcg@5": ndcg, "recall@5": recall}, abs=1e-9)
        everyone = torch.arange(80)
        present = torch.stack([dataset.items.features[name].present for name in ("tags", "cover")], dim=1)
        left = (present & items.visible(("tags", "cover"), everyone)).any(1)
        assert evaluation.counts["items_without_modality"] == int((~left).sum()) > 0
    assert found[0].metrics != found[5].metrics


def test_a_modality_that_the_model_does_not_read_cannot_be_hidden(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset"))
    model = build_model(SingleBranchConfig(), dataset, seed=0).eval()
    message = r"evaluation.hide items.coverr: the model reads no such modality; did you mean items.cover"
    with pytest.raises(ConfigError, match=message):
        evaluate(model, dataset, "test", EvaluationConfig(hide={"items.coverr": 1.0}))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ConfigError, match=r"hide.items.cover: input should be (less|greater) than or equal to [01]"):
        validate(EvaluationConfig, {"hide": {"items.cover": share}}, where="test")
