"""Losses of whole users against one pool of items."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sibra_dist.losses import POOL_LOSSES

logits = st.floats(-8, 8, width=32)
roles = st.sampled_from(["target", "negative", "neither"])


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def textbook_pool_softmax(scores: list[float], targets: list[bool], negatives: list[bool], count: float) -> float:
    others = sum(count * math.exp(score) for score, negative in zip(scores, negatives, strict=True) if negative)
    own = [score for score, target in zip(scores, targets, strict=True) if target]
    return sum(-math.log(math.exp(score) / (math.exp(score) + others)) for score in own) / max(len(own), 1)


def textbook_pool_bce(scores: list[float], targets: list[bool], negatives: list[bool], count: float) -> float:
    terms = [-math.log(sigmoid(score)) for score, target in zip(scores, targets, strict=True) if target]
    terms += [-math.log(1 - sigmoid(score)) for score, negative in zip(scores, negatives, strict=True) if negative]
    return sum(terms) / max(len(terms), 1)


POOL_TEXTBOOK = {"sampled_softmax": textbook_pool_softmax, "bce": textbook_pool_bce}
candidates = st.lists(st.tuples(logits, roles), min_size=1, max_size=6)


def test_every_pool_loss_has_its_textbook_formula_here() -> None:
    assert POOL_LOSSES.keys() == POOL_TEXTBOOK.keys()


@pytest.mark.parametrize("name", POOL_LOSSES)
@given(row=candidates, count=st.sampled_from([1.0, 7.5]))
def test_pool_loss_is_its_textbook_formula(name: str, row: list[tuple[float, str]], count: float) -> None:
    scores = [score for score, _ in row]
    targets, negatives = ([role == wanted for _, role in row] for wanted in ("target", "negative"))
    found = POOL_LOSSES[name](torch.tensor([scores]), torch.tensor([targets]), torch.tensor([negatives]), math.log(count))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([POOL_TEXTBOOK[name](scores, targets, negatives, count)], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", POOL_LOSSES)
@given(row=st.lists(st.tuples(st.sampled_from([-1e4, 0.0, 1e4]), roles), min_size=1))
def test_pool_loss_and_gradient_are_finite_at_extreme_logits(name: str, row: list[tuple[float, str]]) -> None:
    """Also where there are no targets, or no negatives."""
    scores = torch.tensor([[score for score, _ in row]], requires_grad=True)
    targets, negatives = (torch.tensor([[role == wanted for _, role in row]]) for wanted in ("target", "negative"))
    loss = POOL_LOSSES[name](scores, targets, negatives, 0.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not scores.grad[~(targets | negatives)].any()
