"""CLCRec against its formulas, computed densely in float64, example by example."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.config import load_config, validate
from sibra_dist.data.batches import Batches, TrainBatch
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.presence import Hidden
from sibra_dist.errors import ConfigError
from sibra_dist.models import build_model
from sibra_dist.models.base import parameter_count
from sibra_dist.models.clcrec import CLCRec, CLCRecConfig, ContentSide
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.loop import hardest
from tests.models.dense import network
from tests.planted import write_planted

ITEMS = {"input_size": 4, "hidden_sizes": [6], "contrast": {"weight": 0.7, "temperature": 0.2}}
USERS = {**ITEMS, "content": ["club"]}
SMALL = {"type": "clcrec", "embedding_size": 3, "initial_deviation": 0.5, "items": ITEMS}
SIDES: dict[str, dict[str, Any]] = {
    "items": {},
    "users": {"users": USERS, "items": {**ITEMS, "content": []}},
    "both": {"users": USERS},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("clcrec") / "dataset", protocol="cold_item"))


def build(dataset: Dataset, **changes: Any) -> CLCRec:
    model = build_model(validate(CLCRecConfig, {**SMALL, **changes}, "test"), dataset, seed=1).double()
    assert isinstance(model, CLCRec)
    return model


def without_noise(changes: dict[str, Any], rate: float) -> dict[str, Any]:
    return {
        side: {**{"users": {}, "items": ITEMS}[side], **changes.get(side, {}), "replace_id": rate}
        for side in ("users", "items")
    }


def batch_of(model: CLCRec, dataset: Dataset, size: int = 12, hide: dict[str, float] | None = None) -> TrainBatch:
    users, items = model.sampling()
    visible = items.present & Hidden("items", hide or {}).visible(model.items.modalities, torch.arange(dataset.items.count))
    return Batches(dataset, users, items._replace(present=visible), seed=3, batch_size=size, negatives=3).batch(0, 0)


def dense(
    side: ContentSide, dataset: Dataset, entity: int, hidden: frozenset[str] = frozenset()
) -> tuple[Tensor | None, Tensor | None]:
    """The id embedding and the content embedding of an entity, where it has them."""
    entities = dataset.users if side.embedding.rows == dataset.users.count else dataset.items
    has_id = entities.histories.lengths()[entity] > 0 and "id" not in hidden
    names = [name for name in side.modalities[1:] if entities.features[name].present[entity] and name not in hidden]
    assert side.content is not None or not names
    content = network(side.content, dataset, entity, names, 4) if side.content is not None and names else None
    return (side.embedding.weight[entity] if has_id else None), content


def dense_info_nce(pairs: list[tuple[Tensor | None, Tensor | None]], temperature: float) -> Tensor:
    """CE(L, identity) + CE(L^T, identity) of cosines; who lacks one embedding is compared with itself."""
    a = torch.stack([F.normalize(e if e is not None else z, dim=0) for e, z in pairs])
    b = torch.stack([F.normalize(z if z is not None else e, dim=0) for e, z in pairs])
    logits, target = a @ b.T / temperature, torch.arange(len(pairs))
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


@pytest.mark.parametrize("sides", SIDES)
def test_parameters_are_the_papers(dataset: Dataset, sides: str) -> None:
    expected = 3 * (dataset.users.count + dataset.items.count)
    if sides != "users":
        expected += 5 * 4 + (6 * 4 + 4) + (8 * 6 + 6) + (6 * 3 + 3)
    if sides != "items":
        expected += 4 * 4 + (4 * 6 + 6) + (6 * 3 + 3)
    assert parameter_count(build(dataset, **SIDES[sides])) == expected


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("sides", SIDES)
def test_scores_contrasts_and_gradients_are_the_papers(dataset: Dataset, sides: str, rate: float) -> None:
    """Ids alone, and content wherever there is any."""
    model = build(dataset, **without_noise(SIDES[sides], rate))
    batch = batch_of(model, dataset)
    combination = torch.randn(batch.items.shape, generator=torch.Generator().manual_seed(0)).double()
    output = model(batch)
    wanted = {"users": ["users.info_nce"], "items": ["items.info_nce"], "both": ["users.info_nce", "items.info_nce"]}[sides]
    assert list(output.auxiliary_losses) == wanted
    ((output.scores * combination).sum() + sum(loss.sum() for loss in output.auxiliary_losses.values())).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    def scored(pair: tuple[Tensor | None, Tensor | None]) -> Tensor:
        by_id, by_content = pair
        embedding = by_content if by_id is None or (rate == 1 and by_content is not None) else by_id
        assert embedding is not None
        return embedding

    users = [dense(model.users, dataset, user) for user in batch.users.tolist()]
    items = [[dense(model.items, dataset, item) for item in row] for row in batch.items.tolist()]
    total = torch.tensor(0.0).double()
    for b, user in enumerate(users):
        for n, item in enumerate(items[b]):
            score = scored(user) @ scored(item)
            torch.testing.assert_close(output.scores[b, n], score)
            total = total + combination[b, n] * score
        if "items.info_nce" in wanted:
            loss = 0.7 * dense_info_nce(items[b], 0.2)
            torch.testing.assert_close(output.auxiliary_losses["items.info_nce"][b], loss.to(torch.float32), check_dtype=False)
            total = total + loss
    if "users.info_nce" in wanted:
        loss = 0.7 * dense_info_nce(users, 0.2)
        torch.testing.assert_close(output.auxiliary_losses["users.info_nce"].mean(), loss.to(torch.float32), check_dtype=False)
        total = total + loss * len(users)
    total.backward()
    for name, parameter in model.named_parameters():
        # The contrast is computed in float32.
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_an_id_is_replaced_with_the_probability_and_alike_in_any_part_of_the_batch(dataset: Dataset) -> None:
    model = build(dataset, items={**ITEMS, "replace_id": 0.3, "contrast": None})
    batch = batch_of(model, dataset, size=500)
    assert model(batch).auxiliary_losses == {}
    users = F.embedding(batch.users, model.users.embedding.weight)
    both = model.items(model.items.read(batch.items, model.items.present[batch.items]))
    by_id, by_content = (torch.einsum("bd,bnd->bn", users, part[both.inverse]) for part in (both.ids, both.contents))
    scores = model(batch).scores
    replaced = torch.isclose(scores, by_content)
    assert torch.equal(replaced, ~torch.isclose(scores, by_id))
    has_content = model.items.present[batch.items][..., 1:].any(-1)
    assert not replaced[~has_content].any()
    count = int(has_content.sum())
    # Five standard deviations of a mean of so many draws; an item's draws are alike within an example.
    assert float(replaced[has_content].double().mean()) == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / count) ** 0.5)
    model.eval()
    kept = hardest(model, batch, model.read(batch), 1)
    torch.testing.assert_close(model(kept).scores[:, 1], scores[:, 1:].amax(1))


@pytest.mark.parametrize(
    "hide", [frozenset(), frozenset({"id"}), frozenset({"tags", "cover"}), frozenset({"id", "tags", "cover"})]
)
def test_an_item_is_scored_by_its_id_or_else_its_content_or_else_by_nothing(dataset: Dataset, hide: frozenset[str]) -> None:
    model = build(dataset)
    items = torch.arange(dataset.items.count)
    hidden = Hidden("items", dict.fromkeys(hide, 1.0))
    embeddings = model.encode_items(items, hidden)
    zeros = 0
    for item in items.tolist():
        by_id, by_content = dense(model.items, dataset, item, hide)
        expected = by_id if by_id is not None else by_content
        zeros += expected is None
        torch.testing.assert_close(embeddings[item], torch.zeros(3).double() if expected is None else expected)
    assert zeros == model.without_modality(items=True, hidden=hidden)
    assert torch.equal(model.encode_users(torch.arange(5)), model.users.embedding.weight[:5])


def test_ids_hidden_in_training_are_neither_scored_nor_compared(dataset: Dataset) -> None:
    model = build(dataset, items={**ITEMS, "replace_id": 0.0})
    batch = batch_of(model, dataset, size=60, hide={"id": 1.0})
    output = model(batch)
    (output.scores.sum() + output.auxiliary_losses["items.info_nce"].sum()).backward()
    assert model.items.embedding.weight.grad is not None
    assert not model.items.embedding.weight.grad.any()
    assert model.items.content is not None
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.items.content.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": {"content": ["tagz"]}}, "model.items.content: the dataset's items have no feature tagz; did you mean tags"),
        ({"items": {"content": ["interactions"]}}, "model.items.content: the dataset's items have no feature interactions"),
        ({"items": {"content": ["tags", "tags"]}}, "model.items.content names a feature twice"),
        ({"items": {"content": []}}, "clcrec needs content of items or of users"),
        ({"items": {"content": ["tags"], "encoders": {"cover": {}}}}, "model.items.encoders: .* no modality cover"),
        ({"users": {"encoders": {"club": {}}}}, "model.users.encoders: .* no modality club"),
    ],
)
def test_what_cannot_be_built_is_told(dataset: Dataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(dataset, **changes)


def test_recipe_is_the_paper() -> None:
    config = load_config(TrainConfig, "clcrec", ["dataset=here"])
    assert isinstance(config.model, CLCRecConfig)
    assert (config.model.items.content, config.model.users.content, config.model.items.replace_id) == (None, (), 0.5)
