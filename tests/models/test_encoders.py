import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sibra_dist.data.dataset import Csr, Entities
from sibra_dist.models import encoders
from sibra_dist.models.encoders import BagSum, InteractionsEncoder


def csr(dense: torch.Tensor) -> Csr:
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    return Csr(indptr, torch.nonzero(dense)[:, 1].int())


@pytest.mark.parametrize("sorting_cost", [0.0, 1e9], ids=["sorted", "transposed"])
@given(rows=st.integers(1, 6), columns=st.integers(1, 5), seed=st.integers(0, 1000), data=st.data())
def test_bag_sum_is_the_product_with_the_dense_rows(
    sorting_cost: float, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    """Value and gradient in float64, for both forms of the backward pass, with empty rows and columns and no rows at all."""
    generator = torch.Generator().manual_seed(seed)
    dense = (torch.rand(rows, columns, generator=generator) < 0.4).double()
    entities = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows - 1)))), dtype=torch.int64)
    weight = torch.randn(columns, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(len(entities), 3, dtype=torch.float64, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "SORTING_COST", sorting_cost)
        sums = BagSum.apply(weight, entities, csr(dense), csr(dense.T))
        sums.backward(upstream)
    torch.testing.assert_close(sums, dense[entities] @ weight)
    torch.testing.assert_close(weight.grad, dense[entities].T @ upstream)


def test_interactions_encoder_is_a_linear_layer_and_relu() -> None:
    dense = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    split = torch.zeros(3, dtype=torch.int8)
    users = Entities(3, split, csr(dense), {})
    items = Entities(4, torch.zeros(4, dtype=torch.int8), csr(dense.T), {})
    encoder = InteractionsEncoder(users, items, 5)
    assert set(encoder.state_dict()) == {"weight", "bias"}
    expected = torch.relu(torch.nn.functional.linear(dense[[2, 0]], encoder.weight.T, encoder.bias))
    torch.testing.assert_close(encoder(torch.tensor([2, 0])), expected)


def test_an_excluded_entry_is_as_if_it_had_never_been() -> None:
    dense = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    users = Entities(3, torch.zeros(3, dtype=torch.int8), csr(dense), {})
    items = Entities(4, torch.zeros(4, dtype=torch.int8), csr(dense.T), {})
    encoder = InteractionsEncoder(users, items, 5)
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    expected = torch.relu(torch.nn.functional.linear(rows, encoder.weight.T, encoder.bias))
    upstream = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected_gradient = torch.autograd.grad(expected, encoder.weight, upstream)[0]
    found = encoder(torch.tensor([0, 1, 2, 2]), torch.tensor([2, 3, -1, 0]))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, encoder.weight, upstream)[0], expected_gradient)
