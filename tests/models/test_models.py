"""What every model of `MODELS` promises."""

from collections.abc import Iterator

import pytest
import torch

from sibra_dist.config import to_plain, validate
from sibra_dist.data.batches import Batches
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.losses import LOSSES
from sibra_dist.models import MODELS, build_model
from sibra_dist.models.base import Recommender
from sibra_dist.models.single_branch import SiBraR
from sibra_dist.training.config import TrainConfig
from tests.planted import write_planted


@pytest.fixture(scope="module", params=["cold_item", "random"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("models") / "dataset", protocol=request.param))


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest, dataset: Dataset) -> Iterator[Recommender]:
    _, config = MODELS[request.param]
    return build_model(config(type=request.param), dataset, seed=0).eval()


def subsets(names: list[str]) -> list[frozenset[str]]:
    return [frozenset(), *(frozenset([name]) for name in names), frozenset(names)]


def test_config_round_trips(model: Recommender) -> None:
    name = next(name for name, (kind, _) in MODELS.items() if kind is type(model))
    config = validate(TrainConfig, {"dataset": "here", "model": {"type": name}}, where="here")
    assert validate(TrainConfig, to_plain(config), where="here") == config
    assert type(config.model) is MODELS[name][1]


def test_embeddings_are_defined_whatever_is_hidden(model: Recommender, dataset: Dataset) -> None:
    users, items = model.modalities()
    for hidden in subsets(list(users)):
        assert model.encode_users(torch.arange(dataset.users.count), hidden).isfinite().all()
    for hidden in subsets(list(items)):
        assert model.encode_items(torch.arange(dataset.items.count), hidden).isfinite().all()


def test_scores_do_not_depend_on_what_is_scored_beside(model: Recommender, dataset: Dataset) -> None:
    users, items = torch.arange(dataset.users.count), torch.arange(dataset.items.count)
    whole = model.score(model.encode_users(users), model.encode_items(items))
    assert whole.shape == (len(users), len(items))
    part = model.score(model.encode_users(users[7:9]), model.encode_items(items[[40, 3]]))
    torch.testing.assert_close(part, whole[7:9][:, [40, 3]])


def test_same_seed_same_model_and_no_trace_in_the_global_generator(model: Recommender, dataset: Dataset) -> None:
    name = next(name for name, (kind, _) in MODELS.items() if kind is type(model))
    before = torch.random.get_rng_state()
    again = build_model(MODELS[name][1](type=name), dataset, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_every_parameter_has_a_finite_gradient_and_padding_counts_for_nothing(model: Recommender, dataset: Dataset) -> None:
    if not model.trainable:
        with pytest.raises(TypeError, match="nothing to train"):
            model.sampling()
        return
    model.train()
    batches = Batches(dataset, *model.sampling(), seed=0, batch_size=9, negatives=4, rank=1, world=2)
    last = batches.batch(0, batches.steps_per_epoch - 1)
    batch = last if (last.weights == 0).any() else batches.batch(0, 0)
    for name, loss in LOSSES.items():
        model.zero_grad()
        output = model(batch)
        assert output.scores.shape == batch.items.shape
        losses = loss(output.scores, len(dataset.training_items)) + sum(output.auxiliary_losses.values())
        assert losses.shape == batch.users.shape
        (losses * batch.weights).sum().backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{parameter_name} has no gradient under {name}"
            assert parameter.grad.isfinite().all()


def test_forward_agrees_with_score(model: Recommender, dataset: Dataset) -> None:
    """When all that is present is drawn and nothing is dropped, training scores are the scores of evaluation."""
    if not model.trainable:
        return
    draw_all = [part._replace(draws=part.present.shape[1]) for part in model.sampling()]
    batch = Batches(dataset, *draw_all, seed=0, batch_size=32, negatives=4).batch(0, 0)
    # Entities that lack a modality repeat one instead, so compare those that have all.
    complete_users, complete_items = (part.present.all(1) for part in draw_all)
    kept = complete_users[batch.users][:, None] & complete_items[batch.items]
    for module in model.modules():
        if hasattr(module, "_dropout"):
            module._dropout = 0.0
    if isinstance(model, SiBraR):
        model.config = model.config.model_copy(update={"exclude_target": False})
    whole = model.score(
        model.encode_users(torch.arange(dataset.users.count)), model.encode_items(torch.arange(dataset.items.count))
    )
    assert kept.any()
    torch.testing.assert_close(model(batch).scores[kept], whole[batch.users[:, None], batch.items][kept])
