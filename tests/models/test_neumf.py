"""NeuMF against the formula of its paper, computed in float64, pair by pair."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sibra_dist.models.neumf
from sibra_dist.config import load_config, validate
from sibra_dist.data.batches import Batches
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.errors import ConfigError
from sibra_dist.models import build_model
from sibra_dist.models.base import parameter_count
from sibra_dist.models.neumf import NeuMF, NeuMFConfig
from sibra_dist.training.config import TrainConfig
from tests.planted import write_planted

# The paper's towers: an id embedding of p_g (4) and p_m (3), and nothing after it.
IDS = {
    "modalities": ["id"],
    "input_size": 7,
    "hidden_sizes": None,
    "normalize_input": False,
    "input_dropout": 0.0,
    "batch_norm_every": -1,
    "output_activation": False,
}
PAPER = {"type": "neumf", "embedding_size": 7, "gmf_size": 4, "mlp_hidden_sizes": [6, 5, 2], "users": IDS, "items": IDS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("neumf") / "dataset", protocol="random"))


def build(dataset: Dataset, **changes: Any) -> NeuMF:
    model = build_model(validate(NeuMFConfig, {**PAPER, **changes}, "test"), dataset, seed=1).double()
    assert isinstance(model, NeuMF)
    return model


def paper(model: NeuMF, user: Tensor, item: Tensor) -> Tensor:
    """w . [p_g * q_g, MLP([p_m, q_m])] + b for one pair."""
    hidden = torch.cat([user[4:], item[4:]])
    for layer in (model.mlp_input, *(layer for layer in model.mlp if isinstance(layer, torch.nn.Linear))):
        hidden = torch.relu(layer.weight @ hidden + layer.bias)
    return model.output.weight[0] @ torch.cat([user[:4] * item[:4], hidden]) + model.output.bias[0]


def test_parameters_are_the_papers(dataset: Dataset) -> None:
    embeddings = 7 * (dataset.users.count + dataset.items.count)
    layers = (6 * 6 + 6) + (6 * 5 + 5) + (5 * 2 + 2)
    found = parameter_count(build(dataset))
    # The towers have besides what stands for an entity without interactions, one vector each.
    assert found == embeddings + layers + (4 + 2 + 1) + 2 * 7


def test_scores_and_gradients_are_the_papers(dataset: Dataset) -> None:
    model = build(dataset)
    batch = Batches(dataset, *model.sampling(), seed=3, batch_size=12, negatives=3).batch(0, 0)
    combination = torch.randn(batch.items.shape, generator=torch.Generator().manual_seed(0)).double()
    scores = model(batch).scores
    (scores * combination).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    users, items = model.users.encoders["id"].embedding.weight, model.items.encoders["id"].embedding.weight
    total = torch.tensor(0.0).double()
    for b, user in enumerate(batch.users.tolist()):
        for n, item in enumerate(batch.items[b].tolist()):
            score = paper(model, users[user], items[item])
            torch.testing.assert_close(scores[b, n], score)
            total = total + combination[b, n] * score
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("elements", [1, 6 * 7, 6 * 80, 6 * 200, 2**21])
def test_all_pairs_are_scored_in_chunks(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Chunks of single pairs, of part of a row, of whole rows, and all at once; no layer is held for all pairs."""
    model = build(dataset).eval()
    monkeypatch.setattr(sibra_dist.models.neumf, "CHUNK_ELEMENTS", elements)
    users, items = model.encode_users(torch.arange(9)).detach(), model.encode_items(torch.arange(dataset.items.count)).detach()
    with torch.no_grad(), LargestTensor() as largest:
        scores = model.score(users, items)
    assert largest.elements <= max(elements, scores.numel())
    for u in (0, 5, 8):
        for i in (0, 33, 79):
            torch.testing.assert_close(scores[u, i], paper(model, users[u], items[i]))
    assert model.score(users, items[:0]).shape == (9, 0)


@pytest.mark.parametrize("elements", [6 * 7, 6 * 200])
def test_gradients_of_all_pairs_do_not_depend_on_the_chunks(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """What is computed again in the backward pass is what was computed."""
    model = build(dataset)
    combination = torch.randn(9, 80, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for size in (elements, 2**21):
        monkeypatch.setattr(sibra_dist.models.neumf, "CHUNK_ELEMENTS", size)
        users, items = model.encode_users(torch.arange(9)), model.encode_items(torch.arange(80))
        (model.score(users, items) * combination).sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient)
    assert found[1]["mlp_input.weight"].any()


def test_a_shared_branch_is_counted_once(dataset: Dataset) -> None:
    """The single-branch recipe has the two-branch one's parameters but for one of two branches, and is the same function."""
    small = [f"model.{side}.input_size=6" for side in ("users", "items")]
    sizes = ["model.embedding_size=7", "model.gmf_size=4", "model.mlp_hidden_sizes=[6,5,2]", "dataset=here", *small]
    two, one = (
        build_model(load_config(TrainConfig, recipe, sizes).model, dataset, seed=1)
        for recipe in ("neumf", "neumf-single-branch")
    )
    assert isinstance(two, NeuMF)
    assert isinstance(one, NeuMF)
    assert parameter_count(two) - parameter_count(one) == 6 * 7 + 7
    for model in (two, one):
        assert model.modalities() == (("interactions",), ("interactions",))
    shared = {name.replace("branch.", "user_branch."): value for name, value in one.state_dict().items()}
    copied = {name.replace("user_branch.", "item_branch."): value for name, value in shared.items() if "user_branch." in name}
    two.load_state_dict(shared | copied)
    batch = Batches(dataset, *two.sampling(), seed=3, batch_size=12, negatives=3).batch(0, 0)
    users, items = torch.arange(dataset.users.count), torch.arange(dataset.items.count)
    scores = [model.score(model.encode_users(users), model.encode_items(items)) for model in (two, one)]
    assert torch.equal(*scores)
    assert model(batch).scores.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gmf_size": 7}, r"gmf_size \(7\) must be less than embedding_size \(7\)"),
        ({"mlp_hidden_sizes": []}, "mlp_hidden_sizes"),
    ],
)
def test_what_cannot_be_built_is_told(dataset: Dataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(dataset, **changes)
