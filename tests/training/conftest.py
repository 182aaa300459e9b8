from pathlib import Path
from typing import Any

import pytest

from sibra_dist.config import validate, with_override
from sibra_dist.training.config import TrainConfig
from tests.planted import write_planted

SIDE = {"input_size": 16, "hidden_sizes": [16, 16]}
SMALL: dict[str, Any] = {
    "model": {"type": "single_branch", "embedding_size": 8, "users": SIDE, "items": {**SIDE, "draws": 2, "contrast": {}}},
    "training": {"batch_size": 64, "negatives": 4, "epochs": 3, "learning_rate": 0.01, "device": "cpu"},
}


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "dataset", protocol="random")


def make_config(dataset: Path, **overrides: Any) -> TrainConfig:
    """The small configuration; `training__epochs=5` stands for the override training.epochs=5."""
    values: dict[str, Any] = {"dataset": str(dataset), **SMALL}
    for path, value in overrides.items():
        values = with_override(values, path.replace("__", "."), value)
    return validate(TrainConfig, values, where="test")
