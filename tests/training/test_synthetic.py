"""A model that is trained on a synthetic dataset finds the structure that is in it."""

from pathlib import Path
from typing import Any

import pytest

from sibra_dist.config import validate
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.synthetic import SyntheticConfig, synthesize
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.loop import Trainer
from sibra_dist.training.run_folder import RunFolder

SIDE = {"input_size": 32, "hidden_sizes": [32]}
SINGLE_BRANCH = {
    "type": "single_branch",
    "embedding_size": 32,
    "users": {**SIDE, "modalities": ["interactions"]},
    "items": {**SIDE, "draws": 2, "contrast": {}},
    "exclude_target": True,
}


def quality(dataset: Path, to: Path, model: dict[str, Any]) -> float:
    training = {"epochs": 3, "batch_size": 512, "learning_rate": 0.003, "loss": "sampled_softmax", "device": "cpu"}
    config = validate(TrainConfig, {"dataset": str(dataset), "model": model, "training": training}, "test")
    opened = open_dataset(dataset)
    run = RunFolder(to / model["type"])
    run.create(config, opened)
    best = Trainer(config, opened, run).fit().best
    assert best is not None
    return best


@pytest.mark.parametrize("cold_items", [0.0, 0.1])
def test_features_and_histories_beat_popularity_and_chance(tmp_path: Path, cold_items: float) -> None:
    config = SyntheticConfig(users=1_500, items=600, interactions=30_000, cold_items=cold_items)
    synthesize(config, tmp_path / "dataset")
    found = {
        model["type"]: quality(tmp_path / "dataset", tmp_path, model)
        for model in (SINGLE_BRANCH, {"type": "pop"}, {"type": "random"})
    }
    assert found["single_branch"] > 1.5 * max(found["pop"], found["random"]), found
