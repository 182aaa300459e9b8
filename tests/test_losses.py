"""One contract for all losses: the textbook's formula, finite gradients, and padding that counts for nothing."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sibra_dist.losses import LOSSES, batch_info_nce, symmetric_info_nce

Row = list[Any]
"""What one example is made of, as plain numbers."""


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def textbook_bpr(scores: list[float], label: float, log_counts: list[float]) -> float:
    return sum(-math.log(sigmoid(scores[0] - negative)) for negative in scores[1:]) / len(log_counts)


def textbook_bce(scores: list[float], label: float, log_counts: list[float]) -> float:
    own = -label * math.log(sigmoid(scores[0])) - (1 - label) * math.log(1 - sigmoid(scores[0]))
    return (own + sum(-math.log(1 - sigmoid(negative)) for negative in scores[1:])) / len(scores)


def textbook_sampled_softmax(scores: list[float], label: float, log_counts: list[float]) -> float:
    others = sum(math.exp(score) * math.exp(count) for score, count in zip(scores[1:], log_counts, strict=True))
    return -math.log(math.exp(scores[0]) / (math.exp(scores[0]) + others))


TEXTBOOK = {"bpr": textbook_bpr, "bce": textbook_bce, "sampled_softmax": textbook_sampled_softmax}


def textbook_info_nce(a: list[list[float]], b: list[list[float]], temperature: float) -> list[float]:
    """Of each row of a and b, what it costs to find the other in both directions."""
    size = range(len(a))
    similar = [[math.exp(sum(x * y for x, y in zip(p, q, strict=True)) / temperature) for q in b] for p in a]
    rows = [-math.log(similar[i][i] / sum(similar[i])) for i in size]
    columns = [-math.log(similar[i][i] / sum(row[i] for row in similar)) for i in size]
    return [row + column for row, column in zip(rows, columns, strict=True)]


@dataclass(frozen=True)
class Contract:
    """A loss, as all are tested."""

    loss: Callable[..., Tensor]
    """(weights [B], one tensor [B, ...] for each part of an example) -> [B]"""
    textbook: Callable[[list[Row]], list[float]]
    """The losses of examples, in float64."""
    example: Callable[[st.SearchStrategy[float]], st.SearchStrategy[Row]]
    """Examples of one shape, given the numbers that they are made of."""
    differentiated: int
    """So many of an example's parts, from the first, have a gradient."""
    numbers: st.SearchStrategy[float]
    extremes: st.SearchStrategy[float]


def scored(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Row]:
    """Scores of a positive and 3 negatives, a label, log counts."""
    logs = st.lists(st.floats(-2, 6, width=32), min_size=3, max_size=3)
    return st.tuples(st.lists(numbers, min_size=4, max_size=4), st.floats(0, 1, width=32), logs).map(list)


def viewed(*shape: int) -> Callable[[st.SearchStrategy[float]], st.SearchStrategy[Row]]:
    """Two views of that shape."""

    def example(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Row]:
        view: st.SearchStrategy[Any] = numbers
        for size in reversed(shape):
            view = st.lists(view, min_size=size, max_size=size)
        return st.tuples(view, view).map(list)

    return example


def of_scores(name: str) -> Contract:
    return Contract(
        lambda weights, *parts: LOSSES[name](*parts),
        lambda rows: [TEXTBOOK[name](*row) for row in rows],
        scored,
        1,
        st.floats(-8, 8, width=32),
        st.sampled_from([-1e4, 0.0, 1e4]),
    )


COORDINATES, LONG = st.floats(-2, 2, width=32), st.sampled_from([-100.0, 0.0, 100.0])
CONTRACTS = {
    **{name: of_scores(name) for name in LOSSES},
    "symmetric_info_nce": Contract(
        lambda weights, a, b: symmetric_info_nce(a, b, 0.5),
        lambda rows: [sum(textbook_info_nce(a, b, 0.5)) / len(a) for a, b in rows],
        viewed(3, 2),
        2,
        COORDINATES,
        LONG,
    ),
    "batch_info_nce": Contract(
        lambda weights, a, b: batch_info_nce(a, b, weights, 0.5),
        lambda rows: textbook_info_nce([a for a, _ in rows], [b for _, b in rows], 0.5),
        viewed(3),
        2,
        COORDINATES,
        LONG,
    ),
}
every_loss = pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)


def parts_of(rows: list[Row], contract: Contract) -> list[Tensor]:
    parts = [torch.tensor(part) for part in zip(*rows, strict=True)]
    return [part.requires_grad_(number < contract.differentiated) for number, part in enumerate(parts)]


def gradients(parts: list[Tensor], contract: Contract) -> list[Tensor]:
    found = [part.grad for part in parts[: contract.differentiated]]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def test_every_loss_of_scores_has_its_textbook_formula_here() -> None:
    assert LOSSES.keys() == TEXTBOOK.keys()


@every_loss
@given(data=st.data())
def test_loss_is_its_textbook_formula(contract: Contract, data: st.DataObject) -> None:
    rows = data.draw(st.lists(contract.example(contract.numbers), min_size=1, max_size=4))
    found = contract.loss(torch.ones(len(rows)), *parts_of(rows, contract))
    assert found.dtype == torch.float32
    assert found.shape == (len(rows),)
    assert found.tolist() == pytest.approx(contract.textbook(rows), rel=1e-4, abs=1e-5)


@every_loss
@given(data=st.data())
def test_loss_and_gradient_are_finite_at_extreme_logits(contract: Contract, data: st.DataObject) -> None:
    rows = data.draw(st.lists(contract.example(contract.extremes), min_size=1, max_size=4))
    parts = parts_of(rows, contract)
    loss = contract.loss(torch.ones(len(rows)), *parts)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(parts, contract))


@every_loss
@given(data=st.data())
def test_padding_of_weight_0_has_no_effect(contract: Contract, data: st.DataObject) -> None:
    """Wherever it stands and whatever is in it."""
    rows = data.draw(st.lists(contract.example(contract.numbers), min_size=1, max_size=3))
    padding = data.draw(st.lists(contract.example(contract.extremes), min_size=1, max_size=2))
    order = data.draw(st.permutations(range(len(rows) + len(padding))))
    alone, padded = parts_of(rows, contract), parts_of([[*rows, *padding][number] for number in order], contract)
    real = torch.tensor(order) < len(rows)
    places = torch.tensor(order)[real]

    expected = contract.loss(torch.ones(len(rows)), *alone)
    expected.sum().backward()
    found = contract.loss(real.float(), *padded) * real
    found.sum().backward()
    torch.testing.assert_close(found[real], expected[places])
    assert found[~real].eq(0).all()
    for gradient, wanted in zip(gradients(padded, contract), gradients(alone, contract), strict=True):
        torch.testing.assert_close(gradient[real], wanted[places])
        assert gradient[~real].eq(0).all()


@every_loss
@given(data=st.data())
def test_loss_of_half_precision_is_computed_in_float32(contract: Contract, data: st.DataObject) -> None:
    rows = data.draw(st.lists(contract.example(contract.numbers), min_size=1, max_size=3))
    halved = [part.bfloat16() if part.requires_grad else part for part in parts_of(rows, contract)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contract.loss(torch.ones(len(rows)), *halved)
    assert found.dtype == torch.float32
    assert found.tolist() == contract.loss(torch.ones(len(rows)), *(part.float() for part in halved)).tolist()


@pytest.mark.parametrize("name", LOSSES)
def test_a_badly_ranked_positive_still_pulls_at_extreme_logits(name: str) -> None:
    scores = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    LOSSES[name](scores, torch.ones(1), torch.zeros(1, 1)).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, 0] < -0.4
    assert scores.grad[0, 1] > 0.4


def test_sampled_softmax_over_all_other_items_is_the_full_softmax() -> None:
    scores = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    # Each negative stands for itself alone: no correction is left.
    expected = -scores.log_softmax(dim=1)[:, 0]
    torch.testing.assert_close(LOSSES["sampled_softmax"](scores, torch.ones(1), torch.zeros(1, 3)), expected)


def test_a_soft_label_is_the_probability_that_bce_asks_of_the_positive() -> None:
    scores = torch.tensor([[0.0, -30.0]], requires_grad=True)
    for label in (0.25, 1.0):
        optimum = torch.tensor([[math.log(label / (1 - label)) if label < 1 else 40.0, -30.0]], requires_grad=True)
        LOSSES["bce"](optimum, torch.tensor([label]), torch.zeros(1, 1)).sum().backward()
        assert optimum.grad is not None
        assert optimum.grad[0, 0] == pytest.approx(0, abs=1e-6)
    LOSSES["bce"](scores, torch.tensor([0.25]), torch.zeros(1, 1)).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, 0] == pytest.approx((0.5 - 0.25) / 2)


def test_symmetric_info_nce_does_not_mix_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 5, generator=generator).unbind()
    changed = a.clone()
    changed[1] += 1
    before, after = symmetric_info_nce(a, b, 0.1), symmetric_info_nce(changed, b, 0.1)
    assert (before == after).tolist() == [True, False, True]


def test_symmetric_info_nce_of_unlike_views_is_finite_and_pulls_them_together() -> None:
    a = torch.tensor([[[100.0, 0.0], [0.0, 100.0]]], requires_grad=True)
    b = a.detach().flip(1)  # every entity looks like the other one: logits of 1e4 off the diagonal, 0 on it
    loss = symmetric_info_nce(a, b, temperature=1.0)
    loss.sum().backward()
    assert loss.tolist() == [2e4]
    assert a.grad is not None
    assert a.grad[0, 0].tolist() == [100.0, -100.0]


def test_a_batch_of_nothing_but_padding_has_neither_loss_nor_gradient() -> None:
    a = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # nor on the way, where what is not a number might be dropped again
        loss = batch_info_nce(a, a.detach().flip(0), torch.zeros(3), 0.1)
        loss.sum().backward()
    assert loss.tolist() == [0.0] * 3
    assert a.grad is not None
    assert a.grad.eq(0).all()
