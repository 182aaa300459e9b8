"""All items as candidates, also where the protocol ranks those of the split."""

from pathlib import Path

import pytest
import torch

from sibra_dist.data.dataset import HeldOut, open_dataset
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.models import build_model
from sibra_dist.models.baselines import PopConfig, RandomConfig
from tests.planted import write_planted

ALL = EvaluationConfig(metrics=("recall", "coverage"), cutoffs=(5,), user_tile=7, item_tile=11, candidates="all")


def test_cold_items_come_last_by_popularity_once_warm_ones_are_candidates_too(tmp_path: Path) -> None:
    """Of 80 items 64 are warm and a user knows at most 12 of them, so that the first five are warm, and none is relevant."""
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol="cold_item"))
    model = build_model(PopConfig(), dataset, seed=0).eval()
    found = evaluate(model, dataset, "test", ALL, item_cutoffs=(5,))
    own = evaluate(model, dataset, "test", ALL.model_copy(update={"candidates": "split"}))
    assert (found.counts["candidates"], own.counts["candidates"]) == (80, 8)
    assert found.counts["users"] == own.counts["users"]
    assert found.metrics["recall@5"] == 0 < own.metrics["recall@5"]
    groups = found.item_groups["cold_start"]["groups"]
    assert {name: group["candidates"] for name, group in groups.items()} == {"cold": 16, "warm": 64}
    assert groups["warm"]["relevant"] == 0


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("protocol", ["cold_item", "cold_both", "random"])
def test_what_a_user_knows_is_masked_among_all_items(tmp_path: Path, protocol: str, split: HeldOut) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol=protocol))
    model = build_model(RandomConfig(), dataset, seed=0).eval()
    scores = model.score(model.encode_users(torch.arange(60)), model.encode_items(torch.arange(80))).tolist()
    holders, held_out = dataset.held_out[split]
    recalls, shown = [], set()
    for row, user in enumerate(holders.tolist()):
        known = set(dataset.users.histories.gather(torch.tensor([user]))[0].tolist())
        if split == "test":
            before, matrix = dataset.held_out["validation"]
            for place in torch.nonzero(before == user).flatten():
                known |= set(matrix.gather(place[None])[0].tolist())
        first = sorted(set(range(80)) - known, key=lambda item: (-scores[user][item], item))[:5]
        relevant = held_out.gather(torch.tensor([row]))[0].tolist()
        recalls.append(sum(item in relevant for item in first) / len(relevant))
        shown |= set(first)
    found = evaluate(model, dataset, split, ALL)
    assert found.metrics == pytest.approx({"recall@5": sum(recalls) / len(recalls), "coverage@5": len(shown) / 80}, abs=1e-9)
