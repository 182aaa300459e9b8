"""DropoutNet against its formulas, computed densely in float64, example by example."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sibra_dist.config import load_config, validate
from sibra_dist.data.batches import Batches, TrainBatch
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.presence import Hidden
from sibra_dist.errors import ConfigError
from sibra_dist.models import build_model
from sibra_dist.models.base import parameter_count
from sibra_dist.models.branch import Branch
from sibra_dist.models.dropoutnet import DropoutNet, DropoutNetConfig
from sibra_dist.training.config import TrainConfig
from tests.models.dense import network, seen_names
from tests.planted import write_planted

SIDE = {"input_size": 4, "hidden_sizes": [6, 5]}
SMALL = {"type": "dropoutnet", "embedding_size": 3, "users": SIDE, "items": SIDE}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("dropoutnet") / "dataset", protocol="cold_item"))


def build(dataset: Dataset, **changes: Any) -> DropoutNet:
    model = build_model(validate(DropoutNetConfig, {**SMALL, **changes}, "test"), dataset, seed=1).double()
    assert isinstance(model, DropoutNet)
    return model


def batch_of(model: DropoutNet, dataset: Dataset, size: int = 12) -> TrainBatch:
    return Batches(dataset, *model.sampling(), seed=3, batch_size=size, negatives=3).batch(0, 0)


def test_parameters_are_the_papers(dataset: Dataset) -> None:
    """Encoders to width 4, and networks (modalities * 4, 6, 5, 3); nothing stands for what is missing."""
    users = (4 * dataset.items.count + 4) + 4 * 4
    items = (4 * dataset.users.count + 4) + 5 * 4 + (6 * 4 + 4)
    layers = sum((4 * modalities * 6 + 6) + (6 * 5 + 5) + (5 * 3 + 3) for modalities in (2, 3))
    assert parameter_count(build(dataset)) == users + items + layers


def test_scores_and_gradients_are_the_papers(dataset: Dataset) -> None:
    model = build(dataset)
    batch = batch_of(model, dataset, size=40)
    combination = torch.randn(batch.items.shape, generator=torch.Generator().manual_seed(0)).double()
    scores = model(batch).scores
    (scores * combination).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    left_out = 0
    total = torch.tensor(0.0).double()
    for b, user in enumerate(batch.users.tolist()):
        seen = seen_names(model.users.encoders.modalities, batch.user_modalities[b])
        left_out += "interactions" not in seen
        embedded = network(model.users, dataset, user, seen, 4)
        for n, item in enumerate(batch.items[b].tolist()):
            seen = seen_names(model.items.encoders.modalities, batch.item_modalities[b, n])
            score = embedded @ network(model.items, dataset, item, seen, 4)
            torch.testing.assert_close(scores[b, n], score)
            total = total + combination[b, n] * score
    assert 0 < left_out < 40
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize(
    "hide", [{}, {"interactions": 1.0}, {"tags": 1.0, "cover": 0.5}, dict.fromkeys(("interactions", "tags", "cover"), 1.0)]
)
def test_embedding_reads_what_is_present_and_zeros_for_the_rest(dataset: Dataset, hide: dict[str, float]) -> None:
    model, hidden = build(dataset), Hidden("items", hide)
    items = torch.arange(dataset.items.count)
    embeddings = model.encode_items(items, hidden)
    visible = hidden.visible(model.modalities()[1], items)
    for item in (0, 7, 30, 35, 79):
        there = [
            name
            for column, name in enumerate(model.modalities()[1])
            if visible[item, column]
            and (
                dataset.items.histories.lengths()[item] > 0
                if name == "interactions"
                else dataset.items.features[name].present[item]
            )
        ]
        torch.testing.assert_close(embeddings[item], network(model.items, dataset, item, there, 4))


def test_half_of_the_occurrences_are_without_interactions(dataset: Dataset) -> None:
    """By default, and where they are read; what is there otherwise is seen always."""
    model = build(dataset)
    batch = batch_of(model, dataset, size=500)
    for drawn, present, entities in (
        (batch.user_modalities, model.users.encoders.present, batch.users),
        (batch.item_modalities, model.items.encoders.present, batch.items),
    ):
        assert present[entities][..., 0].all()
        count = entities.numel()
        # Five standard deviations of a mean of so many coins.
        assert float((drawn == 0).any(-1).double().mean()) == pytest.approx(0.5, abs=2.5 / count**0.5)
        for number in range(1, present.shape[1]):
            assert torch.equal((drawn == number).any(-1), present[entities][..., number])
    users, items = build(dataset, items={**SIDE, "modalities": ["tags"]}, users={**SIDE, "modality_dropout": {}}).sampling()
    assert users.dropout is None
    assert items.dropout is None


def test_each_distinct_entity_and_set_passes_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dataset)
    batch = batch_of(model, dataset, size=300)
    passed: list[int] = []
    original = Branch.forward

    def counted(self: Branch, inputs: Tensor, names: Tensor, key: int | None) -> Tensor:
        passed.append(len(inputs))
        assert len(names.unique()) == len(inputs)
        return original(self, inputs, names, key)

    monkeypatch.setattr(Branch, "forward", counted)
    model(batch)
    expected = []
    for entities, drawn in ((batch.users, batch.user_modalities), (batch.items, batch.item_modalities)):
        pairs = zip(entities.flatten().tolist(), drawn.flatten(0, -2).tolist(), strict=True)
        expected.append(len({(entity, frozenset(modalities)) for entity, modalities in pairs}))
    assert passed == expected
    assert passed[1] < batch.items.numel() / 2


@pytest.mark.parametrize(("activation", "expected"), [(None, False), (False, False), (True, True)])
def test_interactions_are_linear_unless_asked_otherwise(dataset: Dataset, activation: bool | None, expected: bool) -> None:
    side = {**SIDE, "encoders": {"interactions": {"activation": activation}}}
    model = build(dataset, users=side)
    layers = model.users.encoders.encoders["interactions"].layers
    assert any(isinstance(layer, torch.nn.ReLU) for layer in layers) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"items": {"modalities": ["tags"], "modality_dropout": {"cover": 0.5}}},
            "model.items.modality_dropout: .* no modality cover",
        ),
        ({"users": {"modalities": ["clubs"]}}, "model.users.modalities: .* did you mean club"),
        (
            {"users": {"modalities": ["club"], "encoders": {"interactions": {}}}},
            "model.users.encoders: .* no modality interactions",
        ),
    ],
)
def test_what_cannot_be_built_is_told(dataset: Dataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(dataset, **changes)


def test_more_modalities_than_fit_into_a_number_are_told(dataset: Dataset) -> None:
    model = build(dataset)
    encoders = model.items.encoders
    encoders.present = torch.zeros(dataset.items.count, 60, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"model.items: 60 modalities are too many for 80 items"):
        type(model.items)(encoders, model.config.items, 3)


def test_recipe_is_the_paper() -> None:
    config = load_config(TrainConfig, "dropoutnet", ["dataset=here"])
    assert isinstance(config.model, DropoutNetConfig)
    for side in (config.model.users, config.model.items):
        assert side.modalities is None
        assert (side.modality_dropout or {"interactions": 0.5}) == {"interactions": 0.5}
