"""Matrix factorization against its formulas, computed in float64, example by example."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sibra_dist.config import load_config, validate
from sibra_dist.data.batches import Batches, TrainBatch
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.presence import Hidden
from sibra_dist.data.user_batches import UserBatches
from sibra_dist.models import build_model
from sibra_dist.models.base import parameter_count
from sibra_dist.models.factorization import MatrixFactorization, MatrixFactorizationConfig
from sibra_dist.training.config import TrainConfig
from tests.planted import write_planted

WEIGHTS = {"users": 0.3, "positives": 0.2, "negatives": 0.7, "bias": 0.5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("mf") / "dataset", protocol="cold_item"))


def build(dataset: Dataset, **changes: Any) -> MatrixFactorization:
    config = validate(
        MatrixFactorizationConfig, {"type": "mf", "embedding_size": 5, "initial_deviation": 0.5, **changes}, "test"
    )
    model = build_model(config, dataset, seed=1).double()
    assert isinstance(model, MatrixFactorization)
    if model.item_bias is not None:
        with torch.no_grad():
            model.item_bias.normal_(generator=torch.Generator().manual_seed(2))
    return model


def batch_of(model: MatrixFactorization, dataset: Dataset, hidden: dict[str, float] | None = None) -> TrainBatch:
    users, items = model.sampling()
    entities = torch.arange(dataset.items.count)
    visible = items.present & Hidden("items", hidden or {}).visible(("id",), entities)
    return Batches(dataset, users, items._replace(present=visible), seed=3, batch_size=12, negatives=3).batch(0, 0)


@pytest.mark.parametrize("item_bias", [True, False])
def test_parameters_are_the_papers(dataset: Dataset, item_bias: bool) -> None:
    users, items = dataset.users.count, dataset.items.count
    model = build(dataset, item_bias=item_bias)
    assert parameter_count(model) == 5 * (users + items) + (items if item_bias else 0)


def test_embeddings_start_with_the_deviation_and_biases_at_zero(dataset: Dataset) -> None:
    config = MatrixFactorizationConfig(embedding_size=64, initial_deviation=0.2)
    model = build_model(config, dataset, seed=1)
    assert isinstance(model, MatrixFactorization)
    for embedding in (model.user_embedding.weight.detach(), model.item_embedding.weight.detach()):
        # Of n normal numbers the deviation is known within s / sqrt(2 n): five times as much is allowed.
        assert float(embedding.std()) == pytest.approx(0.2, abs=5 * 0.2 / (2 * embedding.numel()) ** 0.5)
        assert float(embedding.mean()) == pytest.approx(0.0, abs=5 * 0.2 / embedding.numel() ** 0.5)
    assert model.item_bias is not None
    assert not model.item_bias.any()


@pytest.mark.parametrize("item_bias", [True, False])
@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_scores_penalties_and_gradients_are_the_papers(dataset: Dataset, item_bias: bool, hidden: float) -> None:
    model = build(dataset, item_bias=item_bias, regularization=WEIGHTS)
    batch = batch_of(model, dataset, {"id": hidden})
    gone = batch.item_modalities[..., 0] == 1
    assert bool(gone.any()) == (hidden > 0)
    combination = torch.randn(batch.items.shape, generator=torch.Generator().manual_seed(0)).double()
    output = model(batch)
    assert output.auxiliary_losses.keys() == {"regularization"}
    penalties = output.auxiliary_losses["regularization"]
    ((output.scores * combination).sum() + penalties.sum()).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    def item(entity: int, visible: bool) -> tuple[Tensor, Tensor]:
        bias = torch.tensor(0.0).double() if model.item_bias is None else model.item_bias[entity, 0]
        return model.item_embedding.weight[entity] * visible, bias * visible

    total = torch.tensor(0.0).double()
    for b, user in enumerate(batch.users.tolist()):
        p = model.user_embedding.weight[user]
        penalty = WEIGHTS["users"] * (p**2).sum()
        for n, entity in enumerate(batch.items[b].tolist()):
            q, bias = item(entity, not gone[b, n])
            score = p @ q + bias
            torch.testing.assert_close(output.scores[b, n], score)
            share = 1.0 if n == 0 else 1 / 3
            penalty = penalty + share * WEIGHTS["positives" if n == 0 else "negatives"] * (q**2).sum()
            penalty = penalty + share * WEIGHTS["bias"] * bias**2
            total = total + combination[b, n] * score
        torch.testing.assert_close(penalties[b], penalty)
        total = total + penalty
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_whole_users_are_penalised_for_the_mean_over_the_pool(dataset: Dataset) -> None:
    model = build(dataset, regularization=WEIGHTS)
    batch = UserBatches(dataset, *model.sampling(), seed=3, batch_size=7, shown=0.5, pool=20).batch(0, 0)
    penalties = model(batch).auxiliary_losses["regularization"]
    trained = (dataset.items.histories.lengths() > 0)[batch.items]
    assert model.item_bias is not None
    pool, bias = model.item_embedding.weight[batch.items] * trained[:, None], model.item_bias[batch.items, 0] * trained
    of_pool = WEIGHTS["negatives"] * (pool**2).sum(1).mean() + WEIGHTS["bias"] * (bias**2).mean()
    of_users = WEIGHTS["users"] * (model.user_embedding.weight[batch.users] ** 2).sum(1)
    torch.testing.assert_close(penalties, of_users + of_pool)


def test_without_weights_nothing_is_penalised(dataset: Dataset) -> None:
    model = build(dataset)
    assert model(batch_of(model, dataset)).auxiliary_losses == {}


def test_cold_items_tie_and_cold_users_rank_by_the_bias(dataset: Dataset) -> None:
    model = build(dataset)
    users, items = torch.arange(dataset.users.count), torch.arange(dataset.items.count)
    scores = model.score(model.encode_users(users), model.encode_items(items))
    cold = dataset.items.histories.lengths() == 0
    assert cold.any()
    assert not scores[:, cold].any()
    assert int(cold.sum()) == model.without_modality(items=True)
    hidden = Hidden("users", {"id": 1.0})
    assert model.without_modality(items=False, hidden=hidden) == len(users)
    scores = model.score(model.encode_users(users, hidden), model.encode_items(items))
    assert model.item_bias is not None
    torch.testing.assert_close(scores, (model.item_bias[:, 0] * ~cold).expand_as(scores))


def test_recipe_is_the_paper() -> None:
    config = load_config(TrainConfig, "mf", ["dataset=here"])
    assert isinstance(config.model, MatrixFactorizationConfig)
    assert (config.training.loss, config.model.item_bias) == ("bpr", True)
