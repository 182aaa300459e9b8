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
from sibra_dist.errors import ConfigError, SibraError
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.evaluation.metrics import CATALOG_METRICS, USER_METRICS, at_cutoffs
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


EVERY_METRIC = (*USER_METRICS, *CATALOG_METRICS, "ild:tags", "ild:cover")


@pytest.mark.parametrize("protocol", ["cold_item", "random"])
@pytest.mark.parametrize("config", [PopConfig(), RandomConfig()], ids=lambda config: config.type)
@pytest.mark.parametrize("tile", [1, 7])
def test_every_metric_is_the_same_for_any_tiles(
    tmp_path: Path, protocol: str, config: PopConfig | RandomConfig, tile: int
) -> None:
    """With scores that are the same in any tile."""
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol=protocol))
    model = build_model(config, dataset, seed=0).eval()
    found = []
    for size in (tile, 10**6):
        tiles = EvaluationConfig(metrics=EVERY_METRIC, cutoffs=(1, 5, 200), user_tile=size, item_tile=size)
        found.append(evaluate(model, dataset, "test", tiles))
    assert found[0] == found[1]
    assert len(found[0].metrics) == 3 * len(EVERY_METRIC) - 2
    if config == PopConfig() and protocol == "cold_item":
        # All candidates are cold: unpopular, unseen and tied.
        assert {found[0].metrics[name] for name in ("auc", "arp@5", "pop_reo@5", "pop_rsp@5")} == {0.5, 0.0}
        assert (found[0].metrics["aplt@5"], found[0].metrics["aclt@5"]) == (1.0, 5.0)


def test_tiles_are_seen_one_by_one_and_average_to_the_metrics(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol="random"))
    model = build_model(RandomConfig(), dataset, seed=0).eval()
    tiles = EvaluationConfig(metrics=("gini", *USER_METRICS), cutoffs=(5,), user_tile=7)
    users, relevant, values = [], [], []

    def note(tile: Tensor, num_relevant: Tensor, found: Tensor) -> None:
        assert len(tile) <= 7
        users.append(tile)
        relevant.append(num_relevant)
        values.append(found)

    for rank in (0, 1):
        evaluate(model, dataset, "test", tiles, ranks=(rank, 2), each=note)
    holders, held_out = dataset.held_out["test"]
    seen, order = torch.cat(users).sort()
    assert seen.tolist() == holders.tolist()
    assert torch.cat(relevant)[order].tolist() == held_out.lengths().tolist()
    whole = evaluate(model, dataset, "test", tiles).metrics
    averages = torch.cat(values).nanmean(dim=0).tolist()
    assert averages == pytest.approx([whole[name] for name in at_cutoffs([*USER_METRICS], [5])], abs=1e-10)


@pytest.mark.parametrize(("feature", "hint"), [("tag", r"did you mean tags\?"), ("year", "known here: cover, tags")])
def test_a_feature_that_items_lack_is_refused(tmp_path: Path, feature: str, hint: str) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset"))
    model = build_model(RandomConfig(), dataset, seed=0).eval()
    with pytest.raises(ConfigError, match=f"no category, tags or vector '{feature}' to be diverse in; {hint}"):
        evaluate(model, dataset, "test", EvaluationConfig(metrics=(f"ild:{feature}",)))


def test_diversity_is_that_of_the_listed_items(tmp_path: Path) -> None:
    """With cold items, so that candidates are counted otherwise than items. Tags are the item's group and one of all."""
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol="cold_item"))
    model = build_model(PopConfig(), dataset, seed=0).eval()
    found = evaluate(model, dataset, "test", EvaluationConfig(metrics=("ild:tags",), cutoffs=(3,)))
    # All tie, and nobody has seen any: everyone gets the first three candidates.
    first = dataset.candidates("test")[:3].tolist()
    tags = [own for item in first if (own := lists(dataset, "items", "tags")[item])]
    distances = [1 - len(one & other) / 2 for place, one in enumerate(tags) for other in tags[:place]]
    assert distances
    assert found.metrics["ild:tags@3"] == pytest.approx(sum(distances) / len(distances), abs=1e-5)


class Diverged(Recommender):
    """Gives item 5 no number for user 11, in a dataset of any size."""

    def encode_users(self, users: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        return users[:, None]

    def encode_items(self, items: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        return items[:, None]

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        return torch.zeros(len(users), len(items)).masked_fill_((users == 11) & (items.T == 5), math.nan)


@pytest.mark.parametrize("metrics", [("ndcg",), ("auc",)])
def test_a_score_that_is_not_a_number_is_refused_by_user_and_item(tmp_path: Path, metrics: tuple[str, ...]) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol="random"))
    user, item = dataset.ids("users")[11].as_py(), dataset.ids("items")[5].as_py()
    who = rf"the score of Diverged for user '{user}' \(index 11\) and item '{item}' \(index 5\) is not a number"
    with pytest.raises(SibraError, match=who):
        evaluate(Diverged(), dataset, "test", EvaluationConfig(metrics=metrics, user_tile=7, item_tile=3))


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
