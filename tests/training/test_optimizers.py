"""Lazy AdamW against torch's AdamW, and against its own formula, row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sibra_dist.models import bag_sums
from sibra_dist.models.bag_sums import PendingGradient, bag_sum
from sibra_dist.models.histories import Entries
from sibra_dist.training import optimizers
from sibra_dist.training.optimizers import LazyAdamW

ROWS, WIDTH, RATE, DECAY = 6, 4, 0.05, 0.3


def parameter() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


def gradients(steps: int) -> list[Tensor]:
    return list(torch.randn(steps, ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))


def rows_of(gradient: Tensor, rows: list[int]) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([rows], dtype=torch.int64), gradient[rows], gradient.shape, is_coalesced=True, check_invariants=True
    )


def run(optimizer: Any, weight: Tensor, all_gradients: list[Tensor]) -> dict[str, Any]:
    """The optimizer's state after steps with these gradients, at a rate that changes."""
    for number, gradient in enumerate(all_gradients):
        weight.grad = gradient
        if isinstance(optimizer, LazyAdamW):
            optimizer.learning_rate = RATE / (number + 1)
        else:
            optimizer.param_groups[0]["lr"] = RATE / (number + 1)
        optimizer.step()
        assert weight.grad is gradient
    return dict(optimizer.state[weight])


def test_dense_gradients_give_the_bits_of_fused_adamw() -> None:
    ours, theirs = parameter(), parameter()
    found = run(LazyAdamW([ours], RATE, DECAY), ours, gradients(5))
    wanted = run(torch.optim.AdamW([theirs], RATE, weight_decay=DECAY, fused=True), theirs, gradients(5))
    assert torch.equal(ours, theirs)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_lazy_is_adamw_where_every_step_touches_every_row() -> None:
    lazy, dense = parameter(), parameter()
    found = run(LazyAdamW([lazy], RATE, DECAY), lazy, [rows_of(gradient, list(range(ROWS))) for gradient in gradients(20)])
    wanted = run(LazyAdamW([dense], RATE, DECAY), dense, gradients(20))
    torch.testing.assert_close(lazy, dense)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])


def test_rows_that_a_step_does_not_touch_stay_with_their_state() -> None:
    """And those it touches follow the formula, with the number of all steps."""
    touched = [[0, 3], [3], [], [0, 3, 5], [1, 5]]
    weight = parameter()
    optimizer = LazyAdamW([weight], RATE, DECAY)
    expected, first, second = weight.detach().double(), torch.zeros(ROWS, WIDTH).double(), torch.zeros(ROWS, WIDTH).double()
    for step, (rows, gradient) in enumerate(zip(touched, gradients(len(touched)), strict=True), start=1):
        weight.grad = rows_of(gradient, rows)
        before = weight.detach().clone()
        optimizer.step()
        for row in rows:
            g = gradient[row].double()
            first[row] = 0.9 * first[row] + 0.1 * g
            second[row] = 0.999 * second[row] + 0.001 * g**2
            towards = first[row] / (1 - 0.9**step) / ((second[row] / (1 - 0.999**step)) ** 0.5 + 1e-8)
            expected[row] = (1 - RATE * DECAY) * expected[row] - RATE * towards
        others = [row for row in range(ROWS) if row not in rows]
        assert torch.equal(weight[others], before[others])
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
        state = optimizer.state[weight]
        assert float(state["step"]) == step
        torch.testing.assert_close(state["exp_avg"].double(), first, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state["exp_avg_sq"].double(), second, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight[[2, 4]], parameter()[[2, 4]])


def test_a_gradient_may_be_sparse_beside_one_that_is_dense() -> None:
    table, layer, alone = parameter(), parameter(), parameter()
    optimizer = LazyAdamW([table, layer], RATE, DECAY)
    table.grad, layer.grad = rows_of(gradients(1)[0], [2]), gradients(1)[0]
    optimizer.step()
    other = LazyAdamW([alone], RATE, DECAY)
    alone.grad = gradients(1)[0]
    other.step()
    assert torch.equal(layer, alone)
    torch.testing.assert_close(table[2], alone[2])
    assert torch.equal(table[:2], parameter()[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_without_rows_is_updated_without_complaint(dtype: torch.dtype) -> None:
    """What the last of many ranks may hold."""
    weight = torch.empty(0, WIDTH, dtype=dtype).requires_grad_()
    state = run(LazyAdamW([weight], RATE, DECAY), weight, [torch.empty(0, WIDTH, dtype=dtype)])
    assert state["exp_avg"].shape == (0, WIDTH)
    state = run(LazyAdamW([weight], RATE, DECAY), weight, [rows_of(torch.empty(0, WIDTH, dtype=dtype), [])])
    assert float(state["step"]) == 1


@pytest.mark.parametrize("stretch", [1, 4, ROWS, 100])
@pytest.mark.parametrize("own", [False, True], ids=["sums", "and a lookup"])
def test_pending_gradients_update_as_dense_ones_do(stretch: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch of rows at a time: of two sums, one of which waits, and perhaps a lookup."""
    for module in (bag_sums, optimizers):
        monkeypatch.setattr(module, "STRETCH", stretch)
    bags = [
        Entries(torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([0, 1, 3])),  # sorted, of few rows
        Entries(torch.arange(ROWS, dtype=torch.int32).repeat(2), torch.tensor([0, 4, 9])),  # of all
    ]
    ours, theirs = parameter(), parameter()
    pending: list[PendingGradient] = []
    optimizer, reference = LazyAdamW([ours], RATE, DECAY, {ours: pending}), LazyAdamW([theirs], RATE, DECAY)
    for upstream in torch.randn(3, 3, WIDTH, generator=torch.Generator().manual_seed(2)):
        for weight, waiting in ((ours, pending), (theirs, None)):
            weight.grad = None
            if own:
                (weight[3] * 2).sum().backward()
            for entries in bags:
                bag_sum(weight, entries, pending=waiting).backward(upstream)
        assert len(pending) == 1
        assert ours.grad is not None
        assert theirs.grad is not None
        length = theirs.grad.norm()
        optimizer.step()
        reference.step()
        assert not pending
        torch.testing.assert_close(optimizer.lengths[ours], length)
        torch.testing.assert_close(ours, theirs)
        for key, wanted in reference.state[theirs].items():
            torch.testing.assert_close(optimizer.state[ours][key], wanted)
    assert float(optimizer.state[ours]["step"]) == 3


def test_gradients_that_are_forgotten_are_not_followed() -> None:
    weight = parameter()
    pending: list[PendingGradient] = []
    optimizer = LazyAdamW([weight], RATE, DECAY, {weight: pending})
    entries = Entries(torch.tensor([1], dtype=torch.int32), torch.tensor([0]))
    for _ in range(2):
        bag_sum(weight, entries, pending=pending).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(weight, parameter())
    assert not optimizer.state[weight]["step"]
