"""Every recipe of the family against the formulas of its paper, computed densely in float64, example by example."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.config import load_config, validate
from sibra_dist.data.batches import Batches, TrainBatch
from sibra_dist.data.dataset import Csr, Dataset, open_dataset
from sibra_dist.data.presence import Hidden
from sibra_dist.errors import ConfigError
from sibra_dist.models import build_model
from sibra_dist.models.interactions import InteractionsEncoder, InteractionsRead
from sibra_dist.models.single_branch import SingleBranch, SingleBranchConfig
from sibra_dist.training.config import TrainConfig
from tests.planted import write_planted

SIDE = {"input_size": 8, "hidden_sizes": [6, 6], "input_dropout": 0.0}
SMALL = {"type": "single_branch", "embedding_size": 5, "users": SIDE, "items": {**SIDE, "draws": 2}}
CONTRAST = {"weight": 0.5, "temperature": 0.2}
DEEP = ("input_size=8", "hidden_sizes=[6,6]", "input_dropout=0")
SHALLOW = ("input_size=8", "input_dropout=0")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("branch") / "dataset", protocol="cold_item"))


def build(dataset: Dataset, **changes: object) -> SingleBranch:
    model = build_model(validate(SingleBranchConfig, {**SMALL, **changes}, "test"), dataset, seed=1)
    assert isinstance(model, SingleBranch)
    return model


def from_recipe(name: str, dataset: Dataset, side: tuple[str, ...], *changes: str) -> SingleBranch:
    """The model of a packaged recipe, made small."""
    both = [f"model.{which}.{change}" for which in ("users", "items") for change in side]
    settings = ["dataset=here", "model.embedding_size=5", *both, *changes]
    model = build_model(load_config(TrainConfig, name, settings).model, dataset, seed=1)
    assert isinstance(model, SingleBranch)
    return model


def batch_of(model: SingleBranch, dataset: Dataset, size: int = 12, negatives: int = 2) -> TrainBatch:
    return Batches(dataset, *model.sampling(), seed=3, batch_size=size, negatives=negatives).batch(0, 0)


# The papers, densely.


def interactions_row(dataset: Dataset, side: str, entity: int) -> Tensor:
    entities, width = (dataset.users, dataset.items.count) if side == "users" else (dataset.items, dataset.users.count)
    row = torch.zeros(width, dtype=torch.float64)
    row[entities.histories.gather(torch.tensor([entity]))[0].long()] = 1
    return row


def encoding(model: SingleBranch, dataset: Dataset, side: str, name: str, entity: int, excluded: int | None = None) -> Tensor:
    """z_m = f_m(x_m(e))."""
    encoder = getattr(model, side).encoders[name]
    if name == "interactions":
        row = interactions_row(dataset, side, entity)
        if excluded is not None:
            assert row[excluded] == 1
            row[excluded] = 0
        return torch.relu(row @ encoder.table.weight + encoder.bias)
    values = (dataset.users if side == "users" else dataset.items).features[name].values
    if name == "club":
        return F.one_hot(values[entity].long(), 4).double() @ encoder.embedding.weight
    if name == "tags":
        assert isinstance(values, Csr)
        return F.one_hot(values.gather(torch.tensor([entity]))[0].long(), 5).double().sum(0) @ encoder.embedding.weight
    return torch.relu(encoder.linear.weight @ values[entity].double() + encoder.linear.bias)


def sibrar_branch(layers: torch.nn.Sequential, z: Tensor) -> Tensor:
    """g in evaluation: of a vector of length 1, linear, ReLU, linear, batch normalisation, ReLU, linear, ReLU."""
    first, second, norm, third = layers[0], layers[2], layers[3], layers[5]
    hidden = torch.relu(first.weight @ (z / z.norm()) + first.bias)
    hidden = second.weight @ hidden + second.bias
    mean, variance = (norm.running_mean / norm.seen, norm.running_var / norm.seen) if norm.seen else (0.0, torch.ones(()))
    hidden = (hidden - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    return torch.relu(third.weight @ torch.relu(hidden) + third.bias)


def linear_branch(layers: torch.nn.Sequential, z: Tensor) -> Tensor:
    """g of CoBraR and DMF with no hidden layer."""
    (only,) = layers
    return only.weight @ z + only.bias


def branch_of(model: SingleBranch, side: str) -> torch.nn.Sequential:
    """The same layers for both sides where the model shares them."""
    if hasattr(model, "branch"):
        return model.branch.layers
    return (model.user_branch if side == "users" else model.item_branch).layers


def dot(user: Tensor, item: Tensor) -> Tensor:
    return user @ item


def cosine(user: Tensor, item: Tensor) -> Tensor:
    """The logit of max(cos, mu), which stays as far from 1 as from 0."""
    probability = (user @ item / (user.norm() * item.norm())).clamp(1e-6, 1 - 1e-6)
    return torch.log(probability / (1 - probability))


Branch = Callable[[torch.nn.Sequential, Tensor], Tensor]
Paper = tuple[str, tuple[str, ...], tuple[str, ...], Branch, Callable[[Tensor, Tensor], Tensor]]
PAPERS: dict[str, Paper] = {
    "SiBraR, cold items": ("sibrar-cold-item", DEEP, (), sibrar_branch, dot),
    "SiBraR, warm": ("sibrar-warm", DEEP, (), sibrar_branch, dot),
    "SiBraR, without leaving out": ("sibrar-cold-item", DEEP, ("model.exclude_target=false",), sibrar_branch, dot),
    "CoBraR, cosine": ("cobrar", SHALLOW, (), linear_branch, cosine),
    "CoBraR, sigmoid": ("cobrar", SHALLOW, ("model.score=dot",), linear_branch, dot),
    "DMF": ("dmf", SHALLOW, (), linear_branch, cosine),
    "universal": ("universal", DEEP, (), sibrar_branch, dot),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_recipe_is_the_function_of_its_paper(paper: str, dataset: Dataset) -> None:
    """Scores of a batch, and the gradient of a random combination of them with respect to every parameter."""
    recipe, side, changes, g, score = PAPERS[paper]
    model = from_recipe(recipe, dataset, side, *changes).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(generator=torch.Generator().manual_seed(1))
            module.running_var.fill_(1.5)
            module.seen.fill_(0.75)
    batch = batch_of(model, dataset)
    combination = torch.randn(batch.items.shape, generator=torch.Generator().manual_seed(0)).double()
    scores = model(batch).scores
    (scores * combination).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    def embed(which: str, entity: int, drawn: list[int], excluded: int | None) -> Tensor:
        encoders = getattr(model, which)
        inputs = [
            encoders.unknown[0]
            if modality == len(encoders.modalities)
            else encoding(model, dataset, which, encoders.modalities[modality], entity, excluded)
            for modality in drawn
            if modality >= 0
        ]
        return torch.stack([g(branch_of(model, which), one) for one in inputs]).mean(0)

    expected = torch.zeros_like(scores)
    for b, user in enumerate(batch.users.tolist()):
        target = int(batch.items[b, 0]) if model.config.exclude_target else None
        embedded = embed("users", user, batch.user_modalities[b].tolist(), target)
        for n, item in enumerate(batch.items[b].tolist()):
            asked = user if model.config.exclude_target and n == 0 else None
            expected[b, n] = score(embedded, embed("items", item, batch.item_modalities[b, n].tolist(), asked))
    torch.testing.assert_close(scores, expected)
    (expected * combination).sum().backward()
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], wanted, msg=name)


ITEM_SIDE = {"encoders.of_interactions.table.weight": (60, 8), "encoders.of_interactions.bias": (8,), "unknown": (1, 8)}
USER_SIDE = {"encoders.of_interactions.table.weight": (80, 8), "encoders.of_interactions.bias": (8,), "unknown": (1, 8)}
ITEM_FEATURES = {
    "encoders.of_tags.embedding.weight": (5, 8),
    "encoders.of_cover.linear.weight": (8, 6),
    "encoders.of_cover.linear.bias": (8,),
}
DEEP_BRANCH = {
    "layers.0.weight": (6, 8),
    "layers.0.bias": (6,),
    "layers.2.weight": (6, 6),
    "layers.2.bias": (6,),
    "layers.3.weight": (6,),
    "layers.3.bias": (6,),
    "layers.5.weight": (5, 6),
    "layers.5.bias": (5,),
}
LINEAR_BRANCH = {"layers.0.weight": (5, 8), "layers.0.bias": (5,)}
PARTS = {
    "sibrar-cold-item": {
        "users": USER_SIDE,
        "items": ITEM_SIDE | ITEM_FEATURES,
        "user_branch": DEEP_BRANCH,
        "item_branch": DEEP_BRANCH,
    },
    "cobrar": {"users": USER_SIDE, "items": ITEM_SIDE, "branch": LINEAR_BRANCH},
    "dmf": {"users": USER_SIDE, "items": ITEM_SIDE, "user_branch": LINEAR_BRANCH, "item_branch": LINEAR_BRANCH},
    "universal": {
        "users": USER_SIDE | {"encoders.of_club.embedding.weight": (4, 8)},
        "items": ITEM_SIDE | ITEM_FEATURES,
        "branch": DEEP_BRANCH,
    },
}


@pytest.mark.parametrize("recipe", PARTS)
def test_recipe_has_the_parameters_of_its_paper(recipe: str, dataset: Dataset) -> None:
    """Besides them, one: the learned input of an entity of which nothing is there."""
    model = from_recipe(recipe, dataset, SHALLOW if recipe in ("cobrar", "dmf") else DEEP)
    expected = {f"{part}.{name}": shape for part, names in PARTS[recipe].items() for name, shape in names.items()}
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == expected


# What the class adds up from.


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("hidden", [{}, {"interactions": 1.0}, {"tags": 1.0, "club": 0.5}], ids=str)
def test_embedding_is_the_aggregate_over_what_is_present(dataset: Dataset, hidden: dict[str, float], how: str) -> None:
    side = {**SIDE, "aggregation": how}
    model = build(dataset, users=side, items=side).double().eval()
    for which, encode, entities in (
        ("users", model.encode_users, dataset.users),
        ("items", model.encode_items, dataset.items),
    ):
        taken = Hidden(which, hidden, seed=3)
        names = getattr(model, which).modalities
        chosen = torch.tensor([0, 7, 35, entities.count - 1])
        visible = taken.visible(names, chosen)
        for row, (entity, embedding) in enumerate(zip(chosen.tolist(), encode(chosen, taken), strict=True)):
            there = [
                name
                for column, name in enumerate(names)
                if visible[row, column]
                and (
                    entities.histories.lengths()[entity] > 0
                    if name == "interactions"
                    else entities.features[name].present[entity]
                )
            ]
            inputs = [encoding(model, dataset, which, name, entity) for name in there] or [getattr(model, which).unknown[0]]
            stack = torch.stack([sibrar_branch(branch_of(model, which), one) for one in inputs])
            torch.testing.assert_close(embedding, stack.mean(0) if how == "mean" else stack.amax(0))


def test_an_entity_with_nothing_present_has_the_learned_unknown(dataset: Dataset) -> None:
    model = build(dataset).eval()
    everything = Hidden("items", dict.fromkeys(model.items.modalities, 1.0))
    embeddings = model.encode_items(torch.arange(dataset.items.count), everything)
    assert torch.equal(embeddings, embeddings[:1].expand_as(embeddings))
    assert model.without_modality(items=True, hidden=everything) == dataset.items.count
    assert model.without_modality(items=True) == 0
    # Item 0 has neither tags nor a cover: without interactions nothing is left of it.
    assert model.without_modality(items=True, hidden=Hidden("items", {"interactions": 1.0})) == 3


def test_without_a_branch_the_encodings_are_the_embeddings(dataset: Dataset) -> None:
    plain = {"modalities": ["interactions"], "input_size": 5, "hidden_sizes": None, "normalize_input": False}
    model = build(dataset, users=plain).double().eval()
    found = model.encode_users(torch.tensor([4, 9]))
    torch.testing.assert_close(found, torch.stack([encoding(model, dataset, "users", "interactions", user) for user in (4, 9)]))
    assert not list(model.user_branch.parameters())


def test_id_is_a_modality(dataset: Dataset) -> None:
    model = build(dataset, items={**SIDE, "modalities": ["id", "tags"]}).eval()
    assert model.items.encoders["id"](torch.tensor([0, 79])).shape == (2, 8)
    trained = dataset.items.histories.lengths() > 0
    assert model.items.present[:, 0].tolist() == trained.tolist()
    assert not trained.all()


def test_each_distinct_pair_is_encoded_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dataset)
    calls: list[Tensor] = []
    original = InteractionsEncoder.read

    def counted(self: InteractionsEncoder, entities: Tensor, *others: object) -> InteractionsRead:
        calls.append(entities)
        return original(self, entities, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(InteractionsEncoder, "read", counted)
    batch = batch_of(model, dataset, size=200, negatives=4)
    model(batch)
    assert len(calls) == 2
    for entities in calls:
        assert len(entities.unique()) == len(entities)
    drawn = batch.items[..., None].expand_as(batch.item_modalities)[batch.item_modalities == 0]
    assert set(calls[1].tolist()) == set(drawn.tolist())


def test_a_shared_branch_sees_both_sides_in_one_normalisation(dataset: Dataset) -> None:
    """As in evaluation, where there is one set of running statistics."""
    model = build(dataset, share_branch=True).train()
    batch = batch_of(model, dataset)
    inputs: list[int] = []
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d))
    norm.register_forward_hook(lambda module, arguments, output: inputs.append(len(arguments[0])))
    model(batch)
    users = model.users.rows(batch.users, batch.user_modalities)
    items = model.items.rows(batch.items, batch.item_modalities)
    assert inputs == [len(users.names) + len(items.names)]


@pytest.mark.parametrize("items", [["tags"], ["interactions"], ["tags", "cover"]])
def test_a_model_restricted_to_some_modalities_trains(dataset: Dataset, items: list[str]) -> None:
    """Also where items lack all of them, and where there are fewer than the contrast compares."""
    model = build(
        dataset,
        items={**SIDE, "modalities": items, "draws": 2, "contrast": CONTRAST},
        users={**SIDE, "modalities": ["club"]},
        exclude_target=True,
    )
    output = model(batch_of(model, dataset, size=200, negatives=3))
    (output.scores.sum() + output.auxiliary_losses["items.info_nce"].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
    assert model.without_modality(items=True) > 0


def view(model: SingleBranch, dataset: Dataset, side: str, entity: int, drawn: list[int], slot: int) -> Tensor:
    """h_m of the modality in a slot, or of the first where the slot is not used."""
    encoders = getattr(model, side)
    modality = drawn[slot] if drawn[slot] >= 0 else drawn[0]
    known = modality < len(encoders.modalities)
    z = encoding(model, dataset, side, encoders.modalities[modality], entity) if known else encoders.unknown[0]
    return sibrar_branch(branch_of(model, side), z)


def textbook_info_nce(a: Tensor, b: Tensor) -> Tensor:
    """Both directions, each example by itself: [n]."""
    logits, target = a @ b.T / CONTRAST["temperature"], torch.arange(len(a))
    rows = F.cross_entropy(logits, target, reduction="none")
    return rows + F.cross_entropy(logits.T, target, reduction="none")


@pytest.mark.parametrize("central", [None, "cover"])
def test_contrast_of_items_is_within_an_example(dataset: Dataset, central: str | None) -> None:
    contrast = {**CONTRAST, "central": central}
    model = build(dataset, items={**SIDE, "draws": 2, "contrast": contrast}).double().eval()
    batch = batch_of(model, dataset, size=5, negatives=3)
    expected = []
    for items, drawn in zip(batch.items.tolist(), batch.item_modalities.tolist(), strict=True):
        a, b = (
            torch.stack([view(model, dataset, "items", item, d, slot) for item, d in zip(items, drawn, strict=True)])
            for slot in (0, 1)
        )
        expected.append(0.5 * textbook_info_nce(a, b).mean())
    torch.testing.assert_close(
        model(batch).auxiliary_losses["items.info_nce"].double(), torch.stack(expected), rtol=1e-5, atol=1e-6
    )
    if central:
        number = model.items.modalities.index(central)
        has = dataset.items.features[central].present[batch.items]
        assert has.any()
        assert (batch.item_modalities[..., 0][has] == number).all()


def test_one_modality_is_contrasted_with_itself(dataset: Dataset) -> None:
    """Also where all are drawn, so that there is one slot."""
    side = {**SIDE, "modalities": ["interactions"], "contrast": CONTRAST}
    drawn = [build(dataset, users={**side, "draws": draws}).double().eval() for draws in ("all", 2)]
    losses = [model(batch_of(model, dataset)).auxiliary_losses["users.info_nce"] for model in drawn]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("name", ["type", "training", "items", "half"])
def test_a_feature_may_have_any_name(dataset: Dataset, name: str) -> None:
    """`torch.nn.Module` has attributes of these names."""
    renamed = replace(dataset.items, features={name: dataset.items.features["cover"]})
    model = build(replace(dataset, items=renamed), items={**SIDE, "draws": "all"})
    assert model.items.modalities == ("interactions", name)
    assert f"items.encoders.of_{name}.linear.weight" in dict(model.named_parameters())
    assert model.encode_items(torch.arange(3)).isfinite().all()


def test_contrast_of_users_is_over_the_batch(dataset: Dataset) -> None:
    model = build(dataset, users={**SIDE, "draws": 2, "contrast": CONTRAST}).double().eval()
    batch = batch_of(model, dataset, size=9)
    a, b = (
        torch.stack(
            [
                view(model, dataset, "users", user, drawn, slot)
                for user, drawn in zip(batch.users.tolist(), batch.user_modalities.tolist(), strict=True)
            ]
        )
        for slot in (0, 1)
    )
    found = model(batch).auxiliary_losses["users.info_nce"].double()
    torch.testing.assert_close(found, 0.5 * textbook_info_nce(a, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"users": {"modalities": ["interactionz"]}},
            "model.users.modalities: the dataset's users have no interactionz; did you mean interactions",
        ),
        ({"items": {"modalities": []}}, "model.items.modalities must name at least one"),
        ({"items": {"modalities": ["tags", "tags"]}}, "each only once"),
        ({"items": {"contrast": {}}}, "contrast compares two modalities"),
        (
            {"items": {"draws": 2, "contrast": {"central": "tag"}}},
            r"model.items.contrast.central: .* tag there; did you mean tags",
        ),
        ({"items": {"modality_dropout": {"club": 0.5}}}, r"model.items.modality_dropout: the model reads no modality club"),
        ({"items": {"encoders": {"coverr": {}}}}, r"model.items.encoders: .* coverr there; did you mean cover"),
        ({"users": {"hidden_sizes": None}}, r"users.hidden_sizes is null.*users.input_size to the embedding_size \(5\)"),
        ({"share_branch": True, "items": {"hidden_sizes": [6]}}, "set users.input_size and items.input_size alike"),
        ({"users": {"modality_dropout": {"club": 1.0}}}, "less than 1"),
    ],
)
def test_what_cannot_be_built_is_told(dataset: Dataset, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(dataset, **changes)
