"""Gradients that are summed a stretch of rows at a time, and sums that the parts of a step share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sibra_dist.data.dataset import Csr
from sibra_dist.models import bag_sums
from sibra_dist.models.bag_sums import PendingGradient, Whole, bag_sum, plan_gradient
from sibra_dist.models.histories import Entries, Histories
from sibra_dist.models.sharing import reading_together, summed_together, taken, wanted

WIDTH = 3


def sparse_matrix(rows: int, columns: int, seed: int) -> Histories:
    dense = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4

    def csr(matrix: Tensor) -> Csr:
        return Csr(torch.cat([torch.zeros(1, dtype=torch.int64), matrix.sum(1).cumsum(0)]), matrix.nonzero()[:, 1].int())

    return Histories(csr(dense), csr(dense.T))


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
    stretch=st.integers(1, 50),
    form=st.sampled_from(["transposed", "sorted", "distinct"]),
    cached=st.booleans(),
)
def test_stretches_are_the_gradient_bit_for_bit(
    rows: int, columns: int, seed: int, stretch: int, form: str, cached: bool
) -> None:
    histories, generator = sparse_matrix(rows, columns, seed), torch.Generator().manual_seed(seed)
    asked = torch.randperm(rows, generator=generator)[: max(rows // 2, 1)]
    upstream = torch.randn(len(asked), WIDTH, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bag_sums, "STRETCH", stretch)
        patch.setattr(bag_sums, "SORTING_COST", 1e9 if form == "transposed" else 0.0)
        if cached:  # some columns at a time
            patch.setattr(bag_sums, "UNCACHED_BYTES", 0)
            patch.setattr(bag_sums, "READ_AGAIN", 0)
            patch.setattr(bag_sums, "CACHED_WIDTH", 2)
        entries = histories.whole(asked)
        whole = Whole(asked, histories) if form == "transposed" else None
        plan = plan_gradient(entries, whole, columns)
        if form == "distinct" and len(entries.columns) >= columns:  # as if the table were larger
            columns += len(entries.columns)
            plan = plan_gradient(entries, None, columns)
        if len(entries.columns):
            assert (plan.distinct is not None) == (whole is None and len(entries.columns) < columns)
        table = torch.randn(columns, WIDTH, generator=generator).requires_grad_()
        bag_sum(table, entries, plan).backward(upstream)
        pending: list[PendingGradient] = []
        bag_sum(table.detach().requires_grad_(), entries, plan, pending=pending).backward(upstream)
        (gradient,) = pending
        found = list(gradient.stretches(columns))
    assert [len(part) for part in found[:-1]] == [stretch] * (len(found) - 1)
    assert table.grad is not None
    assert torch.equal(torch.cat(found), table.grad)


def test_one_gradient_waits_and_others_are_summed_in_the_backward_pass() -> None:
    table, pending = torch.randn(5, WIDTH).requires_grad_(), []  # type: ignore[var-annotated]
    entries = Entries(torch.tensor([0, 3, 3], dtype=torch.int32), torch.tensor([0, 2]))
    for _ in range(2):
        bag_sum(table, entries, pending=pending).sum().backward()
        assert len(pending) == 1
    # The second found the list taken.
    assert table.grad is not None
    assert torch.equal(table.grad, torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0])[:, None].expand(-1, WIDTH))
    assert torch.equal(next(pending[0].stretches(5)), table.grad)


class Summer(torch.nn.Module):
    """Shares the sums of a table's rows, one a row."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.sums = 0

    def read_together(self, rows: Tensor) -> bag_sums.Bags:
        return bag_sums.Bags(Entries(rows.int(), torch.arange(len(rows))))

    def sum_together(self, bags: bag_sums.Bags) -> Tensor:
        self.sums += 1
        return bag_sum(self.table, *bags)


def test_parts_share_sums_and_each_passes_back_its_own() -> None:
    summer = Summer(torch.arange(12.0).view(6, 2))
    parts = [torch.tensor([4, 1]), torch.tensor([1]), torch.tensor([], dtype=torch.int64)]
    assert wanted(summer, parts[0]) is None  # nobody reads together
    with reading_together() as asked:
        reads = [wanted(summer, part) for part in parts]
    together = asked.read()
    assert together[summer].rows.tolist() == [1, 4]
    with summed_together(together):
        assert not together  # so that entries are not kept while parts are computed
        for number, (read, part) in enumerate(zip(reads, parts, strict=True), start=1):
            assert read is not None
            sums = taken(summer, read)
            assert torch.equal(sums, summer.table[part])
            (number * sums).sum().backward()
        assert summer.table.grad is None
    assert wanted(summer, parts[0]) is None
    assert summer.sums == 1
    assert summer.table.grad is not None
    assert summer.table.grad[:, 0].tolist() == [0.0, 3.0, 0.0, 0.0, 1.0, 0.0]


def test_what_fails_in_a_part_leaves_nothing_held() -> None:
    summer = Summer(torch.ones(2, 2))
    with reading_together() as asked:
        wanted(summer, torch.tensor([0]))
    with pytest.raises(ZeroDivisionError), summed_together(asked.read()):
        raise ZeroDivisionError
    assert wanted(summer, torch.tensor([0])) is None
