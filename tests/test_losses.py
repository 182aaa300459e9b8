import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sibra_dist.losses import LOSSES, symmetric_info_nce

NUM_CANDIDATES = 100


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def textbook_bpr(positive: float, negatives: list[float]) -> float:
    return sum(-math.log(sigmoid(positive - negative)) for negative in negatives) / len(negatives)


def textbook_bce(positive: float, negatives: list[float]) -> float:
    terms = [-math.log(sigmoid(positive)), *(-math.log(1 - sigmoid(negative)) for negative in negatives)]
    return sum(terms) / len(terms)


def textbook_sampled_softmax(positive: float, negatives: list[float]) -> float:
    others = sum(math.exp(negative) * NUM_CANDIDATES / len(negatives) for negative in negatives)
    return -math.log(math.exp(positive) / (math.exp(positive) + others))


TEXTBOOK = {"bpr": textbook_bpr, "bce": textbook_bce, "sampled_softmax": textbook_sampled_softmax}
logits = st.floats(-8, 8, width=32)
score_rows = st.integers(2, 6).flatmap(
    lambda width: st.lists(st.lists(logits, min_size=width, max_size=width), min_size=1, max_size=4)
)


def test_every_loss_has_its_textbook_formula_here() -> None:
    assert LOSSES.keys() == TEXTBOOK.keys()


@pytest.mark.parametrize("name", LOSSES)
@given(scores=score_rows)
def test_loss_is_its_textbook_formula(name: str, scores: list[list[float]]) -> None:
    found = LOSSES[name](torch.tensor(scores), NUM_CANDIDATES)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([TEXTBOOK[name](row[0], row[1:]) for row in scores], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@given(st.lists(st.sampled_from([-1e4, 0.0, 1e4]), min_size=2, max_size=5))
def test_loss_and_gradient_are_finite_at_extreme_logits(name: str, row: list[float]) -> None:
    scores = torch.tensor([row], requires_grad=True)
    loss = LOSSES[name](scores, NUM_CANDIDATES)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_badly_ranked_positive_still_pulls_at_extreme_logits(name: str) -> None:
    scores = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    LOSSES[name](scores, NUM_CANDIDATES).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, 0] < -0.4
    assert scores.grad[0, 1] > 0.4


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_half_precision_scores_is_computed_in_float32(name: str) -> None:
    scores = torch.linspace(-3, 3, 12).view(3, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LOSSES[name](scores, NUM_CANDIDATES)
    assert found.tolist() == LOSSES[name](scores.float(), NUM_CANDIDATES).tolist()
    assert found.dtype == torch.float32


def test_sampled_softmax_over_all_other_items_is_the_full_softmax() -> None:
    scores = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    # Three negatives stand for three items each once: no correction is left.
    expected = -scores.log_softmax(dim=1)[:, 0]
    torch.testing.assert_close(LOSSES["sampled_softmax"](scores, 3), expected)


def textbook_info_nce(a: list[list[float]], b: list[list[float]], temperature: float) -> float:
    size = len(a)
    similarity = [[math.exp(sum(x * y for x, y in zip(p, q, strict=True)) / temperature) for q in b] for p in a]
    rows = sum(-math.log(similarity[i][i] / sum(similarity[i])) for i in range(size)) / size
    columns = sum(-math.log(similarity[i][i] / sum(row[i] for row in similarity)) for i in range(size)) / size
    return rows + columns


@given(
    size=st.integers(1, 4),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    data=st.data(),
)
def test_symmetric_info_nce_is_its_textbook_formula(size: int, temperature: float, data: st.DataObject) -> None:
    vector = st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3)
    view = st.lists(st.lists(vector, min_size=size, max_size=size), min_size=2, max_size=2)
    a, b = data.draw(view), data.draw(view)
    found = symmetric_info_nce(torch.tensor(a), torch.tensor(b), temperature)
    expected = [textbook_info_nce(left, right, temperature) for left, right in zip(a, b, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


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


def test_symmetric_info_nce_ignores_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 3, 8, generator=generator).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = symmetric_info_nce(a, b, 0.01)
    assert found.tolist() == symmetric_info_nce(a, b, 0.01).tolist()
