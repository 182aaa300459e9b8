"""Newcomers on every model: who is known, told again under another id, is embedded as before; and who is known stays so."""

from typing import Any

import pytest
import torch

from sibra_dist.config import validate
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.presence import Hidden
from sibra_dist.errors import ConfigError
from sibra_dist.models import MODELS, build_model
from sibra_dist.models.base import Recommender
from sibra_dist.recommending.newcomers import Given, join, require_embeddings
from tests.models.cases import CASES, single_branch
from tests.newcomers import told_again
from tests.planted import write_planted

TOLD = range(0, 60, 3)
WITHOUT_ID = {side: Hidden(side, {"id": 1.0}) for side in ("users", "items")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("newcomers") / "dataset", columns=("weights",)))


def seated(model: dict[str, Any], dataset: Dataset, *sides: str) -> tuple[Recommender, Recommender]:
    """A model for a dataset, and the same for the dataset with newcomers that are told as known ones."""
    config = validate(MODELS[model["type"]][1], model, "model")
    known = build_model(config, dataset, 1).eval()
    tables = {side: Given("table", "", told_again(dataset, side, TOLD)) for side in sides}
    joined, refused = join(dataset, tables)
    assert refused == []
    extended = build_model(config, joined, 2).eval()
    extended.load_state_dict(known.state_dict())
    require_embeddings(extended, model["type"], tables)
    return known, extended


def by_side(model: Recommender, side: str, entities: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return (model.encode_users if side == "users" else model.encode_items)(entities, WITHOUT_ID[side])


def embeds(name: str, side: str) -> bool:
    """Whether a model has anything but an id to know a side by."""
    model = CASES[name].model
    if model["type"] in ("mf", "pop", "random") or name == "NeuMF, ids":
        return False
    return model["type"] != "clcrec" or (model[side].get("content", () if side == "users" else None)) is None


@pytest.mark.parametrize(
    ("name", "side"), [(name, side) for name in CASES for side in ("users", "items") if embeds(name, side)]
)
def test_who_is_told_again_is_embedded_as_before_and_who_is_known_stays(dataset: Dataset, name: str, side: str) -> None:
    known, extended = seated(CASES[name].model, dataset, side)
    count = (dataset.users if side == "users" else dataset.items).count
    before = by_side(known, side, torch.arange(count))
    after = by_side(extended, side, torch.arange(count + len(TOLD)))
    torch.testing.assert_close(after[:count], before)
    torch.testing.assert_close(after[count:], before[list(TOLD)])
    other = "items" if side == "users" else "users"
    everyone = torch.arange((dataset.items if side == "users" else dataset.users).count)
    assert torch.equal(by_side(extended, other, everyone), by_side(known, other, everyone))


@pytest.mark.parametrize("weighting", ["raw", "log", "tf_idf", "bm25"])
def test_interactions_of_newcomers_are_weighed_by_what_is_known(dataset: Dataset, weighting: str) -> None:
    reads = {"modalities": ["interactions"], "encoders": {"interactions": {"weighting": weighting}}}
    known, extended = seated(single_branch(reads, reads), dataset, "users", "items")
    for side, count in (("users", dataset.users.count), ("items", dataset.items.count)):
        before = by_side(known, side, torch.arange(count))
        after = by_side(extended, side, torch.arange(count + len(TOLD)))
        torch.testing.assert_close(after, torch.cat([before, before[list(TOLD)]]))


@pytest.mark.parametrize("name", ["MF", "NeuMF, ids", "CLCRec, items"])
def test_a_model_that_knows_users_by_ids_alone_says_so(dataset: Dataset, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"the model {CASES[name].model['type']} knows users by their ids alone"):
        seated(CASES[name].model, dataset, "users")


def test_a_newcomer_is_as_popular_as_its_interactions_say(dataset: Dataset) -> None:
    known, extended = seated({"type": "pop"}, dataset, "items")
    popularity = by_side(known, "items", torch.arange(dataset.items.count))
    newcomers = torch.arange(dataset.items.count, dataset.items.count + len(TOLD))
    assert torch.equal(by_side(extended, "items", newcomers), popularity[list(TOLD)])
