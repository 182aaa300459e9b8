import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor, nn

from sibra_dist.data.batches import stream
from sibra_dist.data.dataset import Csr, Entities, Feature
from sibra_dist.data.manifest import FeatureKind, FeatureSpec
from sibra_dist.data.transfer import map_tensors
from sibra_dist.data.user_batches import Shown
from sibra_dist.errors import ConfigError
from sibra_dist.models import bag_sums
from sibra_dist.models.bag_sums import bag_sum
from sibra_dist.models.encoder import Encoder, EncoderConfig
from sibra_dist.models.encoders import build_encoder, presence
from sibra_dist.models.histories import Entries
from sibra_dist.models.interactions import InteractionsEncoder
from sibra_dist.models.weighting import Weighting

KINDS = ("interactions", "id", "club", "tags", "numbers", "cover")
LAYERS = (
    EncoderConfig(),
    EncoderConfig(hidden_sizes=(7, 3), initialization="xavier_uniform"),
    EncoderConfig(activation=True, normalize="l2"),
    # Tags that are no tag at all are encoded as 0, which has no length to be divided by.
    EncoderConfig(hidden_sizes=(4,), initialization="xavier_uniform", activation=False, normalize="l2"),
    EncoderConfig(activation=False, normalize="layer"),
    EncoderConfig(hidden_sizes=(4,), activation=True, normalize="layer"),
)
OF_INTERACTIONS = (
    EncoderConfig(weighting="bm25"),
    EncoderConfig(weighting="raw", max_history=1),
    EncoderConfig(max_history=2, normalize="l2", hidden_sizes=(4,)),
)


def csr(dense: Tensor) -> Csr:
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    return Csr(indptr, torch.nonzero(dense)[:, 1].int())


def sides(dense: Tensor, weights: Tensor | None = None) -> tuple[Entities, Entities]:
    """Users and items of a dense 0/1 matrix; weights of its 1s, where wanted, from a matrix of the same shape."""

    def side(ones: Tensor, weights: Tensor | None) -> Entities:
        values = None if weights is None else weights[ones != 0].float()
        return Entities(len(ones), torch.zeros(len(ones), dtype=torch.int8), csr(ones), {}, values)

    return side(dense, weights), side(dense.T, None if weights is None else weights.T)


@pytest.fixture(scope="module")
def users() -> Entities:
    """Four users with every kind of feature; the last has no interaction, the second has tags that are no tag at all."""
    dense = torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    present = torch.tensor([True, True, False, True])
    generator = torch.Generator().manual_seed(4)

    def feature(name: str, kind: FeatureKind, size: int, values: Tensor | Csr) -> Feature:
        return Feature(FeatureSpec(name=name, kind=kind, size=size, missing=1), present, values)

    features = {
        "club": feature("club", "category", 3, torch.tensor([2, 0, 0, 1], dtype=torch.int32)),
        "tags": feature("tags", "tags", 4, csr(torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]))),
        "numbers": feature("numbers", "numeric", 2, torch.randn(4, 2, generator=generator)),
        "cover": feature("cover", "vector", 6, torch.randn(4, 6, generator=generator)),
    }
    return replace(sides(dense, torch.arange(1.0, 21).view(4, 5))[0], features=features)


@pytest.fixture(scope="module")
def items(users: Entities) -> Entities:
    dense = torch.zeros(4, 5)
    dense[torch.repeat_interleave(users.histories.lengths()), users.histories.indices.long()] = 1
    return sides(dense, torch.arange(1.0, 21).view(4, 5))[1]


def rows_read(encoder: InteractionsEncoder, *asked: Any) -> Tensor:
    """The dense rows that an encoder without layers reads: their product with an identity."""
    with torch.no_grad():
        weight, bias = encoder.table.weight.clone(), encoder.bias.clone()
        encoder.table.weight.copy_(torch.eye(len(weight)))
        encoder.bias.zero_()
        read: Tensor = encoder(*asked)
        encoder.table.weight.copy_(weight)
        encoder.bias.copy_(bias)
    return read


@pytest.mark.parametrize("form", ["transposed", "sorted", "drawn"])
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 5)),
    seed=st.integers(0, 1000),
    weighting=st.sampled_from(["binary", "raw"]),
    excludes=st.booleans(),
    data=st.data(),
)
def test_sums_and_gradient_are_those_of_dense_rows(
    form: str, shape: tuple[int, int], seed: int, weighting: Weighting, excludes: bool, data: st.DataObject
) -> None:
    """In float64, for the three forms of the backward pass, with empty rows and columns and no rows at all."""
    generator = torch.Generator().manual_seed(seed)
    dense = (torch.rand(shape, generator=generator) < 0.6).double()
    weights = torch.randint(1, 9, shape, generator=generator) / 4
    cap = data.draw(st.integers(1, shape[1]))
    config = EncoderConfig(weighting=weighting, max_history=cap if form == "drawn" else None, activation=False)
    table = torch.randn(shape[1], shape[1], dtype=torch.float64, generator=generator)
    encoder = InteractionsEncoder(*sides(dense, weights), shape[1], config).double()
    with torch.no_grad():
        encoder.table.weight.copy_(table)

    entities = torch.tensor(sorted(data.draw(st.sets(st.integers(0, shape[0] - 1)))), dtype=torch.int64)
    weighted = dense * (weights / weights[dense != 0].square().mean().sqrt())
    counts = weighted if weighting == "raw" and dense.any() else dense
    expected = counts[entities]
    excluded = None
    if excludes:
        # Each row whole, and once more for each entry without it.
        there, column = torch.nonzero(dense[entities], as_tuple=True)
        excluded = torch.cat([torch.full_like(entities, -1), column])
        entities = torch.cat([entities, entities[there]])
        expected = counts[entities]
        expected[torch.arange(len(there)) + len(expected) - len(there), column] = 0

    read = rows_read(encoder, entities, seed, excluded)
    if form == "drawn":
        available = (expected != 0).sum(1)
        assert torch.equal((read != 0).sum(1), available.clamp(max=cap))
        scale = (available / cap).clamp(min=1).double()
        expected = torch.where(read != 0, expected * scale[:, None], 0)
    torch.testing.assert_close(read, expected, rtol=1e-6, atol=0)  # what entries count is held in float32

    upstream = torch.randn(len(entities), shape[1], dtype=torch.float64, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bag_sums, "SORTING_COST", 1e9 if form == "transposed" else 0.0)
        sums = encoder(entities, seed, excluded)
        sums.backward(upstream)
    torch.testing.assert_close(sums, read @ table + encoder.bias)
    torch.testing.assert_close(encoder.table.weight.grad, read.T @ upstream)
    torch.testing.assert_close(encoder.bias.grad, upstream.sum(0))


@pytest.mark.parametrize("by_item", [False, True])
@pytest.mark.parametrize("weighting", ["binary", "raw"])
def test_only_what_is_shown_is_read(weighting: Weighting, by_item: bool) -> None:
    """Divided by the share that is shown, also rows of which nothing is, and with a gradient of what is read alone."""
    generator = torch.Generator().manual_seed(0)
    dense = (torch.rand(9, 6, generator=generator) < 0.7).float()
    dense[2] = 0
    weights = torch.randint(1, 9, dense.shape, generator=generator) / 4
    encoder = InteractionsEncoder(*sides(dense, weights), 6, EncoderConfig(weighting=weighting, activation=False))
    entities = torch.tensor([2, 8, 0, 5])
    shown = Shown(stream(5), 0.4, num_items=9 if by_item else 6, by_item=by_item)
    rows, columns = entities[:, None].expand(-1, 6).flatten(), torch.arange(6).repeat(4)
    mask = shown(rows, columns).view(4, 6)
    assert mask.any()
    assert not mask.all()
    read = rows_read(encoder, entities, 3, None, shown)
    torch.testing.assert_close(read, rows_read(encoder, entities) * mask / 0.4)
    upstream = torch.randn(4, 6, generator=generator)
    encoder(entities, 3, None, shown).backward(upstream)
    torch.testing.assert_close(encoder.table.weight.grad, read.T @ upstream)


def test_a_cap_draws_from_what_is_shown_and_keeps_the_mean() -> None:
    dense = torch.ones(3, 12)
    dense[1, 6:] = 0
    encoder = InteractionsEncoder(*sides(dense), 12, EncoderConfig(max_history=2, activation=False))
    entities, total, steps = torch.tensor([0, 1]), torch.zeros(2, 12), 2000
    for step in range(steps):
        shown = Shown(stream(step), 0.5, num_items=12)
        read = rows_read(encoder, entities, stream(step, 1), None, shown)
        assert ((read != 0).sum(1) <= 2).all()
        assert (shown(entities[:, None].expand(-1, 12).flatten(), torch.arange(12).repeat(2)).view(2, 12) | (read == 0)).all()
        total += read
    # An entry is there in about a sixth of the steps, and then counts about 6: five standard deviations.
    torch.testing.assert_close(total / steps, dense[:2], atol=5 * 2.4 / steps**0.5, rtol=0)


def test_interactions_encoder_is_a_linear_layer_and_relu() -> None:
    dense = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    encoder = InteractionsEncoder(*sides(dense), 5)
    assert set(encoder.state_dict()) == {"table.weight", "bias"}
    expected = torch.relu(F.linear(dense[[2, 0]], encoder.table.weight.T, encoder.bias))
    torch.testing.assert_close(encoder(torch.tensor([2, 0])), expected)


def test_values_are_transposed_and_not_read_from_the_other_side() -> None:
    """Weights that differ by direction: the gradient is that of what was read."""
    users, items = sides(torch.ones(2, 3), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    items = replace(items, weights=torch.full((6,), 100.0))
    encoder = InteractionsEncoder(users, items, 3, EncoderConfig(weighting="raw", activation=False))
    read = rows_read(encoder, torch.tensor([0, 1]))
    upstream = torch.tensor([[1.0, 0, 2], [0, 3, 0]])
    encoder(torch.tensor([0, 1])).backward(upstream)
    torch.testing.assert_close(encoder.table.weight.grad, read.T @ upstream)


ROW_LENGTH, CAP, NUM_ROWS = 6, 3, 20_000


@pytest.fixture(scope="module")
def capped() -> InteractionsEncoder:
    users, items = sides(torch.ones(NUM_ROWS, ROW_LENGTH))
    return InteractionsEncoder(users, items, ROW_LENGTH, EncoderConfig(max_history=CAP, activation=False))


@pytest.mark.parametrize("excluded", [None, 4])
def test_every_choice_of_entries_is_drawn_equally_often(capped: InteractionsEncoder, excluded: int | None) -> None:
    there = [column for column in range(ROW_LENGTH) if column != excluded]
    left_out = None if excluded is None else torch.full((NUM_ROWS,), excluded)
    read = rows_read(capped, torch.arange(NUM_ROWS), 3, left_out)
    assert read.unique().tolist() == [0, pytest.approx(len(there) / CAP)]
    drawn = ((read != 0).long() << torch.arange(ROW_LENGTH)).sum(1)
    counts = [int((drawn == sum(1 << column for column in choice)).sum()) for choice in combinations(there, CAP)]
    assert sum(counts) == NUM_ROWS
    assert chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(("length", "cap"), [(5, 2), (7, 3), (11, 1), (50, 49)])
def test_every_entry_of_a_row_is_drawn_equally_often(length: int, cap: int) -> None:
    """So the expected sum is that of the whole row, of lengths too that the permutation has to walk cycles for."""
    encoder = InteractionsEncoder(*sides(torch.ones(NUM_ROWS, length)), length, EncoderConfig(max_history=cap))
    drawn = (rows_read(encoder, torch.arange(NUM_ROWS), 5) != 0).sum(0)
    assert int(drawn.sum()) == NUM_ROWS * cap
    assert chisquare(drawn).pvalue > 0.01


def test_a_row_has_the_same_draw_in_any_batch_and_another_in_another_step(capped: InteractionsEncoder) -> None:
    rows, left_out = torch.arange(50), torch.arange(50) % ROW_LENGTH
    read = rows_read(capped, rows, 3, left_out)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]
    assert torch.equal(rows_read(capped, rows[order], 3, left_out[order]), read[order])
    assert torch.equal(rows_read(capped, rows, 3, torch.full((50,), -1)), rows_read(capped, rows, 3))
    for other in (rows_read(capped, rows, 4, left_out), rows_read(capped, rows + 50, 3, left_out)):
        # Of 10 choices each row makes the same one with probability 0.1.
        assert int((other == read).all(1).sum()) < 20
    without_first = rows_read(capped, rows, 3, torch.full((50,), 0))[:, 1:]
    without_last = rows_read(capped, rows, 3, torch.full((50,), ROW_LENGTH - 1))[:, :-1]
    assert int((without_first == without_last).all(1).sum()) < 20


def test_evaluation_and_short_rows_read_all(users: Entities, items: Entities) -> None:
    capped = InteractionsEncoder(users, items, 5, EncoderConfig(max_history=3))
    whole = InteractionsEncoder(users, items, 5)
    whole.load_state_dict(capped.state_dict())
    assert torch.equal(capped(torch.arange(4)), whole(torch.arange(4)))
    torch.testing.assert_close(capped(torch.tensor([0, 1, 3]), 7), whole(torch.tensor([0, 1, 3])))
    assert not torch.equal(capped(torch.tensor([2]), 7), whole(torch.tensor([2])))


def textbook(weighting: Weighting, weights: Tensor) -> Tensor:
    """What entries count by the formulas, entry by entry, before they are scaled."""
    documents = sum(1 for row in weights.tolist() if any(row))
    lengths = [sum(row) for row in weights.tolist()]
    mean_length = sum(lengths) / documents
    values = torch.zeros_like(weights)
    for row, column in torch.nonzero(weights).tolist():
        w, n = float(weights[row, column]), int((weights[:, column] > 0).sum())
        if weighting == "raw":
            values[row, column] = w
        elif weighting == "log":
            values[row, column] = math.log(1 + w)
        elif weighting == "tf_idf":
            values[row, column] = math.sqrt(w) * (1 + math.log((1 + documents) / (1 + n)))
        else:
            idf = math.log(1 + (documents - n + 0.5) / (n + 0.5))
            values[row, column] = w / (w + 1.2 * (0.25 + 0.75 * lengths[row] / mean_length)) * idf
    return values


@pytest.mark.parametrize(
    ("weighting", "weighted"),
    [("raw", True), ("log", True), ("tf_idf", True), ("tf_idf", False), ("bm25", True), ("bm25", False)],
)
def test_weightings_are_their_formulas_with_a_mean_square_of_one(weighting: Weighting, weighted: bool) -> None:
    weights = torch.tensor([[4.0, 0, 1, 0.25], [0, 0, 0, 0], [9, 1, 1, 0], [0, 16, 2.25, 1]])
    if not weighted:
        weights = (weights > 0).float()
    entities, other = sides((weights > 0).float(), weights if weighted else None)
    read = []
    for side, dense in (((entities, other), weights), ((other, entities), weights.T)):
        encoder = InteractionsEncoder(*side, 4, EncoderConfig(weighting=weighting, activation=False))
        expected = textbook(weighting, dense)
        expected /= expected[dense > 0].square().mean().sqrt()
        read.append(rows_read(encoder, torch.arange(4)))
        torch.testing.assert_close(read[-1], expected)
    assert torch.allclose(read[0], read[1].T) == (weighting in ("raw", "log"))


def test_weights_that_are_all_one_make_a_binary_row() -> None:
    dense = torch.tensor([[1.0, 0, 1], [1, 1, 1]])
    for weighting in ("raw", "log"):
        encoder = InteractionsEncoder(*sides(dense, dense), 3, EncoderConfig(weighting=weighting, activation=False))
        torch.testing.assert_close(rows_read(encoder, torch.arange(2)), dense)


def test_weights_of_zero_and_no_interactions_are_finite() -> None:
    for dense, weights in ((torch.ones(2, 3), torch.zeros(2, 3)), (torch.zeros(2, 3), torch.zeros(2, 3))):
        for weighting in ("raw", "log", "tf_idf", "bm25"):
            encoder = InteractionsEncoder(*sides(dense, weights), 3, EncoderConfig(weighting=weighting))
            assert rows_read(encoder, torch.arange(2)).eq(0).all()


CASES = [
    *((name, config) for name in KINDS for config in LAYERS),
    *(("interactions", config) for config in OF_INTERACTIONS),
]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_parameter_has_a_finite_gradient_whatever_the_batch(
    name: str, config: EncoderConfig, users: Entities, items: Entities
) -> None:
    """No rows at all, rows without any entry, and ordinary ones, in evaluation and in a training step."""
    encoder = build_encoder(name, users, items, 5, config)
    batches: list[tuple[Tensor, Tensor | None]] = [(torch.tensor(rows, dtype=torch.int64), None) for rows in ([], [1], [0, 3])]
    if name == "interactions":
        batches += [(torch.tensor([3]), torch.tensor([-1])), (torch.tensor([1]), torch.tensor([3]))]
        batches += [(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))]
    for entities, excluded in batches:
        for key in (None, 8):
            encoder.zero_grad(set_to_none=True)
            encoded = encoder(entities, key, excluded)
            assert encoded.shape == (len(entities), 5)
            (encoded * torch.arange(5)).sum().backward()
            for parameter in encoder.parameters():
                assert parameter.grad is not None
                assert parameter.grad.abs().lt(1e6).all()


@pytest.mark.parametrize(("name", "config"), CASES)
def test_layers_are_as_configured(name: str, config: EncoderConfig, users: Entities, items: Entities) -> None:
    """By dense arithmetic, from the parameters alone."""
    encoder = build_encoder(name, users, items, 5, config)
    linears = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    entities = torch.tensor([0, 3])
    parameters = dict(encoder.named_parameters())
    if name == "interactions":
        assert isinstance(encoder, InteractionsEncoder)
        linear_only = build_encoder(name, users, items, 5, EncoderConfig(weighting=config.weighting, activation=False))
        assert isinstance(linear_only, InteractionsEncoder)
        expected = rows_read(linear_only, entities) @ encoder.table.weight + encoder.bias
    elif name == "id":
        expected = parameters["embedding.weight"][entities]
    elif name == "club":
        expected = parameters["embedding.weight"][[2, 1]]
    elif name == "tags":
        expected = torch.stack([parameters["embedding.weight"][[0, 2, 3]].sum(0), parameters["embedding.weight"][1]])
    else:
        values = users.features[name].values
        assert isinstance(values, Tensor)
        expected = linears.pop(0)(values[entities])
    assert [linear.out_features for linear in linears] == [*config.hidden_sizes[1:], *[5][: len(config.hidden_sizes)]]
    for linear in linears:
        expected = torch.relu(expected) @ linear.weight.T + linear.bias
    if config.activation is True or (config.activation is None and name in ("interactions", "numbers", "cover")):
        expected = torch.relu(expected)
    if config.normalize == "l2":
        expected = F.normalize(expected)
    elif config.normalize == "layer":
        (norm,) = (module for module in encoder.modules() if isinstance(module, nn.LayerNorm))
        with torch.no_grad():
            norm.weight.copy_(torch.arange(5))
            norm.bias.copy_(torch.arange(5) - 3)
        centred = expected - expected.mean(1, keepdim=True)
        expected = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt() * torch.arange(5) + torch.arange(5) - 3
    torch.testing.assert_close(encoder(entities), expected)


def test_initial_values_are_those_of_torch(users: Entities, items: Entities) -> None:
    torch.manual_seed(3)
    encoders = {name: build_encoder(name, users, items, 5, EncoderConfig()) for name in KINDS if name != "id"}
    torch.manual_seed(3)
    bound = 1 / math.sqrt(5)
    expected: dict[str, list[Tensor]] = {
        "interactions": [torch.empty(5, 5).uniform_(-bound, bound), torch.empty(5).uniform_(-bound, bound)],
        "club": list(nn.Embedding(3, 5).parameters()),
        "tags": list(nn.Embedding(4, 5).parameters()),
        "numbers": list(nn.Linear(2, 5).parameters()),
        "cover": list(nn.Linear(6, 5).parameters()),
    }
    for name, encoder in encoders.items():
        for found, wanted in zip(sorted(encoder.parameters(), key=Tensor.dim, reverse=True), expected[name], strict=True):
            assert torch.equal(found, wanted), name


def test_xavier_fills_its_range_and_biases_are_zero() -> None:
    users, items = sides(torch.ones(3, 200))
    encoder = InteractionsEncoder(users, items, 30, EncoderConfig(hidden_sizes=(40,), initialization="xavier_uniform"))
    (linear,) = (module for module in encoder.modules() if isinstance(module, nn.Linear))
    for weight, bias, fans in ((encoder.table.weight, encoder.bias, 240), (linear.weight, linear.bias, 70)):
        bound = math.sqrt(6 / fans)
        assert bound * 0.99 < float(weight.detach().abs().max()) <= bound
        assert bias.eq(0).all()


def test_elements_of_a_vector_are_dropped_in_training_alone(users: Entities, items: Entities) -> None:
    encoder = build_encoder("cover", users, items, 6, EncoderConfig(input_dropout=0.25, activation=False))
    assert isinstance(encoder.linear, nn.Linear)
    with torch.no_grad():
        encoder.linear.weight.copy_(torch.eye(6))
        encoder.linear.bias.zero_()
    cover, entities = users.features["cover"].values, torch.arange(4)
    assert isinstance(cover, Tensor)
    assert torch.equal(encoder(entities), cover)
    seen = torch.stack([encoder(entities, stream(step)) for step in range(400)])
    kept = seen != 0
    torch.testing.assert_close(seen[kept], (cover / 0.75).expand_as(seen)[kept])
    assert torch.allclose(kept.float().mean(0), torch.tensor(0.75), atol=0.1)
    # The mask is that of the entity, in whatever batch; another feature has another.
    assert torch.equal(encoder(torch.tensor([2, 0]), stream(7)), seen[7][[2, 0]])
    feature = users.features["cover"]
    other = replace(users, features={"back": replace(feature, spec=feature.spec.model_copy(update={"name": "back"}))})
    same = build_encoder("back", other, items, 6, EncoderConfig(input_dropout=0.25, activation=False))
    same.load_state_dict(encoder.state_dict())
    assert not torch.equal(same(entities, stream(7)), seen[7])


def test_id_embeddings_have_length_one_on_average(items: Entities) -> None:
    users = Entities(2000, torch.zeros(2000, dtype=torch.int8), csr(torch.ones(2000, 1)), {})
    torch.manual_seed(0)
    for width in (8, 64):
        encoded = build_encoder("id", users, items, width, EncoderConfig())(torch.arange(2000))
        assert float(encoded.detach().square().sum(1).mean()) == pytest.approx(1, rel=0.05)


def test_who_has_a_modality(users: Entities) -> None:
    for name in ("interactions", "id"):
        assert presence(name, users).tolist() == [True, True, True, False]
    assert presence("club", users).tolist() == [True, True, False, True]


def test_encoders_share_the_memory_of_the_dataset(users: Entities, items: Entities) -> None:
    """What an encoder holds besides its parameters is the dataset's, so that a device has it once."""
    encoder = build_encoder("interactions", users, items, 5, EncoderConfig(max_history=2))
    matrices = (users.histories, items.histories)
    assert held(encoder) == {part.data_ptr() for matrix in matrices for part in (matrix.indptr, matrix.indices)}
    for name in ("club", "tags", "cover"):
        values = users.features[name].values
        parts = (values,) if isinstance(values, Tensor) else (values.indptr, values.indices)
        assert held(build_encoder(name, users, items, 5, EncoderConfig())) == {part.data_ptr() for part in parts}


def held(encoder: Encoder) -> set[int]:
    """Where the tensors lie that are attributes of an encoder, at any depth."""
    found: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        found.add(tensor.data_ptr())
        return tensor

    map_tensors({name: value for name, value in vars(encoder).items() if name not in vars(nn.Module())}, note)
    return found | {buffer.data_ptr() for buffer in encoder.buffers()}


@pytest.mark.parametrize(("name", "config"), CASES)
def test_an_encoder_is_built_without_memory_for_parameters(
    name: str, config: EncoderConfig, users: Entities, items: Entities
) -> None:
    real = build_encoder(name, users, items, 5, config)
    with torch.device("meta"):
        encoder = build_encoder(name, users, items, 5, config)
    assert {key: value.shape for key, value in encoder.state_dict().items()} == {
        key: value.shape for key, value in real.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert not any(buffer.is_meta for buffer in encoder.buffers())


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("tags", EncoderConfig(weighting="log"), r"model\.users\.encoders\.tags\.weighting: only interactions"),
        ("id", EncoderConfig(max_history=3), r"model\.users\.encoders\.id\.max_history: only interactions"),
        ("club", EncoderConfig(input_dropout=0.5), r"encoders\.club\.input_dropout: only numbers and vectors"),
        ("interactions", EncoderConfig(input_dropout=0.5), r"encoders\.interactions\.input_dropout: only numbers and vectors"),
        ("club", EncoderConfig(initialization="xavier_uniform"), r"encoders\.club\.initialization: there is no linear layer"),
        ("clubs", EncoderConfig(), r"encoders\.clubs: there is no such modality; did you mean club"),
    ],
)
def test_what_a_modality_does_not_have_is_refused(
    name: str, config: EncoderConfig, message: str, users: Entities, items: Entities
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(name, users, items, 5, config, "model.users.encoders")


def test_a_weighting_that_the_weights_do_not_allow_is_refused() -> None:
    dense = torch.ones(2, 2)
    for weighting in ("raw", "log"):
        with pytest.raises(ConfigError, match=rf"items\.encoders\.interactions\.weighting: {weighting} is made of"):
            build_encoder("interactions", *sides(dense), 5, EncoderConfig(weighting=weighting), "items.encoders")
    weights = torch.tensor([[1.0, -2], [1, 1]])
    for weighting in ("log", "tf_idf", "bm25"):
        with pytest.raises(ConfigError, match=rf"{weighting} needs weights from 0 on, and the dataset has -2; choose raw"):
            build_encoder("interactions", *sides(dense, weights), 5, EncoderConfig(weighting=weighting))
    raw = EncoderConfig(weighting="raw", activation=False)
    encoder = InteractionsEncoder(*sides(dense, weights), 2, raw)
    torch.testing.assert_close(rows_read(encoder, torch.arange(2)), weights / math.sqrt(7 / 4))


@pytest.mark.parametrize("width", [32, 40, 100, 256])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_some_columns_at_a_time_have_the_same_bits(width: int, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(50, width, generator=generator)
    columns = torch.randint(50, (4000,), generator=generator, dtype=torch.int32)
    starts = torch.arange(0, 4000, 40)
    entries = Entries(columns, starts, torch.rand(4000, generator=generator) if weighted else None)

    def found(uncached: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(bag_sums, "UNCACHED_BYTES", uncached)
        weight = table.clone().requires_grad_()
        sums = bag_sum(weight, entries)
        # A gradient that does not lie in rows, as that of a transposed product.
        (sums.T @ torch.randn(len(starts), 3, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        assert weight.grad is not None
        return sums.detach(), weight.grad

    assert all(map(torch.equal, found(0), found(2**40)))
