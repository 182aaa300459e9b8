from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.config import validate
from sibra_dist.data.batches import Batches, stream
from sibra_dist.data.dataset import Csr, Dataset, open_dataset
from sibra_dist.errors import ConfigError
from sibra_dist.models import build_model
from sibra_dist.models.encoders import InteractionsEncoder
from sibra_dist.models.single_branch import BatchNorm, SiBraR, SiBraRConfig, SingleBranch, named_dropout
from tests.planted import write_planted

SIDE = {"input_size": 8, "hidden_sizes": [6, 6], "input_dropout": 0.0}
SMALL = {"type": "sibrar", "embedding_size": 5, "users": SIDE, "items": {**SIDE, "draws": 2}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("branch") / "dataset", protocol="cold_item"))


def build(dataset: Dataset, **changes: object) -> SiBraR:
    model = build_model(validate(SiBraRConfig, {**SMALL, **changes}, "test"), dataset, seed=1)
    assert isinstance(model, SiBraR)
    return model


def dense_encoding(side: SingleBranch, name: str, entity: int, dataset: Dataset, excluded: int | None = None) -> Tensor:
    """f_m(x_m(e)) of the paper by dense arithmetic, from the dataset and the parameters alone."""
    entities, width = (
        (dataset.users, dataset.items.count) if "club" in side.modalities else (dataset.items, dataset.users.count)
    )
    encoder = side.encoders[name]
    one = torch.tensor([entity])
    if name == "interactions":
        row = torch.zeros(width)
        row[entities.histories.gather(one)[0].long()] = 1
        if excluded is not None:
            assert row[excluded] == 1
            row[excluded] = 0
        return torch.relu(row @ encoder.weight + encoder.bias)
    values = entities.features[name].values
    if name == "club":
        return F.one_hot(values[entity].long(), 4).float() @ encoder.embedding.weight
    if name == "tags":
        assert isinstance(values, Csr)
        return F.one_hot(values.gather(one)[0].long(), 5).float().sum(0) @ encoder.embedding.weight
    return torch.relu(encoder.linear.weight @ values[entity] + encoder.linear.bias)


def dense_branch(side: SingleBranch, inputs: Tensor) -> Tensor:
    """g of the paper in evaluation: linear, ReLU, linear, batch normalisation, ReLU, linear, ReLU on a unit vector."""
    first, second, third = (layer for layer in side.branch.layers if isinstance(layer, torch.nn.Linear))
    (norm,) = (layer for layer in side.branch.layers if isinstance(layer, BatchNorm))
    hidden = torch.relu(first.weight @ (inputs / inputs.norm()) + first.bias)
    hidden = second.weight @ hidden + second.bias
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    return torch.relu(third.weight @ torch.relu(hidden) + third.bias)


@pytest.mark.parametrize("hidden", [frozenset(), frozenset({"interactions"}), frozenset({"tags", "club"})])
def test_embedding_is_the_mean_over_what_is_present(dataset: Dataset, hidden: frozenset[str]) -> None:
    model = build(dataset).eval()
    for side, encode, entities in (
        (model.users, model.encode_users, dataset.users),
        (model.items, model.encode_items, dataset.items),
    ):
        for norm in (module for module in side.modules() if isinstance(module, BatchNorm)):
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        chosen = [0, 7, 35, entities.count - 1]
        for entity, embedding in zip(chosen, encode(torch.tensor(chosen), hidden), strict=True):
            there = [
                name
                for name in side.modalities
                if name not in hidden and name != "interactions" and entities.features[name].present[entity]
            ]
            if "interactions" not in hidden and entities.histories.lengths()[entity] > 0:
                there.append("interactions")
            inputs = [dense_encoding(side, name, entity, dataset) for name in there] or [side.unknown[0]]
            expected = torch.stack([dense_branch(side, one) for one in inputs]).mean(0)
            torch.testing.assert_close(embedding, expected)


def test_an_entity_with_nothing_present_has_the_learned_unknown(dataset: Dataset) -> None:
    model = build(dataset).eval()
    everything = frozenset(model.items.modalities)
    embeddings = model.encode_items(torch.arange(dataset.items.count), everything)
    assert torch.equal(embeddings, embeddings[:1].expand_as(embeddings))
    assert model.without_modality(items=True, hidden=everything) == dataset.items.count
    bare = int((~model.items.present.any(1)).sum())
    assert bare == model.without_modality(items=True) == 0
    # Item 0 has neither tags nor a cover: without interactions nothing is left of it.
    assert model.without_modality(items=True, hidden=frozenset({"interactions"})) == 3


def test_each_distinct_pair_is_encoded_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dataset)
    calls: list[Tensor] = []
    original = InteractionsEncoder._bags

    def counted(self: InteractionsEncoder, entities: Tensor) -> Tensor:
        calls.append(entities)
        return original(self, entities)

    monkeypatch.setattr(InteractionsEncoder, "_bags", counted)
    batch = Batches(dataset, *model.sampling(), seed=0, batch_size=200, negatives=4).batch(0, 0)
    model(batch)
    assert len(calls) == 2
    for entities in calls:
        assert len(entities.unique()) == len(entities)
    drawn = batch.items[..., None].expand_as(batch.item_modalities)[batch.item_modalities == 0]
    assert set(calls[1].tolist()) == set(drawn.tolist())


@pytest.mark.parametrize("exclude_target", [False, True])
def test_gradients_equal_those_of_the_dense_computation(dataset: Dataset, exclude_target: bool) -> None:
    """Scores of a batch by the dense formulas, example by example, without sharing anything."""
    model = build(dataset, contrast=None, exclude_target=exclude_target).eval()
    batch = Batches(dataset, *model.sampling(), seed=3, batch_size=12, negatives=2).batch(0, 0)
    weights = torch.randn(batch.items.shape, generator=torch.Generator().manual_seed(0))
    scores = model(batch).scores
    (scores * weights).sum().backward()
    sparse = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    def embed(side: SingleBranch, entity: int, drawn: list[int], excluded: int | None) -> Tensor:
        inputs = []
        for modality in drawn:
            if modality == len(side.modalities):
                inputs.append(side.unknown[0])
            else:
                inputs.append(dense_encoding(side, side.modalities[modality], entity, dataset, excluded))
        return torch.stack([dense_branch(side, one) for one in inputs]).mean(0)

    total = torch.tensor(0.0)
    for b, user in enumerate(batch.users.tolist()):
        target = int(batch.items[b, 0]) if exclude_target else None
        embedded = embed(model.users, user, batch.user_modalities[b].tolist(), target)
        for n, item in enumerate(batch.items[b].tolist()):
            asked = user if exclude_target and n == 0 else None
            score = embedded @ embed(model.items, item, batch.item_modalities[b, n].tolist(), asked)
            torch.testing.assert_close(scores[b, n], score, rtol=1e-4, atol=1e-5)
            total = total + weights[b, n] * score
    total.backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(sparse[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("items", [["tags"], ["interactions"], ["tags", "cover"]])
def test_a_model_restricted_to_some_modalities_trains(dataset: Dataset, items: list[str]) -> None:
    """Also where items lack all of them, and where there are fewer than the contrast compares."""
    model = build(dataset, items={**SIDE, "modalities": items}, users={**SIDE, "modalities": ["club"]}, exclude_target=True)
    output = model(Batches(dataset, *model.sampling(), seed=3, batch_size=200, negatives=3).batch(0, 0))
    (output.scores.sum() + output.auxiliary_losses["info_nce"].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
    assert model.without_modality(items=True) > 0


def test_contrast_is_between_the_two_drawn_modalities(dataset: Dataset) -> None:
    model = build(dataset, exclude_target=False, contrast={"weight": 0.5, "temperature": 0.2}).eval()
    batch = Batches(dataset, *model.sampling(), seed=3, batch_size=5, negatives=3).batch(0, 0)
    views = model.items(batch.items, batch.item_modalities, 0)
    expected = []
    for example in views:
        logits = example[:, 0] @ example[:, 1].T / 0.2
        target = torch.arange(4)
        expected.append(0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)))
    torch.testing.assert_close(model(batch).auxiliary_losses["info_nce"], torch.stack(expected))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_belongs_to_the_row_name(rate: float) -> None:
    names = torch.arange(4000) * 7919
    ones = torch.ones(4000, 30)
    dropped = named_dropout(ones, rate, stream(4), names)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    # 120,000 draws: five standard deviations.
    assert float((dropped == 0).float().mean()) == pytest.approx(rate, abs=5 * (rate * (1 - rate) / 120_000) ** 0.5)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(named_dropout(ones[:50], rate, stream(4), names[order]), dropped[order])
    assert not torch.equal(named_dropout(ones, rate, stream(5), names), dropped)
    columns = (dropped == 0).float().mean(0)
    assert float(columns.std()) < 0.02
    together = torch.corrcoef((dropped == 0).float().T).fill_diagonal_(0)
    assert float(together.abs().max()) < 0.1


def test_one_row_passes_batch_normalisation() -> None:
    norm = BatchNorm(3).train()
    assert norm(torch.ones(1, 3)).isfinite().all()
    assert norm(torch.randn(4, 3)).mean(0).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"users": {"modalities": ["interactionz"]}},
            "model.users.modalities: the dataset's users have no interactionz; did you mean interactions",
        ),
        ({"items": {"modalities": [], "draws": 2}}, "model.items.modalities must name at least one"),
        ({"items": {"modalities": ["tags", "tags"], "draws": 2}}, "each only once"),
        ({"items": {"draws": 1}}, "contrast: contrast compares two modalities|contrast compares two modalities"),
    ],
)
def test_what_cannot_be_built_is_told(dataset: Dataset, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(dataset, **changes)


def test_baselines_rank_by_popularity_and_by_chance(dataset: Dataset, tmp_path: Path) -> None:
    everyone, everything = torch.arange(dataset.users.count), torch.arange(dataset.items.count)
    from sibra_dist.models.baselines import PopConfig, RandomConfig

    pop = build_model(PopConfig(), dataset, 0)
    scores = pop.score(pop.encode_users(everyone), pop.encode_items(everything))
    assert torch.equal(scores[3], dataset.items.histories.lengths().float())
    one, two = (build_model(RandomConfig(seed=seed), dataset, 0) for seed in (0, 1))
    chance = one.score(one.encode_users(everyone), one.encode_items(everything))
    assert chance.unique().numel() > 0.99 * chance.numel()
    assert float(chance.min()) >= 0
    assert float(chance.max()) < 1
    assert not torch.equal(chance, two.score(two.encode_users(everyone), two.encode_items(everything)))
